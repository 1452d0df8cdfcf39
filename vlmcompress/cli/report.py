"""`vlmcompress report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmcompress.cli.options import Device, Json
from vlmcompress.cli.output import emit
from vlmcompress.cli.values import words


def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Folders of `eval run` and JSON files of `bench --out`."),
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    samples: Annotated[
        int, typer.Option(min=0, help="Worst regressions of each folder that are shown.")
    ] = 8,
    overlays: Annotated[
        bool,
        typer.Option(help="Draw what was kept, for which the model is asked again."),
    ] = True,
    tasks: Annotated[
        str | None,
        typer.Option(help="Files and folders of tasks, comma-separated, for their pictures."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model of the results is now, if it moved.")
    ] = None,
    device: Device = "auto",
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Compressed visual tokens",
    as_json: Json = False,
) -> None:
    """One HTML page with the curves, the times and the worst regressions of results.

    The page needs no other file and no network.
    """
    from eval_harness.report import inputs, page, pictures, regressions

    found = inputs.read(results)
    shown = {
        str(run.folder): pictures.samples(
            run,
            regressions.worst(run, samples),
            tasks=[] if tasks is None else words(tasks),
            model=model,
            device=device,
            overlays=overlays,
        )
        for run in found.runs
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.render(found, shown, title), encoding="utf-8")
    found_worst = {folder: len(regressed) for folder, regressed in shown.items()}
    emit({"page": str(out), "regressions": found_worst}, f"Wrote {out}.", as_json)
