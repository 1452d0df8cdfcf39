"""Where the connector of a vision-language model is, as a module that can be trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmcompress.core.errors import UnsupportedModelError

#: Paths from the base model: most families, Kimi, the mergers inside Qwen's and GLM's towers, and
#: Ovis, whose tower ends in a distribution over rows of a table.
_PATHS = ("multi_modal_projector", "mm_projector", "visual.merger", "visual_embeddings_table")


def connector_name(model: Any) -> str:
    """Full name, in the outer model, of the module that maps tower states to rows of the LLM.

    Raises:
        UnsupportedModelError: when none of the known ones is there.
    """
    modules: dict[str, nn.Module] = dict(model.base_model.named_modules())
    found = next((path for path in _PATHS if path in modules), None)
    if found is None:
        raise UnsupportedModelError(
            f"The connector of {type(model).__name__} is none of {', '.join(_PATHS)}; train the "
            "language model alone."
        )
    return next(name for name, module in model.named_modules() if module is modules[found])
