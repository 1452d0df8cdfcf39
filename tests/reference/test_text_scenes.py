"""The text-heavy world: repeatable, legible, unguessable, and true to what is painted."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from tests.reference.blind import at_chance, halves
from vlmcompress.core.errors import ConfigError
from vlmcompress.reference import TEXT_KINDS, samples
from vlmcompress.reference.batches import Encoder, make_batch
from vlmcompress.reference.grounds import landscape
from vlmcompress.reference.labels import CHARACTER_NAMES, patch_labels
from vlmcompress.reference.scenes import OBJECT_SHARE, Split, scene
from vlmcompress.reference.sprites import COLOURS, letter
from vlmcompress.reference.text_questions import ask_text
from vlmcompress.reference.text_scenes import LETTERS, ROWS, text_scene
from vlmcompress.reference.tokenizer import build_tokenizer
from vlmcompress.reference.worlds import ALL_KINDS, MOST_ITEMS, TEXTS, chance

EVEN = np.ones(len(ALL_KINDS))


@pytest.fixture(scope="module")
def drawn():
    return [text_scene("train", i) for i in range(300)]


def test_scene_is_a_function_of_split_and_index():
    one, two = text_scene("test", 17), text_scene("test", 17)
    assert one.pixels.tobytes() == two.pixels.tobytes()
    assert one.pixels.tobytes() != text_scene("validation", 17).pixels.tobytes()
    assert one.scene_id != scene("test", 17).scene_id


def test_strips_are_as_promised(drawn):
    for one in drawn:
        assert 1 <= len(one.signs) + bool(one.rows) <= 2
        assert len(one.items) <= MOST_ITEMS
        strips = (*one.signs, *one.rows)
        assert len({strip.colour for strip in strips}) == len(strips)
        assert all(LETTERS[0] <= len(sign.text) <= LETTERS[1] for sign in one.signs)
        assert not one.rows or ROWS[0] <= len(one.rows) <= ROWS[1]
        for column in zip(*(row.text for row in one.rows), strict=True):
            assert len(set(column)) == len(column)
        for strip in strips:
            assert strip.text == "".join(one.items[i].glyph for i in strip.members)
            assert 0 <= strip.left <= 224 - strip.width
        assert 0.05 <= (one.coverage >= OBJECT_SHARE).mean() <= 0.32
        assert one.coverage.max() <= 1 + 1e-6  # nothing overlaps


def test_characters_are_painted_where_their_items_are(drawn):
    for one in drawn[:40]:
        for item in one.items:
            if item.glyph is None:
                continue
            mask = letter(item.glyph)
            top = round(item.y - mask.shape[0] / 2)
            left = int(item.x - mask.shape[1] / 2)
            cut = one.pixels[top : top + mask.shape[0], left : left + mask.shape[1]].astype(float)
            ink, plate = cut[mask].mean(0), cut[~mask].mean(0)
            assert np.abs(ink - ink.mean()).max() < 6  # grey
            assert np.abs(ink - plate).max() > 90  # legible
            assert np.abs(plate - COLOURS[item.colour]).max() < 60


def test_landscapes_are_muted_and_rough():
    """Less saturated than any object colour, with more power in low frequencies than in high."""
    grounds = [landscape(np.random.default_rng(i)).astype(float) for i in range(30)]
    saturation = [(g.max(-1) - g.min(-1)).mean() for g in grounds]
    assert max(saturation) < min(max(c) - min(c) for c in COLOURS.values())
    spectra = np.mean([np.abs(np.fft.rfft2(g.mean(-1))) ** 2 for g in grounds], axis=0)
    assert spectra[1:5, 1:5].mean() > 20 * spectra[20:28, 20:28].mean()


def test_questions_are_answered_by_the_picture(drawn):
    rng = np.random.default_rng(0)
    asked = Counter()
    for one in drawn:
        for kind in TEXT_KINDS:
            question = ask_text(one, kind, rng)
            if question is None:
                assert not (one.signs if kind == "sign" else one.rows)
                continue
            asked[kind] += 1
            pointed = ["".join(one.items[i].glyph for i in place) for place in question.points]
            if kind == "largest":
                numbers = [int(row.text[1]) for row in one.rows]
                wanted = (max if "largest" in question.text else min)(numbers)
                assert pointed == [f"{question.answer}{wanted}"]
                assert {r.text for r in one.rows} >= set(pointed)
            else:
                assert "".join(pointed) == question.answer
            assert set(question.about) >= {i for place in question.points for i in place}
    assert min(asked.values()) > 100


def test_samples_come_in_equal_numbers():
    stream = list(samples("test", 301, world="text"))
    assert Counter(s.kind for s in stream) == {"sign": 101, "cell": 100, "largest": 100}
    assert all((s.asked_coverage <= s.object_coverage + 1e-6).all() for s in stream)
    assert {s.scene_id for s in stream}.isdisjoint(s.scene_id for s in samples("test", 64))
    with pytest.raises(ConfigError, match="allowed are objects, text"):
        next(samples("test", 8, world="words"))


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_blind_answerer_is_at_chance(kind):
    """Majority by question text, learnt on one half, is at chance on the other half."""
    learnt, asked = halves(text_scene, ask_text, kind, 4000)
    seen: dict[str, Counter] = defaultdict(Counter)
    for text, answer in learnt:
        seen[text][answer] += 1
    right = np.mean([seen[text].most_common(1)[0][0] == answer for text, answer in asked])
    assert at_chance(right, chance(kind), len(asked))


def test_labels_name_the_character_under_each_patch(drawn):
    for one in drawn[:20]:
        labels = patch_labels(one)
        for i, item in enumerate(one.items):
            mine = labels.item == i
            names = {CHARACTER_NAMES[g] for g in labels.glyph[mine] if g < len(CHARACTER_NAMES)}
            assert names == ({item.glyph} if item.glyph and mine.any() else set())
            if item.shape in ("sign", "row"):
                assert (labels.shape[mine] == -1).all()


def test_each_letter_of_an_answer_points_at_its_own_patches():
    encode = Encoder(build_tokenizer())
    batch = make_batch(Split.TRAIN, range(12), 3, EVEN, encode, text_share=1.0)
    packed = batch.packed
    for row, (one, questions) in enumerate(zip(batch.scenes, batch.questions, strict=True)):
        for block, question in enumerate(questions):
            here = packed.answer[row] & (packed.block[row] == block)
            tokens = encode(f" {question.answer}")
            assert packed.target[row][here].tolist() == tokens
            places = packed.asked[row, packed.slot[row][here]]
            assert places.sum(1).tolist() == pytest.approx([1.0] * len(tokens), abs=1e-5)
            items = question.points[-1]
            shares = np.sum([one.items[i].coverage for i in items], axis=0)
            assert (places[-1].numpy() > 0).tolist() == (shares >= OBJECT_SHARE).tolist()


def test_batches_hold_the_wanted_share_of_texts():
    encode = Encoder(build_tokenizer())
    batch = make_batch(Split.TRAIN, range(50), 1, EVEN, encode, text_share=0.3)
    texts = sum(q[0].kind in TEXTS.kinds for q in batch.questions)
    assert texts == pytest.approx(15, abs=1)
