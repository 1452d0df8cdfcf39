"""Compress the visual tokens of HuggingFace vision-language models.

```python
from vlmcompress import patch
handle = patch(model, keep=0.1)   # 576 visual tokens become 58; model.generate stays as it was
```
"""

from vlmcompress.core.config import CompressionConfig, StageConfig
from vlmcompress.core.errors import (
    AlreadyPatchedError,
    CacheMismatchError,
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
from vlmcompress.live.handle import Handle, handle_of
from vlmcompress.live.patch import patch

__version__ = "0.1.0"

__all__ = [
    "AlreadyPatchedError",
    "AutoKeep",
    "CacheMismatchError",
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
    "patch",
]
