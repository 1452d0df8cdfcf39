"""What all commands share: errors as one line, results as text or JSON, tables, progress."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from tqdm import tqdm


class Group(TyperGroup):
    """Commands whose expected errors end in a message on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        from vlmcompress.core.errors import VLMCompressError

        try:
            return super().invoke(ctx)
        except (VLMCompressError, OSError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error


def emit(results: Any, text: str, as_json: bool, out: Path | None = None) -> None:
    """Print results.

    Args:
        results: JSON-ready.
        text: the same for a reader.
        as_json: which of the two is printed.
        out: where the JSON is written in any case.
    """
    if out is not None:
        write(results, out)
    typer.echo(json.dumps(results, indent=2) if as_json else text)


def write(results: Any, path: Path) -> Path:
    """Write results as JSON, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell in ("", "-")


@contextmanager
def progress(description: str, total: int) -> Iterator[tqdm]:
    """A progress bar on stderr."""
    from tqdm import tqdm

    with tqdm(desc=description, total=total, leave=False) as bar:
        yield bar
