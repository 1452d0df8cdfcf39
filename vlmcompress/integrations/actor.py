"""What runs in a Ray actor: a patched model that answers batches of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import vlmcompress
from eval_harness.shelf import Shelved
from eval_harness.sweep.asker import Answer, Asked, Asker, Unusable
from eval_harness.sweep.questions import Picture
from eval_harness.sweep.settings import Setting
from vlmcompress.core.errors import ConfigError, UnsupportedInputError, VLMCompressError
from vlmcompress.core.extras import require
from vlmcompress.integrations import parts

if TYPE_CHECKING:
    from vlmcompress.integrations.batchplan import BatchPlan

#: The index of what is no answer and stops the run; Ray would wrap an error, and lose its kind.
_STOP = -1


@dataclass(frozen=True)
class _Setting:
    """What an `Asker` wants to know."""

    settings: tuple[Setting, ...]
    positions: str
    reuse_tower: bool = False
    adapter: Shelved | None = None


class Actor:
    """A patched model that answers batches of rows; Ray makes one in each actor."""

    def __init__(self, plan: BatchPlan, device: str) -> None:
        """Nothing is loaded before the first batch: what fails there stops the run with its reason.

        Args:
            plan: what is done with each row.
            device: of the model.
        """
        self._plan, self._device = plan, device
        self._ready: tuple[Asker, Setting] | None = None

    def _made(self) -> tuple[Asker, Setting]:
        """The patched model, and what it is asked under.

        Raises:
            VLMCompressError: for a model or a method that cannot be.
        """
        from vlmcompress.loading import clip_of, load

        plan = self._plan
        model, processor = load(plan.model, plan.dtype, self._device)
        clip = None if plan.clip is None else clip_of(plan.clip, model.device)
        trained = plan.trained()
        if trained is not None:
            setting = _of_adapter(trained, plan.keep)
            asked = _Setting((setting,), trained.found.positions, adapter=trained)
            return Asker(model, processor, asked, clip).__enter__(), setting
        method = "full"
        if plan.method is not None or plan.keep is not None:
            options = {"processor": processor, "positions": plan.positions, "clip": clip}
            keep: Any = plan.keep
            with vlmcompress.patch(model, plan.method, keep=keep, **options) as handle:
                method = handle.config.to_spec()
        setting = Setting(method)
        asker = Asker(model, processor, _Setting((setting,), plan.positions), clip)
        return asker.__enter__(), setting  # until the actor ends

    def __call__(self, batch: Any) -> Any:
        """Answers of a batch of rows, both of them tables of Arrow."""
        rows = batch.to_pylist()
        try:
            self._ready = self._ready or self._made()
            answers = self._answers(rows, *self._ready)
        except VLMCompressError as error:
            rows, answers = [{"index": _STOP, "id": ""}], [str(error)]
        told = [_told(row, one) for row, one in zip(rows, answers, strict=True)]
        arrow = require("pyarrow")
        return arrow.Table.from_pylist(told, schema=parts.schema())

    def _answers(
        self, rows: list[dict[str, Any]], asker: Asker, setting: Setting
    ) -> list[Answer | str]:
        """An answer for each row, or why there is none."""
        found: dict[int, Answer | str] = {}
        asked: dict[int, Asked] = {}
        for place, row in enumerate(rows):
            try:
                asked[place] = _asked(row)
            except UnsupportedInputError as error:
                found[place] = str(error)
        while asked:
            try:
                ready = asker.batch([*asked.values()], [setting])
                answers = asker.answers(ready, setting, self._plan.new_tokens, self._plan.seed)
            except Unusable as error:
                for place, why in [([*asked][i], why) for i, why in error.why.items()]:
                    found[place] = why
                    del asked[place]
            except VLMCompressError as error:
                if len(asked) == 1:
                    found[asked.popitem()[0]] = f"refused: {error}"
                    continue
                # Whichever it is of them fails alone.
                return [self._answers([row], asker, setting)[0] for row in rows]
            else:
                found.update(zip(asked, answers, strict=True))
                break
        return [found[place] for place in range(len(rows))]


def _of_adapter(adapter: Shelved, keep: float | int | str | None) -> Setting:
    """What an adapter is asked under.

    Raises:
        ConfigError: for a budget that it was not trained for, or none where it needs one.
    """
    if keep is not None and not adapter.trained_for(keep):
        raise ConfigError(
            f"keep is {keep!r}, and {adapter.name} was trained for {adapter.found.trained_keep}; "
            "give a budget inside."
        )
    own = adapter.found.keeps
    return Setting(adapter.found.trained, own[-1] if keep is None else keep, adapter=adapter.name)


def checked(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Answers as they come.

    Raises:
        ConfigError: where an actor says that it cannot work.
    """
    for row in rows:
        if row["index"] == _STOP:
            raise ConfigError(row["error"])
        yield row


def _asked(row: Mapping[str, Any]) -> Asked:
    """A row with its pictures open.

    Raises:
        UnsupportedInputError: for a row that cannot be asked.
    """
    if row["error"]:
        raise UnsupportedInputError(row["error"])
    pictures = [
        Picture(file, name) for file, name in zip(row["pictures"], row["names"], strict=True)
    ]
    return Asked(row["question"], tuple(p.open() for p in pictures), tuple(row["names"]))


def _told(row: Mapping[str, Any], answer: Answer | str) -> dict[str, Any]:
    """What is kept of a row; every row has the same fields."""
    about = {"index": int(row["index"]), "id": str(row["id"])}
    if isinstance(answer, str):
        return {**about, "answer": None, **dict.fromkeys(parts.COUNTS), "error": answer}
    counts = {name: getattr(answer, name) for name in parts.COUNTS}
    return {**about, "answer": answer.text, **counts, "error": None}
