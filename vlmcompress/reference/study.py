"""Everything that is measured of the reference model: both worlds, both position modes, targets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval_harness.resume import Part, measured
from vlmcompress.core.errors import ConfigError

from .questions import KINDS
from .weights import WEIGHTS_DIR
from .worlds import WORLDS, chance

POSITIONS = ("contiguous", "original")
METHODS = (
    *("vtc_cls", "fastervlm", "hired", "divprune", "received_attention", "pool", "uniform"),
    *("random", "oracle", "oracle_asked", "anti_oracle"),
)
CONTROLS = ("random", "uniform", "pool", "oracle", "oracle_asked", "anti_oracle")
"""Rows that are no published method."""

_DETECTOR = "detector"
_NEW_TOKENS = 6  # the longest answer, a word, and its end
_KEEP = "0.1"
_NEAR_CHANCE = 0.05


@dataclass(frozen=True)
class Plan:
    """What a study measures.

    Attributes:
        questions: per world. methods, keeps: of each table. seeds: runs of random methods.
        scenes: that [CLS] attention is read on. split: where questions and scenes come from.
        batch: questions at a time.
    """

    questions: dict[str, int]
    methods: tuple[str, ...] = METHODS
    keeps: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)
    seeds: int = 3
    scenes: int = 400
    split: str = "test"
    batch: int = 64

    def parts(self) -> list[tuple[str, str]]:
        """What is measured apart from each other: (world, position mode or ``"detector"``)."""
        modes = [(name, mode) for name in self.questions for mode in POSITIONS]
        return modes + [(name, _DETECTOR) for name in self.questions]


def study(
    plan: Plan,
    folder: str | Path,
    *,
    weights: str | Path = WEIGHTS_DIR,
    processes: int = 2,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model that knows the scenes; a study that was stopped goes on.

    Args:
        plan: what to measure.
        folder: each finished part is kept there, and used again if it belongs to the same weights,
            plan and versions.
        weights: folder of the model.
        processes: one-thread processes.
        progress: called with the name of each part that is there.

    Returns:
        JSON-ready: ``weights`` (SHA-256 of the model's file), ``plan``, ``worlds`` {world:
        {position mode: what `eval_harness.evaluate` returns}}, ``detector`` {world: what
        `detector_quality` returns} and ``targets`` (see `targets`).

    Raises:
        ConfigError: for an unknown world or split, or weights that are not there.
    """
    unknown = set(plan.questions) - set(WORLDS)
    if unknown:
        raise ConfigError(f"worlds {sorted(unknown)}: allowed are {', '.join(WORLDS)}")
    file = Path(weights) / "model.safetensors"
    if not file.exists():
        raise ConfigError(f"{file} is not there: name a folder with trained weights")
    identity = {**_identity(plan), "weights": digest(file)}
    parts = [
        Part("-".join(part), identity, measure, (part, plan, Path(weights)))
        for part in plan.parts()
    ]
    found = measured(parts, folder, processes=processes, progress=progress)
    worlds = {n: {mode: found[f"{n}-{mode}"] for mode in POSITIONS} for n in plan.questions}
    return {
        "weights": identity["weights"],
        "plan": identity["plan"],
        "worlds": worlds,
        "detector": {name: found[f"{name}-{_DETECTOR}"] for name in plan.questions},
        "targets": targets(worlds),
    }


def stored(path: str | Path, weights: str | Path = WEIGHTS_DIR) -> dict[str, Any] | None:
    """A study from its file, None where there is none or it belongs to other weights."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    same = found.get("weights") == digest(Path(weights) / "model.safetensors")
    return found if same else None


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _identity(plan: Plan) -> dict[str, Any]:
    import torch
    import transformers

    import vlmcompress

    return {
        "plan": json.loads(json.dumps(asdict(plan))),
        "versions": [vlmcompress.__version__, torch.__version__, transformers.__version__],
    }


def measure(part: tuple[str, str], plan: Plan, weights: Path) -> dict[str, Any]:
    """Measure one part of a plan on one thread."""
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from eval_harness import evaluate

    from .data import samples
    from .detector import detector_quality

    torch.set_num_threads(1)
    name, mode = part
    model = LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32).eval()
    if mode == _DETECTOR:
        return detector_quality(model, world=name, scenes=plan.scenes, split=plan.split)
    return evaluate(
        model,
        LlavaProcessor.from_pretrained(weights),
        samples(plan.split, plan.questions[name], world=name),
        methods=plan.methods,
        keeps=plan.keeps,
        positions=mode,
        batch_size=plan.batch,
        seeds=plan.seeds,
        new_tokens=_NEW_TOKENS,
    )


def targets(worlds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the model was made to reach, on objects with renumbered positions.

    Returns:
        One dict per target: ``target`` (in words), ``found`` (in words) and ``met``. Empty where
        the study lacks the object world, keep 0.1 or a row that a target compares.
    """
    results = worlds.get("objects", {}).get(POSITIONS[0])
    if results is None or not {"random", "oracle_asked"} <= set(results["accuracy"].get(_KEEP, ())):
        return []
    row = results["accuracy"][_KEEP]
    published = [name for name in row if name not in CONTROLS]
    if not published:
        return []
    best = max(published, key=lambda name: row[name]["mean"])
    kinds = results["by_kind"]
    worst = min(kinds, key=kinds.__getitem__)
    blind = results["blind_by_kind"]
    seen = max(KINDS, key=lambda kind: abs(blind[kind] - chance(kind)))
    share = row[best]["mean"] / row["oracle_asked"]["mean"]
    return [
        _target(
            "all tokens: at least 95 %",
            f"{_percent(results['full']['mean'])}",
            results["full"]["mean"] >= 0.95,
        ),
        _target(
            "all tokens: every kind at least 90 %",
            f"{worst} {_percent(kinds[worst])}",
            kinds[worst] >= 0.9,
        ),
        _target(
            "no image: every kind within 5 points of chance",
            f"{seen} {_percent(blind[seen])}, chance {_percent(chance(seen))}",
            abs(blind[seen] - chance(seen)) <= _NEAR_CHANCE,
        ),
        _target(
            f"keep {_KEEP}: best training-free method at least 95 % of `oracle_asked`",
            f"{best} {_percent(row[best]['mean'])}, {_percent(share)} of it",
            share >= 0.95,
        ),
        _target(
            f"keep {_KEEP}: `random` below the best method, intervals apart",
            f"random up to {_percent(row['random']['high'])}, {best} from "
            f"{_percent(row[best]['low'])}",
            row["random"]["high"] < row[best]["low"],
        ),
    ]


def _target(target: str, found: str, met: bool) -> dict[str, Any]:
    return {"target": target, "found": found, "met": bool(met)}


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
