"""Trained adapters against each other, and against methods without training, at equal counts.

A part is one method or adapter in one world at one number of tokens. All answer the same questions,
so that every difference is paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval_harness import asking, comparison
from eval_harness.asking import FULL, Asking, Cell, Entry, tokens_left
from eval_harness.comparison import digest, subject
from eval_harness.paired import estimated, right_of
from eval_harness.provenance import source, versions
from eval_harness.resume import Part, measured
from eval_harness.shelf import LORA, Shelved, shelved
from vlmcompress import hub
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.keep import count
from vlmcompress.reference.weights import WEIGHTS_DIR
from vlmcompress.training.measure import Measurable

BUDGETS: tuple[float | int, ...] = (0.1, 0.05, 8, 1)
METHODS = (
    *("random", "uniform", "pool", "vtc_cls", "hired", "visionzip", "scope", "divprune"),
    *("tome", "vqtoken"),
)
"""Without training; the best of them at each count is what adapters are compared with."""
_MODE = "auto"
_ADAPTER = "adapter"


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        questions: {world: questions, all kinds alike}.
        shelf: folder of adapters' folders.
        methods: names without training, `random` among them.
        budgets: shares or counts of an image's tokens.
        seeds: runs of random methods.
        seed: of random methods and of the bootstrap.
        batch: questions at a time.
    """

    questions: dict[str, int]
    shelf: Path
    methods: tuple[str, ...] = METHODS
    budgets: tuple[float | int, ...] = BUDGETS
    seeds: int = 3
    seed: int = 0
    batch: int = 64

    def size(self, weights: str | Path = WEIGHTS_DIR) -> int:
        """How many parts `compare` measures."""
        of = tokens_of_an_image(Path(weights))
        return len(parts(self, shelved(self.shelf), of, Path(weights)))

    def asking(self, tokens: int) -> comparison.Plan:
        """How methods without training are asked at one number of tokens."""
        return comparison.Plan(
            self.questions,
            self.methods,
            keeps=(tokens,),
            positions=(_MODE,),
            seeds=self.seeds,
            seed=self.seed,
            batch=self.batch,
        )


def counts(plan: Plan, adapters: list[Shelved], of: int) -> list[int]:
    """Numbers of tokens to compare at: the budgets', and those of adapters that meet none."""
    wanted = {count(budget, of) for budget in plan.budgets}
    for adapter in adapters:
        if all(adapter.keep_for(tokens, of) is None for tokens in wanted):
            wanted |= adapter.ends(of)
    return sorted(wanted, reverse=True)


def compare(
    plan: Plan,
    folder: str | Path,
    *,
    weights: str | Path = WEIGHTS_DIR,
    processes: int = 2,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Ask every method and every adapter; what was stopped goes on.

    Args:
        plan: what to ask.
        folder: each finished part is kept there, and used again if it belongs to the same weights,
            plan, versions, source file of the method and files of the adapter.
        weights: folder of a model that knows the scenes.
        processes: one-thread processes.
        progress: called with the name of each part that is there.

    Returns:
        JSON-ready, estimates as [mean, low, high] in shares: `weights` (SHA-256), `plan`,
        `versions`, `machine`, `tokens` (of an image), `adapters` {name: {method, kind,
        trained_keep, command}}, `refused`, and `worlds` {world: {questions, images, full, blind,
        at {tokens: {best (of the methods without training), tuned {method: its adapter with
        LoRA alone}, rows {name: {tokens (really left, a mean), accuracy, over_best, over_full,
        over_own (its method without training, where that was asked), over_lora (for trained
        weights: the one of `tuned`, where there is one)}}}}}}; differences are paired by question.

    Raises:
        ConfigError: for a shelf without adapters, or one with a method's name.
    """
    adapters, tokens = shelved(plan.shelf), tokens_of_an_image(Path(weights))
    twice = {adapter.name for adapter in adapters} & set(plan.methods)
    if twice:
        raise ConfigError(f"{', '.join(sorted(twice))}: an adapter's folder and a method; rename.")
    asked = parts(plan, adapters, tokens, Path(weights))
    answers = measured(asked, folder, processes=processes, progress=progress)
    worlds = {w: _world(plan, w, adapters, tokens, answers) for w in plan.questions}
    return {
        "weights": digest(Path(weights) / "model.safetensors"),
        "plan": {
            "questions": plan.questions,
            "methods": list(plan.methods),
            "budgets": list(plan.budgets),
            **{name: getattr(plan, name) for name in ("seeds", "seed", "batch")},
        },
        "versions": versions(),
        "machine": answers[_name(next(iter(plan.questions)), FULL)]["machine"],
        "tokens": tokens,
        "adapters": {adapter.name: adapter.describe() for adapter in adapters},
        "refused": [
            {"part": name, "why": row["refused"]}
            for name, row in answers.items()
            if row.get("refused")
        ],
        "worlds": worlds,
    }


def parts(plan: Plan, adapters: list[Shelved], of: int, weights: Path) -> list[Part]:
    """One part per world for the model alone, and one per world, count and row."""
    shared = {
        "weights": digest(weights / "model.safetensors"),
        "versions": versions(),
        **{name: getattr(plan, name) for name in ("seeds", "seed", "batch")},
    }
    found = []
    for world, n in plan.questions.items():
        common = {**shared, "questions": n}
        bare = plan.asking(of)
        found.append(
            Part(_name(world, FULL), common, comparison.ask_method, (world, FULL, bare, weights))
        )
        for tokens in counts(plan, adapters, of):
            for method in plan.methods:
                identity = {**common, "tokens": tokens, "source": source(method)}
                arguments = (world, method, tokens, plan, weights)
                found.append(Part(_name(world, method, tokens), identity, ask_method, arguments))
            for adapter in adapters:
                keep = adapter.keep_for(tokens, of)
                if keep is not None:
                    files = {**common, "keep": keep, "files": adapter.digest}
                    where = (world, adapter.folder, keep, plan, weights)
                    name = _name(world, adapter.name, tokens)
                    found.append(Part(name, files, ask_adapter, where))
    return found


def ask_method(world: str, method: str, tokens: int, plan: Plan, weights: Path) -> dict[str, Any]:
    """Ask all questions of a world under a method that leaves so many tokens of an image.

    Returns:
        `right`, a string of 0 and 1 per run, `tokens` really left, and `refused`, the reason; one
        of the first and the last is None.
    """
    questions = plan.asking(tokens)
    found = comparison.ask_method(world, method, questions, weights)
    refused = found["refused"].get(_MODE, {}).get(str(tokens))
    if refused is not None:
        return {"right": None, "tokens": None, "refused": refused}
    model, processor, asked, clip = subject(world, plan.questions[world], "test", weights)
    left = tokens_left(model, processor, method, tokens, asked[: plan.batch], clip)
    return {"right": found["right"][_MODE][str(tokens)], "tokens": left, "refused": None}


def ask_adapter(
    world: str, folder: Path, keep: float | int, plan: Plan, weights: Path
) -> dict[str, Any]:
    """Ask all questions of a world with an adapter; see `ask_method`."""
    import torch

    torch.set_num_threads(1)
    model, processor, asked, clip = subject(world, plan.questions[world], "test", weights)
    found = Measurable.of(folder)
    entry, cell = Entry.of(found.trained), Cell(found.positions, _ADAPTER, keep)
    options = {"processor": processor, "clip": clip}
    hub.load(model, folder, **options).remove()  # what it has trained stays
    try:
        answers = asking.ask(
            model,
            processor,
            asked,
            Asking({_ADAPTER: entry}, (keep,), (found.positions,), plan.seeds, controls=False),
            batch_size=plan.batch,
            seed=plan.seed,
            new_tokens=comparison.NEW_TOKENS,
            reuse_tower=not found.learns,
            clip=clip,
        )
        left = tokens_left(model, processor, found.trained, keep, asked[: plan.batch], clip)
    finally:
        hub.unload(model)
    right = ["".join("01"[int(bit)] for bit in run) for run in answers.right[cell]]
    return {"right": right, "tokens": left, "refused": None}


def tokens_of_an_image(weights: Path) -> int:
    """Visual tokens that the uncompressed model is given for an image of the scenes."""
    from transformers import LlavaProcessor

    from vlmcompress.reference.data import samples

    processor: Any = LlavaProcessor.from_pretrained(weights)
    (sample,) = samples("test", 1)
    ids = processor(text="<image>", images=[sample.image], return_tensors="pt")["input_ids"]
    return int((ids == processor.image_token_id).sum())


def _world(
    plan: Plan, world: str, adapters: list[Shelved], of: int, answers: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything about one world, with one resampling."""
    bare = answers[_name(world, FULL)]
    full, blind = (right_of([bare[name]]) for name in ("full", "blind"))
    kinds = np.array(bare["kinds"])
    values: dict[str, Any] = {"full": full, "blind": blind}
    best: dict[str, str] = {}
    tuned: dict[str, dict[str, str]] = {}
    left: dict[str, dict[str, float]] = {}
    for tokens in map(str, counts(plan, adapters, of)):
        rows = dict(_rows(plan, world, adapters, tokens, answers))
        right = {name: right_of(row["right"]) for name, row in rows.items()}
        free = {name: _mean(right[name], kinds) for name in plan.methods if name in right}
        best[tokens] = max(free, key=lambda name: free[name])
        left[tokens] = {name: row["tokens"] for name, row in rows.items()}
        own = {a.name: right[a.method] for a in adapters if a.method in free}
        alone = tuned[tokens] = {
            a.method: a.name for a in adapters if a.kind == LORA and a.name in right
        }
        lora = {a.name: right[alone[a.method]] for a in adapters if _beside(a, alone)}
        values[tokens] = {
            name: {
                "accuracy": row,
                "over_best": row - right[best[tokens]],
                "over_full": row - full,
                **({"over_own": row - own[name]} if name in own else {}),
                **({"over_lora": row - lora[name]} if name in lora else {}),
            }
            for name, row in right.items()
        }
    told = estimated(bare, values, plan.seed)
    return {
        "questions": len(full),
        "images": len(set(bare["scenes"])),
        "full": told["full"],
        "blind": told["blind"],
        "at": {
            tokens: {
                "best": best[tokens],
                "tuned": tuned[tokens],
                "rows": {n: {"tokens": left[tokens][n], **row} for n, row in told[tokens].items()},
            }
            for tokens in best
        },
    }


def _rows(
    plan: Plan, world: str, adapters: list[Shelved], tokens: str, answers: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Name and answers of everything that was asked at a count and not refused."""
    for name in (*plan.methods, *(adapter.name for adapter in adapters)):
        row = answers.get(_name(world, name, tokens))
        if row is not None and row["right"] is not None:
            yield name, row


def _beside(adapter: Shelved, alone: Mapping[str, str]) -> bool:
    """Whether an adapter has more than LoRA, and another of its method has that alone."""
    return adapter.kind != LORA and adapter.method in alone


def _mean(row: np.ndarray, kinds: np.ndarray) -> float:
    """Unweighted mean over kinds."""
    return float(np.mean([row[kinds == kind].mean() for kind in np.unique(kinds)]))


def _name(*words: object) -> str:
    """Of a part, as a file is named."""
    return "-".join(str(word) for word in words)
