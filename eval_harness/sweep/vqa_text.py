"""Answers to open questions in one spelling, as VQA evaluation compares them.

The rules are those of the VQA challenge (https://visualqa.org/evaluation.html), in the order in
which its public evaluators apply them: marks, numbers, articles, contractions.
"""

from __future__ import annotations

import re

_TO_TEN = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_TO_TEN.split())} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_->@`<!'
_FULL_STOP = re.compile(r"\.(?!\d)")

_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _with_one_apostrophe_missing(word: str) -> set[str]:
    places = [i for i, letter in enumerate(word) if letter == "'"]
    return {word[:i] + word[i + 1 :] for i in places}


#: {a contraction that lacks one apostrophe: as it is written}
_COMPLETED = {
    wrong: word for word in _CONTRACTIONS.split() for wrong in _with_one_apostrophe_missing(word)
}


def normalised(answer: str) -> str:
    """An answer in the spelling that is compared.

    Lower case; commas and question marks go; a mark is deleted if it stands beside a space anywhere
    in the answer, and otherwise becomes one; full stops go unless a digit follows; number words up
    to ten become digits; articles go; contractions get their apostrophes.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    spaced = {mark for mark in _MARKS if f"{mark} " in text or f" {mark}" in text}
    for mark in _MARKS:
        text = text.replace(mark, "" if mark in spaced else " ")
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).split())
    return " ".join(_COMPLETED.get(word, word) for word in words if word not in _ARTICLES)
