"""Scores against outputs of lmms-eval's functions, and where the definition differs from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval_harness.sweep import metrics
from eval_harness.sweep.metrics import METRICS, chosen, metric_of, said_yes, yes_rates
from eval_harness.sweep.questions import Question
from eval_harness.sweep.vqa_text import normalised
from vlmcompress.core.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parent / "golden_metrics.json").read_text(encoding="utf-8"))


def _asked(*answers, options=(), metric="exact_match"):
    return Question("0", answers=answers, options=tuple(options), metric=metric)


@pytest.mark.parametrize(("text", "expected"), GOLDEN["normalised"])
def test_answers_get_the_spelling_of_the_vqa_evaluation(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(("said", "answers", "expected"), GOLDEN["vqa"])
def test_vqa_soft_accuracy(said, answers, expected):
    assert metrics.vqa(said, _asked(*answers)) == pytest.approx(expected, abs=1e-12)


def test_vqa_with_one_accepted_answer_is_a_comparison():
    """Leaving one of one out would leave nobody to agree with."""
    assert metrics.vqa("The Two dogs.", _asked("2 dogs")) == 1
    assert metrics.vqa("three dogs", _asked("2 dogs")) == 0


@pytest.mark.parametrize(("said", "answers", "expected"), GOLDEN["anls"])
def test_anls(said, answers, expected):
    assert metrics.anls(said, _asked(*answers)) == pytest.approx(expected, abs=1e-12)


def test_anls_does_not_count_space():
    """lmms-eval divides by the length with all spaces and so gives 1 - 2/11 here."""
    assert metrics.anls(" a   b ", _asked("a b")) == 1
    assert metrics.anls("ab", _asked("cb")) == 0.5  # the threshold itself counts
    assert metrics.anls("abc", _asked("xyc")) == 0


@pytest.mark.parametrize(("said", "answer", "expected"), GOLDEN["relaxed_accuracy"])
def test_relaxed_accuracy(said, answer, expected):
    assert metrics.relaxed_accuracy(said, _asked(answer)) == expected


def test_relaxed_accuracy_takes_any_accepted_answer():
    assert metrics.relaxed_accuracy(" 52 ", _asked("ten", "50")) == 1
    assert metrics.relaxed_accuracy("53", _asked("ten", "50")) == 0


@pytest.mark.parametrize(("said", "letter"), GOLDEN["multiple_choice"]["chosen"])
def test_the_chosen_option_is_read(said, letter):
    options = GOLDEN["multiple_choice"]["options"]
    place = chosen(said, options)
    assert place is not None
    assert "ABCD"[place] == letter
    assert metrics.multiple_choice(said, _asked(letter, options=options)) == 1
    assert metrics.multiple_choice(said, _asked(options[place], options=options)) == 1
    other = options[place - 1]
    assert metrics.multiple_choice(said, _asked(other, options=options)) == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("t-shirt", 3),
        ("a T-Shirt.", 3),
        ("the shirt", 1),
        ("long-sleeve shirt", 2),
        ("A dress or a shirt", None),  # two options, and the article is no letter
        ("A dress", 0),
        ("skirt", None),
        ("", None),
        ("b", 1),
        ("E", None),
    ],
)
def test_options_in_words(said, expected):
    assert chosen(said, ["dress", "shirt", "long-sleeve shirt", "t-shirt"]) == expected


@pytest.mark.parametrize("case", GOLDEN["yes_no"], ids=range(len(GOLDEN["yes_no"])))
def test_yes_and_no(case):
    said, right = zip(*case["pairs"], strict=True)
    rates = yes_rates(said, right)
    for name in ("precision", "recall", "f1"):
        assert rates[name] == pytest.approx(case[name], abs=1e-12)
    scores = [metrics.yes_no(one, _asked(other)) for one, other in case["pairs"]]
    assert sum(scores) / len(scores) == pytest.approx(case["accuracy"], abs=1e-12)
    says_yes = [one.strip().lower() == "yes" for one in said]
    assert rates["yes_rate"] == pytest.approx(sum(says_yes) / len(says_yes))


@pytest.mark.parametrize(
    ("said", "expected"),
    [("Yes, there is.", True), ("No.", False), ("There is none, no", False), ("nothing", None)],
)
def test_yes_and_no_in_sentences(said, expected):
    assert said_yes(said) is expected
    assert metrics.yes_no(said, _asked("yes")) == float(expected is True)


def test_answers_that_say_neither_are_told_apart():
    rates = yes_rates(["maybe", "yes", "no", ""], ["yes", "yes", "no", "no"])
    assert rates == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "yes_rate": 0.25,
        "unclear_rate": 0.5,
    }
    assert set(yes_rates([], []).values()) == {0.0}


def test_exact_match_takes_any_accepted_answer():
    assert metrics.exact_match(" Red ", _asked("crimson", "red")) == 1
    assert metrics.exact_match("reddish", _asked("crimson", "red")) == 0


def test_unknown_metrics_are_named_with_near_ones():
    with pytest.raises(ConfigError, match=r"'vga'. Did you mean 'vqa'"):
        metric_of("vga")


@pytest.mark.parametrize("name", METRICS)
def test_scores_are_shares(name):
    options = ["yes", "no"]
    asked = _asked("yes", "no", options=options, metric=name)
    found = {metric_of(name).score(said, asked) for said in ("yes", "no", "perhaps", "", "1")}
    assert found <= {0.0, 0.5, 1.0} or not metric_of(name).binary
    assert all(0 <= score <= 1 for score in found)
    assert len(found) > 1


@pytest.mark.parametrize(
    ("metric", "answer", "options", "why"),
    [
        ("multiple_choice", "C", ["a", "b"], "neither the text nor the letter"),
        ("multiple_choice", "a", [], "neither the text nor the letter"),
        ("yes_no", "perhaps", [], "neither yes nor no"),
    ],
)
def test_questions_that_cannot_be_scored_are_refused(metric, answer, options, why):
    with pytest.raises(ConfigError, match=why):
        metric_of(metric).check(_asked(answer, options=options))
