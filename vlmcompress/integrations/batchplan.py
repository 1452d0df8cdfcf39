"""What batch inference does with each row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from eval_harness.provenance import versions
from eval_harness.shelf import Shelved
from eval_harness.sweep.settings import Setting, identity_of
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.keep import parse_keep
from vlmcompress.hub.fetching import locate
from vlmcompress.methods import pipeline


@dataclass(frozen=True)
class BatchPlan:
    """What is done with each row.

    Attributes:
        model: a hub id, a folder that every machine sees, or `reference`.
        method: a name or a spec string; the tower's default where there is a budget alone.
        keep: its budget; without method, budget and adapter nothing is compressed.
        adapter: a trained one in place of the method: a folder that every machine sees, or a hub
            id.
        question: of rows that bring none.
        new_tokens: longest answer.
        dtype: of the model; `auto` takes the checkpoint's.
        positions: as `patch` takes them.
        seed: of methods that draw numbers.
        clip: for methods that read the question, as `vlmcompress generate --clip` takes it.
        batch: rows at a time in an actor.
    """

    model: str = "reference"
    method: str | None = None
    keep: float | int | str | None = None
    adapter: str | None = None
    question: str | None = None
    new_tokens: int = 64
    dtype: str = "auto"
    positions: str = "auto"
    seed: int = 0
    clip: str | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            ConfigError: for values that make no sense.
            UnknownMethodError: for an unknown method.
        """
        for name in ("new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.adapter is not None and self.method is not None:
            raise ConfigError(
                f"method is {self.method!r}, and the adapter {self.adapter!r} brings its own; give "
                "one of them."
            )
        if self.method is not None:
            pipeline.build(self.method, None if self.keep is None else parse_keep(self.keep))
        elif self.keep is not None:
            parse_keep(self.keep)

    def identity(self) -> dict[str, Any]:
        """JSON-ready, what answers depend on, sources of the methods included."""
        source = identity_of(Setting(self.method)) if self.method else ""
        if (trained := self.trained()) is not None:
            source = trained.digest
        return {**dataclasses.asdict(self), "source": source, "versions": versions()}

    def trained(self) -> Shelved | None:
        """The adapter.

        Raises:
            ConfigError, CheckpointError: for what is none.
        """
        return None if self.adapter is None else Shelved.of(locate(self.adapter))
