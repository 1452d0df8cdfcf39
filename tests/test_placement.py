"""Placement against a slow oracle: which columns stay, in what order, padded where."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcompress.core.errors import PlaceholderMismatchError, VLMCompressError
from vlmcompress.core.placement import edge_padding, place

IMAGE = 9


@st.composite
def batches(draw):
    """Rows of text (1..5) and runs of placeholders, padded with 0 on one side, and kept rows."""
    side = draw(st.sampled_from(["left", "right"]))
    rows, lengths, kept = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        row = [draw(st.integers(1, 5))]
        for _ in range(draw(st.integers(0, 3))):
            n = draw(st.integers(1, 5))
            k = draw(st.integers(1, n))
            kept.append(sorted(draw(st.permutations(range(n)))[:k]))
            lengths.append(n)
            row += [IMAGE] * n + draw(st.lists(st.integers(1, 5), max_size=3))
        rows.append(row)
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [p + r if side == "left" else r + p for p, r in zip(pads, rows, strict=True)]
    return torch.tensor(ids), lengths, kept, side


def by_hand(ids, lengths, kept):
    """Per row the columns that stay, with a counter per image."""
    rows, unit, position = [], 0, 0
    for row in ids.tolist():
        stay = []
        for column, token in enumerate(row):
            if token == 0:
                continue
            if token == IMAGE:
                if position in kept[unit]:
                    stay.append(column)
                position += 1
                if position == lengths[unit]:
                    unit, position = unit + 1, 0
            else:
                stay.append(column)
        rows.append(stay)
    return rows


@settings(max_examples=200, deadline=None)
@given(batches(), st.sampled_from(["left", "right"]))
def test_columns_match_a_slow_oracle(batch, side):
    ids, lengths, kept, _ = batch
    placement = place(
        ids == IMAGE, lengths, [torch.tensor(k) for k in kept], padding=ids == 0, side=side
    )
    rows = by_hand(ids, lengths, kept)
    assert placement.short_length == max(map(len, rows))
    for b, stay in enumerate(rows):
        pad = [0] * (placement.short_length - len(stay))
        values = [int(ids[b, c]) for c in stay]
        assert placement.take(ids, 0)[b].tolist() == (
            pad + values if side == "left" else values + pad
        )
        assert placement.valid[b].sum() == len(stay)
        short = placement.short_column()[b]
        assert (short >= 0).nonzero()[:, 0].tolist() == stay
        assert placement.take(ids, -7)[b, short[stay]].tolist() == values
        dropped = [
            sum(ids[b, :c].eq(IMAGE).tolist()) - sum(ids[b, s] == IMAGE for s in stay if s < c)
            for c in stay
        ]
        assert placement.dropped_before()[b][placement.valid[b]].tolist() == dropped
    assert placement.dropped.sum() == sum(lengths) - sum(map(len, kept))


@settings(max_examples=50, deadline=None)
@given(batches())
def test_every_shape_of_aligned_tensor_is_cut_alike(batch):
    ids, lengths, kept, _ = batch
    placement = place(ids == IMAGE, lengths, [torch.tensor(k) for k in kept], padding=ids == 0)
    flat = placement.take(ids, 0)
    assert torch.equal(placement.take(ids.expand(3, *ids.shape), 0), flat.expand(3, *flat.shape))
    later = torch.full((ids.shape[0], 2), 4)
    assert torch.equal(placement.extend(torch.cat([ids, later], 1), 0), torch.cat([flat, later], 1))
    square = ids[:, None, :, None] * 10 + ids[:, None, None, :]
    cut = placement.take_square(square, -1)
    want = flat[:, None, :, None] * 10 + flat[:, None, None, :]
    valid = placement.valid[:, None, :, None] & placement.valid[:, None, None, :]
    assert torch.equal(cut[valid], want[valid])
    assert (cut.masked_select(~placement.valid[:, None, None, :].expand_as(cut)) == -1).all()


def test_one_row_of_positions_serves_the_batch():
    ids = torch.tensor([[1, IMAGE, IMAGE, 2], [1, IMAGE, IMAGE, 3]])
    placement = place(ids == IMAGE, [2, 2], [torch.tensor([0]), torch.tensor([1])])
    assert placement.take(torch.arange(4)[None], 0).tolist() == [[0, 1, 3], [0, 2, 3]]


@pytest.mark.parametrize("lengths", [[3], [2, 2], []])
def test_counts_that_differ_are_a_typed_error(lengths):
    ids = torch.tensor([[1, IMAGE, IMAGE, 2]])
    with pytest.raises(PlaceholderMismatchError, match="2 image placeholders") as error:
        place(ids == IMAGE, lengths, [torch.arange(n) for n in lengths])
    assert isinstance(error.value, VLMCompressError)
    assert isinstance(error.value, ValueError)


def test_only_padding_at_the_edges_is_trimmed():
    mask = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    assert edge_padding(mask).tolist() == [
        [True, True, False, False, False],
        [False, False, False, True, True],
        [True] * 5,
    ]
