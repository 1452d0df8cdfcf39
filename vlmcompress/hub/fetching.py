"""Adapters by name: a folder of this machine, or a repository of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from vlmcompress.core.config import CONFIG_NAME, CompressionConfig
from vlmcompress.core.errors import ConfigError
from vlmcompress.hub.folder import CARD, part_names


def locate(name: str | Path, **hub: Any) -> Path:
    """The folder of an adapter; one on the Hub is downloaded first.

    What is downloaded is the configuration and the files that it names, never code and never a
    pickle, and not the weights of a whole model that may lie beside them.

    Args:
        name: a folder, or a Hub id (`"user/name"`) where there is no such folder.
        hub: `revision`, `token`, `endpoint`, `cache_dir` and `local_files_only` of
            `huggingface_hub.snapshot_download`.

    Raises:
        ConfigError: when there is neither, or the Hub cannot be reached.
    """
    if isinstance(name, Path) or Path(name).is_dir() or not is_repo_id(name):
        return Path(name)
    try:
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG_NAME], **hub))
        if not (folder / CONFIG_NAME).is_file():
            return folder  # `read` says what is missing
        names = part_names(CompressionConfig.load(folder))
        wanted = [each for each in names if each != CARD]
        # A snapshot is called by its commit, so that all files are those of one.
        hub["revision"] = folder.name
        return Path(snapshot_download(name, allow_patterns=wanted, **hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{name!r} is no folder here and could not be had from the Hub ({error}). Name a "
            "folder that holds an adapter, or a repository that does."
        ) from error


def is_repo_id(name: str) -> bool:
    """Whether a text can be the id of somebody's repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1
