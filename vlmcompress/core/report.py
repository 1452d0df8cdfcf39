"""What a compressed call did, as a frozen record and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor

from vlmcompress.core.tokens import Segment


def _no_times() -> Mapping[str, float]:
    return {}


@dataclass(frozen=True)
class CallRecord:
    """One call with images.

    Attributes:
        method: spec of the pipeline that ran.
        positions: `original` or `contiguous`.
        tokens_before: visual tokens per image in the caller's prompt.
        tokens_after: visual tokens per image that the language model saw.
        kept: per image, kept rows of the uncompressed image, ascending.
        assignments: per image [n] row each uncompressed token went to, -1 where dropped; None if
            untouched.
        segments: per image the rectangles of tokens.
        batch: rows of the prompt.
        prompt_length: L, the caller's prompt length.
        short_length: L', what the language model saw.
        token_index: [B, L'] column of the caller's prompt of each short column; None if nothing
            was dropped.
        layers: tower layers whose attention was read.
        skipped_layers: tower layers that were not run because nobody reads them.
        tower_patches: patches left after each tower layer; empty without a stage inside the tower.
        prefill_flops: analytic FLOPs of the language model's prefill, compressed; None if unknown.
        prefill_flops_before: the same without compression.
        kv_bytes: bytes of keys and values in the cache after prefill; None without a cache.
        warnings: what the caller should know.
        clock: gives seconds by stage.
    """

    method: str
    positions: str
    tokens_before: tuple[int, ...]
    tokens_after: tuple[int, ...]
    kept: tuple[Tensor, ...]
    assignments: tuple[Tensor | None, ...]
    segments: tuple[tuple[Segment, ...], ...]
    batch: int
    prompt_length: int
    short_length: int
    token_index: Tensor | None = None
    layers: tuple[int, ...] = ()
    skipped_layers: int = 0
    tower_patches: tuple[int, ...] = ()
    prefill_flops: int | None = None
    prefill_flops_before: int | None = None
    kv_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    clock: Callable[[], Mapping[str, float]] = field(default=_no_times, repr=False, compare=False)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Per image (h, w) in tokens; of the whole view, where the image was also cut up."""
        return tuple(segments[0].grid[1:] for segments in self.segments)

    @property
    def times(self) -> Mapping[str, float]:
        """Seconds by stage, in the order of the path.

        `tower` includes `evidence`, which is also told alone; where rows are selected after the
        connector, `tower and connector` are one stage. Then `selection`, `connector`, `prefill`.
        """
        return self.clock()

    def lines(self) -> list[str]:
        """The record as text, one fact per line."""
        lines = [f"{_tokens(self)} ({self.method}, {self.positions} positions)"]
        lines.append(
            f"prompt: {self.prompt_length} -> {self.short_length} tokens, batch {self.batch}"
        )
        if self.prefill_flops is not None and self.prefill_flops_before is not None:
            before, after = _si(self.prefill_flops_before), _si(self.prefill_flops)
            lines.append(f"prefill: {before} -> {after}FLOPs (analytic)")
        if self.kv_bytes is not None:
            lines.append(f"KV cache after prefill: {self.kv_bytes:,} bytes")
        if self.layers:
            lines.append(f"tower layers read: {', '.join(map(str, self.layers))}")
        if self.skipped_layers:
            lines.append(f"tower layers skipped (nobody reads them): {self.skipped_layers}")
        if self.tower_patches:
            lines.append(f"patches after each tower layer: {_runs(self.tower_patches)}")
        if self.times:
            lines.append(
                "time: " + ", ".join(f"{k} {v * 1000:.1f} ms" for k, v in self.times.items())
            )
        return lines + [f"warning: {text}" for text in self.warnings]


@dataclass(frozen=True)
class Report:
    """Everything a handle can tell.

    Attributes:
        model: class name.
        method: spec of the configured pipeline.
        chosen: how the method was chosen.
        positions: resolved position mode.
        calls_with_images: compressed calls so far.
        calls_without_images: calls that carried no image.
        last: record of this thread's last compressed call.
    """

    model: str
    method: str
    chosen: str
    positions: str
    calls_with_images: int
    calls_without_images: int
    last: CallRecord | None = None

    def __str__(self) -> str:
        """Readable text, headed by the last call's token counts."""
        method = f"{self.method} ({self.chosen})"
        head = f"vlmcompress on {self.model}: {method}, {self.positions} positions"
        calls = f"calls: {self.calls_with_images} with images, {self.calls_without_images} without"
        if self.last is not None:
            return "\n".join([*self.last.lines(), head, calls])
        if self.calls_without_images:
            calls += "; no call carried an image, so nothing was compressed"
        else:
            calls += "; nothing has been compressed yet"
        return "\n".join([head, calls])


def _tokens(record: CallRecord) -> str:
    pairs = sorted(set(zip(record.tokens_before, record.tokens_after, strict=True)))
    if len(pairs) == 1:
        return f"{pairs[0][0]} -> {pairs[0][1]} tokens/image, {len(record.kept)} image(s)"
    before, after = sum(record.tokens_before), sum(record.tokens_after)
    return f"{before} -> {after} tokens over {len(record.kept)} images"


def _runs(counts: tuple[int, ...]) -> str:
    """Equal neighbours told once: `576 x6, 288 x17`."""
    runs = [(count, len(list(same))) for count, same in groupby(counts)]
    return ", ".join(f"{count} x{times}" if times > 1 else f"{count}" for count, times in runs)


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} P"
