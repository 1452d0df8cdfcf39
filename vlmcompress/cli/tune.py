"""`vlmcompress tune`: the cheapest pipeline that keeps a model's accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmcompress.cli.options import Clip, Clock, Device, Dtype, Json, ModelArgument, Positions
from vlmcompress.cli.output import emit, table
from vlmcompress.cli.values import words
from vlmcompress.loading import REFERENCE, clip_of, load

NONE_FOUND = 3
"""Exit code where no pipeline could be certified."""

_SHOWN = 12  # pipelines of the table


def tune(
    out: Annotated[
        Path, typer.Option(help="Folder of the configuration and its evidence; a run goes on.")
    ],
    tasks: Annotated[
        str,
        typer.Option(help="Comma-separated, as of eval run: reference, folders, files."),
    ],
    model: ModelArgument = REFERENCE,
    keep_accuracy: Annotated[
        float | None,
        typer.Option(help="Share of the full model's score to keep; the cheapest is wanted."),
    ] = None,
    max_ttft: Annotated[
        str | None,
        typer.Option(
            help="Or: longest time to the first token, as a share of the full model's (0.6) or "
            "a time (150ms); the most accurate is wanted."
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Largest probability that the choice is not admissible.")
    ] = 0.05,
    space: Annotated[
        Path | None,
        typer.Option(help="YAML with pipelines; what the model can run where not given."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Time for it: 90s, 30m, 2h.")] = None,
    cost: Annotated[
        str, typer.Option(help="ttft (measured from the picture on) or flops (by formula).")
    ] = "ttft",
    rounds: Annotated[int, typer.Option(help="Timed rounds of each pipeline.")] = 5,
    clock: Clock = "wall",
    metric: Annotated[str | None, typer.Option(help="Of rows that name none.")] = None,
    split: Annotated[str | None, typer.Option(help="Only rows of this split.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First questions of each task.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="With {question}, and {options} if wanted.")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the images that only the final test sees.")
    ] = 0.5,
    first: Annotated[int, typer.Option(help="Images of the first round of questions.")] = 16,
    finalists: Annotated[int, typer.Option(help="Pipelines in the final test, at most.")] = 4,
    dtype: Dtype = "float32",
    device: Device = "auto",
    positions: Positions = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the cut, of intervals and random methods.")] = 0,
    clip: Clip = None,
    fresh: Annotated[bool, typer.Option(help="Forget what the folder holds.")] = False,
    as_json: Json = False,
) -> None:
    """Choose a pipeline for a model and your questions, and write vlmcompress_config.json.

    Exit codes: 0; 1 for an error; 3 where no pipeline could be certified (tune.json says which
    floor or ceiling could be reached); 130 when interrupted: the same command goes on.
    """
    from eval_harness.sweep.plan import plan_of
    from eval_harness.tune import space as spaces
    from eval_harness.tune.budget import Budget, seconds_of
    from eval_harness.tune.goal import Goal, ceiling_of
    from eval_harness.tune.halving import Rules
    from eval_harness.tune.plan import TunePlan
    from eval_harness.tune.run import tune as go

    ceiling = {} if max_ttft is None else ceiling_of(max_ttft)
    asked = {"metric": metric, "split": split, "limit": limit, "prompt": prompt}
    given = {k: v for k, v in {**asked, "new_tokens": new_tokens}.items() if v is not None}
    plan = TunePlan(
        model=model,
        tasks=plan_of({"tasks": words(tasks), "methods": [], **given}).tasks,
        goal=Goal(keep_accuracy=keep_accuracy, alpha=alpha, **ceiling),
        space=() if space is None else spaces.read(space),
        rules=Rules(first=first, finalists=finalists, seed=seed),
        held_out=held_out,
        cost=cost,
        rounds=rounds,
        clock=clock,
        dtype=dtype,
        positions=positions,
        batch=batch,
        clip=clip,
    )
    time = Budget(None if budget is None else seconds_of(budget))

    def subject() -> tuple[Any, Any, Any]:
        loaded, processor = load(plan.model, plan.dtype, device)
        return loaded, processor, None if clip is None else clip_of(clip, loaded.device)

    try:
        results = _shown(lambda say: go(plan, out, subject, budget=time, fresh=fresh, progress=say))
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; the same command goes on with what {out} holds.", err=True)
        raise typer.Exit(130) from None
    emit(results, text(results, out), as_json)
    if results["status"] != "chosen":
        raise typer.Exit(NONE_FOUND)


def _shown(work: Any) -> Any:
    """Do the work, with its lines as the description of a bar on stderr."""
    from tqdm import tqdm

    with tqdm(desc="tune", unit=" steps", leave=False) as bar:

        def say(line: str) -> None:
            bar.set_postfix_str(line[:80], refresh=False)
            bar.update()

        return work(say)


def text(results: dict[str, Any], folder: Path) -> str:
    """The choice, its evidence and the pipelines that were cheapest, for a reader."""
    from eval_harness.tune import tables

    parts = [_verdict(results, folder)]
    header, rows = tables.finalists(results)
    if rows:
        parts.append(f"Tested on samples that the search did not see:\n\n{table(header, rows)}")
    parts.append(table(*tables.cheapest(results, _SHOWN)))
    asked = results["asked"]
    parts.append(
        f"{asked['questions']} questions were asked; all pipelines on all samples would have been "
        f"{asked['exhaustive']}. {results['seconds']:.0f} s."
    )
    return "\n\n".join(parts)


def _verdict(results: dict[str, Any], folder: Path) -> str:
    goal, alpha = results["goal"]["text"], results["goal"]["alpha"]
    if results["status"] == "chosen":
        return (
            f"{results['pipeline']}: {goal}, wrongly with a probability of {100 * alpha:g} % at "
            f"most (p {results['p']:.2g}); {folder}/vlmcompress_config.json"
        )
    lines = [f"Nothing was chosen: {results['why']}."]
    if results["reachable"] is not None:
        lines.append(f"{results['pipeline']} could be certified at {results['reachable']:.3g}.")
    if results["images_needed"] is not None:
        held = results["samples"]["images"]["held_out"]
        lines.append(
            f"A pipeline whose answers are all the full model's needs {results['images_needed']} "
            f"held-out images for this floor; there are {held}."
        )
    if any(row["decision"] in ("search ends", "test ends") for row in results["decisions"]):
        lines.append("Time ran out; the same command goes on from here.")
    return " ".join(lines)
