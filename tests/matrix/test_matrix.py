"""The full matrix, one test per cell (`make test-matrix`)."""

from __future__ import annotations

import pytest

from tests.matrix.cells import Cell, cells
from tests.seam import kernels
from tests.seam.equalities import CHECKS, world


@pytest.mark.matrix
@pytest.mark.parametrize("cell", cells(), ids=str)
def test_cell(cell: Cell):
    if reason := kernels.missing(cell.kernel):
        pytest.skip(reason)
    CHECKS[cell.equality](world(cell.family, cell.kernel, cell.dtype), cell.method)
