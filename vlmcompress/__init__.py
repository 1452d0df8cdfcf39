"""Compress the visual tokens of HuggingFace vision-language models.

```python
from vlmcompress import patch
handle = patch(model, keep=0.1)   # 576 visual tokens become 58; model.generate stays as it was
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmcompress.core.config import CompressionConfig, StageConfig
    from vlmcompress.core.errors import (
        AlreadyPatchedError,
        CacheMismatchError,
        CheckpointError,
        ConfigError,
        ConfigTypeError,
        EvidenceError,
        MissingExtraError,
        MissingTextError,
        PlaceholderMismatchError,
        UnknownMethodError,
        UnsupportedInputError,
        UnsupportedModelError,
        VLMCompressError,
    )
    from vlmcompress.core.keep import AutoKeep
    from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
    from vlmcompress.hub import load_adapter
    from vlmcompress.live.handle import Handle
    from vlmcompress.live.patch import handle_of, patch

__version__ = "0.1.0"

_PLACES = {
    "core.config": ("CompressionConfig", "StageConfig"),
    "core.errors": (
        "AlreadyPatchedError",
        "CacheMismatchError",
        "CheckpointError",
        "ConfigError",
        "ConfigTypeError",
        "EvidenceError",
        "MissingExtraError",
        "MissingTextError",
        "PlaceholderMismatchError",
        "UnknownMethodError",
        "UnsupportedInputError",
        "UnsupportedModelError",
        "VLMCompressError",
    ),
    "core.keep": ("AutoKeep",),
    "core.tokens": ("Evidence", "Segment", "VisualTokens"),
    "hub": ("load_adapter",),
    "live.handle": ("Handle",),
    "live.patch": ("handle_of", "patch"),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "AlreadyPatchedError",
    "AutoKeep",
    "CacheMismatchError",
    "CheckpointError",
    "CompressionConfig",
    "ConfigError",
    "ConfigTypeError",
    "Evidence",
    "EvidenceError",
    "Handle",
    "MissingExtraError",
    "MissingTextError",
    "PlaceholderMismatchError",
    "Segment",
    "StageConfig",
    "UnknownMethodError",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "VLMCompressError",
    "VisualTokens",
    "handle_of",
    "load_adapter",
    "patch",
]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers' generation take seconds."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted({*globals(), *__all__})
