"""The full matrix, one test per cell (`make test-matrix`)."""

from __future__ import annotations

import pytest

from tests.matrix.cells import Cell, cells
from tests.seam import kernels
from tests.seam.checks import check
from tests.seam.worlds import world
from vlmcompress import handle_of
from vlmcompress.live.state import state_of


@pytest.mark.matrix
@pytest.mark.parametrize("cell", cells(), ids=str)
def test_cell(cell: Cell):
    if reason := kernels.missing(cell.kernel):
        pytest.skip(reason)
    here = world(cell.family, cell.kernel, cell.dtype)
    try:
        check(cell.equality, here, cell.method)
    finally:  # other cells share the model
        if state_of(here.model) is not None:
            handle_of(here.model).remove()
