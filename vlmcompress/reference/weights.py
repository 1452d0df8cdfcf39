"""The weights that ship with the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from .exporting import TEXT_HEAD
from .text_head import TextHead

WEIGHTS_DIR = Path(__file__).parent / "weights"


def load(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the reference model and its processor from `WEIGHTS_DIR`, in evaluation mode.

    The folder is an ordinary one: ``AutoModelForImageTextToText.from_pretrained(WEIGHTS_DIR)`` and
    ``AutoProcessor.from_pretrained(WEIGHTS_DIR)`` read it as well.

    Args:
        dtype: of the loaded weights; they are stored in bfloat16.
        device: where the model goes.
    """
    model: Any = LlavaForConditionalGeneration.from_pretrained(WEIGHTS_DIR, dtype=dtype)
    return model.to(device).eval(), LlavaProcessor.from_pretrained(WEIGHTS_DIR)


def load_text_head() -> TextHead:
    """Load the CLIP text head that was trained beside the tower, float32, in evaluation mode."""
    return TextHead.load(WEIGHTS_DIR / TEXT_HEAD)
