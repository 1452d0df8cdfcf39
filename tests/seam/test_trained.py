"""Trained compressors between tower and LLM: what they get, where their rows go, what is learnt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.seam import oracle
from tests.seam.trained_methods import KINDS, Instead, Mixed
from vlmcompress import ConfigError, EvidenceError, patch
from vlmcompress.families import family_of
from vlmcompress.methods import registry

#: Families whose connector can be parted from the tower, and two where it cannot.
FAMILIES = ("llava", "llava_siglip", "paligemma", "ovis2", "qwen2_vl", "llava_next")
TOKENS = 3


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in KINDS.items():
        monkeypatch.setitem(registry.BUILTIN, name, f"{kind.__module__}:{kind.__name__}")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def asked(family: str, prompts: Any = oracle.ONE) -> tuple[Any, dict[str, Tensor]]:
    model = tiny.build(family)
    return model, tiny.inputs(model, prompts)


@pytest.mark.parametrize("kind", [Mixed, Instead])
@torch.no_grad()
def test_rows_reach_the_prompt(family, kind):
    """What the method makes of its rows is what the language model reads, and no more."""
    model, call = asked(family)
    made: list[Tensor] = []

    class Watched(kind):
        def mixed(self, tokens, k):
            made.append(super().mixed(tokens, k))
            return made[-1]

    with patch(model, Watched(tokens=TOKENS)) as handle:
        output = handle.encode(**call).encoded.output
        rows = torch.cat([unit.flatten(0, -2) for unit in output.pooler_output])
        model(**call)
        assert handle.last.tokens_after == (len(rows),)
    del made[len(made) // 2 :]  # those of the second call
    connector = family_of(model).connector(model.base_model)
    given = torch.cat([part[0] for part in made])
    wanted = given if connector is None or kind is Instead else connector(given[None])[0]
    assert len(rows) == TOKENS * len(made)
    # Rows of tiles lie in the order of their places in the whole image.
    order = [x[:, 0].argsort() for x in (rows, wanted)]
    torch.testing.assert_close(rows[order[0]], wanted[order[1]])


@pytest.mark.parametrize("kind", [Mixed, Instead])
def test_parts_learn(family, kind):
    model, call = asked(family)
    call["labels"] = call["input_ids"]
    with patch(model, kind(tokens=TOKENS)) as handle:
        parts = handle.parts
        model(**call).loss.backward()
        grads = [p.grad for p in parts.parameters()]
        assert all(g is not None and bool(g.abs().sum() > 0) for g in grads)
        assert not any(p is q for p in parts.parameters() for q in model.parameters())


@pytest.mark.parametrize("family_of_levels", ["llava", "llava_siglip", "paligemma", "qwen2_vl"])
def test_states_are_those_of_the_tower(family_of_levels):
    """Outputs of layers, as `output_hidden_states` gives them, patch by patch or token by token."""
    model, call = asked(family_of_levels)
    facts = family_of(model)
    tower = facts.tower(model.base_model)
    layers = tower.layers(facts.tower_module(model.base_model))
    outputs: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda m, a, out, i=i: outputs.__setitem__(i, out if torch.is_tensor(out) else out[0])
        )
        for i, layer in enumerate(layers)
    ]
    seen: list[dict[int, Tensor]] = []

    class Watched(Mixed):
        def mixed(self, tokens, k):
            seen.append(dict(tokens.evidence.states))
            return super().mixed(tokens, k)

    with patch(model, Watched(tokens=TOKENS, levels=(0, -2))) as handle:
        if facts.connector(model.base_model) is None:
            with pytest.raises(RuntimeError):
                handle.encode(**call)  # other widths than the language model's
        else:
            handle.encode(**call)
    for hook in hooks:
        hook.remove()
    depth = len(layers)
    assert list(seen[0]) == [0, depth - 2]
    for layer, states in seen[0].items():
        plain = outputs[layer]
        if plain.ndim == 3:
            assert torch.equal(states, plain[:, int(tower.has_cls) :])
        else:
            grouped = plain.unflatten(0, (-1, facts.merge**2)).mean(1)
            assert torch.allclose(states.reshape(grouped.shape), grouped, atol=1e-6)


@pytest.mark.parametrize("name", ["evit", "tome_tower", "mctf"])
def test_states_behind_a_reduced_tower_are_those_of_its_rows(name):
    """What the connector reads is the last of them; earlier ones are joined as their rows are."""
    model, call = asked("llava")
    facts = family_of(model)
    depth = len(facts.tower(model.base_model).layers(facts.tower_module(model.base_model)))
    read = facts.last_read_layer(model.base_model, {}, depth)
    seen: list[Any] = []

    class Watched(Mixed):
        def mixed(self, tokens, k):
            seen.append(tokens)
            return super().mixed(tokens, k)

    with patch(model, [f"{name}:6", Watched(tokens=2, levels=(0, read))]) as handle:
        handle.encode(**call)
    (tokens,) = seen
    assert tokens.features.shape[1] == 6
    assert torch.equal(tokens.features, tokens.evidence.states[read])
    assert tokens.evidence.states[0].shape == tokens.features.shape


@pytest.mark.parametrize("kind", [Mixed, Instead])
def test_generation_and_removal(family, kind):
    model, call = asked(family)
    before = model(**call).logits
    with patch(model, kind(tokens=TOKENS)) as handle:
        out = model.generate(**call, max_new_tokens=3, do_sample=False)
        assert out.shape[1] == call["input_ids"].shape[1] + 3
        alone = copy.deepcopy(model).generate(**call, max_new_tokens=3, do_sample=False)
        assert torch.equal(alone, out)
        assert handle.last.tokens_after[0] < handle.last.tokens_before[0]
    assert torch.equal(model(**call).logits, before)


def test_weights_come_from_a_file(tmp_path):
    model, call = asked("llava")
    path = str(tmp_path / "mixed.safetensors")
    with patch(model, Instead(tokens=TOKENS, seed=7)) as handle:
        handle.parts.save(path)
        wanted = model(**call).logits
    with patch(model, Instead(tokens=TOKENS, weights=path)):
        assert torch.equal(model(**call).logits, wanted)
    with pytest.raises(ConfigError, match="made for"):
        patch(model, Instead(tokens=TOKENS + 1, weights=path))
    with patch(model, Instead(tokens=TOKENS)):
        assert not torch.equal(model(**call).logits, wanted)


def test_parts_stay_when_other_things_are_set():
    model = tiny.build("llava")
    with patch(model, ["uniform:9", Mixed(tokens=TOKENS)]) as handle:
        parts = handle.parts
        handle.set(positions="contiguous")
        assert handle.parts is parts
        assert handle.parts_of("mixed") is parts
        handle.set(method=["uniform:9", Mixed(tokens=2)])
        assert handle.parts is not parts


def test_one_budget_only():
    with pytest.raises(ConfigError, match="says twice"):
        patch(tiny.build("llava"), Mixed(tokens=TOKENS), keep=0.5)
    with pytest.raises(ConfigError, match="has no budget"):
        patch(tiny.build("llava"), Mixed())
    with patch(tiny.build("llava"), Mixed(), keep=2) as handle:
        assert handle.parts.config["tokens"] == 2


def test_layers_that_cannot_be_read():
    model = tiny.build("llava_pixtral")
    family = family_of(model)
    if family.tower(model.base_model) is not None:
        pytest.skip("its layers can be read")
    with pytest.raises(EvidenceError, match="cannot be read"):
        patch(model, Mixed(tokens=TOKENS, levels=(0,)))


def test_what_follows_rows_of_the_language_model_sees_them():
    """A pruner behind one that takes the connector's place works on its rows."""
    model, call = asked("llava")
    with patch(model, [Instead(tokens=4), "divprune:2"]) as handle:
        model(**call)
        assert handle.last.tokens_after == (2,)
    with patch(model, [Instead(tokens=4), Mixed(tokens=2)]) as handle:
        model(**call)
        assert handle.last.tokens_after == (2,)
        width = model.config.get_text_config().hidden_size
        assert handle.parts_of("mixed").config["width"] == width
