"""`vlmcompress train`: train what methods learn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmcompress.cli.lora import lora
from vlmcompress.cli.options import Device, Json, Precision
from vlmcompress.cli.output import emit, progress
from vlmcompress.loading import REFERENCE, load

app = typer.Typer(no_args_is_help=True, help="Train what methods learn, and LoRA.")

_BATCH = 64
_DEFAULT_RANK = 8


@app.callback()
def main() -> None:
    """Train what methods learn."""


app.command()(lora)


@app.command()
def atp(
    out: Annotated[Path, typer.Option(help="Folder of the run; it becomes the adapter.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")] = 200,
    target: Annotated[
        float, typer.Option(help="Mean over layers of the share of visual tokens wanted.")
    ] = 0.25,
    seed: Annotated[int, typer.Option(help="Of the untrained heads and the scenes.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Questions per step.")] = 8,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.004,
    lambda_atp: Annotated[float, typer.Option(help="Weight of tokens kept late.")] = 0.05,
    lambda_target: Annotated[
        float, typer.Option(help="Weight of the distance from the target, per token.")
    ] = 0.2,
    lora: Annotated[bool, typer.Option(help="Train LoRA in the language model, too.")] = False,
    precision: Precision = "float32",
    questions: Annotated[
        int, typer.Option(min=0, help="Of the test split, to measure on; 0 for none.")
    ] = 512,
    resume: Annotated[bool, typer.Option(help="Continue what lies in the folder.")] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Thresholds of ATP for the reference model, measured against fixed schedules."""
    from vlmcompress.core.config import CompressionConfig
    from vlmcompress.training import adapter
    from vlmcompress.training.atp import Plan, train

    plan = Plan(
        steps=steps,
        target=target,
        seed=seed,
        batch=batch,
        rate=rate,
        lambda_atp=lambda_atp,
        lambda_target=lambda_target,
        lora=_DEFAULT_RANK if lora else 0,
        precision=precision,
    )
    model, processor = load(REFERENCE, device=device)
    with progress("steps", plan.steps) as bar:

        def show(found: dict[str, float]) -> None:
            bar.update(found["step"] - bar.n)
            bar.set_postfix(keep=f"{found['average_keep']:.3f}", answers=f"{found['answers']:.3f}")

        trained = train(model, processor, out, plan, resume=resume, progress=show)
    folder = adapter.save(model, trained, out)
    facts = {"command": _command(plan, out, lora, questions), "model": REFERENCE, "data": REFERENCE}
    measured = None
    if questions:
        learnt = CompressionConfig.load(folder).stages[0].options["weights"]
        method = dataclasses.replace(trained.method, weights=str(folder / learnt))
        measured = _measured(model, processor, method, questions, seed)
    results = adapter.write(out, plan, trained, facts, measured)
    emit(results, f"The adapter is in {out}.", as_json)


def _measured(model: Any, processor: Any, method: Any, questions: int, seed: int) -> dict[str, Any]:
    from eval_harness.schedules import against_schedules
    from vlmcompress.reference.data import samples

    asked: Any = samples("test", questions)
    with progress("batches", -(-questions // _BATCH)) as bar:
        found = against_schedules(
            model,
            processor,
            method,
            asked,
            batch_size=_BATCH,
            seed=seed,
            progress=lambda _line: bar.update(),
        )
    found["machine"]["shape"] = REFERENCE
    return found


def _command(plan: Any, out: Path, lora: bool, questions: int) -> str:
    """What was typed, with the options that differ from their defaults."""
    words = [f"vlmcompress train atp --out adapters/{out.name}"]
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if field.name not in ("lora", "method") and value != field.default:
            words.append(f"--{field.name.replace('_', '-')} {value}")
    words += ["--lora"] * lora
    words += [f"--questions {questions}"] * (questions != 512)
    return " ".join(words)
