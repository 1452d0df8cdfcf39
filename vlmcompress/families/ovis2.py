"""Ovis2: patches in 2x2 squares become distributions over a visual vocabulary, then embeddings."""

from vlmcompress.families.base import Family

FAMILY = Family("ovis2", connector_path="visual_embeddings_table", merge=2)
