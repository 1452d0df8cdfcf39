"""What is timed: a model, what it is asked, and the method under which it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from eval_harness.clock import Clock
from eval_harness.requests import Request
from eval_harness.stages import Parts

NONE = "none"
"""In the place of a method: the unpatched model beside itself, which tells the noise."""

Keep: TypeAlias = float | int | str | None


@dataclass(frozen=True)
class Subject:
    """What is timed: a model and what it is asked.

    Attributes:
        model: unpatched, unless inside `patched`.
        given: a request, or tensors.
        clock: of the model's device.
        parts: the model's.
        clip: as `patch` takes it.
    """

    model: Any
    given: dict[str, Tensor] | Request
    clock: Clock
    parts: Parts
    clip: Any = None

    def inputs(self) -> Mapping[str, Any]:
        """What the model is called with."""
        return self.given.inputs(self.model) if isinstance(self.given, Request) else self.given

    def processed(self) -> tuple[Mapping[str, Any], float | None]:
        """What the model is called with, and the seconds that its processor took, if it ran."""
        if not isinstance(self.given, Request):
            return self.given, None
        made: list[Any] = []
        seconds = self.clock.time(lambda: made.append(self.inputs()))
        return made[0], seconds

    def prefill(self, inputs: Mapping[str, Any]) -> Any:
        """One call that ends with the first token's logits."""
        return self.model(**inputs, use_cache=True, logits_to_keep=1)

    def patched(self, configs: Sequence[tuple[str, Keep]]) -> Any:
        """A context with a handle; with None where every configuration is the unpatched model."""
        from vlmcompress import patch

        first = next(((method, keep) for method, keep in configs if method != NONE), None)
        if first is None:
            return nullcontext()
        processor = self.given.processor if isinstance(self.given, Request) else None
        return patch(self.model, first[0], keep=first[1], processor=processor, clip=self.clip)

    def describe(self) -> dict[str, Any]:
        """JSON-ready: size of the picture, rows and length of the prompt, pictures in it."""
        inputs = self.inputs()
        rows, length = inputs["input_ids"].shape
        known = self.given.describe() if isinstance(self.given, Request) else {"image_size": None}
        return {**known, "batch": rows, "prompt_tokens": length}


def off(handle: Any) -> Any:
    """A context in which calls run uncompressed; `handle` may be None."""
    return nullcontext() if handle is None else handle.disabled()


@contextmanager
def under(handle: Any, method: str, keep: Keep) -> Iterator[None]:
    """Calls run under a method, or uncompressed under `NONE`."""
    if method == NONE:
        with off(handle):
            yield
    else:
        handle.set(method=method, keep=keep)
        yield
