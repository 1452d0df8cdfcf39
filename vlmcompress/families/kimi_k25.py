"""Kimi K2.5: packed MoonViT, temporal mean and 2x2 merge (raster), 1-D positions."""

from vlmcompress.families.base import GridFamily

FAMILY = GridFamily("kimi_k25", merge=2)
