"""The demonstration: one held-out scene, three questions, and accuracy against tokens kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcompress.core.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmcompress.reference.data import Sample

METHODS = ("vtc_cls", "fastervlm", "divprune", "pool", "uniform", "random", "oracle")
"""What is compared; `oracle` keeps the patches that objects cover, known from the drawing."""

METHOD, KEEP = "vtc_cls", 0.1
"""The configuration that answers the three questions."""

_BATCH = 48
_QUESTIONS = 3
_GAP = 16  # pixels between the two pictures


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        questions: for the accuracies.
        keeps: budgets of the curve and the table.
        repeats: timed rounds per budget.
    """

    questions: int
    keeps: tuple[float, ...]
    repeats: int

    @property
    def steps(self) -> int:
        """How often `run` ticks."""
        return math.ceil(self.questions / _BATCH) + 2 * (len(self.keeps) - 1) + 1


FULL = Plan(240, (1.0, 0.5, 0.25, 0.1, 0.05), 8)
QUICK = Plan(48, (1.0, 0.25, 0.1), 3)


def run(
    model: Any,
    processor: Any,
    out: str | Path,
    *,
    plan: Plan = FULL,
    scene: int = 0,
    seed: int = 0,
    tick: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Ask, draw and measure.

    Args:
        model: a VLM that knows the scenes of `vlmcompress.reference`, unpatched.
        processor: its processor.
        out: folder for kept.png and curve.png.
        plan: how much is measured.
        scene: which held-out scene is shown and asked about.
        seed: of random methods and intervals.
        tick: called after each step.

    Returns:
        JSON-ready: what `eval_harness.evaluate` returns for `plan.questions` questions, and
        `questions` (text, expected answer, answers by keep), `tokens` {keep: visual tokens per
        image}, `ttft` {keep: seconds}, `ttft_ratio` {keep: over that with all tokens, in the same
        rounds} and `method`, to which they belong.
    """
    from eval_harness import evaluate, plot_curve
    from vlmcompress.reference.data import samples

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    shown = questions_about(scene)
    asked, picture = answers(model, processor, shown)
    picture.save(out / "kept.png")
    tick()
    results = evaluate(
        model,
        processor,
        samples("test", plan.questions),
        methods=METHODS,
        keeps=plan.keeps,
        batch_size=_BATCH,
        seed=seed,
        progress=lambda _line: tick(),
    )
    plot_curve(results, out / "curve.png")
    times = latency(model, processor, shown[0], plan, tick)
    return {**results, "method": METHOD, "scene": scene, "questions": asked, **times}


def questions_about(scene: int) -> list[Sample]:
    """Three questions about one held-out scene, of different kinds.

    Raises:
        ConfigError: for a negative scene.
    """
    from vlmcompress.reference.data import samples
    from vlmcompress.reference.questions import KINDS

    if scene < 0:
        raise ConfigError(f"scene is {scene}; it must be 0 or more.")
    # One question of each kind is asked of the first scene that allows it: the first in the stream
    # belong to `scene` itself, and every scene allows at least four kinds.
    stream = samples("test", len(KINDS), seed_offset=scene)
    return [sample for sample, _ in zip(stream, range(_QUESTIONS), strict=False)]


def answers(
    model: Any, processor: Any, shown: Sequence[Sample]
) -> tuple[list[dict[str, Any]], Image]:
    """Ask with all tokens and with `KEEP` of them.

    Returns:
        One dict per question, and the scene next to what the language model saw of it.
    """
    from vlmcompress import patch

    image = shown[0].image
    with patch(model, METHOD, keep=KEEP, processor=processor) as handle:
        few = [_answer(model, processor, sample) for sample in shown]
        picture = side_by_side(image, handle.overlay(image))
        with handle.disabled():
            full = [_answer(model, processor, sample) for sample in shown]
    asked = [
        {
            "kind": sample.kind,
            "question": sample.question,
            "expected": sample.answer,
            "answers": {"1.0": whole, str(KEEP): short},
        }
        for sample, whole, short in zip(shown, full, few, strict=True)
    ]
    return asked, picture


def _inputs(model: Any, processor: Any, sample: Sample) -> Any:
    from vlmcompress.reference.tokenizer import prompt

    text = prompt(processor, sample.question)
    inputs = processor(text=[text], images=[sample.image], return_tensors="pt")
    return inputs.to(model.device, model.dtype)


def _answer(model: Any, processor: Any, sample: Sample) -> str:
    inputs = _inputs(model, processor, sample)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(new, skip_special_tokens=True)).strip()


def side_by_side(left: Image, right: Image, scale: int = 2) -> Image:
    """Two pictures of one size, enlarged, on white."""
    from PIL import Image as Images

    width, height = (scale * side for side in left.size)
    sheet = Images.new("RGB", (2 * width + _GAP, height), "white")
    for picture, x in ((left, 0), (right, width + _GAP)):
        sheet.paste(picture.resize((width, height), Images.Resampling.NEAREST), (x, 0))
    return sheet


def latency(
    model: Any, processor: Any, sample: Sample, plan: Plan, tick: Callable[[], Any]
) -> dict[str, dict[str, Any]]:
    """Median seconds to the first token, their ratios, and tokens per image, by keep."""
    from eval_harness import bench

    configs = [(METHOD, keep) for keep in plan.keeps if keep < 1]
    timed = bench(
        model,
        dict(_inputs(model, processor, sample)),
        configs,
        repeats=plan.repeats,
        new_tokens=0,
        progress=lambda _line: tick(),
    )
    rows = timed["configs"]
    ttft = {"1.0": rows[0]["baseline"]["ttft"]["median"]}
    ratio, tokens = {"1.0": 1.0}, {"1.0": rows[0]["baseline"]["tokens"]}
    for row in rows:
        ttft[str(row["keep"])] = row["ttft"]["median"]
        ratio[str(row["keep"])] = 1 / row["speedup"]
        tokens[str(row["keep"])] = row["tokens"]
    return {"ttft": ttft, "ttft_ratio": ratio, "tokens": tokens}


def accuracy_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table method x keep: percent and its 95 % interval."""
    keeps = list(results["accuracy"])
    methods = list(results["accuracy"][keeps[0]])
    rows = [
        [method, *(_cell(results["accuracy"][keep][method]) for keep in keeps)]
        for method in methods
    ]
    return ["method", *(f"keep {keep}" for keep in keeps)], rows


def _cell(estimate: dict[str, float]) -> str:
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.0f}-{high:.0f})"


def cost_rows(results: dict[str, Any]) -> list[list[str]]:
    """Rows to put under the table: tokens per image and time to the first token."""
    keeps = list(results["accuracy"])
    return [
        ["tokens per image", *(str(results["tokens"][keep]) for keep in keeps)],
        ["TTFT, relative", *(f"{results['ttft_ratio'][keep]:.2f}" for keep in keeps)],
    ]


def text(results: dict[str, Any], out: str | Path) -> str:
    """The results as `vlmcompress demo` prints them."""
    from vlmcompress.cli.output import table

    header, rows = accuracy_rows(results)
    return "\n\n".join(
        [
            "\n".join(_dialogue(results)),
            f"Accuracy in % on {results['n']} questions about held-out scenes (95 % interval); "
            f"without the image {100 * results['blind']:.1f}; TTFT of {results['method']}:",
            table(header, [*rows, *cost_rows(results)]),
            f"Wrote {Path(out) / 'kept.png'}, {Path(out) / 'curve.png'} and "
            f"{Path(out) / 'results.json'}.",
        ]
    )


def _dialogue(results: dict[str, Any]) -> Iterator[str]:
    few = str(KEEP)
    yield f"{results['tokens']['1.0']} -> {results['tokens'][few]} tokens"
    for row in results["questions"]:
        yield f"Q: {row['question']}"
        yield f"   expected {row['expected']!r}, " + ", ".join(
            f"keep {keep}: {answer!r}" for keep, answer in row["answers"].items()
        )
