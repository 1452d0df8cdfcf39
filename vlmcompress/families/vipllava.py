"""ViP-LLaVA: LLaVA whose connector reads several tower layers, concatenated."""

from vlmcompress.families.llava import Llava

FAMILY = Llava("vipllava")
