"""Kimi K2.5: packed MoonViT, temporal mean and 2x2 merge (raster), 1-D positions."""

from vlmcompress.families.base import GridFamily
from vlmcompress.families.towers import PackedTower

FAMILY = GridFamily("kimi_k25", merge=2, own_tower=PackedTower(layers_path="layers", fused=False))
