"""The compressors that fit every size and count, in models: rows, training, files, questions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tests import tiny
from tests.seam import oracle
from tests.seam.worlds import RandomSource, asking
from vlmcompress import ConfigError, MissingTextError, patch
from vlmcompress.families import family_of
from vlmcompress.methods.connector.bus import BUS, Summary
from vlmcompress.methods.connector.lookup import Lookup
from vlmcompress.methods.connector.windowed import Windowed
from vlmcompress.methods.trained import LearnedCompressor

METHODS: dict[str, LearnedCompressor] = {
    "lookup": Lookup(depth=2, head_width=4),
    "windowed": Windowed(stages=2, head_width=4),
    "bus": BUS(depth=1, text_width=6, head_width=4),
}
CELLS = ("llava", "paligemma", "qwen2_vl", "llava_next", "ovis2")
PLACES = [(name, family) for name in ("lookup", "windowed") for family in CELLS]
PLACES += [("bus", family) for family in ("llava", "paligemma")]
#: Budgets at which nothing is left out: windows of one token need no weights, nor does attention
#: to one.
KEEPS: dict[str, float | int] = {"lookup": 0.5, "windowed": 1, "bus": 0.5}
every_place = pytest.mark.parametrize(("name", "family"), PLACES)


def ask(family: str, prompts: Any = oracle.MIXED) -> tuple[Any, dict[str, Tensor]]:
    model = tiny.build(family)
    return model, tiny.inputs(model, prompts)


def patched(model: Any, method: LearnedCompressor, keep: Any) -> Any:
    return patch(model, method, keep=keep, **(asking(model) if method.name == "bus" else {}))


def shake(parts: torch.nn.Module) -> None:
    """Other numbers than those that add nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@every_place
def test_the_prompt_is_shorter_and_every_part_learns(name: str, family: str):
    model, call = ask(family)
    call["labels"] = call["input_ids"]
    with patched(model, METHODS[name], KEEPS[name]) as handle:
        shake(handle.parts)
        model(**call).loss.backward()
        before, after = handle.last.tokens_before, handle.last.tokens_after
        assert len(after) == 3
        assert all(0 < a <= b // 2 + 1 for a, b in zip(after, before, strict=True))
        for part, parameter in handle.parts.named_parameters():
            assert parameter.grad is not None, part
            if not part.endswith("in_proj_bias"):  # a third of it cancels in the softmax
                assert bool(parameter.grad.abs().sum() > 0), part


@every_place
def test_answers_are_generated_and_the_model_comes_back(name: str, family: str):
    model, call = ask(family)
    before = model(**call).logits
    with patched(model, METHODS[name], 0.5) as handle:
        out = model.generate(**call, **oracle.greedy(model, 3))
        assert out.shape == (3, call["input_ids"].shape[1] + 3)
        assert sum(handle.last.tokens_after) < sum(handle.last.tokens_before)
    assert torch.equal(model(**call).logits, before)
    assert not any(name in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["lookup", "windowed"])
@pytest.mark.parametrize("family", ["llava", "paligemma"])
@torch.no_grad()
def test_untrained_rows_are_the_connector_of_the_smaller_image(name: str, family: str):
    """Cut by hand: the tower's states shrunk, then the model's own connector."""
    model, call = ask(family, oracle.ONE)
    facts, base = family_of(model), model.base_model
    connector = facts.connector(base)
    read: list[Tensor] = []
    hook = connector.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    oracle.encode(model, call)
    hook.remove()
    states = read[0]
    side, middle = int(states.shape[1] ** 0.5), int(states.shape[1] ** 0.5) // 2
    pixels = states.transpose(1, 2).reshape(1, -1, side, side)
    if name == "windowed":
        halves = (slice(0, middle), slice(middle, side))
        cells = [pixels[:, :, y, x].mean((2, 3)) for y in halves for x in halves]
        small = torch.stack(cells, 1)
    else:
        shrunk = interpolate(pixels, (2, 2), mode="bilinear", antialias=True)
        small = shrunk.flatten(2).transpose(1, 2)
    want = connector(small)
    method = Windowed(stages=1) if name == "windowed" else METHODS[name]
    with patch(model, method, keep=4) as handle:
        got = handle.encode(**call).encoded.output.pooler_output[0]
    torch.testing.assert_close(got.reshape(want.shape), want, atol=1e-5, rtol=1e-4)


@every_place
def test_one_set_of_weights_serves_every_budget(name: str, family: str):
    model, call = ask(family)
    with patched(model, METHODS[name], 0.5) as handle:
        parts, counts = handle.parts, []
        for keep in (1, 0.25, 1.0):
            handle.set(keep=keep)
            assert handle.parts is parts
            model(**call)
            counts.append(handle.last.tokens_after[0])
        assert counts == sorted(set(counts))


@every_place
def test_weights_come_from_a_file(name: str, family: str, tmp_path: Any):
    model, call = ask(family, oracle.ONE)
    path = str(tmp_path / "parts.safetensors")
    with patched(model, METHODS[name], 0.5) as handle:
        untrained = model(**call).logits
        shake(handle.parts)
        trained = model(**call).logits
        handle.parts.save(path)
    assert not torch.equal(untrained, trained)
    options = METHODS[name].options()
    again = type(METHODS[name])(**{**options, "weights": path})
    with patched(model, again, 0.5):
        assert torch.equal(model(**call).logits, trained)


@pytest.mark.parametrize("name", METHODS)
def test_training_lowers_the_loss_of_a_frozen_model(name: str):
    model, call = ask("llava")
    model.requires_grad_(False)
    call["labels"] = call["input_ids"]
    with patched(model, METHODS[name], 2) as handle:
        optimizer, losses = torch.optim.Adam(handle.parts.parameters(), lr=0.02), []
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(**call).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]


class Hearing(RandomSource):
    """Embeds every text by itself."""

    def texts(self, texts: Any) -> list[Tensor]:
        made = [torch.Generator().manual_seed(sum(text.encode())) for text in texts]
        return [torch.randn(1, 6, generator=generator) for generator in made]


@torch.no_grad()
def test_bus_keeps_other_patches_for_another_question():
    model, call = ask("llava", oracle.ONE)
    source = Hearing(model.model.vision_tower.config.hidden_size)
    with patch(model, METHODS["bus"], keep=4, clip=source) as handle:
        shake(handle.parts)
        seen = []
        for question in ("the first", "another", "the first"):
            model(**call, question=question)
            seen.append(handle.kept[0])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_bus_without_a_question_or_of_another_width():
    model, call = ask("llava", oracle.ONE)
    with pytest.raises(MissingTextError, match="clip="):
        patch(model, METHODS["bus"], keep=4)
    with patch(model, BUS(), keep=4, **asking(model)) as handle:
        assert isinstance(handle.parts, Summary)
        with pytest.raises(ConfigError, match=r"bus\(text_width=6\)"):
            model(**call)
