"""`vlmcompress eval adapter` and `adapters`: what training brings, of one and of all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmcompress.cli.options import (
    Device,
    Json,
    Parts,
    PartsOut,
    Precision,
    Processes,
    Seeds,
    TextQuestions,
)
from vlmcompress.cli.output import emit, progress, table
from vlmcompress.cli.values import keep_of, words
from vlmcompress.loading import REFERENCE, load, location

QUESTIONS = 2000
SHELF = Path("adapters")
_BATCH = 64  # questions at a time


def adapter(
    folder: Annotated[Path, typer.Argument(help="Of the adapter; its results and card change.")],
    model: Annotated[
        str | None,
        typer.Option(help="A folder, a hub id or 'reference'; what the recipe names if not given."),
    ] = None,
    questions: Annotated[
        int, typer.Option(min=1, help="Held-out questions of each drawn world.")
    ] = QUESTIONS,
    keeps: Annotated[
        str | None, typer.Option(help="Comma-separated; those of the training if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random methods and of the bootstrap.")] = 0,
    precision: Precision = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Ask drawn scenes without an adapter and with it; rewrite its results and its card."""
    from vlmcompress.hub.about import of_folder
    from vlmcompress.hub.folder import RESULTS, read, read_json
    from vlmcompress.training import recipe

    read(folder)  # says what is wrong before a model is loaded
    made = recipe.recipe_of(folder)
    name = model or str(made.get("model") or REFERENCE)
    loaded, processor = load(name, precision, device)
    found = measured(loaded, processor, folder, questions, keeps_of(keeps), seed)
    old = read_json(folder / RESULTS, "results file") if (folder / RESULTS).is_file() else {}
    command = _command(folder, questions, keeps, seed, model)
    if made.get("command"):
        command = f"{made['command']}\n{command}"
    about = of_folder(folder)
    told = {**old, "command": command, **recipe.told(found)}
    results = recipe.write_results(folder, told, about)
    emit(results, shown(results, folder), as_json)


def adapters(
    out: PartsOut,
    folder: Annotated[Path, typer.Option(help="That the adapters' folders lie in.")] = SHELF,
    questions: Annotated[int, typer.Option(min=1, help="Questions about objects.")] = QUESTIONS,
    text_questions: TextQuestions = QUESTIONS,
    methods: Annotated[
        str, typer.Option(help="Without training, comma-separated; ten if not given.")
    ] = "",
    budgets: Annotated[
        str, typer.Option(help="Shares or counts of an image's tokens, comma-separated.")
    ] = "0.1,0.05,8,1",
    seeds: Seeds = 3,
    processes: Processes = 2,
    parts: Parts = None,
    as_json: Json = False,
) -> None:
    """Adapters of the reference model against methods without training, at equal token counts.

    An adapter answers at every budget that it was trained for, one that meets none of them at its
    own. A stopped run goes on.
    """
    from eval_harness import adapters as shelf
    from eval_harness.adapter_tables import rows
    from eval_harness.provenance import save

    worlds = {"objects": questions, **({"text": text_questions} if text_questions else {})}
    plan = shelf.Plan(
        worlds,
        folder,
        tuple(words(methods)) if methods else shelf.METHODS,
        tuple(keep_of(budget) for budget in words(budgets)),  # type: ignore[misc]
        seeds,
    )
    place = parts or Path("build") / f"{out.stem}.parts"
    with progress("parts", plan.size(location(REFERENCE))) as bar:
        results = shelf.compare(
            plan, place, processes=processes, progress=lambda _name: bar.update()
        )
    save(results, out)
    emit(results, table(*rows(results)), as_json)


def measured(
    model: Any,
    processor: Any,
    folder: Path,
    questions: int,
    keeps: list[Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Both worlds of drawn scenes, as many questions of each; see `before_and_after`."""
    from vlmcompress.reference.data import samples
    from vlmcompress.reference.worlds import WORLDS
    from vlmcompress.training.measure import before_and_after

    asked = {world: list(samples("test", questions, world=world)) for world in WORLDS}
    with progress("batches", 2 * len(asked) * -(-questions // _BATCH)) as bar:
        found = before_and_after(
            model,
            processor,
            folder,
            asked,
            keeps,
            batch_size=_BATCH,
            seed=seed,
            progress=lambda _line: bar.update(),
        )
    found["machine"]["shape"] = REFERENCE
    return found


def keeps_of(text: str | None) -> list[Any] | None:
    """Budgets of a comma-separated list; None for those of the training."""
    return None if text is None else [keep_of(word) for word in words(text)]


def shown(results: dict[str, Any], folder: Path) -> str:
    """What was measured, as text."""
    found = results.get("measured")
    if found is None:
        return f"The adapter is in {folder}."
    rows = [
        [
            world,
            keep,
            *(f"{100 * row[name]['mean']:.1f}" for name in ("before", "after")),
            f"{100 * told['full']['mean']:.1f}",
            f"{100 * row['recovered']:.1f}",
        ]
        for world, told in found["worlds"].items()
        for keep, row in told["at"].items()
    ]
    header = ["world", "keep", "before", "after", "all tokens", "after, % of all"]
    return f"{table(header, rows)}\n\nThe adapter is in {folder}."


def _command(folder: Path, questions: int, keeps: str | None, seed: int, model: str | None) -> str:
    """What was typed, without the places of the program and of the folder."""
    words = [f"vlmcompress eval adapter adapters/{folder.resolve().name}"]
    words += [] if model is None else [f"--model {model}"]
    words += [] if questions == QUESTIONS else [f"--questions {questions}"]
    words += [] if keeps is None else [f"--keeps {keeps}"]
    return " ".join([*words, *([f"--seed {seed}"] if seed else [])])
