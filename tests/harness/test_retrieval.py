"""Attribute retrieval: what counts as found, what chance is, and what a run gives."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from eval_harness import retrieval
from vlmcompress import ConfigError

KINDS = retrieval.attributes()


def scene(*pairs: tuple[str, str]) -> SimpleNamespace:
    """A scene of objects without a picture."""
    return SimpleNamespace(items=[SimpleNamespace(colour=c, shape=s) for c, s in pairs])


def test_texts_name_everything_that_is_drawn():
    colours, shapes, pairs = KINDS
    assert len(pairs.texts) == len(colours.texts) * len(shapes.texts) == 48
    shown = scene(("orange", "star"), ("orange", "circle"), ("red", "sign"))
    assert [colours.texts[i] for i in colours.present(shown)] == ["the orange object"]
    assert {pairs.texts[i] for i in pairs.present(shown)} == {"an orange star", "an orange circle"}


def test_an_attribute_is_found_when_it_beats_all_that_are_absent():
    shown = [[kind.present(scene(("red", "circle"), ("blue", "square"))) for kind in KINDS]]
    asked = retrieval._Asked.of(shown, KINDS)
    scores = [np.zeros((1, len(kind.texts))) for kind in KINDS]
    present = sorted(shown[0][0])
    scores[0][0, present] = 2.0, 0.5
    scores[0][0, next(i for i in range(8) if i not in present)] = 1.0
    assert asked.kinds.tolist() == ["colour"] * 2 + ["shape"] * 2 + ["pair"] * 2
    # The second colour loses to one that is absent; a tie is not found.
    assert asked.answers(scores).tolist() == [1, 0, 0, 0, 0, 0]
    assert asked.chance() == pytest.approx((1 / 7 + 1 / 5 + 1 / 47) / 3)


def test_scenes_without_objects_are_refused():
    with pytest.raises(ConfigError, match="scenes with objects"):
        retrieval.retrieve(None, None, None, [scene()])


def test_a_run_tells_accuracy_and_cost():
    from vlmcompress.reference import load, load_text_head
    from vlmcompress.reference.scenes import Split
    from vlmcompress.reference.scenes import scene as draw

    model, processor = load()
    scenes = [draw(Split.TEST, index) for index in range(4)]
    results = retrieval.retrieve(
        *(model, processor, load_text_head(), scenes),
        methods=["tome", "evit"],
        keeps=[1.0, 0.25],
        batch_size=3,
    )
    full, rows = results["full"], results["rows"]
    assert full["accuracy"]["mean"] > 2 * results["chance"]
    assert [(row["method"], row["keep"]) for row in rows] == [
        *(("tome", 1.0), ("tome", 0.25), ("evit", 1.0), ("evit", 0.25))
    ]
    for row in rows:
        whole = row["keep"] == 1.0
        assert (row["flops_ratio"] == 1) == whole
        assert row["patches"] == [] if whole else row["patches"][-1] == 49
        assert row["difference"] == {"mean": 0, "low": 0, "high": 0} or not whole
    header, lines = retrieval.rows(results)
    assert len(lines) == 1 + len(rows)
    assert {len(line) for line in lines} == {len(header)}
