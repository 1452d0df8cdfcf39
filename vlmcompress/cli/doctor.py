"""`vlmcompress doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmcompress.cli.options import Json
from vlmcompress.cli.output import emit


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder, a hub id, a model type such as 'llava', or 'reference'."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a model is made of, which methods it can run and why the others cannot.

    Only the configuration is read, never the weights. Without MODEL: the families and versions.
    The exit code is 1 for a model that cannot be compressed.
    """
    from vlmcompress import doctor as doctors
    from vlmcompress.loading import location

    if model is None:
        environment = doctors.environment()
        emit(environment.to_dict(), str(environment), as_json)
        return
    diagnosis = doctors.diagnose(doctors.config_of(location(model)))
    emit(diagnosis.to_dict(), str(diagnosis), as_json)
    if not diagnosis.supported:
        typer.echo(f"Error: {diagnosis.reason}", err=True)
        raise typer.Exit(1)
