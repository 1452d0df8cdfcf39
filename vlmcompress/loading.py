"""Models, devices and dtypes by their names, as commands, actors and tables give them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from vlmcompress.core.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

REFERENCE = "reference"
"""The name under which everything finds the model that ships with the library."""

_DTYPES = ("float32", "bfloat16", "float16")


def dtype_of(name: str) -> torch.dtype:
    """A torch type by its name.

    Raises:
        ConfigError: for an unknown one.
    """
    import torch

    if name not in _DTYPES:
        raise ConfigError(f"dtype is {name!r}; allowed are {', '.join(_DTYPES)}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def device_of(name: str) -> torch.device:
    """A torch device; `auto` is the GPU where there is one.

    Raises:
        ConfigError: for an unknown one, or CUDA where there is none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r} and torch sees no GPU; use cpu or auto.")
    return device


def location(model: str) -> str:
    """The folder or hub id that `model` stands for.

    Raises:
        UnsupportedModelError: when the reference model's weights are not there.
    """
    if model != REFERENCE:
        return model
    from vlmcompress.reference import weights

    if not (weights.WEIGHTS_DIR / "config.json").exists():
        raise UnsupportedModelError(
            f"The reference model has no weights in {weights.WEIGHTS_DIR}; train them with "
            "`vlmcompress reference train` or name another model."
        )
    return str(weights.WEIGHTS_DIR)


def load(model: str, dtype: str = "float32", device: str = "auto") -> tuple[Any, Any]:
    """A model in evaluation mode and its processor.

    Args:
        model: a folder, a hub id or `reference`.
        dtype: `auto` takes the checkpoint's.
        device: where the model goes.

    Raises:
        UnsupportedModelError: when transformers cannot load it.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where, target = location(model), device_of(device)
    kind = "auto" if dtype == "auto" else dtype_of(dtype)
    try:
        with _quiet() if model == REFERENCE else nullcontext():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(where, dtype=kind)
            processor = AutoProcessor.from_pretrained(where)
    except (OSError, ValueError, SafetensorError) as error:
        raise UnsupportedModelError(f"{model!r} cannot be loaded: {error}") from error
    return loaded.to(target).eval(), processor


def clip_of(name: str, device: torch.device) -> Any:
    """What `patch(clip=...)` takes: a CLIP model with its tokenizer, or the reference's text head.

    Args:
        name: a folder, a hub id or `reference`.
        device: where it goes.

    Raises:
        UnsupportedModelError: when there is no CLIP model.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    try:
        if name == REFERENCE:
            from vlmcompress.reference.weights import load_text_head

            with _quiet():
                return load_text_head().to(device)
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "clip":
            raise ValueError(f"its model_type is {kind!r}; that of a CLIP model is 'clip'.")
        model: Any = CLIPModel.from_pretrained(name)
        return model.to(device).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise UnsupportedModelError(
            f"{name!r} cannot be loaded as a CLIP model: {error}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loaders' bars: the small model is there in a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
