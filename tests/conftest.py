"""What tests of several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmcompress.reference import weights


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model's weights, or untrained ones of its shape where there are none."""
    if (weights.WEIGHTS_DIR / "config.json").exists():
        return weights.WEIGHTS_DIR
    from vlmcompress.reference.model import build_model
    from vlmcompress.reference.tokenizer import build_processor

    folder = tmp_path_factory.mktemp("weights")
    build_model().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder
