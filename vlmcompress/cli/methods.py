"""`vlmcompress methods`."""

from __future__ import annotations

from vlmcompress.cli.options import Json
from vlmcompress.cli.output import emit, table


def methods(as_json: Json = False) -> None:
    """List the compression methods: stage, evidence, kind of count, paper, and parity cases met."""
    from vlmcompress.methods.table import COLUMNS, cells, rows

    found = rows()
    emit({"methods": found}, table(list(COLUMNS.values()), [cells(row) for row in found]), as_json)
