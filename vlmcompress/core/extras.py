"""Optional packages: imported where they are used, through `require`, and named when missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from vlmcompress.core.errors import MissingExtraError

EXTRA_OF = {
    "accelerate": "eval",
    "bitsandbytes": "train",
    "datasets": "train",
    "filelock": "eval",
    "jinja2": "eval",
    "matplotlib": "eval",
    "open_clip": "clip",
    "peft": "train",
    "pyarrow": "eval",
    "rapidfuzz": "eval",
    "scipy": "eval",
    "timm": "timm",
    "vector_quantize_pytorch": "vq",
    "yaml": "eval",
}
"""Import name of each package that the library may do without, and the extra that brings it."""


def require(module: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: its full name, such as `scipy.stats`; the package stands in `EXTRA_OF`.

    Raises:
        MissingExtraError: when the package is not installed.
        ImportError: when it is and cannot be imported itself: installing it again is no remedy.
    """
    package = module.partition(".")[0]
    extra = EXTRA_OF[package]
    try:
        import_module(package)
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or package).partition(".")[0] != package:
            raise
        raise MissingExtraError(package, extra) from error
