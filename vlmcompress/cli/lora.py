"""`vlmcompress train lora`."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmcompress.cli.adapters import QUESTIONS, keeps_of, measured, shown
from vlmcompress.cli.options import Device, Json, Model, Positions
from vlmcompress.cli.output import emit, progress
from vlmcompress.loading import REFERENCE, device_of, load, location

if TYPE_CHECKING:
    from vlmcompress.training.data import Source

#: Options that say where a run is, and not what.
_PLACES = ("out", "images", "device", "as_json", "keep_checkpoints", "resume", "workers")


def lora(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run; it becomes the adapter.")],
    model: Model = REFERENCE,
    method: Annotated[
        str | None, typer.Option(help="Name or spec string; the tower's default if not given.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="0.1, 64, or a range to draw from: 0.02:0.5. None: the method's own."),
    ] = None,
    keep_draw: Annotated[
        str, typer.Option(help="log or uniform: how budgets of a range are drawn, one per step.")
    ] = "log",
    positions: Positions = "auto",
    data: Annotated[
        str,
        typer.Option(
            help="'reference' (drawn scenes), a .json, .jsonl or .parquet file in LLaVA's "
            "conversation format, or a hub id."
        ),
    ] = REFERENCE,
    split: Annotated[str, typer.Option(help="Of a hub data set.")] = "train",
    images: Annotated[
        Path | None, typer.Option(help="Folder that image paths are relative to; the file's own.")
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option(help="Report rows that cannot be used and leave them out.")
    ] = False,
    one_each: Annotated[
        bool, typer.Option(help="Drawn scenes: every question of a step about another one.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 1000,
    batch: Annotated[int, typer.Option(help="Questions per pass and process.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Passes per step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate of LoRA.")] = 2e-4,
    connector_lr: Annotated[float, typer.Option(help="Of a connector trained in full.")] = 2e-5,
    parts_lr: Annotated[float, typer.Option(help="Of what methods learn.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps until the peak.")] = 20,
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="Of LoRA; twice the rank.")] = None,
    dropout: Annotated[float, typer.Option(help="Of LoRA's input.")] = 0.0,
    targets: Annotated[
        str,
        typer.Option(help="all, attention, mlp, or linear maps of the decoder: q_proj,v_proj."),
    ] = "all",
    connector: Annotated[str, typer.Option(help="none, lora or full.")] = "none",
    train_parts: Annotated[bool, typer.Option(help="Train what methods learn along.")] = False,
    align: Annotated[
        int,
        typer.Option(help="First steps in which compressors learn rows like the connector's."),
    ] = 0,
    align_lr: Annotated[float, typer.Option(help="Peak learning rate of those.")] = 3e-3,
    target: Annotated[
        float | None,
        typer.Option(help="For atp with --train-parts: mean over layers of the share wanted."),
    ] = None,
    distil: Annotated[
        float, typer.Option(help="Weight, 0 to 1, of the distance from the uncompressed model.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of the distributions there.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the adapter's start, data and budgets.")] = 0,
    precision: Annotated[
        str, typer.Option(help="float32 or bfloat16: of passes and frozen weights.")
    ] = "float32",
    stored: Annotated[
        str, typer.Option(help="float32 or bfloat16: of the adapter's files.")
    ] = "float32",
    load_in_4bit: Annotated[
        bool, typer.Option(help="Language model in 4 bits (QLoRA); needs bitsandbytes.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option(help="Run layers again in the backward pass: less memory, more time.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read data.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    log_every: Annotated[int, typer.Option(help="Steps between rows of the log.")] = 10,
    questions: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Held-out questions of each drawn world to measure on, before and after; "
            f"{QUESTIONS} for the reference model and 0 for others.",
        ),
    ] = None,
    eval_keeps: Annotated[
        str | None, typer.Option(help="Comma-separated; those of the training if not given.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue what lies in the folder.")] = True,
    keep_checkpoints: Annotated[bool, typer.Option(help="Leave the last ones behind.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """LoRA that gives back what compression takes, trained with compression on.

    Several processes: accelerate launch --multi_gpu --num_processes 2 -m vlmcompress.cli train lora
    ..., in shards with --config_file examples/fsdp2.yaml instead of --multi_gpu.
    """
    from vlmcompress import hub
    from vlmcompress.training import recipe
    from vlmcompress.training.keeps import KeepRange
    from vlmcompress.training.loop import CHECKPOINTS
    from vlmcompress.training.lora import train
    from vlmcompress.training.plan import LoraPlan

    plan = LoraPlan(
        method=method,
        keep=None if keep is None else KeepRange.parse(keep, keep_draw),  # type: ignore[arg-type]
        positions=positions,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        seed=seed,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        connector=connector,
        train_parts=train_parts,
        align=align,
        align_rate=align_lr,
        target=target,
        rate=lr,
        connector_rate=connector_lr,
        parts_rate=parts_lr,
        warmup=warmup,
        distil=distil,
        temperature=temperature,
        precision=precision,
        stored=stored,
        checkpointing=checkpointing,
        save_every=save_every,
        log_every=log_every,
    )
    source = _source(data, split, images, skip_broken, one_each)
    loaded, processor = _loaded(model, precision, device, load_in_4bit)
    facts = {"command": _command(context, out), "model": model, "data": _named(data)}
    with progress("steps", steps) as bar:
        bar.disable = bar.disable or _rank() > 0

        def show(found: dict[str, float]) -> None:
            bar.update(found["step"] - bar.n)
            bar.set_postfix({k: f"{v:.3g}" for k, v in found.items() if k != "step"})

        trained = train(
            loaded,
            processor,
            out,
            plan,
            source,
            resume=resume,
            workers=workers,
            facts=facts,
            progress=show,
        )
    if not trained.main:
        return
    asked = (QUESTIONS if model == REFERENCE else 0) if questions is None else questions
    found = None
    if asked:
        again = trained.sharded  # its model runs no more
        bare = _loaded(model, precision, device, False)[0] if again else hub.unload(trained.model)
        found = measured(bare, processor, out, asked, keeps_of(eval_keeps), seed)
    made = {**facts, "plan": plan.to_dict(), "curve": trained.curve, **recipe.told(found)}
    results = recipe.write_results(out, made, recipe.about_reference(out, facts))
    if not keep_checkpoints:
        shutil.rmtree(out / CHECKPOINTS)
    emit(results, shown(results, out), as_json)


def _source(
    data: str, split: str, images: Path | None, skip_broken: bool, one_each: bool
) -> Source:
    """The data that a name stands for."""
    from vlmcompress.core.errors import ConfigError
    from vlmcompress.training.data import Rows, Scenes, rows_of

    if data == REFERENCE:
        return Scenes(one_each)
    if one_each:
        raise ConfigError(
            f"--one-each is about drawn scenes, and the data are {data!r}, whose rows are shuffled "
            "anyway; leave it out."
        )
    local = Path(data)
    folder = images or (local.parent if local.is_file() else None)
    return Rows(rows_of(data, split), folder, "skip" if skip_broken else "raise")


def _rank() -> int:
    """Number of this process on its machine, as launchers of several tell it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _loaded(model: str, precision: str, device: str, in_4bit: bool) -> tuple[Any, Any]:
    """Model and processor, on the device of this process."""
    where = device_of(device)
    name = f"cuda:{_rank()}" if where.type == "cuda" and where.index is None else str(where)
    if not in_4bit:
        return load(model, precision, name)
    from transformers import AutoProcessor

    from vlmcompress.training.loading import load_in_4bit

    place = location(model)
    quantised = load_in_4bit(place, precision, device_of(name))
    return quantised, AutoProcessor.from_pretrained(place)


def _command(typed: typer.Context, out: Path) -> str:
    """What was typed, without the places of the program and of the folder."""
    words = [f"vlmcompress train lora --out adapters/{out.name}"]
    for option in typed.command.params:
        value = typed.params.get(str(option.name))
        if option.name in _PLACES or value == option.default or value is None:
            continue
        name = option.opts[0]
        words.append(name if value is True else f"{name} {shlex.quote(str(value))}")
    return " ".join(words)


def _named(data: str) -> str:
    """Data by its name, without the folder that it lies in."""
    return Path(data).name if Path(data).exists() else data
