"""GLM-4V: packed ViT with rotary patches, 2x2 convolution (merge order), M-RoPE."""

from vlmcompress.families.base import GridFamily
from vlmcompress.families.towers import PackedTower

FAMILY = GridFamily(
    "glm4v",
    tower_path="visual",
    merge=2,
    merge_order="consecutive",
    rope="mrope",
    own_tower=PackedTower(),
)
