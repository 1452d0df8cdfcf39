"""Floating-point operations as torch counts them, under eager attention.

`torch.utils.flop_counter.FlopCounterMode` goes by the shapes of operators: a multiply-add is two,
and what is no matrix product or convolution counts as nothing. It does not see into fused attention
on CPU nor into attention packages, so the model is switched to eager attention while it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from eval_harness.clock import Clock, Mark
from eval_harness.stages import Parts, timed_call

_EAGER = "eager"


class _OperationClock(Clock):
    """A clock whose hand is moved by operations instead of time."""

    def __init__(self, device: Any, counter: FlopCounterMode) -> None:
        super().__init__(device)
        self._counter = counter

    def mark(self) -> Mark:
        """Operations so far."""
        return self._counter.get_total_flops()

    def seconds(self, start: Mark, end: Mark) -> float:
        """Operations between two marks."""
        return float(end - start)

    def time(self, call: Callable[[], Any]) -> float:
        """Operations of one call."""
        start = self.mark()
        call()
        return self.seconds(start, self.mark())


def count(prefill: Callable[[], Any], parts: Parts, device: Any) -> dict[str, int]:
    """Operations of one prefill, by stage.

    What a method computes for its evidence is in the tower's; what it computes after it, with the
    embedding look-up, is `selection`. Inside the language model both are in `prefill`.

    Args:
        prefill: one call of the model, whose attention is eager.
        parts: the model's.
        device: where it runs.

    Returns:
        `tower`, `selection`, `connector`, `prefill` and `total`.
    """
    with FlopCounterMode(display=False) as counter:
        stages, _, _ = timed_call(prefill, parts, _OperationClock(device, counter))
    total = stages.pop("ttft")
    return {**{stage: int(n) for stage, n in stages.items()}, "total": int(total)}


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """An unpatched model whose tower and language model attend eagerly; as before afterwards."""
    before = _implementations(model.config)
    model.set_attn_implementation(dict.fromkeys(before, _EAGER))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _implementations(config: Any) -> Mapping[str, str]:
    """{name of the part's configuration, "" of the whole: its kernel}."""
    found = {"": config._attn_implementation}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            found[name] = part._attn_implementation
    return found
