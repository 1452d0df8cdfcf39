"""Puts tables, plots and pictures into one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval_harness.report import figures
from eval_harness.report.inputs import Findings, Run, label, layer_lines, share_kept
from eval_harness.report.pictures import Sample
from eval_harness.sweep.tables import density
from vlmcompress.core.extras import require

_MIB = 2**20


@dataclass(frozen=True)
class Table:
    """Header and rows of text."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A plot with what it shows."""

    kind: str
    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page with its heading."""

    title: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    note: str = ""
    samples: tuple[Sample, ...] = field(default=())


def render(findings: Findings, samples: Mapping[str, Sequence[Sample]], title: str) -> str:
    """The page as HTML that refers to nothing outside itself.

    Args:
        findings: what was measured.
        samples: regressions of each run, by the text of its folder.
        title: of the page.

    Raises:
        MissingExtraError: without jinja2 or matplotlib.
    """
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval_harness.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.jinja")
    text: str = page.render(
        title=title,
        sections=_sections(findings, samples),
        sources=[*_sources(findings)],
    )
    return text


def _sections(findings: Findings, samples: Mapping[str, Sequence[Sample]]) -> list[Section]:
    sections = [section for run in findings.runs for section in _of_tasks(run, findings)]
    lines = list(layer_lines(findings))
    if lines:
        note = "Visual tokens in the attention of each layer of the language model."
        plot = Figure("layers", "Tokens per layer", figures.tokens_per_layer(lines), note)
        sections.append(Section("Tokens per layer", figures=(plot,)))
    sections += [_of_bench(bench) for bench in findings.benches]
    for run in findings.runs:
        shown = tuple(samples.get(str(run.folder), ()))
        if shown:
            sections.append(Section(f"Worst regressions: {run.model}", samples=shown))
    return sections


def _of_tasks(run: Run, findings: Findings) -> list[Section]:
    sections = []
    for task, told in run.results["tasks"].items():
        plot = figures.accuracy_against_keep(run, task)
        plots = [Figure("keep", "Accuracy against tokens kept", plot)]
        for bench in findings.benches:
            points = figures.timed(run, task, bench)
            if len(points) > 1:
                name = f"{task} {bench.file.name} {len(plots)}"
                plots.append(
                    Figure(
                        "time",
                        "Accuracy against time to the first token",
                        figures.accuracy_against_time(points, name),
                        f"Times: {bench.subject} on {bench.results['machine']['device']}.",
                    )
                )
        note = (
            f"{told['questions']} questions about {told['images']} pictures, metric "
            f"{told['metric']}. TokDense is its score in % per visual token kept, a mean over "
            "layers. Intervals are of 95 %, resampled by picture; differences to all tokens are "
            "paired by question."
        )
        tables = (_accuracy_table(run, task),)
        sections.append(Section(f"{task}: {run.model}", tables, tuple(plots), note))
    return sections


def _accuracy_table(run: Run, task: str) -> Table:
    score = ("accuracy", "TokDense", "minus all tokens", "p (Holm)")
    header = ("setting", "tokens kept", *score, "failed")
    rows = []
    for row in run.rows(task):
        over = row["over_full"]
        rows.append(
            (
                label(row["method"], row["keep"]),
                f"{100 * share_kept(row):.1f} %",
                _interval(row["score"], ".1f"),
                density(row),
                "-" if over is None else _interval(over, "+.1f"),
                "-" if over is None or over.get("p_holm") is None else f"{over['p_holm']:.3f}",
                str(row["failed"]),
            )
        )
    return Table(header, tuple(rows))


def _interval(found: Mapping[str, float], digits: str) -> str:
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    return f"{mean:{digits}} ({low:{digits}} to {high:{digits}})"


def _of_bench(bench: Any) -> Section:
    results = bench.results
    base = results["configs"][0]["baseline"]
    costs = ("visual tokens", "TTFT, ms", "p99", "TPOT, ms", "KV cache, MiB")
    header = ("setting", *costs, "speed-up", "floor ratio", "ideal ratio")
    rows = [("all tokens", *_costs(base), "-", "-", "-")]
    for row in results["configs"]:
        ideal = row["ideal_ratio"]
        ratios = f"{row['speedup']:.2f}", f"{row['floor_ratio']:.3f}"
        rows.append(
            (
                label(row["method"], row["keep"]),
                *_costs(row),
                *ratios,
                "-" if ideal is None else f"{ideal:.3f}",
            )
        )
    note = (
        f"{results['protocol']['repeats']} rounds in turns. The floor is the tower alone plus the "
        "prefill of the short prompt alone; the ideal is each layer of the language model alone at "
        "its own length."
    )
    return Section(f"Time and memory: {bench.subject}", (Table(header, tuple(rows)),), note=note)


def _costs(row: Mapping[str, Any]) -> tuple[str, ...]:
    tpot = row["tpot"]
    return (
        str(row["tokens"]),
        f"{1000 * row['ttft']['median']:.1f}",
        f"{1000 * row['ttft'].get('p99', row['ttft']['p90']):.1f}",
        "-" if tpot is None else f"{1000 * tpot:.1f}",
        "-" if row["kv_bytes"] is None else f"{row['kv_bytes'] / _MIB:.2f}",
    )


def _sources(findings: Findings) -> list[str]:
    """Where everything comes from, a line each."""
    lines = []
    for name, results in [
        *((str(run.folder), run.results) for run in findings.runs),
        *((str(bench.file), bench.results) for bench in findings.benches),
    ]:
        machine = results["machine"]
        partial = "" if results.get("complete", True) else "; stopped before its end"
        lines.append(
            f"{name}: {machine['date']}, commit {machine['commit'] or 'unknown'}, "
            f"{machine['device']} ({machine['cpu']}), {machine['dtype']}, torch "
            f"{machine['torch']}, transformers {machine['transformers']}{partial}"
        )
    return lines
