"""Compression methods, one file each, and the contracts they implement."""

from vlmcompress.methods.base import (
    Method,
    Needs,
    TokenCompressor,
    TokenPruner,
)
from vlmcompress.methods.decoder.base import LayerReducer
from vlmcompress.methods.prompt.base import PromptCompressor
from vlmcompress.methods.registry import create, get, names
from vlmcompress.methods.tower.base import TowerReducer
from vlmcompress.methods.trained import LearnedCompressor

__all__ = [
    "LayerReducer",
    "LearnedCompressor",
    "Method",
    "Needs",
    "PromptCompressor",
    "TokenCompressor",
    "TokenPruner",
    "TowerReducer",
    "create",
    "get",
    "names",
]
