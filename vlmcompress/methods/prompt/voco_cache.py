"""What is left of an image when VoCo tokens have read it, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmcompress.core.errors import CacheMismatchError, CheckpointError

FORMAT = 1
_HEADER = "vlmcompress_voco_cache"


@dataclass(frozen=True)
class VocoCache:
    """Keys and values of the compression tokens of one image, in every layer of one LLM.

    The keys have been turned by the places at which they were made, so the text that is asked later
    continues from `following`, and the cache stands where it was made: first in the prompt, or
    behind the same number of tokens.

    Attributes:
        keys: per layer [kv_heads, k, head_dim].
        values: per layer [kv_heads, k, head_dim].
        positions: [k] int64 position ids of the compression tokens.
        following: position id of the first token behind them.
        model: what names the model and the trained parts that made it; another one refuses it.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: Tensor
    following: int
    model: str

    @property
    def tokens(self) -> int:
        """Compression tokens."""
        return len(self.positions)

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @classmethod
    def of(
        cls, layers: Sequence[tuple[Tensor, Tensor]], rows: Tensor, positions: Tensor, model: str
    ) -> VocoCache:
        """The rows of compression tokens out of the cache of a prefill over the image.

        Args:
            layers: keys and values of each layer, [kv_heads, L, head_dim].
            rows: [L] bool, compression tokens.
            positions: [L] int64 position ids.
            model: see above.
        """
        rows = rows.bool()
        kept = [(k[:, rows.to(k.device)], v[:, rows.to(v.device)]) for k, v in layers]
        places = positions[rows.to(positions.device)].detach().cpu().long()
        keys, values = (
            tuple(part.contiguous() for part in parts) for parts in zip(*kept, strict=True)
        )
        return cls(keys, values, places, int(places.max()) + 1, model)

    def check(self, model: str, layers: int) -> None:
        """Refuse the cache of another model.

        Raises:
            CacheMismatchError: saying which one it is of.
        """
        if (self.model, len(self.keys)) != (model, layers):
            raise CacheMismatchError(
                f"This cache is of {self.model} with {len(self.keys)} layers, and the model is "
                f"{model} with {layers}; compress the image with this model."
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; a crash leaves either the old or the new one.

        Raises:
            CheckpointError: when it cannot be written.
        """
        path = Path(path)
        stored = {"positions": self.positions.cpu().contiguous()}
        for i, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            stored |= {f"keys.{i}": _plain(key), f"values.{i}": _plain(value)}
        header = {"format": FORMAT, "following": self.following, "model": self.model}
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(stored, str(partial), metadata={_HEADER: json.dumps(header)})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink()
            raise CheckpointError(
                f"{path} cannot be written ({error}); name a file in a folder that exists and has "
                "room."
            ) from error

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> VocoCache:
        """Read what `save` wrote.

        Raises:
            CheckpointError: for a file that is missing, broken, newer or of something else.
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
        return cls._read(path, header, found)

    @classmethod
    def _read(
        cls, path: str | Path, header: dict[str, object], found: dict[str, Tensor]
    ) -> VocoCache:
        following, model = header.get("following"), header.get("model")
        layers = sum(name.startswith("keys.") for name in found)
        wanted = {f"{part}.{i}" for part in ("keys", "values") for i in range(layers)}
        if not isinstance(following, int) or not isinstance(model, str) or not layers:
            raise CheckpointError(_unusable(path, "its header or its layers are missing"))
        if set(found) != wanted | {"positions"}:
            raise CheckpointError(_unusable(path, "keys and values are not of the same layers"))
        keys = tuple(found[f"keys.{i}"] for i in range(layers))
        values = tuple(found[f"values.{i}"] for i in range(layers))
        positions = found["positions"].cpu()
        if positions.ndim != 1 or any(
            t.ndim != 3 or t.shape[1] != len(positions) for t in keys + values
        ):
            raise CheckpointError(_unusable(path, "its tensors do not fit each other"))
        return cls(keys, values, positions, following, model)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _unusable(path: str | Path, why: object) -> str:
    return f"{path} holds no cache of VoCo tokens ({why}); give a file that `save` wrote."
