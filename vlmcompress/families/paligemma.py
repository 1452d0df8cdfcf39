"""PaliGemma: SigLIP tower, linear connector, Gemma with bidirectional prefix, 1-based positions."""

from vlmcompress.families.base import Family

FAMILY = Family(
    "paligemma", connector_path="multi_modal_projector", position_offset=1, sees_ahead=True
)
