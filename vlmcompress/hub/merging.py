"""LoRA folded into a model's weights, and the folder that serves them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vlmcompress.core.config import CompressionConfig
from vlmcompress.hub import lora
from vlmcompress.hub.about import describe
from vlmcompress.hub.cards import write_card
from vlmcompress.hub.saving import refuse_lora_in, save_config, save_stages
from vlmcompress.live.install import outer_model
from vlmcompress.live.patch import handle_of
from vlmcompress.live.state import state_of


def merge(model: Any, folder: str | Path | None = None) -> Any:
    """Fold the LoRA of a model into its weights, for serving without peft.

    A patch is taken off first: it hangs on modules that go. With `folder` the configuration that
    was in force is saved beside the merged weights, so that the folder is a model to serve and an
    adapter to load at once.

    ```python
    handle = hub.load(model, "adapters/lora-keep-0.1")
    merged = hub.merge(model, "merged")
    handle = hub.load(merged, "merged")       # or, later: from_pretrained("merged")
    ```

    Args:
        model: a PEFT model, or a transformers model that an adapter was loaded into.
        folder: for the merged model and its `vlmcompress_config.json`; the model must be patched.

    Returns:
        The transformers model, unpatched.

    Raises:
        ConfigError: when there is no LoRA in the model, or several.
        UnsupportedModelError: for quantised weights.
        VLMCompressError: with a folder, for a model that is not patched.
        CheckpointError: when it cannot be written, or weights are not finite once merged.
    """
    model = outer_model(model)
    lora.check_mergeable(model)
    saved = None if folder is None else _saved_stages(model, Path(folder))
    if state_of(model) is not None:
        handle_of(model).remove()
    lora.fold(model)
    if folder is not None and saved is not None:
        model.save_pretrained(folder)
        save_config(saved, Path(folder))
        about = describe(model, Path(folder).resolve().name)
        write_card(folder, dataclasses.replace(about, relation="finetune"))
    return model


def _saved_stages(model: Any, folder: Path) -> CompressionConfig:
    """What the stages of a patched model have learnt, written; refused where LoRA lies beside."""
    refuse_lora_in(folder, "the merged model, which carries none")
    return save_stages(handle_of(model), folder)
