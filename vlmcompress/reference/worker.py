"""One process of one training stage: steps, learning rate, log, checkpoints, validation."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmcompress.core.errors import CheckpointError, ConfigError, VLMCompressError

from .checkpoint import load_checkpoint, load_parameters, save_checkpoint
from .model import Shape
from .stages import STAGES, JointStage, Stage
from .tokenizer import build_tokenizer
from .trainee import Mix, Trainee
from .validate import validate

_WARMUP = 100
_CLIP = 1.0
_LOG_EVERY = 25


@dataclass(frozen=True)
class Job:
    """What one process has to do.

    Attributes:
        folder: where checkpoints and logs go.
        stage: name of the stage. rank, world: among the processes that share it.
        minutes, steps: the budget of the stage; whichever is given ends it.
        batch: scenes per step and process. seed: of everything.
        device: torch device. shape: of the model. pulse: seconds between checkpoints.
        precision: ``"bfloat16"`` (autocast; weights stay float32) or ``"float32"``.
        start: checkpoint of another run whose parameters this stage begins with. gentle: factor on
            all learning rates.
        validate_every: seconds between validations of the joint stage.
    """

    folder: Path
    stage: str
    rank: int = 0
    world: int = 1
    minutes: float | None = None
    steps: int | None = None
    batch: int = 8
    seed: int = 0
    device: str = "cpu"
    shape: Shape = field(default_factory=Shape)
    pulse: float = 60.0
    validate_every: float = 240.0
    precision: str = "bfloat16"
    start: Path | None = None
    gentle: float = 1.0

    @property
    def checkpoint(self) -> Path:
        """The stage's checkpoint."""
        return self.folder / f"{self.stage}.safetensors"

    @property
    def identity(self) -> dict[str, int | str]:
        """What a run must share with its checkpoint, so that resuming continues it exactly."""
        return {"seed": self.seed, "batch": self.batch}

    def autocast(self) -> torch.autocast:
        """The context of forward passes."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bfloat16")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is used up."""
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_time, step / self.steps if self.steps else 0.0)


def rate_factor(step: int, progress: float, last: float) -> float:
    """Warm-up over 100 steps, then a cosine from 1 to ``last``."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / _WARMUP) * (last + (1 - last) * cosine)


class Worker:
    """Runs a job; call `run`."""

    def __init__(self, job: Job) -> None:
        self.job, self.parent = job, os.getppid()
        device = torch.device(job.device)
        tokenizer = build_tokenizer()
        trainee = Trainee(job.shape, tokenizer, job.seed).to(device)
        self.stage: Stage = STAGES[job.stage](
            trainee, tokenizer, job.rank, job.world, job.batch, job.seed
        )
        groups = self.stage.groups()
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.97), weight_decay=0.01, fused=fused
        )
        self.parameters = [p for group in groups for p in group["params"]]
        self.step, self.seconds, self.validated = 0, 0.0, 0.0
        self.means: dict[str, float] = {}
        self._restore()

    def _restore(self) -> None:
        """Continue from the stage's checkpoint, or start from those of the stages before."""
        job, trainee = self.job, self.stage.trainee
        state = load_checkpoint(job.checkpoint, trainee, self.optimizer)
        if state is not None:
            self._check_identity(state)
            self.step, self.seconds, self.means = state["step"], state["seconds"], state["means"]
            self.stage.mix = Mix(np.array(state["mix"]))
            return
        if job.start is not None:
            load_parameters(job.start, trainee)
            self.stage.mix = load_state_mix(job.start) or self.stage.mix
        if job.stage == JointStage.name:
            llm = "model.model.language_model"
            others = tuple(p for p in STAGES["tower"].rates)
            for name, prefixes in (("tower", others), ("language", (llm,))):
                load_parameters(job.folder / f"{name}.safetensors", trainee, prefixes)
            language = load_state_mix(job.folder / "language.safetensors")
            self.stage.mix = language or self.stage.mix

    def _check_identity(self, state: dict) -> None:
        """Refuse to continue a run with another seed or batch.

        Raises:
            ConfigError: naming the difference.
        """
        for key, mine in self.job.identity.items():
            if state[key] != mine:
                raise ConfigError(
                    f"{self.job.checkpoint} was trained with {key}={state[key]} and this run has "
                    f"{key}={mine}: resume with the same, or train in another folder."
                )

    def save(self) -> None:
        """Write the checkpoint (first process only)."""
        if self.job.rank == 0:
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "means": self.means,
                "mix": self.stage.mix.accuracy.tolist(),
                "shape": vars(self.job.shape),
                **self.job.identity,
            }
            save_checkpoint(self.job.checkpoint, self.stage.trainee, self.optimizer, state)

    def log(self, row: dict) -> None:
        """Append a line to the stage's log (first process only)."""
        if self.job.rank == 0:
            head = {"stage": self.job.stage, "step": self.step, "minutes": self.seconds / 60}
            path = self.job.folder / "log.jsonl"
            try:
                with path.open("a") as file:
                    file.write(json.dumps({**head, **row}) + "\n")
            except OSError as error:
                raise CheckpointError(
                    f"{path} cannot be written ({error}). Make room and run again to resume."
                ) from error

    def _note(self, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            old = self.means.get(key, value)
            self.means[key] = old + 0.02 * (value - old)

    def _share_gradients(self) -> None:
        """Average gradients over the processes, as one flat bfloat16 vector."""
        import torch.distributed as dist

        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([g.flatten() for g in grads]).bfloat16()
        dist.all_reduce(flat)
        parts: list[Tensor] = list(
            flat.float().div_(self.job.world).split([g.numel() for g in grads])
        )
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _progress(self) -> float:
        """Used share of the budget; the first process's clock counts."""
        progress = self.job.progress(self.step, self.seconds)
        if self.job.world > 1:
            import torch.distributed as dist

            shared = torch.tensor([progress], dtype=torch.float64)
            dist.broadcast(shared, 0)
            progress = float(shared)
        return progress

    def train_step(self, progress: float) -> None:
        """One optimiser step."""
        factor = self.job.gentle * rate_factor(self.step, progress, self.stage.last_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        with self.job.autocast():
            loss, metrics = self.stage.loss(self.step)
        loss.backward()
        if self.job.world > 1:
            self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._note({"loss": loss.item(), **metrics})
        self.step += 1

    def _log_means(self) -> None:
        rounded = {k: round(v, 4) for k, v in self.means.items()}
        self.log({"means": rounded, "kinds": self.stage.mix.accuracy.round(3).tolist()})

    def _validate(self) -> None:
        if self.job.rank == 0 and self.job.stage == JointStage.name:
            with self.job.autocast():
                table = validate(self.stage.trainee.model, self.stage.encode)
                self.log({"validation": table})
        self.validated = self.seconds

    def run(self) -> None:
        """Train until the budget is used up; safe to kill and run again."""
        from tqdm import tqdm

        job = self.job
        bar = tqdm(total=100, desc=job.stage, disable=job.rank > 0, mininterval=10, unit="%")
        saved = self.seconds
        while (progress := self._progress()) < 1 and os.getppid() == self.parent:
            begun = time.monotonic()
            self.train_step(progress)
            if self.seconds - self.validated > job.validate_every:
                self._validate()
            if self.step % _LOG_EVERY == 0:
                self._log_means()
                bar.update(100 * progress - bar.n)
            if self.seconds - saved > job.pulse:
                self.save()
                saved = self.seconds
            self.seconds += time.monotonic() - begun
        if progress >= 1:
            self._log_means()
            self._validate()
            self.save()
        bar.close()


def load_state_mix(path: Path) -> Mix | None:
    """Accuracies per kind that a stage ended with."""
    from .checkpoint import read_state

    state = read_state(path)
    return Mix(np.array(state["mix"])) if state else None


def run_job(job: Job, failures: Any, meeting: str | None = None) -> None:
    """Entry point of a process.

    Args:
        job: what to do.
        failures: a queue for errors that the caller should raise.
        meeting: a file where the processes of a stage meet.
    """
    if job.device == "cpu":
        torch.set_num_threads(1)
    if job.world > 1:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=job.rank, world_size=job.world
        )
    try:
        Worker(job).run()
    except VLMCompressError as error:
        failures.put(error)
        raise SystemExit(1) from error
    if job.world > 1:
        dist.destroy_process_group()
