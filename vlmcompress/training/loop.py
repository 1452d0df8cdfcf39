"""transformers' `Trainer` with budgets drawn per step, a log in JSON and whole checkpoints.

Its checkpoints hold what is trained (safetensors), optimiser, schedule and random states (tensors
and numbers, which torch reads without running code), and the step.
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from vlmcompress.core.errors import CheckpointError, ConfigError
from vlmcompress.training.keeps import KeepRange
from vlmcompress.training.plan import LoraPlan
from vlmcompress.training.trainee import Trainee, learning_of

CHECKPOINTS, LOG = "checkpoints", "log.jsonl"
#: The last file of a checkpoint: without it the run was stopped while writing.
_STATE = "trainer_state.json"
_WEIGHTS = "model.safetensors"
_TORCH_FILES = ("*.pt", "*.pth", "*.bin")


class Loop(Trainer):
    """Takes items in their order and notes what the trainee met."""

    def __init__(self, trainee: Trainee, plan: LoraPlan, **options: Any) -> None:
        """Make one.

        Args:
            trainee: the module.
            plan: of the training, for its learning rates.
            options: of `Trainer`.
        """
        self._trainee, self._plan = trainee, plan
        super().__init__(trainee, **options)
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW without decay, one group for each learning rate."""
        if self.optimizer is None:
            rates, groups = self._plan.rates, dict[str, list[nn.Parameter]]()
            for name, parameter in self._trainee.learning().items():
                groups.setdefault(kind_of(name), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [{"params": group, "lr": rates[kind]} for kind, group in groups.items()],
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=0.0,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Warm-up and cosine; where rows are aligned first, one for that and one for the rest."""
        of = optimizer or self.optimizer
        if self._plan.align and self.lr_scheduler is None and of is not None:
            kinds = list(dict.fromkeys(map(kind_of, self._trainee.learning())))
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                of, [partial(share_at, self._plan, kind) for kind in kinds]
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """In order: streams are shuffled already, and where a run stands follows from its step."""
        stream: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(stream)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The same row with what the trainee met since the last one, over all processes.

        Raises:
            ConfigError: when the loss is no number any more.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise ConfigError(
                    f"The loss is {logs['loss']} at step {self.state.global_step}; lower the "
                    "learning rate, or look for broken values in the data."
                )
            answers, distil, right, tokens = self.accelerator.reduce(self._trainee.drain()).tolist()
            if tokens:  # none while rows are aligned
                met = {"answers": answers, "distil": distil, "right": right}
                logs |= {name: value / tokens for name, value in met.items()}
        super().log(logs, start_time)


def share_at(plan: LoraPlan, kind: str, step: int) -> float:
    """What a kind of weight takes of its peak learning rate at a step, where rows are aligned."""
    if step >= plan.align:
        return _rise_and_fall(step - plan.align, plan.steps - plan.align, plan.warmup)
    if kind != "parts":
        return 0.0
    return _rise_and_fall(step, plan.align, plan.warmup) * plan.align_rate / plan.parts_rate


def _rise_and_fall(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def kind_of(name: str) -> str:
    """`parts`, `connector` or `lora`: what a trained weight of this name belongs to."""
    if name.startswith("parts."):
        return "parts"
    return "connector" if ".modules_to_save." in name else "lora"


class Budget(TrainerCallback):
    """Sets the handle to the budget of a step."""

    def __init__(self, handle: Any, keep: KeepRange | None, seed: int) -> None:
        """Of a run."""
        self._handle, self._keep, self._seed = handle, keep, seed
        self.now: float | int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw it.

        Raises:
            ConfigError: when the method needs other parts for another budget.
        """
        if self._keep is None:
            return
        self.now = self._keep.at(state.global_step, self._seed)
        if self._keep.fixed:
            return
        before = self._parts()
        self._handle.set(keep=self.now)
        if [id(part) for part in self._parts()] != [id(part) for part in before]:
            raise ConfigError(
                f"{self._handle.config.to_spec()!r} learns other weights for another budget; "
                "train it at a fixed keep."
            )

    def _parts(self) -> list[Any]:
        return list(learning_of(self._handle).values())


class Follow(TrainerCallback):
    """Writes the log and tells whoever watches of every step."""

    def __init__(
        self, folder: Path, budget: Budget, progress: Callable[[dict[str, float]], None] | None
    ) -> None:
        """Of a run in a folder."""
        self._log, self._budget, self._progress = folder / LOG, budget, progress
        self._latest: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rows behind the checkpoint that is resumed from are written again."""
        if state.is_world_process_zero:
            rows = (json.dumps(row) for row in curve(state.log_history))
            self._log.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell."""
        if self._progress is not None and state.is_world_process_zero:
            keep = {} if self._budget.now is None else {"keep": self._budget.now}
            self._progress({"step": state.global_step, **keep, **self._latest})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One line."""
        rows = curve(state.log_history[-1:])
        if state.is_world_process_zero and rows:
            self._latest = {name: rows[0][name] for name in ("loss", "right") if name in rows[0]}
            with self._log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(rows[0]) + "\n")


def curve(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows of the trainer's history that are about steps, rounded."""
    names = ("step", "loss", "answers", "distil", "right", "grad_norm", "learning_rate")
    return [
        {n: row[n] if n == "step" else float(f"{row[n]:.6g}") for n in names if n in row}
        for row in history
        if "loss" in row
    ]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; what was not written to its end is removed.

    Raises:
        CheckpointError: for one that was written and is broken.
    """
    found = sorted((folder / CHECKPOINTS).glob("checkpoint-*"), key=_step, reverse=True)
    for checkpoint in found:
        if _whole(checkpoint / _STATE):
            _check(checkpoint)
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _whole(state: Path) -> bool:
    try:
        return "global_step" in json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _check(checkpoint: Path) -> None:
    """Look at every file before any is used.

    Raises:
        CheckpointError: naming the broken one.
    """
    path = checkpoint / _WEIGHTS
    try:
        with safe_open(str(path), "pt") as file:
            file.keys()
        for path in sorted(p for kind in _TORCH_FILES for p in checkpoint.glob(kind)):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile("a checksum is wrong")
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is no whole part of a checkpoint ({error}). Delete {checkpoint} to go on from "
            "the one before it, or start anew with resume=False."
        ) from error
