"""What a compressed call did, as a frozen record and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from vlmcompress.core.tokens import Segment


def _no_times() -> Mapping[str, float]:
    return {}


def _no_layers() -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class SoftMask:
    """How a site in the language model masked visual tokens in training.

    Attributes:
        layer: before which it did.
        weights: [B, R] product of the soft masks up to here, with its gradient; 0 for text.
        kept: [B, R] bool, visual tokens that would be left behind the site outside training.
        visual: [B, R] bool, all visual tokens.
    """

    layer: int
    weights: Tensor
    kept: Tensor
    visual: Tensor


@dataclass(frozen=True)
class CallRecord:
    """One call with images.

    Attributes:
        method: spec of the pipeline that ran.
        positions: `original` or `contiguous`; None without a language model.
        tokens_before: visual tokens per image in the caller's prompt.
        tokens_after: visual tokens per image that the language model saw, or that left a tower
            without one.
        kept: per image, kept rows of the uncompressed image, ascending.
        assignments: per image [n] row each uncompressed token went to, -1 where dropped; None if
            untouched.
        segments: per image the rectangles of tokens.
        batch: rows of the prompt.
        prompt_length: L, the caller's prompt length; None without a language model.
        short_length: L', what the language model saw; None likewise.
        token_index: [B, L'] column of the caller's prompt of each short column; None if nothing
            was dropped.
        layers: tower layers whose attention was read.
        skipped_layers: tower layers that were not run because nobody reads them.
        tower_patches: patches left after each tower layer; empty without a stage inside the tower.
        tower_keys: keys that a query looked at in each tower layer; empty where it looked at all.
        tower_run: tower layers that were run, where patches may leave early; None elsewhere.
        prefill_flops: analytic FLOPs of the language model's prefill, compressed; None if unknown.
        prefill_flops_before: the same without compression.
        tower_flops: analytic FLOPs of the tower's blocks, compressed; None where a language model
            follows.
        tower_flops_before: the same without compression.
        layer_lengths: rows in the attention and in the MLP of each layer of the language model;
            empty without a stage inside it.
        layer_tokens: per layer, visual tokens of each sample in its attention; empty likewise.
        layer_entrants: per layer [B, R], which of all visual tokens that entered the language model
            each row of its attention is, -1 for text, merged rows and padding; empty likewise.
        soft_masks: in training, the soft mask of each site in the language model.
        kv_bytes: bytes of keys and values in the cache after prefill; None without a cache.
        warnings: what the caller should know.
        ran: gives `layers_run`.
        clock: gives seconds by stage.
    """

    method: str
    positions: str | None
    tokens_before: tuple[int, ...]
    tokens_after: tuple[int, ...]
    kept: tuple[Tensor, ...]
    assignments: tuple[Tensor | None, ...]
    segments: tuple[tuple[Segment, ...], ...]
    batch: int
    prompt_length: int | None
    short_length: int | None
    token_index: Tensor | None = None
    layers: tuple[int, ...] = ()
    skipped_layers: int = 0
    tower_patches: tuple[int, ...] = ()
    tower_keys: tuple[int, ...] = ()
    tower_run: int | None = None
    prefill_flops: int | None = None
    prefill_flops_before: int | None = None
    tower_flops: int | None = None
    tower_flops_before: int | None = None
    layer_lengths: tuple[tuple[int, int], ...] = ()
    layer_tokens: tuple[tuple[int, ...], ...] = ()
    layer_entrants: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    soft_masks: tuple[SoftMask, ...] = field(default=(), repr=False, compare=False)
    kv_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    ran: Callable[[], tuple[int, ...]] = field(default=_no_layers, repr=False, compare=False)
    clock: Callable[[], Mapping[str, float]] = field(default=_no_times, repr=False, compare=False)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Per image (h, w) in tokens; of the whole view, where the image was also cut up."""
        return tuple(segments[0].grid[1:] for segments in self.segments)

    def kept_in(self, layer: int) -> tuple[Tensor, ...]:
        """Per image, rows of the uncompressed image that were in a layer's attention, ascending.

        Args:
            layer: of the language model; negative counts from the end.
        """
        if not self.layer_entrants:
            return self.kept
        there = self.layer_entrants[layer]
        there = there[there >= 0].sort().values
        first, kept = 0, []
        for rows in self.kept:
            mine = there[(there >= first) & (there < first + len(rows))] - first
            kept.append(rows[mine.to(rows.device)])
            first += len(rows)
        return tuple(kept)

    def at_layer(self, layer: int) -> CallRecord:
        """The same call as if only what got to a layer of the language model had been kept."""
        kept, assignments = self.kept_in(layer), []
        for n, rows in zip(self.tokens_before, kept, strict=True):
            there = rows.new_full((n,), -1)
            there[rows] = torch.arange(len(rows), device=rows.device)
            assignments.append(there)
        counts = tuple(len(rows) for rows in kept)
        return replace(self, kept=kept, assignments=tuple(assignments), tokens_after=counts)

    @property
    def average_keep(self) -> float:
        """Mean over the language model's layers of the share of visual tokens in their attention.

        Of those that entered it; 1 without a stage inside it.
        """
        if not self.layer_tokens or not sum(self.layer_tokens[0]):
            return 1.0
        total = sum(map(sum, self.layer_tokens))
        return total / (len(self.layer_tokens) * sum(self.layer_tokens[0]))

    @property
    def layers_run(self) -> tuple[int, ...]:
        """Layers of the language model that each forward ran, where rows may leave early.

        That of the prompt first, then those over its cache so far. Empty without an early exit.
        """
        return self.ran()

    @property
    def times(self) -> Mapping[str, float]:
        """Seconds by stage, in the order of the path.

        `tower` includes `evidence`, which is also told alone; where rows are selected after the
        connector, `tower and connector` are one stage. Then `selection`, `connector`, `prefill`.
        """
        return self.clock()

    def lines(self) -> list[str]:
        """The record as text, one fact per line."""
        lines = [f"{_tokens(self)} ({_with_positions(self.method, self.positions)})"]
        if self.prompt_length is not None:
            lines.append(
                f"prompt: {self.prompt_length} -> {self.short_length} tokens, batch {self.batch}"
            )
        if self.prefill_flops is not None and self.prefill_flops_before is not None:
            before, after = _si(self.prefill_flops_before), _si(self.prefill_flops)
            lines.append(f"prefill: {before} -> {after}FLOPs (analytic)")
        if self.tower_flops is not None and self.tower_flops_before is not None:
            before, after = _si(self.tower_flops_before), _si(self.tower_flops)
            lines.append(f"blocks of the tower: {before} -> {after}FLOPs (analytic)")
        if self.layer_tokens:
            shown = (max(counts) for counts in self.layer_tokens)
            lines.append(f"visual tokens in each layer: {_runs(tuple(shown))}")
            lines.append(f"mean over layers: {100 * self.average_keep:.1f} % of those that entered")
        if self.layers_run:
            first, *later = self.layers_run
            steps = f", {sum(later) / len(later):.1f} on average after it" if later else ""
            lines.append(f"layers run: {first} of {len(self.layer_lengths)} in prefill{steps}")
        if self.kv_bytes is not None:
            lines.append(f"KV cache after prefill: {self.kv_bytes:,} bytes")
        if self.layers:
            lines.append(f"tower layers read: {', '.join(map(str, self.layers))}")
        if self.skipped_layers:
            lines.append(f"tower layers skipped (nobody reads them): {self.skipped_layers}")
        if self.tower_run is not None:
            lines.append(f"tower layers run before patches left: {self.tower_run}")
        if self.tower_patches:
            lines.append(f"patches after each tower layer: {_runs(self.tower_patches)}")
        if self.tower_keys:
            lines.append(f"keys of a query in each tower layer: {_runs(self.tower_keys)}")
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
        positions: resolved position mode; None without a language model.
        calls_with_images: compressed calls so far.
        calls_without_images: calls that carried no image.
        last: record of this thread's last compressed call.
    """

    model: str
    method: str
    chosen: str
    positions: str | None
    calls_with_images: int
    calls_without_images: int
    last: CallRecord | None = None

    def __str__(self) -> str:
        """Readable text, headed by the last call's token counts."""
        method = f"{self.method} ({self.chosen})"
        head = f"vlmcompress on {self.model}: {_with_positions(method, self.positions)}"
        calls = f"calls: {self.calls_with_images} with images, {self.calls_without_images} without"
        if self.positions is None and self.calls_without_images:
            calls += " (to the blocks, past the tower's forward: not reduced)"
        if self.last is not None:
            return "\n".join([*self.last.lines(), head, calls])
        if self.calls_without_images:
            calls += "; no call carried an image, so nothing was compressed"
        else:
            calls += "; nothing has been compressed yet"
        return "\n".join([head, calls])


def _with_positions(method: str, positions: str | None) -> str:
    return method if positions is None else f"{method}, {positions} positions"


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
