"""VoCo-LLaMA end to end: two passes equal one long one under the mask, and cost less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.seam import oracle
from tests.seam.equalities import cache_size, traces
from tests.seam.singles import check_logits
from tests.seam.talk import Talk
from tests.seam.use_equalities import checkpoint
from tests.tiny import Prompt
from vlmcompress import ConfigError, UnsupportedInputError, handle_of, patch
from vlmcompress.families import family_of
from vlmcompress.live import positions
from vlmcompress.methods.prompt.voco_llama import Blocks, VoCoLLaMA

FAMILIES = ("llava", "llava_siglip", "qwen2_vl", "llava_next", "paligemma")
K, NEW = 3, 4


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def shaken(handle: Any) -> Any:
    """Embeddings as large as the model's rows, so that a mistake shows."""
    with torch.no_grad():
        handle.parts.embed_tokens.weight.mul_(50)
    return handle


def patched(model: Any, keep: int = K, **more: Any) -> Any:
    return shaken(patch(model, "voco_llama", keep=keep, **more))


# --- one long pass -------------------------------------------------------------------------------


class Long:
    """A prompt of one row at full length: every image whole, its compression tokens behind it.

    Attributes:
        rows: [1, L, d].
        image: [1, L] which image a row shows or compresses, 0 for text.
        voco: [1, L] bool.
        short: [L] column of the short prompt of each row, -1 for rows of images.
    """

    def __init__(self, model: Any, call: dict[str, Tensor], embeddings: Tensor) -> None:
        features = iter(oracle.features(model, call))
        embedded = model.get_input_embeddings()(call["input_ids"])[0]
        visual = (call["input_ids"][0] == model.config.image_token_id).tolist()
        rows, image, voco, short = [], [], [], []
        number, column, i = 0, 0, 0
        while i < len(visual):
            if not visual[i]:
                rows.append(embedded[i : i + 1])
                image, voco, short = [*image, 0], [*voco, False], [*short, column]
                column, i = column + 1, i + 1
                continue
            own = next(features)
            number += 1
            rows += [own.flatten(0, -2), embeddings]
            image += [number] * (len(rows[-2]) + len(embeddings))
            voco += [False] * len(rows[-2]) + [True] * len(embeddings)
            short += [-1] * len(rows[-2]) + list(range(column, column + len(embeddings)))
            column, i = column + len(embeddings), i + len(rows[-2])
        self.rows = torch.cat(rows)[None]
        self.image, self.voco = torch.tensor([image]), torch.tensor([voco])
        self.short = torch.tensor(short)

    def where(self, grid: Tensor, short: Tensor, follows: Tensor) -> Tensor:
        """[3 or 1, 1, L] positions: an image's rows lie before its own tokens as when it was read.

        Args:
            grid: [3 or 1, n] of an image's rows when it was read.
            short: [3 or 1, 1, L'] of the short prompt.
            follows: [3 or 1] of the first compression token when the image was read.
        """
        full = short[..., self.short.clamp(min=0)]
        for number in range(1, int(self.image.max()) + 1):
            own = (self.image == number) & ~self.voco
            first = int(((self.image == number) & self.voco)[0].nonzero()[0])
            full[:, own] = grid + (full[:, 0, first] - follows)[:, None]
        return full - full.min()  # a constant moves nothing

    def logits(self, model: Any, where: Tensor, masked: bool = True) -> Tensor:
        """[1, L', V] in the order of the short prompt."""
        blocks = Blocks.of(self.image, self.voco)
        allowed = blocks.visible() if family_of(model).sees_ahead else blocks.allowed()
        if not masked:
            allowed = allowed.new_ones(allowed.shape).tril()
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        out = model.model.language_model(
            inputs_embeds=self.rows,
            attention_mask=bias,
            position_ids=where if len(where) == 3 else where[0],
            use_cache=False,
        )
        logits = model.lm_head(out.last_hidden_state)
        return logits[:, self.short >= 0]


def when_read(model: Any, call: dict[str, Tensor], mode: str) -> tuple[Tensor, Tensor]:
    """Positions of an image's rows as it is read, and of the first token behind them."""
    n = int((call["input_ids"] == model.config.image_token_id).sum()) // len(
        oracle.features(model, call)
    )
    if family_of(model).rope == "1d":
        return torch.arange(n)[None], torch.tensor([n])
    at = (call["input_ids"][0] == model.config.image_token_id).nonzero()[:n, 0]
    grid = positions.rotary(model, call)[:, 0, at]
    grid = grid - grid.min()
    return grid, grid[:, -K] if mode == "original" else (grid.max() + 1).expand(3)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [oracle.ONE, (Prompt(images=2, text=7),)])
@pytest.mark.parametrize("mode", ["contiguous", "original"])
def test_two_passes_are_the_long_one_under_the_mask(family, prompt, mode):
    model = tiny.build(family)
    call = tiny.inputs(model, prompt)
    with patched(model, positions=mode, restore_length=False) as handle:
        got = model(**call).logits
        index = handle.last.token_index
        embeddings = handle.parts.embed_tokens.weight.clone()
        assert handle.last.tokens_after == (K,) * prompt[0].images
    axes = 3 if family_of(model).rope == "mrope" else 1
    short = torch.arange(index.shape[1]).expand(axes, 1, -1)
    if mode == "original":
        short = index[None] if axes == 1 else positions.rotary(model, call)[..., index[0]]
    long = Long(model, call, embeddings)
    grid, follows = when_read(model, call, mode)
    want = long.logits(model, long.where(grid, short, follows))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    seeing = long.logits(model, long.where(grid, short, follows), masked=False)
    assert (seeing - want).abs().max() > 1e-2  # the comparison has power


@torch.no_grad()
def test_the_image_alone_decides_what_is_read_of_it(family):
    """One image, three prompts and places: its tokens are the same in every layer."""
    model = tiny.build(family)
    heard = []
    for prompts in (oracle.ONE, (Prompt(1, 13),), (Prompt(0, 5), Prompt(1, 4))):
        call = tiny.inputs(model, prompts, seed=1)
        alone = tiny.inputs(model, oracle.ONE, seed=0)
        call |= {k: v for k, v in alone.items() if k.startswith(("pixel", "image"))}
        with patched(model) as handle:
            heard.append(handle.encode(**call).encoded.heard[0])
    depth = model.config.get_text_config().num_hidden_layers
    assert heard[0].shape[:2] == (depth + 1, K)
    assert all(torch.equal(one, heard[0]) for one in heard[1:])


# --- what users do -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_is_singles(family, side):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED, padding=side)
    with patched(model):
        check_logits(model, call)


@torch.no_grad()
def test_generation(family):
    """Cached, uncached, from an encoding, with beams and samples; and nothing stays behind."""
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED)
    before, greedy = model(**call).logits, oracle.greedy(model, NEW)
    with patched(model) as handle:
        cached = model.generate(**call, **greedy)
        assert torch.equal(model.generate(**call, **greedy, use_cache=False), cached)
        encoded = handle.encode(**call)
        text = {k: v for k, v in call.items() if not k.startswith("pixel")}
        assert torch.equal(model.generate(**text, **greedy, mm_encoder_outputs=encoded), cached)
        assert torch.equal(model(**text, mm_encoder_outputs=encoded).logits, model(**call).logits)
        assert torch.equal(copy.deepcopy(model).generate(**call, **greedy), cached)
        assert handle_of(copy.deepcopy(model)).parts is not handle.parts
        one = {k: v for k, v in greedy.items() if k != "max_new_tokens"} | {"max_new_tokens": 1}
        wide = model.generate(**call, **{**one, "num_beams": 3}, num_return_sequences=3)
        assert torch.equal(wide[::3, -1], cached[:, call["input_ids"].shape[1]])
    assert traces(model) == []
    assert torch.equal(model(**call).logits, before)


@torch.no_grad()
def test_the_cache_holds_compression_tokens_and_text(family):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.ONE)
    full = model(**call, use_cache=True).past_key_values
    with patched(model) as handle:
        cache = model(**call, use_cache=True).past_key_values
        assert handle.last.kv_bytes == cache_size(cache)
    text = int((call["input_ids"] != model.config.image_token_id).sum())
    assert [layer.get_seq_length() for layer in cache.layers] == [text + K] * len(cache.layers)
    assert cache_size(cache) * full.get_seq_length() == cache_size(full) * (text + K)


@torch.no_grad()
def test_turns_with_images_of_their_own(family):
    if family == "paligemma":
        pytest.skip("its prefix attends both ways, so a longer prefix changes earlier states")
    model = tiny.build(family)
    with patched(model):
        talk = Talk(model, rows=2)
        for seed, images in enumerate((1, 0, 1)):
            talk.say(images, 6, seed=seed)
            whole = talk.answer_uncached()
            assert torch.equal(talk.answer(), whole)


def test_training(family):
    """The loss is that of logits restored; gradients reach embeddings, connector and LLM."""
    model = tiny.build(family).train()
    call = tiny.inputs(model, oracle.MIXED)
    call["labels"] = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    losses, grads = [], []
    with patched(model) as handle:
        for checkpointed in (False, True):
            if checkpointed:
                checkpoint(model)
            model.zero_grad()
            handle.parts.zero_grad()
            loss = model(**call).loss
            loss.backward()
            losses.append(loss.detach())
            grads.append(handle.parts.embed_tokens.weight.grad.clone())
        touched = [n for n, p in model.named_parameters() if p.grad is not None]
        assert any("layers.0.self_attn.k_proj" in n and "language" in n for n in touched)
        tower = [p.grad for p in family_of(model).tower_module(model.base_model).parameters()]
        assert any(g is not None and bool(g.abs().sum() > 0) for g in tower)
    assert bool((grads[0].abs().sum(1) > 0).all())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1])


# --- budgets, parts, refusals --------------------------------------------------------------------


@torch.no_grad()
def test_work_falls_and_is_told(family):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.ONE)
    text = {k: v for k, v in call.items() if not k.startswith("pixel")}
    with patched(model) as handle:
        model(**call)
        reading, report = handle.last.prefill_flops, handle.last
        model(**text, mm_encoder_outputs=handle.encode(**call))
        again = handle.last.prefill_flops
        assert again < reading
        assert again < report.prefill_flops_before / 2
        visual = (report.segments[0][-1].slice.stop - torch.arange(K).flip(0)) - 1
        assert family == "llava_next" or torch.equal(handle.kept[0], visual)


def test_embeddings_are_saved(family, tmp_path):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.ONE)
    path = str(tmp_path / "voco.safetensors")
    with torch.no_grad(), patched(model) as handle:
        handle.parts.save(path)
        want = model(**call).logits
        handle.set(positions="auto")
        assert torch.equal(model(**call).logits, want)
    with torch.no_grad(), patch(model, VoCoLLaMA(tokens=K, weights=path)):
        assert torch.equal(model(**call).logits, want)
    with pytest.raises(ConfigError, match="made for"):
        patch(model, VoCoLLaMA(tokens=K + 1, weights=path))


@torch.no_grad()
def test_an_earlier_method_thins_out_what_is_read():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.MIXED)
    with shaken(patch(model, ["divprune:6", VoCoLLaMA(tokens=2)])) as handle:
        thin = model(**call).logits
        assert handle.last.tokens_after == (2, 2, 2)
        handle.set(method=["divprune:25", VoCoLLaMA(tokens=2)])
        assert not torch.equal(model(**call).logits, thin)


def test_what_cannot_be():
    model = tiny.build("llava")
    with pytest.raises(ConfigError, match="stands behind it"):
        patch(model, [VoCoLLaMA(tokens=3), "uniform:2"])
    with pytest.raises(ConfigError, match="cannot act there"):
        patch(model, [VoCoLLaMA(tokens=3), "fastv@1:0.5"])
    with pytest.raises(ConfigError, match="as a count"):
        patch(tiny.build("qwen2_vl"), "voco_llama", keep=0.5)
    call = tiny.inputs(model, oracle.ONE)
    with patched(model) as handle, torch.no_grad():
        encoded = handle.encode(**call)
        with pytest.raises(UnsupportedInputError, match="one piece"):
            model.generate(**call, **oracle.greedy(model, 2), prefill_chunk_size=5)
        model(**call)  # and what was left behind does no harm
    text = {k: v for k, v in call.items() if not k.startswith("pixel")}
    with patch(model, "uniform", keep=3), pytest.raises(UnsupportedInputError, match="patch it"):
        model(**text, mm_encoder_outputs=encoded)
