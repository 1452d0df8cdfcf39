"""The command line, `vlmcompress`.

Commands import what they need when they run, print results to stdout (`--json` for machines) and
progress to stderr, and end with a code other than 0 when they fail.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vlmcompress.cli import (
    adapters,
    batch,
    bench,
    calibrate,
    demo,
    doctor,
    evaluation,
    generate,
    layerwise,
    lmms,
    methods,
    pareto,
    reference,
    report,
    retrieval,
    selection,
    sweep,
    train,
    tune,
)
from vlmcompress.cli.output import Group

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(demo.demo)
app.command()(methods.methods)
app.command()(generate.generate)
app.command()(batch.batch)
app.command()(doctor.doctor)
app.command()(bench.bench)
app.command()(selection.bench_selection)
app.command()(pareto.pareto)
app.command()(report.report)
app.command()(tune.tune)
app.command()(lmms.lmms_path)
evaluation.app.command()(sweep.run)
evaluation.app.command()(lmms.published)
evaluation.app.command()(retrieval.retrieval)
evaluation.app.command()(layerwise.schedules)
evaluation.app.command()(layerwise.adaptive)
evaluation.app.command()(adapters.adapter)
evaluation.app.command()(adapters.adapters)
app.add_typer(calibrate.app, name="calibrate")
app.add_typer(evaluation.app, name="eval")
app.add_typer(reference.app, name="reference")
app.add_typer(train.app, name="train")


def _version(wanted: bool) -> None:
    if wanted:
        from vlmcompress import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress the visual tokens of vision-language models."""
