"""Qwen2-VL: packed ViT with rotary patches, 2x2 merger (merge order), M-RoPE."""

from vlmcompress.families.base import GridFamily

FAMILY = GridFamily(
    "qwen2_vl", tower_path="visual", merge=2, merge_order="consecutive", rope="mrope"
)
