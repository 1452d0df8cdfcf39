"""`vlmcompress lmms-path`, and `vlmcompress eval published`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmcompress.cli.options import Json, Out
from vlmcompress.cli.output import emit, table
from vlmcompress.cli.values import words
from vlmcompress.core.errors import ConfigError


def lmms_path(as_json: Json = False) -> None:
    """Print the folder with the library's tasks, for lmms-eval's --include_path."""
    from vlmcompress.integrations.lmms_eval import TASKS

    emit({"path": str(TASKS)}, str(TASKS), as_json)


def published(
    name: Annotated[str, typer.Argument(help="Whose values, such as llava-1.5-7b.")],
    listed: Annotated[
        bool, typer.Option("--list", help="Print the published values; run nothing.")
    ] = False,
    methods: Annotated[
        str, typer.Option(help="Separated by semicolons; all where not given.")
    ] = "",
    tokens: Annotated[str, typer.Option(help="Budgets, comma-separated.")] = "",
    benchmarks: Annotated[str, typer.Option(help="Comma-separated.")] = "",
    checkpoint: Annotated[
        str | None, typer.Option(help="A folder or hub id in place of the papers' model.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder for what lmms-eval writes.")] = Path(
        "runs/published"
    ),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="First questions of each task, for a trial.")
    ] = None,
    download: Annotated[bool, typer.Option(help="Fetch the model and data that are missing.")] = (
        False
    ),
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure by lmms-eval what papers print, and set ours beside it.

    `vlmcompress eval --published NAME` is the same.
    """
    from eval_harness.published import run, values

    known = values.published(name)
    wanted = run.Comparison(
        values=known,
        rows=known.chosen(
            words(methods, ";") if methods else (),
            [_count(count) for count in words(tokens)] if tokens else (),
        ),
        benchmarks=words(benchmarks) if benchmarks else list(known.benchmarks),
        out=work,
        checkpoint=checkpoint,
        device=device,
        limit=limit,
        online=download,
    )
    if listed:
        results = run.table(wanted)
    else:
        results = run.measure(wanted, say=lambda line: typer.echo(line, err=True))
    emit(results, text(results), as_json, out)


def _count(text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"tokens is {text!r}; give counts such as 128.")
    return int(text)


def text(results: dict[str, Any]) -> str:
    """The table with its sources and notes, for a reader."""
    titles = {key: told["title"] for key, told in results["benchmarks"].items()}
    rows = [
        [
            row["method"],
            str(row["tokens"]),
            "+".join(row["sources"]),
            *(_value(row["values"].get(key)) for key in titles),
        ]
        for row in results["rows"]
    ]
    parts = [table(["method", "tokens", "source", *titles.values()], rows)]
    parts += [f"{k}: {s['what']}; {s['where']}; {s['read']}" for k, s in results["sources"].items()]
    for notes in (results["benchmarks"], results["methods"]):
        parts += [
            f"{titles.get(k, k)}: {told['note']}" for k, told in notes.items() if told["note"]
        ]
    if results["limit"] is not None:
        parts.append(f"Ours are of the first {results['limit']} questions only.")
    return "\n".join([parts[0], "", *parts[1:]])


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
