"""What a training of LoRA does, as one value."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.options import check_choice, check_count, check_number
from vlmcompress.training.keeps import KeepRange
from vlmcompress.training.targets import check_connector

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class LoraPlan:
    """One training.

    Attributes:
        method: what compresses, as a spec string; None for the default of the model's tower.
        keep: its budget, fixed or drawn for each step; None where the method carries its own.
        positions: as `patch` takes them.
        steps: of the optimiser.
        batch: questions per pass and process.
        accumulate: passes per step.
        seed: of the adapter's start, of dropout, data and budgets.
        rank: of LoRA.
        alpha: of LoRA; twice the rank where it is None.
        dropout: of LoRA's input.
        targets: linear maps of the language model, see `lora_targets`.
        connector: whether it is left alone (`none`), gets LoRA (`lora`) or is trained itself
            (`full`).
        train_parts: whether what methods learn is trained along.
        align: first steps in which trained compressors learn rows like the model's own alone, see
            `aligning`; the others train on answers, with warm-up and cosine of their own.
        align_rate: peak learning rate of those first steps.
        target: for thresholds that learn how much they let through: wanted mean over layers.
        rate: peak learning rate of LoRA; it rises over `warmup` steps and falls along a cosine.
        connector_rate: the same of a connector that is trained itself.
        parts_rate: the same of what methods learn.
        warmup: steps.
        clip: largest norm of the gradient.
        distil: weight of the distance from the uncompressed model on tokens of answers.
        temperature: of both distributions there.
        precision: of the passes; what is trained stays float32.
        stored: dtype of the adapter's files. What is trained is rounded to it at the end, so that
            what is measured is what the files hold.
        checkpointing: whether layers of the language model run again in the backward pass.
        save_every: steps between checkpoints, a multiple of `log_every`.
        log_every: steps between rows of the log.
    """

    method: str | None = None
    keep: KeepRange | None = None
    positions: str = "auto"
    steps: int = 1000
    batch: int = 16
    accumulate: int = 1
    seed: int = 0
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str = "all"
    connector: str = "none"
    train_parts: bool = False
    align: int = 0
    align_rate: float = 3e-3
    target: float | None = None
    rate: float = 2e-4
    connector_rate: float = 2e-5
    parts_rate: float = 1e-3
    warmup: int = 20
    clip: float = 1.0
    distil: float = 0.0
    temperature: float = 1.0
    precision: str = "float32"
    stored: str = "float32"
    checkpointing: bool = False
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        """Check the values; those that depend on the model are checked when it is known.

        Raises:
            ConfigError, ConfigTypeError: for values that make no sense.
        """
        for name in ("steps", "batch", "accumulate", "rank", "save_every", "log_every"):
            check_count("training", name, getattr(self, name))
        for name in ("seed", "warmup", "align"):
            check_count("training", name, getattr(self, name), 0)
        for name in ("rate", "connector_rate", "parts_rate", "align_rate", "clip"):
            check_number("training", name, getattr(self, name), 0, math.inf)
        for name in ("dropout", "distil"):
            check_number("training", name, getattr(self, name), 0, 1)
        if self.alpha is not None:
            check_number("training", "alpha", self.alpha, 0, math.inf)
        if self.target is not None:
            check_number("training", "target", self.target, 0, 1)
        check_number("training", "temperature", self.temperature, 1e-3, math.inf)
        for name in ("precision", "stored"):
            check_choice("training", name, getattr(self, name), PRECISIONS)
        check_connector(self.connector)
        if self.align and not self.train_parts:
            raise ConfigError(
                f"align is {self.align}, and the parts that it is for are not trained; give "
                "train_parts, too."
            )
        if self.align >= self.steps:
            raise ConfigError(
                f"align is {self.align} of {self.steps} steps; some must be left for answers, so "
                "give fewer, or more steps."
            )
        if self.save_every % self.log_every:
            raise ConfigError(
                f"save_every is {self.save_every} and log_every {self.log_every}; the first must "
                "be a multiple of the second, so that a resumed run logs the same rows."
            )

    @property
    def first_keep(self) -> float | int | None:
        """What `patch` is given before the first step."""
        return None if self.keep is None else self.keep.high

    @property
    def rates(self) -> dict[str, float]:
        """Peak learning rate by kind of weight."""
        return {"lora": self.rate, "connector": self.connector_rate, "parts": self.parts_rate}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        keep = None if self.keep is None else dataclasses.asdict(self.keep)
        return {**dataclasses.asdict(self), "keep": keep}
