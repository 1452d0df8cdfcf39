"""Aya Vision: SigLIP tower, pixel shuffle of 2x2 patches in the connector."""

from vlmcompress.families.llava import Llava

FAMILY = Llava("aya_vision", connector_path=None, merge=2)
