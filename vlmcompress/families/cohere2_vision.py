"""Cohere2 Vision (Command A Vision): SigLIP tower, 2x2 pixel shuffle in the connector."""

from vlmcompress.families.base import Family

FAMILY = Family("cohere2_vision", merge=2)
