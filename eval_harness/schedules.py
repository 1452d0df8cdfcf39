"""An adaptive method inside the language model against fixed schedules that keep as much."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval_harness import machine, statistics
from eval_harness.asking import BLIND_CELL, FULL_CELL, Asking, Cell, Entry, Sample, ask, prompt_of
from vlmcompress.core.costs import layered_flops, prefill_flops
from vlmcompress.core.errors import ConfigError
from vlmcompress.methods import create
from vlmcompress.methods.decoder.base import LayerReducer

#: Fixed schedules, and whether they drop at each of the adaptive method's sites or at the first.
FIXED = (("fastv", False), ("pyramiddrop", True), ("random_layer", True), ("uniform_layer", True))
#: Of the interval that an average is searched in.
_HALVINGS = 30


@dataclass(frozen=True)
class Spent:
    """What a method spends on questions.

    Attributes:
        tokens: [questions, layers] visual tokens in each layer's attention.
        text: [questions] text tokens.
    """

    tokens: np.ndarray
    text: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """[questions] mean over layers of the share of visual tokens."""
        means: np.ndarray = self.tokens.mean(1) / self.tokens[:, 0]
        return means

    def flops(self, config: Any) -> float:
        """FLOPs of the language model's prefill by formula, relative to all tokens.

        Raises:
            ConfigError: where the configuration describes no stack whose costs are known.
        """
        spent = whole = 0
        alike = Counter(zip(map(tuple, self.tokens.tolist()), self.text.tolist(), strict=True))
        for (tokens, text), times in alike.items():
            lengths = [(n + text, n + text) for n in tokens]
            mine, full = layered_flops(config, lengths), prefill_flops(config, tokens[0] + text)
            if mine is None or full is None:
                raise ConfigError("The FLOPs of this language model are not known by formula.")
            spent, whole = spent + times * mine, whole + times * full
        return spent / whole


@torch.no_grad()
def spent(
    model: Any, processor: Any, method: LayerReducer, samples: Sequence[Sample], batch_size: int
) -> Spent:
    """Count the tokens that go through the layers, question by question."""
    from vlmcompress import patch

    tokens, text = [], []
    with patch(model, method) as handle:
        for start in range(0, len(samples), batch_size):
            asked = samples[start : start + batch_size]
            inputs = processor(
                text=[prompt_of(processor, s.question, 1) for s in asked],
                images=[s.image for s in asked],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device, model.dtype)
            model(**inputs, use_cache=False, logits_to_keep=1)
            record = handle.last
            assert record is not None  # the call has just been made
            found = np.array(record.layer_tokens).T
            tokens.append(found)
            text.append(inputs["attention_mask"].sum(1).cpu().numpy() - found[:, 0])
    return Spent(np.concatenate(tokens), np.concatenate(text))


def fixed(method: LayerReducer, share: float) -> list[LayerReducer]:
    """Fixed schedules at the sites of an adaptive method that keep a share on average.

    Args:
        method: with `layers`.
        share: mean over layers.
    """
    layers = tuple(method.options()["layers"])
    made = []
    for name, everywhere in FIXED:
        schedule = create(name, layers=layers if everywhere else layers[:1], average_keep=share)
        assert isinstance(schedule, LayerReducer)  # FIXED names no others
        made.append(schedule)
    return made


def against_schedules(
    model: Any,
    processor: Any,
    method: LayerReducer | Sequence[LayerReducer],
    samples: Iterable[Sample],
    *,
    layers: Mapping[str, Sequence[int]] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    new_tokens: int = 6,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Ask questions under an adaptive method and under fixed schedules of equal average.

    Args:
        model: an unpatched VLM; unpatched again afterwards.
        processor: with a chat template.
        method: inside the language model, with thresholds of its own and `layers`; several of one
            kind, such as those of several trainings, count as runs of it.
        samples: questions; those of one image should follow each other.
        layers: {fixed schedule: its layers}, where they were tuned; each then has the FLOPs of the
            adaptive method. Otherwise all have its layers and its average.
        batch_size: questions at a time.
        seed: of random dropping and of the bootstrap.
        new_tokens: longest answer.
        progress: called with a line of text after each batch.

    Returns:
        JSON-ready: `questions`, `images`, `average_keep` and its `spread` (5th and 95th percentile
        over questions), `left` (tokens in each layer on average), `tokens` (of an image),
        `accuracy` {method: {mean, low, high}}, `difference` (the adaptive method minus each other
        one, paired), `flops` {method: relative to all tokens}, `full`, `over_full`, `blind`,
        `by_kind` {method: {kind: float}}, `seed`, `machine`.
    """
    asked = list(samples)
    runs = [method] if isinstance(method, LayerReducer) else list(method)
    config = model.config.get_text_config()
    mine = joined(spent(model, processor, run, asked, batch_size) for run in runs)
    others = (
        fixed(runs[0], float(mine.shares.mean()))
        if layers is None
        else [at_equal_flops(name, row, mine, config) for name, row in layers.items()]
    )
    own_names = [f"{run.name} {i}" for i, run in enumerate(runs)]
    entries = dict(zip(own_names, map(Entry.of, runs), strict=True))
    plan = Asking(entries | {m.name: Entry.of(m) for m in others}, (None,), ("auto",))
    answers = ask(
        model,
        processor,
        asked,
        plan,
        batch_size=batch_size,
        seed=seed,
        new_tokens=new_tokens,
        progress=progress,
    )
    depth, name = mine.tokens.shape[1], runs[0].name
    told = {n: answers.right[Cell("auto", n, None)][0].astype(float) for n in plan.entries}
    right = {name: np.mean([told[own] for own in own_names], axis=0)}
    right |= {m.name: told[m.name] for m in others}
    full, blind = (answers.right[cell][0].astype(float) for cell in (FULL_CELL, BLIND_CELL))
    kinds = np.array([s.kind for s in asked])
    scenes = np.array([s.scene_id for s in asked])
    own = right[name]
    gaps = {m.name: own - right[m.name] for m in others}
    rows = [*right.values(), *gaps.values(), full, own - full, blind]
    found = iter(e.to_dict() for e in statistics.means_over_kinds(rows, kinds, scenes, seed=seed))
    flops = {name: mine.flops(config)}
    flops |= {m.name: scheduled(m, mine, depth).flops(config) for m in others}
    return {
        "questions": len(asked),
        "images": len(set(scenes.tolist())),
        "average_keep": float(mine.shares.mean()),
        "spread": [float(x) for x in np.quantile(mine.shares, (0.05, 0.95))],
        "left": mine.tokens.mean(0).tolist(),
        "tokens": int(mine.tokens[0, 0]),
        "accuracy": {name: next(found) for name in right},
        "difference": {name: next(found) for name in gaps},
        "full": next(found),
        "over_full": next(found),
        "blind": next(found),
        "flops": flops,
        "layers": {m.name: list(m.options()["layers"]) for m in others},
        "runs": [float(told[own].mean()) for own in own_names],
        "by_kind": {
            name: {str(kind): float(row[kinds == kind].mean()) for kind in np.unique(kinds)}
            for name, row in {"full": full, **right}.items()
        },
        "seed": seed,
        "machine": machine.describe(model),
    }


def joined(several: Iterable[Spent]) -> Spent:
    """What several runs spend on the same questions, one after the other."""
    every = list(several)
    tokens = np.concatenate([one.tokens for one in every])
    return Spent(tokens, np.concatenate([one.text for one in every]))


def at_equal_flops(name: str, layers: Sequence[int], like: Spent, config: Any) -> LayerReducer:
    """A fixed schedule at some layers whose prefill has the FLOPs of another method's.

    Raises:
        ConfigError: where the layers before its first site alone have more.
    """
    schedule = create(name, layers=tuple(layers), average_keep=1.0)
    found = matched(schedule, like, config) if isinstance(schedule, LayerReducer) else None
    if found is None:
        raise ConfigError(f"{name} before layers {list(layers)} cannot be as cheap; drop earlier.")
    return found


def matched(method: LayerReducer, like: Spent, config: Any) -> LayerReducer | None:
    """The schedule with the average at which its prefill has as many FLOPs; None where none has.

    Args:
        method: with `average_keep`.
        like: what the other one spends.
        config: of the language model.
    """
    wanted, depth = like.flops(config), like.tokens.shape[1]
    low, high, best = 0.0, 1.0, None
    for _ in range(_HALVINGS):
        average = (low + high) / 2
        tried = dataclasses.replace(method, average_keep=average)  # type: ignore[call-arg, type-var]
        try:
            found = scheduled(tried, like, depth).flops(config)
        except ConfigError:  # the layers before its first site alone cost more
            low = average
            continue
        low, high = (average, high) if found < wanted else (low, average)
        best = tried if found <= wanted else best
    return best


def scheduled(method: LayerReducer, like: Spent, depth: int) -> Spent:
    """What a fixed schedule spends on the same questions; its counts are known beforehand."""
    tokens = np.empty_like(like.tokens)
    for row, n in zip(tokens, like.tokens[:, 0].tolist(), strict=True):
        row[:] = n
        for site, count in zip(method.sites(depth), method.counts(n, None, depth), strict=True):
            row[site.layer :] = count
    return Spent(tokens, like.text)
