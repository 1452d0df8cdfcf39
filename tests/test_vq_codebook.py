"""Codebooks that are learned: what they give, how they are trained, and their files."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from torch.nn.functional import normalize

from tests import tiny
from vlmcompress import patch
from vlmcompress.core.errors import ConfigError, EvidenceError, MissingExtraError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.connector.vq_codebook import KINDS, Codebook, Kind, VQCodebook
from vlmcompress.methods.connector.vqtoken import VQToken
from vlmcompress.methods.trained import ConnectorShape

WIDTH = 24
SHAPE = ConnectorShape(WIDTH, WIDTH, 0, (6, 6), 8)
SMALL = {"size": 12, "channels": 6, "levels": 3, "groups": 2}

every_kind = pytest.mark.parametrize("kind", KINDS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(b: int = 2, k: int = 8, seed: int = 0) -> Tensor:
    return 0.9 * normalize(drawn(b, k, WIDTH, seed=seed), dim=-1)


def parts(kind: Kind, **options: Any) -> Codebook:
    return VQCodebook(kind=kind, **{**SMALL, **options}).parts(SHAPE)


def state(module: Codebook) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- what comes out ---------------------------------------------------------------------------


def residual(weights: dict[str, Tensor], prefix: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ([m, width]) and symbols ([m, levels]) of residual codebooks, by their definition."""
    left = x @ weights[f"{prefix}project_in.weight"].T + weights[f"{prefix}project_in.bias"]
    made, symbols = torch.zeros_like(left), []
    for level in range(SMALL["levels"]):
        book = weights[f"{prefix}layers.{level}._codebook.embed"][0]
        nearest = torch.cdist(left, book).argmin(1)
        made, left = made + book[nearest], left - book[nearest]
        symbols.append(nearest)
    rows = made @ weights[f"{prefix}project_out.weight"].T + weights[f"{prefix}project_out.bias"]
    return rows, torch.stack(symbols, 1)


def test_residual_codebooks():
    module, x = parts("residual"), codes()
    rows, symbols = residual(state(module), "quantiser.", x.flatten(0, 1) * WIDTH**0.5)
    found = module(x)
    torch.testing.assert_close(found.rows.flatten(0, 1) * WIDTH**0.5, rows)
    assert torch.equal(found.symbols.flatten(0, 1), symbols)


def test_grouped_codebooks():
    module, x = parts("grouped"), codes()
    found = module(x)
    groups = (x.flatten(0, 1) * WIDTH**0.5).chunk(SMALL["groups"], 1)
    for i, group in enumerate(groups):
        rows, symbols = residual(state(module), f"quantiser.rvqs.{i}.", group)
        got = found.rows.chunk(SMALL["groups"], 2)[i].flatten(0, 1)
        torch.testing.assert_close(got * WIDTH**0.5, rows)
        assert torch.equal(found.symbols[i].flatten(0, 1), symbols)


def test_factorized_codes_have_unit_length_and_are_nearest_by_cosine():
    module, x = parts("factorized"), codes()
    weights = state(module)
    book = weights["quantiser._codebook.embed"][0]
    torch.testing.assert_close(book.norm(dim=1), torch.ones(SMALL["size"]))
    inner = (x * WIDTH**0.5) @ weights["quantiser.project_in.weight"].T
    nearest = ((inner + weights["quantiser.project_in.bias"]) @ book.T).argmax(2)
    found = module(x)
    assert torch.equal(found.symbols, nearest)
    rows = book[nearest] @ weights["quantiser.project_out.weight"].T
    rows = rows + weights["quantiser.project_out.bias"]
    torch.testing.assert_close(found.rows * WIDTH**0.5, rows)


@every_kind
def test_evaluation_changes_nothing(kind: Kind):
    module, before = parts(kind), torch.get_rng_state()
    held = state(module)
    first = module(codes())
    assert not module.training
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(module(codes()).rows, first.rows)
    assert all(torch.equal(value, held[name]) for name, value in state(module).items())
    assert module.take_loss() == 0


@every_kind
def test_parts_of_one_seed_are_equal(kind: Kind):
    before = torch.get_rng_state()
    one, same, other = (state(parts(kind, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# --- training ---------------------------------------------------------------------------------


@every_kind
def test_codes_follow_the_rows(kind: Kind):
    module = parts(kind).train()
    held = state(module)
    module(codes())
    moved = [n for n, v in state(module).items() if not torch.equal(v, held[n])]
    assert any(name.endswith("embed") for name in moved)
    assert not any("project" in name for name in moved)


@every_kind
def test_losses_are_taken_once(kind: Kind):
    module = parts(kind).train()
    x = codes().requires_grad_()
    module(x)
    module(x)
    loss = module.take_loss()
    assert loss.shape == ()
    assert loss > 0
    loss.backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert module.take_loss() == 0


@every_kind
def test_gradients_pass_the_nearest_code(kind: Kind):
    module = parts(kind).train()
    x = codes().requires_grad_()
    (module(x).rows * drawn(2, 8, WIDTH, seed=1)).sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(2) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@every_kind
def test_dead_codes_come_back_to_life(kind: Kind):
    torch.manual_seed(0)
    module = parts(kind, decay=0.5).train()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("embed"):
                value[:, 1:] = value[:, :1]  # the first of equals is taken
    many = codes(4, 64)
    assert len(module.eval()(many).symbols.unique()) == 1
    module.train()
    for _ in range(8):
        module(many)
    assert len(module.eval()(many).symbols.unique()) > SMALL["size"] // 2


@every_kind
def test_it_learns_what_its_rows_are(kind: Kind):
    torch.manual_seed(0)
    module = parts(kind).train()
    x = codes(1, 12).repeat(4, 1, 1)  # as many rows as there are codes
    optimiser = torch.optim.Adam(module.parameters(), 0.01)
    errors = []
    for _ in range(150):
        error = WIDTH * (module(x).rows - x).square().mean()
        loss = error + 0.1 * module.take_loss()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(error.item())
    assert errors[-1] < 0.4 * errors[0]


@every_kind
def test_a_copy_in_the_middle_of_training(kind: Kind):
    module = parts(kind).train()
    module(codes().requires_grad_())
    twin = copy.deepcopy(module)
    assert twin.take_loss() == 0
    assert module.take_loss() > 0


def test_codes_as_wide_as_the_rows_have_no_projection():
    module = parts("residual", channels=WIDTH)
    assert not list(module.parameters())
    assert module.take_loss() == 0
    assert module(codes()).rows.shape == (2, 8, WIDTH)


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    module = parts("residual").train()
    for step in range(3):
        module(codes(seed=10 * step + rank))
    module.save(f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_share_one_codebook(tmp_path: Path):
    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    one, other = (parts("residual", weights=str(tmp_path / f"{i}.safetensors")) for i in (0, 1))
    assert all(torch.equal(a, state(other)[name]) for name, a in state(one).items())
    fresh = state(parts("residual"))
    assert any(not torch.equal(a, fresh[name]) for name, a in state(one).items())


# --- as a method ------------------------------------------------------------------------------


@every_kind
def test_codes_of_clusters_become_those_of_the_codebook(kind: Kind):
    method = VQCodebook(kind=kind, **SMALL)
    module = method.parts(SHAPE)
    tokens = VisualTokens.from_features(5 * drawn(2, 30, WIDTH))
    tokens = dataclasses.replace(tokens, parts=module)
    kept = method.compress(tokens, 4)
    plain = VQToken(rescale=False).compress(tokens, 4)
    length = tokens.features.norm(dim=2).mean(1)[:, None, None]
    torch.testing.assert_close(kept.features, module(plain.features).rows * length)
    assert torch.equal(kept.index, plain.index)
    assert method.compress(tokens, 30).n == 30


@every_kind
def test_in_a_model(kind: Kind):
    model = tiny.build("llava")
    inputs = tiny.inputs(model, [tiny.Prompt(1, 5), tiny.Prompt(2, 4)])
    with patch(model, VQCodebook(kind=kind, **SMALL), keep=4) as handle:
        wanted = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, wanted)
        handle.parts.train()
        loss = model(**inputs, labels=inputs["input_ids"]).loss + handle.parts.take_loss()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parts.parameters())
        handle.parts.eval()
        assert not torch.equal(model(**inputs).logits, wanted)


# --- files and options ------------------------------------------------------------------------


@every_kind
def test_weights_come_back(kind: Kind, tmp_path: Path):
    module, path = parts(kind).train(), str(tmp_path / "codebook.safetensors")
    module(codes())
    module.save(path)
    back = parts(kind, seed=9, weights=path, decay=0.9)
    assert torch.equal(back(codes()).rows, module.eval()(codes()).rows)
    other = KINDS[(KINDS.index(kind) + 1) % len(KINDS)]
    with pytest.raises(ConfigError, match=f"kind '{kind}' instead of '{other}'"):
        parts(other, weights=path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "flat"}, "allowed are 'residual', 'grouped', 'factorized'"),
        ({"size": 1}, "at least 2"),
        ({"levels": 0}, "at least 1"),
        ({"decay": 1.5}, r"lie in \[0, 1\]"),
        ({"smallest": 9, "largest": 8}, "at least 9"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        VQCodebook(**options)


def test_groups_that_do_not_fit():
    with pytest.raises(ConfigError, match="7 groups do not divide the LLM's width of 24"):
        parts("grouped", groups=7)


def test_without_parts_it_says_so():
    with pytest.raises(EvidenceError, match="Codebook"):
        VQCodebook(**SMALL).compress(VisualTokens.from_features(drawn(1, 30, WIDTH)), 4)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(MissingExtraError, match=r"vlmcompress\[vq\]"):
        parts("residual")
