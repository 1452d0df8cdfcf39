"""The cells of the full matrix and how they are divided into shards."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tests.seam import matrix


@dataclass(frozen=True)
class Cell:
    """One equality of one method on one family, kernel and dtype."""

    family: str
    kernel: str
    dtype: str
    method: str
    equality: str

    def __str__(self) -> str:
        return f"{self.method}-{self.family}-{self.kernel}-{self.dtype}-{self.equality}"

    @property
    def exempt(self) -> str | None:
        """Why the equality does not exist here, None where it does."""
        return matrix.exempt(
            self.equality,
            method=self.method,
            family=self.family,
            kernel=self.kernel,
            dtype=self.dtype,
        )


def every_cell() -> list[Cell]:
    """All cells, exempt ones too, in an order in which a worker builds each model once.

    Which kernels and dtypes a method runs under on which family, `matrix.crossed` says.
    """
    return [
        Cell(family, kernel, dtype, method, equality)
        for kernel in matrix.KERNELS
        for dtype in matrix.DTYPES
        for family, method in matrix.everything()
        for equality in matrix.EQUALITIES
        if matrix.crossed(equality, method, family, kernel, dtype)
    ]


def cells() -> list[Cell]:
    """The cells that are run."""
    return [cell for cell in every_cell() if cell.exempt is None]


def parse_shard(text: str) -> tuple[int, int]:
    """`1/4` as (1, 4).

    Raises:
        ValueError: for anything that is no shard.
    """
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise ValueError(f"The shard is {text!r}; write 1/4 for the first of four.")


def in_shard(cell: Cell, shard: tuple[int, int]) -> bool:
    """Whether a cell belongs to a shard; new cells never move old ones to another."""
    index, count = shard
    digest = hashlib.sha256(str(cell).encode()).digest()
    return int.from_bytes(digest[:8], "big") % count == index - 1
