"""Outliers of live models are those of the states that their own tower hands to the connector."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.seam.test_anyres import packed_rows
from tests.tiny import Prompt
from vlmcompress import ConfigError, EvidenceError, patch
from vlmcompress.families import family_of
from vlmcompress.live.encode import encoder_arguments
from vlmcompress.methods.outliers import far_above

#: Random states have no outliers; at this threshold about a third of them are some.
LOW = 0.5


def one_image(family: str) -> tuple:
    model = tiny.build(family)
    return model, tiny.inputs(model, (Prompt(1, 6),))


@torch.no_grad()
def states(model, call) -> Tensor:
    """What the last block that the connector reads puts out, in an unpatched call."""
    base, family = model.base_model, family_of(model)
    layers = family.tower(base).layers(family.tower_module(base))
    arguments = encoder_arguments(base, call)
    seen = []
    read = layers[family.last_read_layer(base, arguments, len(layers))]
    hook = read.register_forward_hook(
        lambda module, args, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    try:
        base.get_image_features(**arguments, return_dict=True)
    finally:
        hook.remove()
    (found,) = seen
    return found


def lengths_by_token(family: str, model, call) -> Tensor:
    """[n] length of the state of each token of the only image; NaN for newlines."""
    norms = states(model, call).float().norm(dim=-1)
    if family in ("llava", "vipllava"):
        return norms[0, 1:]
    if family == "llava_next":
        (rows,) = packed_rows(model, call)
        flat = norms[:, 1:].flatten()
        return torch.where(rows.isnan(), torch.nan, flat[rows.nan_to_num(0).long()])
    if family in ("qwen2_vl", "qwen2_5_vl", "glm4v"):  # the patches of a token follow each other
        by_token = norms.view(-1, 4).mean(1)
        if family == "qwen2_5_vl":  # and lie in windows of 2 x 2 tokens
            _, h, w = (call["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
            return by_token.view(h // 2, w // 2, 2, 2).transpose(1, 2).flatten()
        return by_token
    return norms[0]


FAMILIES = {
    "llava": "fastervlm",
    "vipllava": "vtc_cls",
    "llava_next": "fastervlm",
    "paligemma": "received_attention",
    "qwen2_vl": "received_attention",
    "qwen2_5_vl": "received_attention",
    "glm4v": "received_attention",
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_long_states_are_left_out(family: str):
    model, call = one_image(family)
    norms = lengths_by_token(family, model, call)
    outliers = far_above(norms[None], LOW)[0]
    others = (~outliers & ~norms.isnan()).nonzero()[:, 0]
    assert 0 < len(others) < int((~norms.isnan()).sum())
    options = f"exclude_outliers='norm', outlier_threshold={LOW}, scope='image'"
    with patch(model, f"{FAMILIES[family]}({options})", keep=len(others)) as handle:
        model(**call)
        assert torch.equal(handle.kept[0], others)


@torch.no_grad()
def test_a_padded_batch_leaves_out_those_of_each_image():
    model = tiny.build("qwen2_vl")
    sizes = [(4, 8), (8, 8), (8, 4)]
    call = tiny.inputs(model, (Prompt(1, 6), Prompt(2, 9)), image_sizes=sizes)
    spec = f"received_attention(exclude_outliers='norm', outlier_threshold={LOW})"
    with patch(model, spec, keep=0.5) as handle:
        model(**call)
        together = handle.kept
    norms = states(model, call).float().norm(dim=-1).view(-1, 4).mean(1)
    for kept, part in zip(together, norms.split([8, 16, 8]), strict=True):
        inside = ~far_above(part[None], LOW)[0]
        assert len(kept) == len(part) // 2
        assert int(inside[kept].sum()) == min(len(kept), int(inside.sum()))


@torch.no_grad()
def test_cls_attention_that_is_far_above_is_left_out():
    model, call = one_image("llava")
    with patch(model, "fastervlm", keep=5) as handle:
        model(**call)
        best = handle.kept[0]
        options = "exclude_outliers='cls', outlier_threshold=0.0"  # all above the median
        handle.set(method=f"fastervlm({options})", keep=5)
        model(**call)
        assert not set(handle.kept[0].tolist()) & set(best.tolist())


@torch.no_grad()
def test_after_a_method_inside_the_tower():
    model, call = one_image("llava")
    seen = []
    with patch(model, "tome_tower:0.5") as handle:
        hook = model.base_model.multi_modal_projector.register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        model(**call)
        hook.remove()
        left = handle.kept[0]
        others = ~far_above(seen[0].float().norm(dim=-1), LOW)[0]
        assert 0 < int(others.sum()) < len(left)
        options = f"exclude_outliers='norm', outlier_threshold={LOW}"
        second = f"fastervlm({options}):{int(others.sum())}"
        handle.set(method=f"tome_tower:0.5 | {second}")
        model(**call)
        assert torch.equal(handle.kept[0], left[others])


def test_towers_that_cannot_tell_them():
    siglip = tiny.build("paligemma")
    with pytest.raises(EvidenceError, match="no \\[CLS\\] token; use exclude_outliers='norm'"):
        patch(siglip, "received_attention(exclude_outliers='cls')", keep=0.5)
    assert "generate" not in siglip.__dict__
    with pytest.raises(ConfigError, match="'divprune' ranks none"):
        patch(siglip, "divprune(exclude_outliers='norm')", keep=0.5)
    with patch(siglip, "received_attention", keep=0.5) as handle:
        before = handle.config
        with pytest.raises(EvidenceError):
            handle.set(method="received_attention(exclude_outliers='cls')")
        assert handle.config == before
