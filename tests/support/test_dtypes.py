"""Half precision."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.seam import oracle
from tests.support import same
from vlmcompress import patch


def hold(model, call, tolerance):
    """Keep all = unpatched bit for bit; dropped = masked out within a few units of rounding."""
    full = same.seen(model, call)
    same.assert_same(same.patched(model, call, keep=1.0), full)
    with torch.no_grad():
        with patch(model, keep=same.KEEP, positions="original") as handle:
            got, record = model(**call).logits, handle.last
        want = oracle.masked_logits(model, call, record.kept, record.tokens_before)
    rows = oracle.drop_mask(model, call, record.kept, record.tokens_before).bool()
    assert got.dtype == full.logits.dtype
    assert (got - want)[rows].abs().max() <= tolerance * want[rows].abs().max()


def in_type(family, dtype):
    model = tiny.build(family, dtype=dtype)
    hold(model, same.mixed(model), tolerance=6 * torch.finfo(dtype).eps)


@pytest.mark.support("types: bfloat16")
@same.THREE
def test_bfloat16(family):
    """Keep all = unpatched bit for bit; dropped = masked-out tokens within rounding."""
    in_type(family, torch.bfloat16)


@pytest.mark.support("types: float16")
@same.THREE
def test_float16(family):
    """Keep all = unpatched bit for bit; dropped = masked-out tokens within rounding."""
    in_type(family, torch.float16)


@pytest.mark.support("types: autocast to bfloat16")
@same.THREE
def test_autocast(family):
    """Keep all = unpatched bit for bit; dropped = masked-out tokens within rounding."""
    model = tiny.build(family)
    with torch.autocast("cpu", torch.bfloat16):
        hold(model, same.mixed(model), tolerance=6 * torch.finfo(torch.bfloat16).eps)
