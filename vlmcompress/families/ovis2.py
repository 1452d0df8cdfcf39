"""Ovis2: patches in 2x2 squares become distributions over a visual vocabulary, then embeddings."""

from vlmcompress.families.base import Family
from vlmcompress.families.towers import Tower

FAMILY = Family(
    "ovis2",
    connector_path="visual_embeddings_table",
    connector_reads_states=False,
    merge=2,
    own_tower=Tower(layers_path="transformer.encoder.layers", attention="attention", norm=None),
)
