"""From a checkpoint to folders that plain transformers loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_parameters
from .model import Shape
from .tokenizer import build_processor
from .trainee import Trainee

TEXT_HEAD = "text_head"


def export(
    run: str | Path, weights: str | Path, *, shape: Shape | None = None, seed: int = 0
) -> Path:
    """Write the trained model in bfloat16, its processor and its text head.

    Args:
        run: folder of a training run; its joint checkpoint is read.
        weights: folder to write.
        shape: sizes the run was trained with.
        seed: of the run.

    Returns:
        ``weights``.
    """
    processor = build_processor()
    trainee = Trainee(shape or Shape(), processor.tokenizer, seed)
    load_parameters(Path(run) / "joint.safetensors", trainee)
    weights = Path(weights)
    model: Any = copy.deepcopy(trainee.model)
    model.to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    model.generation_config.max_new_tokens = 8
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(weights)
    processor.save_pretrained(weights)
    trainee.text_head.to(torch.bfloat16).save(weights / TEXT_HEAD)
    return weights
