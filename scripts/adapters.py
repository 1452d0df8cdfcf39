"""Trains adapters of adapters/ whose weights are missing, and measures those without numbers.

What to run stands in each folder's recipe.yaml and nowhere else. A stopped training goes on from
build/adapters when it is started again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from vlmcompress.core.errors import VLMCompressError
from vlmcompress.hub.folder import PEFT_WEIGHTS, RECIPE, RESULTS, read
from vlmcompress.training.recipe import recipe_of

ROOT = Path(__file__).resolve().parent.parent
SHELF = ROOT / "adapters"
BUILD = ROOT / "build" / "adapters"


def lacking(folder: Path) -> list[str]:
    """Files that an adapter of this recipe has and the folder does not, weights first."""
    plan = recipe_of(folder).get("plan", {})
    lora = bool(plan.get("rank") or plan.get("lora"))
    try:
        stages = read(folder).config.stages
    except VLMCompressError as error:
        return [str(error)]
    wanted = [str(stage.options["weights"]) for stage in stages if "weights" in stage.options]
    wanted += [PEFT_WEIGHTS] if lora else []
    return [name for name in wanted if not (folder / name).is_file()]


def training(folder: Path, out: Path) -> list[str]:
    """The command of a folder's recipe as words, writing to another folder."""
    words = shlex.split(recipe_of(folder)["command"])
    words[words.index("--out") + 1] = str(out)
    return words


def ordered(shelf: Path) -> list[Path]:
    """Folders with a recipe; those whose weights another's training starts from come before it."""
    folders = {path.parent.name: path.parent for path in sorted(shelf.glob(f"*/{RECIPE}"))}
    graph: TopologicalSorter[str] = TopologicalSorter()
    for name, folder in folders.items():
        command = recipe_of(folder)["command"]
        graph.add(name, *(other for other in folders if f"{SHELF.name}/{other}/" in command))
    return [folders[name] for name in graph.static_order()]


def train(folder: Path) -> None:
    """Train an adapter anew; its folder changes when all of it is there."""
    out = BUILD / folder.name
    if lacking(out):
        _run(training(folder, out))
    for name in read(out).files:
        shutil.copyfile(out / name, folder / name)
    shutil.rmtree(out)


def measured(folder: Path) -> bool:
    """Whether an adapter's results say what it brings."""
    path = folder / RESULTS
    return path.is_file() and "evaluations" in json.loads(path.read_text(encoding="utf-8"))


def _run(words: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "vlmcompress.cli", *words[1:]], check=True, cwd=ROOT)


def main() -> None:
    """Every folder with a recipe, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shelf", type=Path, default=SHELF, help="folder of the adapters")
    parser.add_argument(
        "--measure", default="--questions 1000", help="further options of eval adapter"
    )
    given = parser.parse_args()
    for folder in ordered(given.shelf):
        if lacking(folder):
            train(folder)
        if not measured(folder):
            options = shlex.split(given.measure)
            _run(["vlmcompress", "eval", "adapter", str(folder), *options])


if __name__ == "__main__":
    main()
