"""bitsandbytes, as far as its CPU backend goes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from tests import tiny
from tests.seam import oracle
from tests.support import same
from vlmcompress import patch

EIGHT = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
#: The 4-bit kernels of the CPU backend take rows of whole blocks of 64 weights only.
BLOCK = 64


def wide(family):
    """A tiny model whose matrices are rows of whole blocks."""
    sizes = {"hidden_size": BLOCK, "embed_dim": BLOCK, "intermediate_size": 2 * BLOCK}
    if family == "paligemma":
        sizes |= {"head_dim": BLOCK, "projection_dim": BLOCK}
    return same.sized(family, sizes, sizes)


def quantised(model, folder, options):
    pytest.importorskip("bitsandbytes")
    model.save_pretrained(folder)
    config = BitsAndBytesConfig(**options)
    auto = AutoModelForImageTextToText
    return auto.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


def hold(model, kind):
    """Keep all = unpatched, and dropped = masked out, with weights of this kind of layer."""
    assert kind in {type(module).__name__ for module in model.modules()}
    call = same.mixed(model)
    full = same.seen(model, call)
    same.assert_same(same.patched(model, call, keep=1.0), full)
    with patch(model, keep=same.KEEP, positions="original") as handle, torch.no_grad():
        got, record = model(**call).logits, handle.last
        assert same.seen(model, call).ids.shape == full.ids.shape
    with torch.no_grad():
        want = oracle.masked_logits(model, call, record.kept, record.tokens_before)
    rows = oracle.drop_mask(model, call, record.kept, record.tokens_before).bool()
    assert (got - want)[rows].abs().max() < 1e-4


@pytest.mark.support("bitsandbytes: 8-bit")
@same.THREE
def test_eight_bits(family, tmp_path):
    """Keep all = unpatched bit for bit; dropped tokens = masked-out tokens to 1e-4.

    With the outlier threshold off: outlier columns are chosen over all rows of a call, so that
    there the rest of the batch changes every row, patched or not.
    """
    hold(quantised(tiny.build(family), tmp_path, EIGHT), "Linear8bitLt")


@pytest.mark.support("bitsandbytes: 4-bit")
@same.THREE
def test_four_bits(family, tmp_path):
    """Keep all = unpatched bit for bit; dropped tokens = masked-out tokens to 1e-4."""
    hold(quantised(wide(family), tmp_path, FOUR), "Linear4bit")
