"""`vlmcompress methods`."""

from __future__ import annotations

from vlmcompress.cli.output import Json, emit, table


def methods(as_json: Json = False) -> None:
    """List the compression methods: where they act, what they look at, which paper they follow."""
    from vlmcompress.methods.table import COLUMNS, rows

    found = rows()
    cells = [[row[column] for column in COLUMNS] for row in found]
    emit({"methods": found}, table(COLUMNS, cells), as_json)
