"""`vlmcompress reference`: train and evaluate the model that ships with the library."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmcompress.cli.options import (
    Device,
    Json,
    Out,
    Positions,
    Processes,
    Seeds,
    TextQuestions,
    Weights,
)
from vlmcompress.cli.output import emit, progress, table
from vlmcompress.cli.values import keep_of, words
from vlmcompress.loading import REFERENCE, load, location

app = typer.Typer(
    no_args_is_help=True, help="Train and evaluate the small model that ships with the library."
)

_BATCH = 64
_LONGEST_ANSWER = 6  # tokens: a word, letter by letter, and its end


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; weights end in its 'weights'.")],
    minutes: Annotated[float, typer.Option(min=0, help="Wall-clock budget.")] = 95.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Budget in steps, instead of minutes.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue what lies in the folder.")] = True,
    processes: Annotated[int, typer.Option(min=1, help="CPU processes; a GPU takes one.")] = 2,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of weights, scenes and dropping.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Finished run to go on from.")] = None,
    gentle: Annotated[float, typer.Option(help="Factor on all learning rates.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Train from nothing on drawn scenes; a killed run continues where it was."""
    from vlmcompress.reference.training import train as run

    weights = run(
        out,
        minutes=minutes,
        steps=steps,
        resume=resume,
        processes=processes,
        device=device,
        seed=seed,
        start=start,
        gentle=gentle,
    )
    emit({"weights": str(weights)}, f"The weights are in {weights}.", as_json)


@app.command("eval")
def evaluate(
    n: Annotated[int, typer.Option(min=1, help="Questions, all kinds alike.")] = 1600,
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated; oracle, oracle_asked and anti_oracle are controls."),
    ] = "vtc_cls,fastervlm,hired,divprune,pool,uniform,random,oracle,oracle_asked,anti_oracle",
    keeps: Annotated[str, typer.Option(help="Comma-separated.")] = "1.0,0.5,0.25,0.1,0.05",
    world: Annotated[str, typer.Option(help="objects or text.")] = "objects",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    positions: Positions = "auto",
    weights: Weights = REFERENCE,
    seed: Annotated[int, typer.Option(help="Of random methods and intervals.")] = 0,
    seeds: Seeds = 1,
    device: Device = "auto",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Accuracy of each method at each budget on held-out scenes, with 95 % intervals."""
    from eval_harness import evaluate as run
    from vlmcompress.core.errors import ConfigError
    from vlmcompress.reference.data import samples

    if split not in ("train", "validation", "test"):
        raise ConfigError(f"split is {split!r}; allowed are train, validation and test.")
    model, processor = load(weights, device=device)
    with progress("batches", math.ceil(n / _BATCH)) as bar:
        results = run(
            model,
            processor,
            samples(split, n, world=world),
            methods=words(methods),
            keeps=[_number(k) for k in words(keeps)],
            positions=positions,
            batch_size=_BATCH,
            seed=seed,
            seeds=seeds,
            new_tokens=_LONGEST_ANSWER,
            progress=lambda _line: bar.update(),
        )
    results = {**results, "split": split, "world": world}
    emit(results, _text(results), as_json, out)


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="JSON to write; parts are kept beside it.")],
    n: Annotated[int, typer.Option(min=1, help="Questions about objects.")] = 4000,
    n_text: TextQuestions = 1500,
    methods: Annotated[str, typer.Option(help="Comma-separated; all where not given.")] = "",
    keeps: Annotated[str, typer.Option(help="Comma-separated.")] = "1.0,0.5,0.25,0.1,0.05,0.02",
    seeds: Seeds = 3,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes for the detector table.")] = 400,
    weights: Weights = REFERENCE,
    processes: Processes = 2,
    as_json: Json = False,
) -> None:
    """All tables of the reference model's card, and its targets; a stopped study goes on."""
    from vlmcompress.reference.study import METHODS, Plan
    from vlmcompress.reference.study import study as run

    plan = Plan(
        questions={"objects": n, **({"text": n_text} if n_text else {})},
        methods=tuple(words(methods)) if methods else METHODS,
        keeps=tuple(float(_number(k)) for k in words(keeps)),
        seeds=seeds,
        scenes=scenes,
    )
    with progress("parts", len(plan.parts())) as bar:
        results = run(
            plan,
            out.with_suffix(".parts"),
            weights=location(weights),
            processes=processes,
            progress=lambda _part: bar.update(),
        )
    rows = [[t["target"], t["found"], "yes" if t["met"] else "no"] for t in results["targets"]]
    emit(results, table(["target", "found", "met"], rows), as_json, out)


def _number(text: str) -> float | int:
    from vlmcompress.core.errors import ConfigError

    keep = keep_of(text)
    if isinstance(keep, str):
        raise ConfigError("keep is 'auto'; an evaluation needs fractions or counts.")
    return keep


def _text(results: dict[str, Any]) -> str:
    from vlmcompress.demo import accuracy_rows

    kinds = [[kind, f"{100 * value:.1f}"] for kind, value in results["by_kind"].items()]
    head = (
        f"{results['n']} questions about {results['images']} scenes; accuracy in %, 95 % interval"
    )
    return "\n\n".join(
        [
            head,
            table(*accuracy_rows(results)),
            table(["kind", "all tokens"], kinds),
            f"without the image: {100 * results['blind']:.1f}",
        ]
    )
