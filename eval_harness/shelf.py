"""A folder of trained adapters, and which numbers of tokens each may leave."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from vlmcompress.core.config import CompressionConfig
from vlmcompress.core.errors import CheckpointError, ConfigError
from vlmcompress.core.keep import count
from vlmcompress.core.trained import within
from vlmcompress.hub.folder import read
from vlmcompress.training.measure import Measurable
from vlmcompress.training.recipe import recipe_of

LORA = "LoRA"
"""The kind of adapters that train the language model and nothing else."""


@dataclass(frozen=True)
class Shelved:
    """An adapter on the shelf.

    Attributes:
        name: of its folder.
        folder: where it lies.
        found: what is run.
        command: that trained it.
    """

    name: str
    folder: Path
    found: Measurable
    command: str | None

    @classmethod
    def of(cls, folder: Path) -> Shelved:
        """The adapter in a folder.

        Raises:
            ConfigError, CheckpointError: for what is none.
        """
        found = Measurable.of(folder)
        return cls(folder.resolve().name, folder, found, recipe_of(folder).get("command"))

    @property
    def method(self) -> str:
        """Name of the method that decides how many tokens there are."""
        return CompressionConfig.from_spec(self.found.plain).stages[-1].method

    @property
    def kind(self) -> str:
        """What was trained."""
        learnt = "trained weights" * self.found.learns
        return " + ".join(filter(None, (learnt, LORA * self.found.lora)))

    def keep_for(self, tokens: int, of: int) -> float | int | None:
        """The budget that leaves so many tokens; None outside of what it was trained for.

        Args:
            tokens: wanted.
            of: tokens of a whole image.
        """
        assert self.found.trained_keep is not None  # `shelved` has seen to it
        low, high = self.found.trained_keep
        if isinstance(low, int):
            return tokens if low <= tokens <= high else None
        tried = (share for share in (low, high, tokens / of) if low <= share <= high)
        return next((share for share in tried if count(share, of) == tokens), None)

    def trained_for(self, keep: float | int | str) -> bool:
        """Whether a budget lies inside what it was trained for."""
        ends = self.found.trained_keep
        return ends is not None and not isinstance(keep, str) and within(keep, ends)

    def ends(self, of: int) -> set[int]:
        """Tokens at both ends of what it was trained for."""
        assert self.found.trained_keep is not None
        return {count(end, of) for end in self.found.trained_keep}

    @property
    def digest(self) -> str:
        """Of its configuration and weights; results and card may change."""
        made = sha256()
        for name in read(self.folder).files:
            if name.endswith((".safetensors", "config.json")):
                made.update(name.encode() + (self.folder / name).read_bytes())
        return made.hexdigest()[:12]

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "method": self.found.plain,
            "kind": self.kind,
            "trained_keep": list(self.found.trained_keep or ()),
            "command": self.command,
        }


def shelved(shelf: Path) -> list[Shelved]:
    """The adapters of a shelf that were trained for budgets, by name.

    Raises:
        ConfigError: for a shelf without one.
    """
    found = []
    for folder in sorted(path for path in shelf.iterdir() if path.is_dir()):
        try:
            adapter = Shelved.of(folder)
        except (ConfigError, CheckpointError):
            continue  # not finished, or nothing of ours
        if adapter.found.trained_keep is not None:
            found.append(adapter)
    if not found:
        raise ConfigError(f"{shelf} holds no adapter with a `trained_keep`; train one into it.")
    return found
