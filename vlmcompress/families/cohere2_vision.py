"""Cohere2 Vision (Command A Vision): SigLIP tower, pixel shuffle of 2x2 patches in the connector."""

from vlmcompress.families.base import Family

FAMILY = Family("cohere2_vision", merge=2)
