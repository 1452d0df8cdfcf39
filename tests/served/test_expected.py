"""What transformers answers, and which other answers rounding explains."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from eval_harness.served import expected
from eval_harness.served.models import qwen2_5_vl
from vlmcompress import patch
from vlmcompress.reference.data import samples


@dataclass(frozen=True)
class Asked:
    question: str
    images: tuple[Image.Image, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return qwen2_5_vl(tmp_path_factory.mktemp("model"))


def _asked(number, size):
    sample = list(samples("test", number + 1))[number]
    return Asked(sample.question, (sample.image.resize(size),))


def test_answers_with_their_margins(folder):
    asked = [_asked(0, (224, 224)), _asked(1, (448, 224))]
    for found in expected.answers(folder, asked, "uniform:0.25", 3):
        assert len(found.tokens) == len(found.margins) == 3
        assert all(gap >= 0 for gap in found.margins)
        assert found.prompt_tokens < found.full_tokens
        smallest = min(range(3), key=found.margins.__getitem__)
        assert found.close_until(found.margins[smallest] + 1e-9) <= smallest
        assert found.close_until(0.0) == 3


def test_rounding_explains_what_hangs_on_it_alone(folder, monkeypatch):
    asked = _asked(1, (112, 112))
    [found] = expected.answers(folder, [asked], "uniform:0.25", 2)
    monkeypatch.setattr(expected, "_DRAWS", 3)
    assert _by_rounding(folder, asked, found.tokens)
    monkeypatch.setattr(expected, "_NOISE", 30.0)
    noise, (model, processor) = torch.Generator().manual_seed(0), expected._loaded(folder)
    with patch(model, "uniform:0.25") as handle:
        drawn = [expected._answer(model, processor, handle, asked, 2, noise) for _ in range(3)]
    other = next(answer.tokens for answer in drawn if answer.tokens != found.tokens)
    assert _by_rounding(folder, asked, other)
    monkeypatch.setattr(expected, "_NOISE", 1e-6)
    assert not _by_rounding(folder, asked, other)


def _by_rounding(folder, asked, tokens):
    return expected.by_rounding(folder, asked, "uniform:0.25", len(tokens), tokens)
