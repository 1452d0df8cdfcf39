"""The public names: all there, imported on first use only."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vlmcompress


@pytest.mark.parametrize("name", vlmcompress.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(vlmcompress, name).__doc__
    assert name in dir(vlmcompress)


def test_every_lazy_name_is_public():
    assert sorted(vlmcompress._MODULE_OF) == sorted(vlmcompress.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'patsch'"):
        _ = vlmcompress.patsch


def test_import_alone_loads_neither_torch_nor_transformers():
    code = "import sys, vlmcompress; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
