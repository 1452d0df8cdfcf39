"""What the tests of adapters share: tiny models with LoRA and parts, and what they compute."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests import tiny

#: peft asks transformers by a name that transformers is about to drop.
PEFT_WARNING = "ignore:.*is_gradient_checkpointing:FutureWarning"
ON_LLM = r".*language_model.*\.(q|v)_proj"
ATP = "atp(layers=(1, 2), sample_rates=(0.5,))"
EVALUATIONS = [
    {
        "dataset": {
            "name": "POPE",
            "id": "lmms-lab/POPE",
            "split": "test",
            "task": "default",
        },
        "setting": "keep 0.5 + LoRA",
        "metric": "accuracy",
        "value": 0.8625,
        "low": 0.85,
        "high": 0.87,
        "questions": 9000,
        "full_split": True,
    },
    {
        "dataset": {"name": "drawn scenes", "split": "test"},
        "setting": "keep 0.5 + LoRA",
        "metric": "accuracy",
        "value": 0.93,
        "questions": 2000,
    },
    {
        "dataset": {"name": "drawn scenes", "split": "test"},
        "setting": "all tokens",
        "metric": "accuracy",
        "value": 0.987,
        "questions": 2000,
        "compared": True,
    },
]
RESULTS: dict[str, Any] = {
    "command": "vlmcompress train lora --keep 0.5",
    "machine": {"date": "2026-11-20T17:24:39+00:00", "commit": "0526f6a", "device": "cpu"},
    "evaluations": EVALUATIONS,
}


def model(family: str = "llava") -> Any:
    """Equal at every call."""
    return tiny.build(family)


def with_lora(base: Any, **options: Any) -> Any:
    """A PEFT model around a model, with LoRA that changes what it computes."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=ON_LLM, init_lora_weights=False, **options)
    return get_peft_model(base, config).eval()


def call(base: Any) -> dict[str, Tensor]:
    """A prompt with two images."""
    return tiny.inputs(base, [tiny.Prompt(images=1, text=5), tiny.Prompt(images=1, text=7)])


@torch.no_grad()
def logits(base: Any) -> Tensor:
    """Of that prompt."""
    found: Tensor = base(**call(base)).logits
    return found


def weights(base: Any) -> dict[str, Tensor]:
    """A copy of what the model holds."""
    return {name: value.clone() for name, value in base.state_dict().items()}


def assert_untouched(base: Any, before: dict[str, Tensor]) -> None:
    """Nothing was added to the model, and nothing in it changed."""
    now = base.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in base.parameters())
    added = {"_vlmcompress", "peft_config", "_hf_peft_config_loaded", "_weight_conversions"}
    assert not added & set(base.__dict__)
