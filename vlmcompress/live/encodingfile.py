"""Files of compressed images: encoded once, asked about in another process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmcompress.core.errors import CacheMismatchError, CheckpointError
from vlmcompress.core.tokens import Segment

if TYPE_CHECKING:
    from vlmcompress.live.encoded import Encoded

FORMAT = 1
_HEADER = "vlmcompress_encoding"
#: What an encoding may hold of every image.
_OPTIONAL = ("assignments", "heard", "whole")


def identity(model: Any) -> dict[str, Any]:
    """What an encoding must have in common with the model that it is asked with."""
    text = model.config.get_text_config()
    return {
        "type": model.config.model_type,
        "width": text.hidden_size,
        "layers": text.num_hidden_layers,
    }


def save(encoded: Encoded, made_by: Mapping[str, Any], path: str | Path) -> None:
    """Write one safetensors file; a crash leaves either the old or the new one.

    Args:
        encoded: the images.
        made_by: `identity` of the model that encoded them.
        path: of the file.

    Raises:
        CheckpointError: when it cannot be written.
    """
    path = Path(path)
    tensors = _tensors(encoded)
    header = {
        "format": FORMAT,
        "model": dict(made_by),
        "stacked": isinstance(encoded.output.pooler_output, Tensor),
        "lengths": list(encoded.lengths),
        "segments": [[_as_list(segment) for segment in image] for image in encoded.segments],
    }
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, str(partial), metadata={_HEADER: json.dumps(header)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise CheckpointError(
            f"{path} cannot be written ({error}); name a file in a folder that exists and has room."
        ) from error


def load(path: str | Path, wanted: Mapping[str, Any], device: torch.device) -> Encoded:
    """Read what `save` wrote.

    Args:
        path: of the file.
        wanted: `identity` of the model that is to be asked.
        device: where the images are wanted.

    Raises:
        CheckpointError: for a file that is missing, broken, newer or of something else.
        CacheMismatchError: for images that another model has encoded.
    """
    try:
        with safe_open(str(path), "pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(_unusable(path, error)) from error
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise CheckpointError(_unusable(path, "its header does not name its format"))
    if header["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {header['format']}, and this vlmcompress reads up to {FORMAT}; "
            "upgrade vlmcompress."
        )
    if header.get("model") != dict(wanted):
        raise CacheMismatchError(
            f"{path} holds images of {header.get('model')}, and the model is {dict(wanted)}; "
            "encode them with this model."
        )
    try:
        return _encoded(header, found)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(_unusable(path, f"it lacks {error}")) from error


def _tensors(encoded: Encoded) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for i, rows in enumerate(encoded.features):
        out |= {f"features.{i}": rows, f"kept.{i}": encoded.kept[i]}
        for name in _OPTIONAL:
            values = getattr(encoded, name)
            if values and values[i] is not None:
                out[f"{name}.{i}"] = values[i]
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in out.items()}


def _encoded(header: Mapping[str, Any], found: Mapping[str, Tensor]) -> Encoded:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from vlmcompress.live.encoded import Encoded, pooled

    images = range(len(header["lengths"]))
    rows: Any = pooled([found[f"features.{i}"] for i in images], header["stacked"])
    parts = {
        name: tuple(found.get(f"{name}.{i}") for i in images)
        for name in _OPTIONAL
        if name == "assignments" or f"{name}.0" in found
    }
    return Encoded(
        output=BaseModelOutputWithPooling(pooler_output=rows),
        lengths=tuple(header["lengths"]),
        kept=tuple(found[f"kept.{i}"] for i in images),
        segments=tuple(tuple(map(_as_segment, image)) for image in header["segments"]),
        evidence_layers=(),
        skipped_layers=0,
        **parts,  # type: ignore[arg-type]
    )


def _as_list(segment: Segment) -> list[Any]:
    return [segment.kind, list(segment.grid), segment.slice.start, segment.slice.stop]


def _as_segment(values: list[Any]) -> Segment:
    kind, (t, h, w), start, stop = values
    return Segment(kind, (t, h, w), slice(start, stop))


def _unusable(path: str | Path, why: object) -> str:
    return f"{path} holds no compressed images ({why}); give one that an encoding's `save` wrote."
