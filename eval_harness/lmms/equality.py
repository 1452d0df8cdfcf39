"""The same questions through lmms-eval and through `vlmcompress eval run`, sample by sample.

`python -m eval_harness.lmms.equality --out FILE` (`make test-lmms`) asks the reference model's
questions with and without compression, at batch size 1 and in one dtype, and fails where an answer,
a score or a count of tokens differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval_harness import machine
from eval_harness.lmms.runs import Run, go
from eval_harness.provenance import versions
from eval_harness.sweep.store import Answers, write_json
from vlmcompress.core.errors import ResultsError
from vlmcompress.integrations.lmms_eval import TASKS
from vlmcompress.reference.study import digest
from vlmcompress.reference.weights import WEIGHTS_DIR

_FULL = "full"


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        questions: {task of the reference model: how many}.
        method: that compresses.
        keep: what it keeps.
        dtype: of the model on both sides.
        device: of the model on both sides.
    """

    questions: Mapping[str, int]
    method: str = "vtc_cls"
    keep: float = 0.1
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """{label in the sweep: model arguments of lmms-eval}."""
        shared = {"pretrained": "reference", "dtype": self.dtype}
        compressed = {**shared, "method": self.method, "keep": self.keep}
        return {_FULL: shared, f"{self.method}:{self.keep}": compressed}


def compare(plan: Plan, work: Path) -> dict[str, Any]:
    """Ask everything on both sides.

    Args:
        plan: what is compared.
        work: folder for what both sides write.

    Returns:
        The results, JSON-ready; `equal` says whether all samples are.

    Raises:
        MissingExtraError: without lmms-eval.
        ResultsError: when one side ends without results.
    """
    include = _write_tasks(plan, work / "tasks")
    ours = _sweep(plan, work / "sweep")
    commands = [f"vlmcompress eval run {work / 'sweep.yaml'} --device {plan.device}"]
    tables: dict[str, Any] = {task: {} for task in plan.questions}
    for label, arguments in plan.settings.items():
        out = work / label.replace(":", "-")
        run = Run(arguments, [_name(t) for t in plan.questions], out, include, device=plan.device)
        commands.append(str(run))
        theirs = go(run)
        for task in plan.questions:
            rows = theirs.samples[_name(task)]
            told = theirs.metric(_name(task), "score")
            tables[task][label] = {**side_by_side(ours[task][label], rows), "lmms_score": told}
    cells = [cell for table in tables.values() for cell in table.values()]
    return {
        "plan": asdict(plan),
        "tasks": tables,
        "equal": all(map(is_equal, cells)),
        "commands": commands,
        "versions": {**versions(), "lmms_eval": version("lmms-eval")},
        "weights": digest(WEIGHTS_DIR / "model.safetensors"),
        "machine": machine.environment(),
    }


def side_by_side(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How many samples agree, and what both sides come to.

    Args:
        ours: lines of a sweep's samples file.
        theirs: lines of lmms-eval's, in the same order.

    Raises:
        ResultsError: when they are not the same questions.
    """
    asked = [[row["index"] for row in ours], [row["doc_id"] for row in theirs]]
    targets = [[row["answers"][0] for row in ours], [row["target"] for row in theirs]]
    if asked[0] != asked[1] or targets[0] != targets[1] or not ours:
        raise ResultsError(
            f"{len(ours)} samples of the sweep and {len(theirs)} of lmms-eval are not of the same "
            "questions."
        )
    pairs = [*zip(ours, theirs, strict=True)]
    counts = [(o, _counts(t)) for o, t in pairs]
    read = [c["input_tokens"] for _, c in counts]
    return {
        "questions": len(pairs),
        "score": sum(o["score"] for o in ours) / len(ours),
        "tokens_in": [min(read), sum(read) / len(read), max(read)],
        "visual_kept": sum(o["visual_kept"] for o in ours) / len(ours),
        "equal_answers": sum(o["prediction"] == t["resps"].strip() for o, t in pairs),
        "equal_scores": sum(o["score"] == t["score"] for o, t in pairs),
        "equal_tokens_in": sum(o["tokens_in"] == c["input_tokens"] for o, c in counts),
        "equal_tokens_out": sum(o["tokens_out"] == c["output_tokens"] for o, c in counts),
    }


def is_equal(cell: Mapping[str, Any]) -> bool:
    """Whether every sample agrees in everything, and the totals do."""
    names = ("equal_answers", "equal_scores", "equal_tokens_in", "equal_tokens_out")
    same = all(cell[name] == cell["questions"] for name in names)
    return same and abs(cell["score"] - cell["lmms_score"]) < 1e-9


def _counts(row: Mapping[str, Any]) -> Mapping[str, int]:
    (counts,) = row["token_counts"]
    return counts


def _name(task: str) -> str:
    return f"vlmc_{task}_part"


def _write_tasks(plan: Plan, folder: Path) -> Path:
    """The shipped tasks with fewer questions."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, limit in plan.questions.items():
        lines = [f"include: {TASKS / f'vlmc_{task}.yaml'}", f"task: {_name(task)}"]
        lines.append(f"dataset_kwargs: {{limit: {limit}}}")
        (folder / f"{_name(task)}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _sweep(plan: Plan, folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{task: {setting: lines of its samples file}} of our own harness."""
    options = {
        "out": str(folder),
        "tasks": [{"task": task, "limit": n} for task, n in plan.questions.items()],
        "methods": [plan.method],
        "keeps": [plan.keep],
        "dtype": plan.dtype,
        "batch": 1,
        "reuse_tower": False,
    }
    told = folder.with_suffix(".yaml")
    told.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    command = ["-m", "vlmcompress.cli", "eval", "run", str(told), "--device", plan.device]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--fresh"], env=environment, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        raise ResultsError(f"The sweep ended with exit code {done.returncode}.")
    return {
        task: {label: [*Answers.of(folder, task, label, 0).rows()] for label in plan.settings}
        for task in plan.questions
    }


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description="Hold lmms-eval against `vlmcompress eval run`.")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--work", type=Path, default=Path("build/lmms/run"))
    parser.add_argument("--objects", type=int, default=64, help="questions about objects")
    parser.add_argument("--texts", type=int, default=24, help="questions about texts")
    given = parser.parse_args()
    plan = Plan({"reference": given.objects, "reference_text": given.texts})
    results = compare(plan, given.work)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, results)
    print(json.dumps(results["tasks"], indent=2))
    if not results["equal"]:
        sys.exit(f"The two differ; see {given.out}.")


if __name__ == "__main__":
    main()
