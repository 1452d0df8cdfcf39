"""Compressors pulled to the rows of the model's own connector: the distance, the loss, refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_train_lora import SMALL
from vlmcompress import patch
from vlmcompress.core.errors import ConfigError
from vlmcompress.live.encoded import Encoded
from vlmcompress.reference import load
from vlmcompress.training.aligning import Aligning, distance, outstanding
from vlmcompress.training.conversations import Collator
from vlmcompress.training.data import Scenes
from vlmcompress.training.keeps import KeepRange
from vlmcompress.training.loop import share_at
from vlmcompress.training.lora import train, with_lora
from vlmcompress.training.plan import LoraPlan
from vlmcompress.training.trainee import Objective, Trainee

# peft asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def encoded(rows: list[torch.Tensor], assigned: list[torch.Tensor | None]) -> Encoded:
    kept = tuple(torch.arange(len(r)) for r in rows)
    features: Any = rows if len({len(r) for r in rows}) > 1 else torch.stack(rows)
    output = type("Output", (), {"pooler_output": features})()
    lengths = tuple(len(r) for r in rows)
    return Encoded(output, lengths, kept, ((),) * len(rows), tuple(assigned), (), 0)


def test_the_distance_written_out() -> None:
    whole = [torch.zeros(6, 2), torch.zeros(6, 2)]
    whole[0][1], whole[0][3], whole[0][4] = torch.tensor([[8.0, 0], [0, 4], [0, 2]])
    whole[1][2], whole[1][4], whole[1][5] = torch.tensor([[90.0, 0], [0, 30], [-60, 0]])
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 2, generator=generator, requires_grad=True) for _ in range(2)]
    # The last row of the first image stands for nothing, one token of the second is gone.
    assigned = [torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([2, 0, -1, 1, 1, 2])]
    wanted = [(0, 0, 1), (0, 1, 3), (1, 0, 1), (1, 1, 4), (1, 2, 5)]
    rows = torch.stack([whole[image][place] for image, _, place in wanted])
    squares = sum(((made[i][row] - whole[i][place]) ** 2).sum() for i, row, place in wanted)
    want = squares / ((rows - rows.mean(0)) ** 2).sum()
    got = distance(encoded(made, assigned), encoded(whole, [None, None]))
    torch.testing.assert_close(got, want)
    got.backward()
    assert made[0].grad is not None
    assert not made[0].grad[2].any()
    assert made[0].grad[:2].abs().sum() > 0


def test_what_stands_out() -> None:
    """Of equal rows the first; of no rows none."""
    whole = torch.tensor([[0.0], [5.0], [5.0], [1.0], [0.0]])
    assert outstanding(whole, torch.tensor([0, 0, 0, 2, -1]), 3).tolist() == [1, 5, 3]


def test_images_that_keep_different_counts() -> None:
    """Their rows lie one behind the other."""
    whole = [torch.randn(4, 3), torch.randn(4, 3)]
    assigned = [torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.int64)]
    places = [outstanding(w, a, k) for w, a, k in zip(whole, assigned, (2, 1), strict=True)]
    made = [w[p] for w, p in zip(whole, places, strict=True)]
    flat = encoded(made, assigned)
    flat.output.pooler_output = torch.cat(made)
    assert distance(flat, encoded(whole, [None, None])) == 0
    assert distance(encoded(made, assigned), encoded(whole, [None, None])) == 0


def test_rows_without_places_stand_for_what_is_next_to_them() -> None:
    whole = torch.randn(2, 6, 3)
    made = encoded([whole[0, [2, 5]], whole[1, [0, 4]]], [torch.zeros(6, dtype=torch.int64)] * 2)
    made = dataclasses.replace(made, kept=(torch.tensor([1, 4]),) * 2, lengths=(6, 6))
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    wanted = [w[outstanding(w, groups, 2)] for w in whole]
    squares = sum(
        ((r - w) ** 2).sum() for r, w in zip(made.output.pooler_output, wanted, strict=True)
    )
    rows = torch.cat(wanted)
    want = squares / ((rows - rows.mean(0)) ** 2).sum()
    whole_encoded = encoded(list(whole), [None, None])
    torch.testing.assert_close(distance(made, whole_encoded, placeless=True), want)
    assert distance(made, whole_encoded) != want


def test_the_first_steps_align() -> None:
    trainee = type("Trainee", (), {"aligning": False})()
    aligning, seen = Aligning(trainee, 2), []
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight])
    for step in range(4):
        state = type("State", (), {"global_step": step})()
        aligning.on_step_begin(None, state, None, optimizer=optimizer)
        seen.append((trainee.aligning, len(optimizer.state)))
        weight.grad = torch.ones(1)
        optimizer.step()
    assert seen == [(True, 0), (True, 1), (False, 0), (False, 1)]


def test_both_parts_rise_and_fall() -> None:
    plan = LoraPlan(
        align=20, align_rate=4e-3, parts_rate=1e-3, steps=60, warmup=4, train_parts=True
    )
    parts = [share_at(plan, "parts", step) for step in range(61)]
    lora = [share_at(plan, "lora", step) for step in range(61)]
    assert parts[0] == lora[20] == 0
    assert parts[4] == max(parts) == 4.0
    assert parts[2] == 2.0
    assert parts[12] == pytest.approx(2.0)
    assert parts[19] < 0.1
    assert lora[:20] == [0.0] * 20
    assert parts[20:] == lora[20:]
    assert lora[24] == max(lora) == 1.0
    assert lora[42] == pytest.approx(0.5)
    assert lora[60] == pytest.approx(0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tokenpacker", "quecc"])
def test_the_loss_is_the_distance(method: str) -> None:
    """Also for methods that read the question, whose rows are those of one question."""
    model, processor = load()
    stream = Scenes().stream(1, 6, 0)
    batch = Collator(processor)([stream[i] for i in range(6)])
    tuned = with_lora(model, LoraPlan(rank=2))
    handle = patch(tuned, method, keep=4, processor=processor)
    trainee = Trainee(tuned, handle, Objective(), train_parts=True)
    trainee.aligning = True
    loss = trainee(**batch)["loss"]
    call = {k: v for k, v in batch.items() if k not in ("labels", "shown")}
    made = handle.encode(**call).encoded
    with handle.disabled():
        whole = handle.encode(**call).encoded
    torch.testing.assert_close(loss, distance(made, whole), rtol=1e-3, atol=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainee.parts.parameters())
    lora = [p for name, p in trainee.learning().items() if not name.startswith("parts.")]
    assert lora
    assert all(p.grad is None for p in lora)
    assert not trainee.drain().any()


def test_a_batch_without_images_aligns_nothing() -> None:
    model, processor = load()
    tuned = with_lora(model, LoraPlan(rank=2))
    handle = patch(tuned, "mqt(max_tokens=4)", keep=4, processor=processor)
    trainee = Trainee(tuned, handle, Objective(), train_parts=True)
    trainee.aligning = True
    ids = torch.tensor([[5, 6, 7]])
    loss = trainee(input_ids=ids, labels=torch.tensor([[-100, 6, 7]]))["loss"]
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in trainee.parts.parameters())


@pytest.mark.slow
def test_rows_come_closer(tmp_path: Path) -> None:
    model, processor = load()
    options: dict[str, Any] = {"keep": 4, "processor": processor, "seed": SMALL.seed}
    stream = Scenes().stream(1, 8, 9)
    pixels = Collator(processor)([stream[i] for i in range(8)])["pixel_values"]

    def apart() -> float:
        with torch.no_grad():
            made = handle.encode(pixel_values=pixels).encoded
            with handle.disabled():
                whole = handle.encode(pixel_values=pixels).encoded
            return float(distance(made, whole))

    with patch(model, "tokenpacker", **options) as handle:
        before = apart()
    plan = dataclasses.replace(
        SMALL, method="tokenpacker", keep=KeepRange(4, 4), train_parts=True, align=30, steps=40
    )
    plan = dataclasses.replace(plan, batch=8, accumulate=1, parts_rate=1e-4, distil=0.0)
    trained = train(model, processor, tmp_path, plan, Scenes(one_each=True))
    rates = {row["step"]: row["learning_rate"] for row in trained.curve}
    assert rates[20] == 0
    assert rates[35] > 0
    assert ["right" in row for row in trained.curve] == [row["step"] > 30 for row in trained.curve]
    with patch(trained.model, "tokenpacker", **options) as handle:
        [parts] = trained.parts.values()
        handle.parts.load_state_dict(parts.state_dict())
        after = apart()
    assert math.isfinite(after)
    assert after < 0.7 * before


def test_align_where_nothing_could_be_aligned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_parts"):
        LoraPlan(align=5)
    with pytest.raises(ConfigError, match="5 of 5 steps"):
        LoraPlan(align=5, steps=5, train_parts=True)
    plan = dataclasses.replace(SMALL, method="llava_mini", keep=KeepRange(4, 4))
    plan = dataclasses.replace(plan, train_parts=True, align=2)
    with pytest.raises(ConfigError, match="llava_mini"):
        train(*load(), tmp_path, plan, Scenes())
