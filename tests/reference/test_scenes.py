"""The drawn scenes and their questions: disjoint, balanced, repeatable, as dense as promised."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest

from tests.reference.blind import at_chance, halves
from vlmcompress.core.errors import ConfigError
from vlmcompress.reference import KINDS, samples
from vlmcompress.reference.questions import ANSWERS, ask
from vlmcompress.reference.scenes import COVERED, OBJECT_SHARE, Split, scene

SCENES = 300


@pytest.fixture(scope="module")
def drawn():
    return [scene(Split.TRAIN, i) for i in range(SCENES)]


def _facts(sample) -> tuple:
    return sample.scene_id, sample.kind, sample.question, sample.answer


def test_splits_are_disjoint():
    top = 2**40 - 1
    ranges = [(split.seed(0), split.seed(top)) for split in Split]
    for (_, last), (first, _) in itertools.pairwise(ranges):
        assert last < first
    for bad in (-1, top + 1):
        with pytest.raises(ConfigError, match="scene index"):
            Split.TEST.seed(bad)


def test_unknown_split_is_named():
    with pytest.raises(ConfigError, match="allowed are train, validation, test"):
        next(samples("dev", 8))


def test_splits_show_different_scenes():
    ids = {s: {x.scene_id for x in samples(s, 80)} for s in ("train", "validation", "test")}
    assert not ids["train"] & ids["validation"]
    assert not ids["test"] & (ids["train"] | ids["validation"])
    pictures = {scene(split, 3).pixels.tobytes() for split in Split}
    assert len(pictures) == 3


def test_scene_is_a_function_of_split_and_index():
    one, two = scene("test", 17), scene("test", 17)
    assert one.pixels.tobytes() == two.pixels.tobytes()
    assert [i.pair for i in one.items] == [i.pair for i in two.items]
    np.testing.assert_array_equal(one.coverage, two.coverage)


def test_drawing_leaves_numpys_global_state_alone():
    before = np.random.get_state()[1].copy()
    list(samples("test", 16))
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_samples_repeat_and_offset():
    first = [_facts(s) for s in samples("test", 64)]
    assert first == [_facts(s) for s in samples("test", 64)]
    later = {s.scene_id for s in samples("test", 64, seed_offset=1000)}
    assert not later & {facts[0] for facts in first}


def test_objects_cover_a_tenth_to_a_quarter_of_the_patches(drawn):
    for one in drawn:
        share = (one.coverage >= OBJECT_SHARE).mean()
        assert COVERED[0] <= share <= COVERED[1]
        assert 2 <= len(one.items) <= 7
        assert one.pixels.shape == (224, 224, 3)


def test_coverage_matches_the_picture():
    one = scene("test", 5)
    painted = sum((stamp.alpha > 0).sum() for stamp in one.stamps)
    assert one.coverage.shape == (196,)
    assert one.coverage.sum() * 256 == pytest.approx(painted, rel=0.15)
    assert one.coverage.max() <= 1 + 1e-6


def test_some_objects_are_never_singled_out(drawn):
    rng = np.random.default_rng(0)
    spared = 0
    for one in drawn:
        silent = {i for i, item in enumerate(one.items) if not item.asked}
        spared += len(silent)
        for kind in ("colour", "shape", "relation", "quadrant", "glyph"):
            question = ask(one, kind, rng)
            assert question is None or not silent & set(question.about)
    assert spared > SCENES / 3


def test_kinds_come_in_equal_numbers_and_share_scenes():
    stream = list(samples("test", 800))
    assert Counter(s.kind for s in stream) == dict.fromkeys(KINDS, 100)
    per_scene = len(stream) / len({s.scene_id for s in stream})
    assert 4 <= per_scene <= 8
    assert all(s.answer in ANSWERS[s.kind] for s in stream)
    assert all(len(s.answer.split()) == 1 for s in stream)


def test_asked_coverage_is_part_of_the_objects():
    for s in samples("test", 160):
        assert s.asked_coverage.sum() > 0
        assert (s.asked_coverage <= s.object_coverage + 1e-6).all()
        if s.answer == "no":
            np.testing.assert_allclose(s.asked_coverage, s.object_coverage, atol=1e-6)


def test_absent_asks_for_a_colour_and_a_shape_that_are_both_there():
    rng = np.random.default_rng(1)
    for i in range(150):
        one = scene("train", i)
        question = ask(one, "absent", rng)
        if question is not None and question.answer == "no":
            words = question.text.rstrip("?").split()
            colour, shape = words[-2:]
            assert colour in {item.colour for item in one.items}
            assert shape in {item.shape for item in one.items}
            assert (colour, shape) not in {item.pair for item in one.items}


def test_counts_are_true(drawn):
    rng = np.random.default_rng(2)
    for one in drawn:
        question = ask(one, "count", rng)
        names = ("one", "two", "three", "four")
        assert names.index(question.answer) + 1 == len(question.about)


@pytest.mark.parametrize("kind", KINDS)
def test_blind_answerer_is_at_chance(kind):
    """Majority by question text, learnt on one half, is at chance on the other half."""
    learnt, asked = halves(scene, ask, kind, 3000)
    seen: dict[str, Counter] = defaultdict(Counter)
    overall: Counter = Counter()
    for text, answer in learnt:
        seen[text][answer] += 1
        overall[answer] += 1

    def guess(text: str) -> str:
        words = [w for w in text.replace(".", "?").split("?")[0].split() if w in overall]
        if kind == "relation":
            return max(words, key=overall.__getitem__)
        return (seen[text] or overall).most_common(1)[0][0]

    right = np.mean([guess(text) == answer for text, answer in asked])
    options = 2 if kind == "relation" else len(ANSWERS[kind])
    assert at_chance(right, 1 / options, len(asked))
