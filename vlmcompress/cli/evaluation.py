"""`vlmcompress eval`: measure every method on the model that ships with the library."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlmcompress.cli.options import Json, Parts, PartsOut, Processes, Seeds, TextQuestions, Weights
from vlmcompress.cli.output import emit, progress, table
from vlmcompress.cli.values import keep_of, words
from vlmcompress.loading import REFERENCE, location


class _Evaluation(TyperGroup):
    """`eval --published NAME` is `eval published NAME`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name in place of the option."""
        if args[:1] == ["--published"]:
            args = ["published", *args[1:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Evaluation, no_args_is_help=True, help="Measure the methods against each other."
)

_SHOWN = 0.1


@app.callback()
def main() -> None:
    """Measure the methods against each other."""


@app.command()
def methods(
    out: PartsOut,
    questions: Annotated[int, typer.Option(min=1, help="Questions about objects.")] = 640,
    text_questions: TextQuestions = 330,
    methods: Annotated[
        str, typer.Option(help="Separated by semicolons; every one where not given.")
    ] = "",
    keeps: Annotated[str, typer.Option(help="Comma-separated.")] = "0.5,0.25,0.1,0.05,0.02",
    positions: Annotated[str, typer.Option(help="Comma-separated.")] = "contiguous,original",
    seeds: Seeds = 3,
    weights: Weights = REFERENCE,
    processes: Processes = 2,
    speed: Annotated[bool, typer.Option(help="Time the methods on a model of --shape.")] = True,
    shape: Annotated[str, typer.Option(help="Of the timed model.")] = "llava-1.5-1b",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds per method.")] = 3,
    parts: Parts = None,
    fresh: Annotated[bool, typer.Option(help="Forget the kept parts.")] = False,
    as_json: Json = False,
) -> None:
    """Accuracy and speed of every method and control; a stopped run goes on.

    A method's part is measured anew when its own source file, the weights, the versions or the
    options change; after other changes to the library, --fresh measures all.
    """
    from eval_harness.comparison import Plan, compare, default_methods
    from eval_harness.provenance import save
    from eval_harness.speed import SpeedPlan

    plan = Plan(
        questions={"objects": questions, **({"text": text_questions} if text_questions else {})},
        methods=tuple(words(methods, ";")) if methods else default_methods(),
        keeps=tuple(_fraction(keep) for keep in words(keeps)),
        positions=tuple(words(positions)),
        seeds=seeds,
    )
    timing = SpeedPlan(shape=shape, rounds=rounds) if speed else None
    folder = parts or Path("build") / f"{out.stem}.parts"
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    with progress("parts", plan.parts(timing)) as bar:

        def tick(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        results = compare(
            plan,
            folder,
            speed=timing,
            weights=location(weights),
            processes=processes,
            progress=tick,
        )
    save(results, out)
    emit(results, _text(results), as_json)


def _fraction(text: str) -> float:
    from vlmcompress.core.errors import ConfigError

    keep = keep_of(text)
    if not isinstance(keep, float):
        raise ConfigError(f"keep is {text!r}; methods are compared at fractions such as 0.1.")
    return keep


def _text(results: dict[str, Any]) -> str:
    keeps = results["plan"]["keeps"]
    keep = str(_SHOWN if _SHOWN in keeps else keeps[0])
    mode = results["plan"]["positions"][0]
    worlds = results["worlds"]
    header = ["method", *(f"{name} %" for name in worlds)]
    rows = [
        [
            method,
            *(_percent(world["accuracy"][mode][keep].get(method)) for world in worlds.values()),
        ]
        for method in results["methods"]
    ]
    sizes = ", ".join(f"{world['questions']} about {name}" for name, world in worlds.items())
    return f"{table(header, rows)}\n\nkeep {keep}, positions {mode}; questions: {sizes}"


def _percent(estimate: list[float] | None) -> str:
    return "-" if estimate is None else f"{100 * estimate[0]:.1f}"
