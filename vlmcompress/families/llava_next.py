"""LLaVA-NeXT (1.6): LLaVA with AnyRes."""

from vlmcompress.families.anyres import AnyRes

FAMILY = AnyRes("llava_next")
