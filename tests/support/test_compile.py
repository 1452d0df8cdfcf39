"""`torch.compile`. Traced and run by the compiler's own interpreter: what the compiler might get
wrong about hooks is in the tracing, and nothing has to be built."""

from __future__ import annotations

import pytest
import torch

from tests.support import same
from vlmcompress import patch

BACKEND = "eager"

pytestmark = [pytest.mark.slow]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def shallow(family):
    """Few layers: tracing takes time by the layer."""
    return same.sized(family, {"depth": 4, "num_hidden_layers": 4}, {"num_hidden_layers": 1})


@torch.no_grad()
def logits(model, call):
    return model(**call).logits


@pytest.mark.support("torch.compile of the vision tower")
@same.families("llava", "qwen2_vl")
def test_tower(family):
    """Compiled before patching: kept tokens and logits as without; keep all = unpatched."""
    model = shallow(family)
    call = same.mixed(model)
    full = logits(model, call)
    with patch(model, keep=same.KEEP) as handle:
        want, kept = logits(model, call), handle.kept
    name, tower = same.tower(model)
    setattr(model.model, name, torch.compile(tower, backend=BACKEND))
    assert (logits(model, call) - full).abs().max() < 1e-5
    with patch(model, keep=same.KEEP) as handle:
        assert (logits(model, call) - want).abs().max() < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(handle.kept, kept, strict=True))
        handle.set(keep=1.0)
        assert (logits(model, call) - full).abs().max() < 1e-5


@pytest.mark.support("torch.compile of the whole model")
@same.families("llava")
def test_whole_model(family):
    """Logits as without, patched through the compiled model; keep all = unpatched."""
    model = shallow(family)
    call = same.one(model)
    full = logits(model, call)
    compiled = torch.compile(model, backend=BACKEND)
    with patch(compiled, keep=same.KEEP) as handle:
        assert handle.model is model
        want = logits(model, call)
        assert (logits(compiled, call) - want).abs().max() < 1e-5
        assert handle.last.tokens_after < handle.last.tokens_before
        handle.set(keep=1.0)
        assert (logits(compiled, call) - full).abs().max() < 1e-5
