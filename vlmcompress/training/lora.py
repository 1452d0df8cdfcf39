"""Recovering accuracy under compression by LoRA on the language model.

LoRA is that of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models"
(https://arxiv.org/abs/2106.09685), as peft has it. The tower stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from vlmcompress.core.extras import require
from vlmcompress.families.connectors import connector_name
from vlmcompress.live.install import outer_model
from vlmcompress.live.patch import patch
from vlmcompress.training import recipe, sharding
from vlmcompress.training.aligning import Aligning
from vlmcompress.training.conversations import Collator
from vlmcompress.training.data import Source
from vlmcompress.training.loop import CHECKPOINTS, Budget, Follow, Loop, curve, latest_checkpoint
from vlmcompress.training.plan import LoraPlan
from vlmcompress.training.targets import lora_targets
from vlmcompress.training.trainee import Objective, Trainee, learning_of


@dataclass(frozen=True)
class Recovered:
    """What a training leaves.

    Attributes:
        model: the PEFT model, unpatched, in evaluation mode.
        parts: what its methods have learnt, by method.
        curve: rows of the log.
        main: whether this process writes files (of several, one does).
        sharded: whether the model is in shards, so that it runs no more.
    """

    model: Any
    parts: dict[str, nn.Module]
    curve: list[dict[str, float]]
    main: bool
    sharded: bool = False


def train(
    model: Any,
    processor: Any,
    folder: str | Path,
    plan: LoraPlan,
    source: Source,
    *,
    resume: bool = True,
    workers: int = 0,
    clip: Any = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Recovered:
    """Train an adapter with compression on; a killed run goes on where it was.

    Started by `accelerate launch` or `torchrun`, every process takes `plan.batch` questions of its
    own, and a step is that of all of them together. With `examples/fsdp2.yaml` each of them holds a
    share of the weights.

    Args:
        model: an unpatched VLM, on the device to train on; LoRA is put into it and stays.
        processor: with a chat template.
        folder: for checkpoints, log, adapter and recipe.
        plan: of the training.
        source: of conversations.
        resume: go on from the folder's last checkpoint; otherwise it is replaced.
        workers: processes that read data.
        clip: as `patch` takes it, for methods that read the question.
        facts: about the run, for the recipe: `command`, `model`, `data`.
        progress: called after each step with its number, its budget and the last row of the log.

    Raises:
        ConfigError: for options that this model, this method or FSDP cannot have, a run with other
            options in the folder, or a loss that is no number.
        CheckpointError: for a broken checkpoint.
        DataError: for data that cannot be used.
        MissingExtraError: without peft and accelerate.
    """
    require("accelerate")
    folder, inner = Path(folder), outer_model(model)
    collator = Collator(processor)
    arguments = _arguments(folder, plan, inner, workers)
    world = arguments.world_size
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            if not resume:
                recipe.forget(folder, folder / CHECKPOINTS)
            recipe.begin(folder, folder / CHECKPOINTS, plan, world)
        checkpoint = latest_checkpoint(folder)
    tuned = with_lora(inner, plan)
    size = plan.batch * plan.accumulate * world
    with (
        patch(
            tuned,
            plan.method,
            keep=plan.first_keep,
            processor=processor,
            positions=plan.positions,
            seed=plan.seed,
            clip=clip,
        ) as handle,
        _recomputing(inner, plan.checkpointing),
    ):
        objective = Objective(plan.distil, plan.temperature, plan.target)
        trainee = Trainee(tuned, handle, objective, train_parts=plan.train_parts)
        aligning = []
        if plan.align:
            trainee.check_alignable()
            aligning = [Aligning(trainee, plan.align)]
        budget = Budget(handle, plan.keep, plan.seed)
        loop = Loop(
            trainee,
            plan,
            args=arguments,
            data_collator=collator,
            train_dataset=source.stream(plan.steps, size, plan.seed),
            callbacks=[budget, *aligning, Follow(folder, budget, progress)],
        )
        sharded = sharding.prepare(loop)
        loop.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if sharded:
            sharding.gather(loop)
        tuned.eval()
        trainee.round_to(getattr(torch, plan.stored))
        rows, main = curve(loop.state.log_history), arguments.process_index == 0
        parts = {name: p.eval() for name, p in learning_of(handle).items()}
        if main:
            recipe.save(handle, folder, plan, rows, facts or {})
    return Recovered(tuned, parts, rows, main, sharded)


def with_lora(model: Any, plan: LoraPlan) -> Any:
    """A PEFT model around one, with an untrained adapter; the same seed gives the same.

    Everything but the adapter, and the connector where the plan trains it, is frozen.

    Raises:
        ConfigError: for targets that the model does not have.
        UnsupportedModelError: when its language model or connector cannot be found.
        MissingExtraError: without peft.
    """
    peft = require("peft")
    config = peft.LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank if plan.alpha is None else plan.alpha,
        lora_dropout=plan.dropout,
        target_modules=lora_targets(model, plan.targets, plan.connector),
        modules_to_save=[connector_name(model)] if plan.connector == "full" else None,
    )
    model.requires_grad_(False).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        tuned = peft.get_peft_model(model, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:  # the connector's own weights may be in less
            parameter.data = parameter.data.float()
    return tuned


def _arguments(folder: Path, plan: LoraPlan, model: Any, workers: int) -> Any:
    """What transformers' `Trainer` is told."""
    arguments = TrainingArguments(
        str(folder / CHECKPOINTS),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch,
        gradient_accumulation_steps=plan.accumulate,
        learning_rate=plan.rate,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup,
        max_grad_norm=plan.clip,
        seed=plan.seed,
        bf16=plan.precision == "bfloat16",
        use_cpu=model.device.type == "cpu",
        # A batch without images leaves connector and parts out; methods may leave layers out.
        ddp_find_unused_parameters=True,
        save_steps=plan.save_every,
        save_total_limit=2,
        logging_steps=plan.log_every,
        logging_nan_inf_filter=False,
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # replicas of DataParallel have no patch
    return arguments


@contextmanager
def _recomputing(model: Any, wanted: bool) -> Iterator[None]:
    """The layers of the language model run again in the backward pass; the tower learns nothing."""
    decoder = model.get_decoder()
    # Older transformers know it by another name.
    name = "activation" if hasattr(decoder, "activation_checkpointing_enable") else "gradient"
    if wanted:
        options = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(decoder, f"{name}_checkpointing_enable")(**options)
    try:
        yield
    finally:
        if wanted:
            getattr(decoder, f"{name}_checkpointing_disable")()
