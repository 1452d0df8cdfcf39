"""Methods inside the language model at equal averages of tokens per layer.

What a schedule costs is decided by the tokens that go through its layers, not by those that leave
the last one. So every schedule gets the same mean over layers, and drops at the layers of its paper
as far as that leaves room.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval_harness.asking import FULL
from eval_harness.comparison import RANDOM, ask_method, digest, subject
from eval_harness.comparison import Plan as Questions
from eval_harness.paired import estimated, right_of
from eval_harness.provenance import source, versions
from eval_harness.replay import built
from eval_harness.resume import Part, measured
from eval_harness.schedules import spent
from vlmcompress.core.config import CompressionConfig, StageConfig
from vlmcompress.core.errors import ConfigError
from vlmcompress.hub.folder import read
from vlmcompress.methods import registry
from vlmcompress.methods.decoder.base import LayerReducer
from vlmcompress.reference.weights import WEIGHTS_DIR

BUDGETS = (0.75, 0.5, 0.25)
#: What all are compared with, at the same budget.
AGAINST = "random_layer"
_WORLD = "objects"
_MODE = "auto"


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        questions: of the test split, all kinds alike.
        methods: names of methods with `average_keep`.
        budgets: means over layers of the share of visual tokens that go through attention.
        adapters: folders of methods with thresholds of their own, which have one budget.
        seeds: runs of random dropping.
        seed: of random dropping and of the bootstrap.
    """

    questions: int = 2000
    methods: tuple[str, ...] = ()
    budgets: tuple[float, ...] = BUDGETS
    adapters: tuple[str, ...] = ()
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the methods.

        Raises:
            ConfigError: for one without `average_keep`, or without `random_layer` among them.
        """
        unfit = sorted(set(self.methods) - set(schedules()))
        if unfit or AGAINST not in self.methods:
            raise ConfigError(
                f"methods are {', '.join(self.methods)}; give {AGAINST} and any of "
                f"{', '.join(n for n in schedules() if n != AGAINST)}."
            )

    def specs(self) -> dict[str, str]:
        """{name of the row: spec string}, rows of one method in the order of budgets."""
        rows = {f"{m} {b}": f"{m}(average_keep={b})" for m in self.methods for b in self.budgets}
        return rows | {_row_of(folder): _spec_of(folder) for folder in self.adapters}

    def asking(self) -> Questions:
        """How questions are asked."""
        return Questions(
            {_WORLD: self.questions},
            (RANDOM,),
            keeps=(None,),  # type: ignore[arg-type]  # every method has a budget of its own
            positions=(_MODE,),
            seeds=self.seeds,
            seed=self.seed,
        )


def schedules() -> tuple[str, ...]:
    """Built-in methods that drop inside the language model, to any average, without training."""
    kinds = {name: registry.get(name) for name in registry.BUILTIN}
    return tuple(
        name
        for name, kind in kinds.items()
        if issubclass(kind, LayerReducer) and kind.training_free and hasattr(kind(), "average_keep")
    )


def _row_of(folder: str) -> str:
    return f"{_stage_of(folder).method} ({Path(folder).name})"


def _spec_of(folder: str) -> str:
    return CompressionConfig((_stage_of(folder),)).to_spec()


def _stage_of(folder: str) -> StageConfig:
    """The only stage of an adapter, its weights named by their place."""
    (stage,) = read(folder).located.stages
    return stage


def study(
    plan: Plan,
    folder: str | Path,
    *,
    weights: str | Path = WEIGHTS_DIR,
    processes: int = 2,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Ask the questions under every schedule; what was stopped goes on.

    Args:
        plan: what to ask.
        folder: each finished part is kept there, and used again if it belongs to the same weights,
            plan, versions and source file of the method.
        weights: folder of a model that knows the scenes.
        processes: one-thread processes.
        progress: called with the name of each part that is there.

    Returns:
        JSON-ready, estimates as [mean, low, high] in shares: `weights` (SHA-256), `plan`,
        `versions`, `machine`, `questions`, `images`, `tokens` (of an image), `full`, `blind`, and
        `rows` [{name, method, wanted (the average asked for; None where it is the method's own),
        refused (why, or None), average, left (tokens in each layer's attention, a mean), flops
        (of the language model's prefill by formula, relative to all tokens), accuracy, over_full,
        over_random (paired; None where random dropping has no such budget)}].
    """
    answers = measured(parts(plan, Path(weights)), folder, processes=processes, progress=progress)
    bare, specs = answers["full"], plan.specs()
    found = {name: answers[_file(name)] for name in specs}
    asked = {n: row for n, row in found.items() if row["refused"] is None}
    right = {name: right_of(row["right"]) for name, row in asked.items()}
    full, blind = (right_of([bare[name]]) for name in ("full", "blind"))
    random = {n: right.get(f"{AGAINST} {asked[n]['wanted']}") for n in asked}
    values: dict[str, Any] = {"full": full, "blind": blind, "rows": {}}
    for name, row in right.items():
        values["rows"][name] = {"accuracy": row, "over_full": row - full}
        other = random[name]
        if other is not None and not name.startswith(AGAINST):
            values["rows"][name]["over_random"] = row - other
    told = estimated(bare, values, plan.seed)

    def row_of(name: str) -> dict[str, Any]:
        row = {k: v for k, v in found[name].items() if k != "right"}
        unknown = dict.fromkeys(("accuracy", "over_full", "over_random"))
        return {"name": name, **row, **unknown, **told["rows"].get(name, {})}

    return {
        "weights": digest(Path(weights) / "model.safetensors"),
        "plan": asdict(plan) | {"adapters": [Path(f).name for f in plan.adapters]},
        "versions": versions(),
        "machine": bare["machine"],
        "questions": len(full),
        "images": len(set(bare["scenes"])),
        "tokens": bare["tokens"],
        "full": told["full"],
        "blind": told["blind"],
        "rows": [row_of(name) for name in specs],
    }


def parts(plan: Plan, weights: Path) -> list[Part]:
    """One part for the model without a method, and one per row."""
    common = {
        **plan.asking().common(),
        "weights": digest(weights / "model.safetensors"),
        "versions": versions(),
        "questions": plan.questions,
    }
    bare = Part("full", common, ask_bare, (plan, weights))
    rows = [
        Part(
            _file(name),
            {**common, "spec": spec, "source": source(spec), "learnt": _learnt(spec)},
            ask_row,
            (spec, plan, weights),
        )
        for name, spec in plan.specs().items()
    ]
    return [bare, *rows]


def ask_bare(plan: Plan, weights: Path) -> dict[str, Any]:
    """What the model answers without a method, and the tokens of an image."""
    found = ask_method(_WORLD, FULL, plan.asking(), weights)
    model, processor, asked, _ = subject(_WORLD, plan.questions, plan.asking().split, weights)
    image = processor(text="<image>", images=[asked[0].image], return_tensors="pt")
    tokens = int((image["input_ids"] == model.config.image_token_id).sum())
    return {**found, "tokens": tokens}


def ask_row(spec: str, plan: Plan, weights: Path) -> dict[str, Any]:
    """What it answers under a schedule, and what that spends."""
    questions = plan.asking()
    model, processor, asked, _ = subject(_WORLD, plan.questions, questions.split, weights)
    (method,) = built(spec).templates
    assert isinstance(method, LayerReducer)  # the plan has seen to it
    row = {"method": method.name, "wanted": getattr(method, "average_keep", None), "refused": None}
    found = ask_method(_WORLD, spec, questions, weights)
    refused = found["refused"].get(_MODE, {}).get(str(None))
    if refused is not None:
        return {**row, "refused": refused}
    told = spent(model, processor, method, asked, questions.batch)
    return {
        **row,
        "average": float(told.shares.mean()),
        "left": told.tokens.mean(0).tolist(),
        "flops": told.flops(model.config.get_text_config()),
        "right": found["right"][_MODE][str(None)],
    }


def _file(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")


def _learnt(spec: str) -> str:
    """Digest of the weights that a method reads; empty where it reads none."""
    path = getattr(built(spec).templates[0], "weights", None)
    return "" if path is None else digest(Path(path))
