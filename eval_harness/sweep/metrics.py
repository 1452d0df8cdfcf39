"""How an answer is scored, one function per published definition; docs/evaluating.md lists them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eval_harness.asking import is_right
from eval_harness.sweep.naming import unknown
from eval_harness.sweep.questions import Question
from eval_harness.sweep.vqa_text import normalised
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.extras import require

#: Up to this share of the right number counts as right (relaxed accuracy).
_TOLERANCE = 0.05
#: Below this similarity an answer counts nothing (ANLS).
_SIMILAR = 0.5
#: So many annotators must agree for a full score (VQA).
_AGREE = 3

YES, NO = "yes", "no"


def exact_match(prediction: str, question: Question) -> float:
    """1 if the answer equals an accepted one, case and surrounding space aside."""
    return float(any(is_right(prediction, answer) for answer in question.answers))


def vqa(prediction: str, question: Question) -> float:
    """Soft accuracy of the VQA challenge (https://visualqa.org/evaluation.html).

    Over all ways to leave one annotator out, the mean of min(1, annotators of the others who gave
    this answer / 3), with all answers in one spelling (`normalised`). A single accepted answer is
    compared with the prediction: 0 or 1.
    """
    said = normalised(prediction)
    same = [normalised(answer) == said for answer in question.answers]
    if len(same) == 1:
        return float(same[0])
    agreeing = sum(same)
    return sum(min(1.0, (agreeing - mine) / _AGREE) for mine in same) / len(same)


def anls(prediction: str, question: Question) -> float:
    """Average normalised Levenshtein similarity (Biten et al., arXiv:1905.13648, equation 1).

    1 - edits / length of the longer text, for the accepted answer that is nearest; 0 where that is
    below 0.5. Case and the amount of space do not count. At exactly 0.5 the paper gives 0; here,
    as in the challenge's own evaluator, the score stays.
    """
    distance = require("rapidfuzz.distance").Levenshtein.normalized_distance
    said = _spaced(prediction)
    best = 1.0 - min(distance(_spaced(answer), said) for answer in question.answers)
    return best if best >= _SIMILAR else 0.0


def relaxed_accuracy(prediction: str, question: Question) -> float:
    """1 for a number within 5 % of the right one; other answers must be equal.

    (Masry et al., arXiv:2203.10244, section 5.1.) A percent sign divides by 100. To 0 there is no
    relative distance, so that 0 must be given as it is written. Case and surrounding space aside.
    """
    return float(any(_near(prediction, answer) for answer in question.answers))


def multiple_choice(prediction: str, question: Question) -> float:
    """1 if the answer names the right option; `chosen` says how it is read."""
    right = _right_option(question)
    return float(right is not None and chosen(prediction, question.options) == right)


def yes_no(prediction: str, question: Question) -> float:
    """1 if the first `yes` or `no` among the words of the answer is the right one.

    For sets of questions about objects that are there or not (POPE, arXiv:2305.10355); `yes_rates`
    gives what it reports beside accuracy.
    """
    return float(said_yes(prediction) == said_yes(question.answers[0]) is not None)


def chosen(prediction: str, options: Sequence[str]) -> int | None:
    """Which option an answer names, counted from 0; None where it names none, or several.

    In this order: the answer is an option's text; it is a letter, or begins with one that a
    bracket, full stop or colon follows; it says `answer is X` or `answer: X` with a letter; one
    option's text stands in it (one that is part of a longer one that stands there does not count).
    """
    text = prediction.strip()
    plain = _plain(text)
    texts = [_plain(option) for option in options]
    if plain in texts:
        return texts.index(plain)
    letters = "".join(chr(ord("A") + i) for i in range(len(options)))
    for pattern in (
        rf"\(?([{letters}{letters.lower()}])\)?[.:]?",
        rf"\(?([{letters}])[).:].*",
        rf".*\b(?i:answer(?:\s+is)?\s*:?\s*(?:option\s+)?)\(?([{letters}])\b.*",
    ):
        found = re.fullmatch(pattern, text, re.DOTALL)
        if found:
            return letters.index(found[1].upper())
    inside = [i for i, option in enumerate(texts) if option and _stands_in(option, plain)]
    longest = [
        i for i in inside if not any(i != j and _stands_in(texts[i], texts[j]) for j in inside)
    ]
    return longest[0] if len(longest) == 1 else None


def said_yes(answer: str) -> bool | None:
    """Whether the first of the words `yes` and `no` is `yes`; None without either."""
    found = re.search(rf"\b({YES}|{NO})\b", answer.lower())
    return None if found is None else found[1] == YES


def yes_rates(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Precision, recall and F1 of `yes`, and how often it is said (POPE, arXiv:2305.10355).

    Args:
        predictions: what the model said.
        answers: what is right.

    Returns:
        `precision`, `recall` and `f1` (0 where nothing is to be divided by), `yes_rate` (share of
        all answers that say yes) and `unclear_rate` (that say neither).
    """
    said = [said_yes(text) for text in predictions]
    right = [bool(said_yes(text)) for text in answers]
    hits = sum(one is True and is_yes for one, is_yes in zip(said, right, strict=True))
    claimed, there = said.count(True), sum(right)
    precision = hits / claimed if claimed else 0.0
    recall = hits / there if there else 0.0
    both = precision + recall
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / both if both else 0.0,
        "yes_rate": claimed / len(said) if said else 0.0,
        "unclear_rate": said.count(None) / len(said) if said else 0.0,
    }


@dataclass(frozen=True)
class Metric:
    """A way to score answers.

    Attributes:
        name: of it.
        score: of a prediction for a question, in [0, 1].
        binary: whether every score is 0 or 1.
        prompt: what is asked where the task does not say.
        rates: what else is told of all answers together, from predictions and right answers.
    """

    name: str
    score: Callable[[str, Question], float]
    binary: bool = True
    prompt: str = "{question}"
    rates: Callable[[Sequence[str], Sequence[str]], dict[str, float]] | None = None

    def check(self, question: Question) -> None:
        """Refuse a question that this metric cannot score.

        Raises:
            ConfigError: for a choice without options or a right one among them, or an answer that
                is neither yes nor no.
        """
        if self.name == "multiple_choice" and _right_option(question) is None:
            raise ConfigError(
                f"its answer {question.answers[0]!r} is neither the text nor the letter of one of "
                f"its options {list(question.options)}"
            )
        if self.name == "yes_no" and said_yes(question.answers[0]) is None:
            raise ConfigError(f"its answer {question.answers[0]!r} is neither yes nor no")


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", exact_match),
        Metric("vqa", vqa, binary=False),
        Metric("anls", anls, binary=False),
        Metric("relaxed_accuracy", relaxed_accuracy),
        Metric(
            "multiple_choice",
            multiple_choice,
            prompt="{question}\n{options}\nAnswer with the letter of the right option.",
        ),
        Metric("yes_no", yes_no, rates=yes_rates),
    )
}


def metric_of(name: Any) -> Metric:
    """A metric by its name.

    Raises:
        ConfigError: for an unknown one, with near names.
    """
    if name not in METRICS:
        raise ConfigError(unknown("metric", str(name), METRICS))
    return METRICS[name]


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _near(prediction: str, answer: str) -> bool:
    said, right = _number(prediction), _number(answer)
    if said is None or not right:
        return is_right(prediction, answer)
    return abs(said - right) / abs(right) <= _TOLERANCE


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _plain(text: str) -> str:
    return _spaced(text).rstrip(".").rstrip()


def _stands_in(part: str, text: str) -> bool:
    """Whether words stand in a text, hyphens holding words together."""
    return re.search(rf"(?<![\w-]){re.escape(part)}(?![\w-])", text) is not None


def _right_option(question: Question) -> int | None:
    texts = [_plain(option) for option in question.options]
    answer = question.answers[0].strip()
    if _plain(answer) in texts:
        return texts.index(_plain(answer))
    letters = [letter for letter, _ in question.lettered()]
    return letters.index(answer.upper()) if answer.upper() in letters else None
