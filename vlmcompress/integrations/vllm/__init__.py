r"""Compressed images in vLLM: a plugin that the engine loads by itself once both are installed.

```sh
vllm serve llava-hf/llava-1.5-7b-hf \
    --hf-overrides '{"vlmcompress": {"method": "vtc_cls", "keep": 0.1}}'
```

A model folder with a `vlmcompress_config.json`, as `vlmcompress.hub.merge` writes it, needs no
option. Servers that were not told to compress run vLLM's own classes.
"""

from __future__ import annotations


def register() -> None:
    """The entry point `vllm.general_plugins`, called in every process of the engine."""
    from vllm import ModelRegistry

    from vlmcompress.integrations.vllm.registry import attach

    attach(ModelRegistry)


__all__ = ["register"]
