"""Training ATP's thresholds on the reference model's drawn scenes."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.extras import require
from vlmcompress.live.patch import patch
from vlmcompress.methods.decoder.atp import ATP, budget_loss
from vlmcompress.methods.learned import Learned
from vlmcompress.methods.options import check_count, check_number
from vlmcompress.reference.checkpoint import load_checkpoint, read_state, save_checkpoint
from vlmcompress.training.questions import batch_of, encoded, encoded_once, right_share

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
_LOG_EVERY = 10
_SAVE_EVERY = 25
_CLIP = 1.0
_WARMUP = 10
#: Learning rate of LoRA as a share of that of the thresholds.
_LORA_RATE = 0.01
_PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Plan:
    """One training.

    Attributes:
        steps: of the optimiser.
        target: wanted mean over layers of the share of visual tokens in their attention.
        seed: of the untrained heads and of the scenes.
        batch: questions per step.
        rate: peak learning rate, which falls to nothing along a cosine.
        lambda_atp: weight of tokens that are kept late.
        lambda_target: weight of the distance from the target, per token.
        lora: rank of LoRA on queries and values of the language model; 0 for none.
        precision: of the passes, float32 or bfloat16; weights stay float32.
        method: with its sites and options; seed and weights are the plan's.
    """

    steps: int = 200
    target: float = 0.25
    seed: int = 0
    batch: int = 8
    rate: float = 0.004
    lambda_atp: float = 0.05
    lambda_target: float = 0.2
    lora: int = 0
    precision: str = "float32"
    method: ATP = field(default_factory=ATP)

    def __post_init__(self) -> None:
        """Check the values; the target is checked against the model when it is known."""
        check_count("training", "steps", self.steps)
        check_count("training", "seed", self.seed, 0)
        check_count("training", "batch", self.batch)
        check_count("training", "lora", self.lora, 0)
        for name in ("rate", "lambda_atp", "lambda_target"):
            check_number("training", name, getattr(self, name), 0, math.inf)
        check_number("training", "target", self.target, 0, 1)
        if self.precision not in _PRECISIONS:
            raise ConfigError(
                f"precision is {self.precision!r}; allowed are {', '.join(_PRECISIONS)}."
            )
        method = dataclasses.replace(self.method, seed=self.seed, weights=None)
        object.__setattr__(self, "method", method)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        made = dataclasses.asdict(self)
        return json.loads(json.dumps({**made, "method": self.method.options()}))


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
        method: that was trained.
        parts: its thresholds, in evaluation mode.
        model: the PEFT model around the one given, None without LoRA.
        curve: rows of the log.
    """

    method: ATP
    parts: Learned
    model: Any
    curve: list[dict[str, float]]


def train(
    model: Any,
    processor: Any,
    folder: str | Path,
    plan: Plan,
    *,
    resume: bool = True,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Trained:
    """Train thresholds, and LoRA with them if the plan says so; a killed run goes on.

    Args:
        model: an unpatched VLM, frozen from here on; unpatched again afterwards, with LoRA in it
            where that was trained.
        processor: with a chat template.
        folder: for checkpoint and log.
        plan: of the training.
        resume: go on from the folder's checkpoint; otherwise it is replaced.
        progress: called with the figures of each step.

    Raises:
        ConfigError: for a target that cannot be met, or a checkpoint of another plan.
        CheckpointError: when the checkpoint cannot be read or written.
        MissingExtraError: for LoRA without peft.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        for name in (CHECKPOINT, LOG):
            (folder / name).unlink(missing_ok=True)
    _check_plan(folder / CHECKPOINT, plan)
    model.requires_grad_(False).eval()
    tuned = _with_lora(model, plan) if plan.lora else None
    with patch(model, plan.method) as handle:
        run = _Run(model, processor, handle, plan, folder)
        run.all(progress)
        parts = handle.parts_of(plan.method.name)
        return Trained(plan.method, parts.eval(), tuned, run.curve)


def _with_lora(model: Any, plan: Plan) -> Any:
    peft = require("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=plan.lora,
                lora_alpha=2 * plan.lora,
                target_modules=r".*language_model.*\.(q_proj|v_proj)",
            ),
        ).eval()


def _check_plan(checkpoint: Path, plan: Plan) -> None:
    """Refuse to go on with another plan.

    Raises:
        ConfigError: naming what differs.
    """
    state = read_state(checkpoint)
    if state is None:
        return
    mine, found = plan.to_dict(), state["plan"]
    other = [f"{k}={found.get(k)!r}" for k in mine if found.get(k) != mine[k]]
    if other:
        raise ConfigError(
            f"{checkpoint} was trained with {', '.join(other)}: resume with the same, train in "
            "another folder, or start anew with resume=False."
        )


class _Run:
    """Steps, checkpoints and log of one training."""

    def __init__(self, model: Any, processor: Any, handle: Any, plan: Plan, folder: Path) -> None:
        self._model, self._processor, self._handle = model, processor, handle
        self._plan, self._folder = plan, folder
        lora = [p for p in model.parameters() if p.requires_grad]
        self._trainee = nn.ModuleDict({"atp": handle.parts, "lora": nn.ParameterList(lora)})
        groups = [
            {"params": list(handle.parts.parameters()), "peak": plan.rate},
            {"params": lora, "peak": plan.rate * _LORA_RATE},
        ]
        self._optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        state = load_checkpoint(folder / CHECKPOINT, self._trainee, self._optimizer)
        self.step: int = 0 if state is None else state["step"]
        self.seconds: float = 0.0 if state is None else state["seconds"]
        self.curve: list[dict[str, float]] = [] if state is None else state["curve"]
        handle.parts.train()

    def all(self, progress: Callable[[dict[str, float]], None] | None) -> None:
        """Every step that is left."""
        while self.step < self._plan.steps:
            begun = time.monotonic()
            found = self._one()
            self.step += 1
            self.seconds += time.monotonic() - begun
            last = self.step == self._plan.steps
            if self.step % _LOG_EVERY == 0 or last:
                self._log(found)
            if self.step % _SAVE_EVERY == 0 or last:
                self._save()
            if progress is not None:
                progress(found)

    def _one(self) -> dict[str, float]:
        plan, device = self._plan, self._model.device
        asked = batch_of(self.step, plan.batch, plan.seed)
        inputs = {k: v.to(device) for k, v in encoded(self._processor, asked).items()}
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate_factor()
        low = plan.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            with torch.no_grad():
                call = encoded_once(self._handle, inputs, asked)
            output = self._model(**call, use_cache=False)
            budget = self._budget()
            loss: Tensor = output.loss + budget
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trainee.parameters(), _CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {
            "step": self.step + 1,
            "answers": output.loss.item(),
            "budget": budget.item(),
            "average_keep": self._average_keep(),
            "right": right_share(output.logits, inputs["labels"]),
        }

    def _budget(self) -> Tensor:
        plan = self._plan
        return budget_loss(
            self._handle.last.soft_masks,
            self._depth,
            plan.target,
            lambda_atp=plan.lambda_atp,
            lambda_target=plan.lambda_target,
        )

    @property
    def _depth(self) -> int:
        return len(self._handle.last.layer_lengths)

    def _average_keep(self) -> float:
        """What the batch would have kept outside training."""
        masks = self._handle.last.soft_masks
        layers = [mask.layer for mask in masks]
        runs = [b - a for a, b in zip(layers, [*layers[1:], self._depth], strict=True)]
        n = int(masks[0].visual.sum())
        kept = sum(int(m.kept.sum()) * run for m, run in zip(masks, runs, strict=True))
        return (layers[0] + kept / n) / self._depth

    def _rate_factor(self) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self._plan.steps))
        return min(1.0, (self.step + 1) / _WARMUP) * cosine

    def _log(self, found: dict[str, float]) -> None:
        row = {k: round(v, 4) for k, v in found.items()}
        self.curve.append(row)
        timed = {**row, "seconds": round(self.seconds, 1)}
        with (self._folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(timed) + "\n")

    def _save(self) -> None:
        state = {
            "plan": self._plan.to_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        save_checkpoint(self._folder / CHECKPOINT, self._trainee, self._optimizer, state)
