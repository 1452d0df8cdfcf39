"""Puts measured tables and pictures into README.md and docs/, between their markers.

`python scripts/readme.py --demo demo` first takes over what `vlmcompress demo` wrote; without it
the tables are made again from the results that lie in docs/assets.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval_harness import adapter_tables, layerwise_tables, pareto_tables, tables
from eval_harness.plots import plot_comparison, plot_learning, plot_pareto
from eval_harness.retrieval import rows as retrieval_rows
from eval_harness.served import tables as served_tables
from eval_harness.tune import tables as tune_tables
from vlmcompress.demo import accuracy_rows, cost_rows
from vlmcompress.doctor import families_table
from vlmcompress.reference.card import card, markdown, report, worlds_table
from vlmcompress.reference.curve import TRAINING_LOG
from vlmcompress.reference.study import digest
from vlmcompress.reference.weights import WEIGHTS_DIR

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "docs" / "assets"
RESULTS = ROOT / "eval_harness" / "results"
METHODS = RESULTS / "methods.json"
SCHEDULES = RESULTS / "schedules.json"
ADAPTIVE = RESULTS / "adaptive.json"
ADAPTERS = RESULTS / "adapters.json"
LAYER_TIMES = RESULTS / "layer_times.json"
TUNED = RESULTS / "tune" / "tune.json"
_TRIED = 10  # pipelines of a search that are shown
_CLOCKS = ("wall", "cpu")
_SCHEDULES = "make schedules-results"


def insert(document: str, region: str, content: str) -> str:
    """`document` with new content between the markers of a region.

    Raises:
        ValueError: when a marker is missing.
    """
    begin, end = f"<!-- {region}:begin -->", f"<!-- {region}:end -->"
    head, found, rest = document.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"The document needs the markers {begin} and {end}.")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def accuracy_region(results: dict[str, Any]) -> str:
    """The table method x keep of the demonstration and where it comes from."""
    header, rows = accuracy_rows(results)
    rows = [[f"`{row[0]}`", *row[1:]] for row in rows] + cost_rows(results)
    return (
        f"{markdown(header, rows)}\n\n"
        f"Accuracy in % (95 % interval) of the small model that ships with the library on "
        f"{results['n']} questions about held-out drawn scenes; {100 * results['blind']:.1f} "
        f"without the image. TTFT is the time to the first token with `{results['method']}`, "
        f"medians of ratios to that with all tokens; this model is tiny, so little of "
        f"it is prefill. "
        f"{_source('docs/assets/results.json', results['machine'], 'make readme')}"
    )


def bench_region(results: dict[str, Any]) -> str:
    """What `vlmcompress bench` measured and where it comes from."""
    header = ["", "keep", "tokens", "KV MiB", "speed-up of TTFT", "floor ratio", "ideal ratio"]
    first = results["configs"][0]["baseline"]
    rows = [["unpatched", "", *_costs(first), "", "", ""]]
    for row in results["configs"]:
        ideal = row.get("ideal_ratio")
        ratios = [f"{row['speedup']:.2f}", f"{row['floor_ratio']:.3f}"]
        ratios.append("" if ideal is None else f"{ideal:.3f}")
        rows.append([f"`{row['method']}`", str(row["keep"]), *_costs(row), *ratios])
    machine = results["machine"]
    what = f"`{machine['shape']}` in {machine['dtype']}, random weights, medians of "
    return (
        f"{markdown(header, rows)}\n\n"
        f"{what}{results['protocol']['repeats']} interleaved rounds. "
        f"{_source('docs/assets/bench.json', machine, 'make results')}"
    )


def worlds_region(study: dict[str, Any]) -> str:
    """Both worlds side by side: texts fail first."""
    machine = study["worlds"]["objects"]["contiguous"]["machine"]
    sizes = " and ".join(f"{n} about {name}" for name, n in study["plan"]["questions"].items())
    return (
        f"{worlds_table(study)}\n\n"
        f"Accuracy in % (95 % interval) on held-out questions, {sizes}; the detail that texts need "
        f"is what goes first. "
        f"{_source('docs/assets/reference_eval.json', machine, 'make reference-results')}"
    )


def reference_region(study: dict[str, Any]) -> str:
    """Everything that was measured of the reference model."""
    machine = study["worlds"]["objects"]["contiguous"]["machine"]
    return (
        f"{report(study)}\n\n"
        f"Accuracy in % (95 % interval, bootstrap over scenes) on held-out questions, unweighted "
        f"mean over the kinds; `random` is the mean of {study['plan']['seeds']} seeds. AUC: the "
        f"chance that an object patch gets more [CLS] attention than a ground patch; mass: the "
        f"share of that attention on object patches. "
        f"{_source('assets/reference_eval.json', machine, 'make reference-results')}"
    )


def methods_region(results: dict[str, Any]) -> str:
    """Every table of the comparison of all methods, and where they come from."""
    source = _source("../eval_harness/results/methods.json", results["machine"], "make results")
    plan, speed = results["plan"], results["speed"]
    dense = "TokDense is accuracy in % per visual token. " if "tokens" in results else ""
    timed = ""
    if speed is not None:
        timed = (
            f"Times: `{speed['shape']}` in {speed['dtype']} at keep {speed['keep']}, "
            f"{speed['rounds']} rounds, {speed['machine']['threads']} threads. {speed['how']} "
        )
    return (
        f"{tables.report(results)}\n\n"
        f"Accuracy in %, unweighted mean over the kinds of questions, with a 95 % interval "
        f"(bootstrap over images); differences to `random` are paired by question. `random` is the "
        f"mean of {plan['seeds']} seeds. {dense}{tables.LEGEND}. {timed}{source}"
    )


def picture_region(results: dict[str, Any]) -> str:
    """The curves of the comparison, for the first page."""
    sizes = ", ".join(f"{w['questions']} about {name}" for name, w in results["worlds"].items())
    return (
        '<p align="center">\n'
        '  <img src="docs/assets/methods.png" width="820" alt="Accuracy against the share of '
        'visual tokens kept, for methods and controls in two worlds">\n'
        "</p>\n\n"
        f"Questions: {sizes}; [docs/results.md](docs/results.md) has all "
        f"{len(results['methods'])} rows, with intervals and times. "
        f"{_source('eval_harness/results/methods.json', results['machine'], 'make results')}"
    )


def lmms_region(results: dict[str, Any]) -> str:
    """lmms-eval against `eval run`, sample by sample, and where it comes from."""
    header = ["task", "setting", "questions", "score", "prompt tokens, mean", "of them visual"]
    agreeing = ("answers", "scores", "tokens_in", "tokens_out")
    rows = [
        [
            f"`{task}`",
            f"`{setting}`",
            str(cell["questions"]),
            f"{100 * cell['score']:.1f} / {100 * cell['lmms_score']:.1f}",
            f"{cell['tokens_in'][1]:.1f}",
            f"{cell['visual_kept']:.0f}",
            *(f"{cell[f'equal_{name}']} of {cell['questions']}" for name in agreeing),
        ]
        for task, cells in results["tasks"].items()
        for setting, cell in cells.items()
    ]
    header += [f"equal {name.replace('_', ' ')}" for name in agreeing]
    return (
        f"{markdown(header, rows)}\n\n"
        f"The reference model in {results['plan']['dtype']} at batch size 1; scores in %, of "
        f"`eval run` / of lmms-eval. {served_tables.versions(results)}. "
        f"{_source('../eval_harness/results/lmms.json', results['machine'], 'make test-lmms')}"
    )


def import_region(results: dict[str, Any]) -> str:
    """What importing this library adds to importing transformers, and where it comes from."""
    header = ["imported", "on top of", "wall time, ratio", "processor time, ratio"]
    rows = [
        [f"`{row['added']}`", f"`{row['base']}`", *(f"{row[c]['ratio']:.2f}" for c in _CLOCKS)]
        for row in results["imports"]
    ]
    return (
        f"{markdown(header, rows)}\n\n"
        f"Medians over {results['protocol']['repeats']} rounds of fresh interpreters in turns. "
        f"{_source('assets/import_time.json', results['machine'], 'make import-time')}"
    )


def pareto_region(results: dict[str, Any]) -> str:
    """Methods in and after the tower: picture, tables, and where they come from."""
    header, rows = pareto_tables.points(results, code=True)
    towers = markdown(*pareto_tables.towers(results, code=True))
    clock = "processor" if results["timing"]["clock"] == "cpu" else "wall"
    return (
        f"![Accuracy against time to first token](assets/pareto.png)\n\n"
        f"{pareto_tables.goal(results)}\n\n{markdown(header, rows)}\n\n"
        f"Time to the first token on `{results['timing']['shape']}` in "
        f"{results['timing']['dtype']} with random weights, {clock} time, medians of "
        f"{results['rounds']} interleaved rounds; accuracy (95 % interval) of the same pipelines "
        f"on the reference model at the same share of tokens.\n\n{towers}\n\n"
        f"The tower's time under a method inside it, over its time under none. "
        f"{_source('assets/pareto.json', results['machine'], 'make pareto')}"
    )


def selection_region(results: dict[str, Any]) -> str:
    """What choosing tokens takes beside the tower, and where it comes from."""
    protocol, machine = results["protocol"], results["machine"]
    keeps = protocol["keeps"]
    shares = {(row["method"], row["keep"]): row for row in results["methods"]}
    rows = [
        [f"`{name}`", *(_share(shares[name, keep]) for keep in keeps)]
        for name in dict.fromkeys(row["method"] for row in results["methods"])
    ]
    clock = "processor" if protocol["clock"] == "cpu" else "wall"
    return (
        f"{markdown(['', *(f'keep {keep}' for keep in keeps)], rows)}\n\n"
        f"{clock.capitalize()} time of selection as a share of that of the tower of "
        f"`{machine['shape']}` in {machine['dtype']} on {protocol['views']} views "
        f"({protocol['tokens']:,} tokens of width {protocol['width']:,}), medians of "
        f"{protocol['repeats']} interleaved rounds; bold where it is not below "
        f"{100 * protocol['bound']:.0f} %. "
        f"{_source('assets/selection.json', machine, 'make selection-time')}"
    )


def _share(row: dict[str, Any]) -> str:
    """A share of the tower's time in percent."""
    text = f"{100 * row['share']:.2f} %"
    return text if row["within"] else f"**{text}**"


def matrix_region(results: dict[str, Any]) -> str:
    """The table method x family of the full matrix, and where it comes from."""
    families = results["axes"]["family"]
    rows = [
        [f"`{method}`", *(_verdict(results, method, family) for family in families)]
        for method in results["axes"]["method"]
    ]
    exempt = {exemption["reason"] for exemption in results["exemptions"]}
    skips = sorted(set(results["reasons"].values()) - exempt)
    why = {"skipped": f" ({'; '.join(skips)})", "exempt": " (the table below)"}
    counts = [f"{n} {name}{why.get(name, '')}" for name, n in results["counts"].items() if n]
    return (
        f"{markdown(['', *(f'`{family}`' for family in families)], rows)}\n\n"
        f"✓ all cells passed, (✓) some of them on earlier sources; `?` some have not run yet; a "
        f"number names the exemption below that holds for some of them; "
        f"`-` the method does not exist there ({'; '.join(results['absent'])}). "
        f"Cells: {', '.join(counts)}. "
        f"From [assets/matrix.json](assets/matrix.json) (`make test-matrix`): "
        f"{served_tables.versions(results)}."
    )


def retrieval_region(results: dict[str, Any]) -> str:
    """Attribute retrieval by method inside the tower and budget, and where it comes from."""
    header, lines = retrieval_rows(results)
    lines = [lines[0], *([f"`{line[0]}`", *line[1:]] for line in lines[1:])]
    return (
        f"{markdown(header, lines)}\n\n"
        f"{results['questions']} attributes of {results['images']} scenes; accuracy and difference "
        f"to the full tower in % (95 % interval, bootstrap over scenes), unweighted mean over the "
        f"three kinds; by chance {100 * results['chance']:.1f}. FLOPs of the tower's blocks as a "
        "share of the full tower's. "
        f"{_source('assets/retrieval.json', results['machine'], 'make retrieval-results')}"
    )


def schedules_region(results: dict[str, Any]) -> str:
    """Methods inside the language model at equal averages, and where they come from."""
    source = _source("../eval_harness/results/schedules.json", results["machine"], _SCHEDULES)
    return (
        f"{markdown(*layerwise_tables.rows(results))}\n\n"
        f"Accuracy in % (95 % interval, bootstrap over scenes) on {results['questions']} questions "
        f"about {results['images']} scenes; {100 * results['full'][0]:.1f} with all tokens, "
        f"{100 * results['blind'][0]:.1f} without the image. Averages are means over layers and "
        "questions of the share of visual tokens in a layer's attention; FLOPs are those of the "
        "language model's prefill by formula, relative to all tokens; TokDense is accuracy in % "
        f"per visual token, mean over layers. {source}"
    )


def adaptive_region(results: dict[str, Any]) -> str:
    """Trained thresholds against fixed schedules of equal FLOPs, and where they come from."""
    source = _source("../eval_harness/results/adaptive.json", results["machine"], _SCHEDULES)
    trials = max(len(row["tried"]) for row in results["tuned"].values())
    runs = ", ".join(f"{100 * run:.1f}" for run in results["runs"])
    return (
        f"{markdown(*layerwise_tables.adaptive_rows(results))}\n\n"
        f"{results['questions']} questions about {results['images']} scenes of the test split; "
        f"accuracy in % with 95 % intervals, differences paired by question. Layers of the fixed "
        f"schedules are the best of up to {trials} lists each on {results['validation']} questions "
        f"of the validation split. Right answers of the single trainings in %: {runs}. {source}"
    )


def layer_times_region(results: dict[str, Any]) -> str:
    """Times of methods inside the language model, and where they come from."""
    machine, plan = results["machine"], results["protocol"]
    source = _source("../eval_harness/results/layer_times.json", machine, "make layer-times")
    return (
        f"{markdown(*layerwise_tables.time_rows(results))}\n\n"
        f"`{machine['shape']}` in {machine['dtype']}, random weights, {plan['repeats']} "
        "interleaved rounds. TTFT and TPOT relative to the unpatched model. Prefill relative to "
        f"its ideal, each layer alone at its own length. {source}"
    )


def tune_region(results: dict[str, Any]) -> str:
    """What `tune` chose for the reference model, and where it comes from."""
    machine, goal, asked = results["machine"], results["goal"], results["asked"]
    source = _source("../eval_harness/results/tune/tune.json", machine, "make tune-results")
    chosen = "nothing" if results["status"] != "chosen" else f"`{results['pipeline']}`"
    final, tried = (
        markdown(header, [[f"`{row[0]}`", *row[1:]] for row in rows])
        for header, rows in (tune_tables.finalists(results), tune_tables.cheapest(results, _TRIED))
    )
    return (
        f"{goal['text'].capitalize()}, wrongly with a probability of {100 * goal['alpha']:g} % at "
        f"most: {chosen}. The finalists, on images that the search did not see:\n\n{final}\n\n"
        f"What the search saw of the cheapest:\n\n{tried}\n\n"
        f"Costs are shares of the full model's. {asked['questions']} questions were asked; all "
        f"pipelines on all of them would have been {asked['exhaustive']}. {source}"
    )


def engine_region(results: dict[str, Any]) -> str:
    """How answers of a real engine compare with those of transformers."""
    plan = results["plan"]
    commits = sorted({case["commit"] or "unknown" for case in results["cases"]})
    return (
        f"{markdown(*served_tables.equality(results))}\n\n"
        f"Greedy answers of {plan['new_tokens']} tokens in float32 on both sides. Every answer is "
        f"equal up to the first step whose two best logits differ by less than {plan['close']:g} "
        "(or the patched model gives it as well when pixels change in their last places, because "
        "the method's choice hangs on rounding), and every prompt has the same number of tokens. "
        f"From [eval_harness/results/vllm.json](../eval_harness/results/vllm.json) "
        f"(`make test-vllm`): commit {' and '.join(commits)}, {served_tables.versions(results)}."
    )


def load_region(results: dict[str, Any]) -> str:
    """An engine's throughput with and without compression."""
    plan, machine = results["plan"], results["machine"]
    return (
        f"{markdown(*served_tables.load(results))}\n\n"
        "Ratios to whole images at the same concurrency; more requests per second and shorter "
        f"times are better. Answers of {plan['new_tokens']} tokens to questions about pictures "
        f"that are all different; medians over {plan['rounds']} servers of each kind, in turns. "
        "TTFT: time to the first token. TPOT: time per token after it, as the client sees it: "
        "tokens that a server makes faster than it sends them arrive together with the first. "
        "From [eval_harness/results/serving.json](../eval_harness/results/serving.json) "
        f"(`make serve-results`): commit {machine['commit'] or 'unknown'}, "
        f"{served_tables.versions(results)}, {machine['cpu']}, {machine['cores']} cores."
    )


def adapters_region(results: dict[str, Any]) -> str:
    """Adapters against methods without training, what training brought, and the commands."""
    source = _source("../eval_harness/results/adapters.json", results["machine"], "make adapters")
    worlds, asked = results["worlds"], results["plan"]["methods"]
    sizes = " and ".join(f"{w['questions']} about {name}" for name, w in worlds.items())
    listed = ", ".join(f"`{method}`" for method in asked)
    commands = "\n".join(adapter_tables.commands(results))
    return (
        f"{markdown(*adapter_tables.rows(results))}\n\n"
        f"Accuracy in % (95 % interval, bootstrap over scenes) on held-out questions, {sizes}, "
        "unweighted mean over their kinds; differences are paired by question. The best without "
        "training is the best on these very questions, which favours it, of "
        f"{listed}. TokDense is accuracy in % per visual token.\n\n"
        "### The same method without training, or with LoRA alone\n\n"
        f"{markdown(*adapter_tables.own_rows(results))}\n\n"
        f"Codes of `vqtoken` alone are its codebook; trained weights of it are VQ-Attention over "
        f"the token hash map. {source}\n\n"
        f"```sh\n{commands}\n```"
    )


def _verdict(results: dict[str, Any], method: str, family: str) -> str:
    """`✓`, `✗`, `?` or `-`, with the numbers of the exemptions that are about this pair."""
    row = results["results"][method].get(family)
    if row is None:
        return "-"
    signs = "".join(row["outcomes"])
    notes = [
        str(number)
        for number, e in enumerate(results["exemptions"], start=1)
        if set(e["equality"]) <= set(results["axes"]["equality"])
        and (e["method"] or e["family"])
        and (not e["method"] or method in e["method"])
        and (not e["family"] or family in e["family"])
    ]
    verdict = "✗" if "F" in signs else "?" if "?" in signs else "(✓)" if "," in signs else "✓"
    return f"{verdict} <sup>{', '.join(notes)}</sup>" if notes else verdict


def exemptions_region(results: dict[str, Any]) -> str:
    """The exemptions of the matrix, numbered."""
    axes = ("equality", "method", "family", "kernel", "dtype")
    names = {**results["axes"]["equality"], **results["axes"].get("other equalities", {})}
    lines = [("no.", *axes, "reason"), ("---",) * 7]
    for number, exemption in enumerate(results["exemptions"], start=1):
        shown = {axis: [f"`{value}`" for value in exemption[axis]] for axis in axes}
        shown["equality"] = [names[equality] for equality in exemption["equality"]]
        cells = (", ".join(shown[axis]) or "all" for axis in axes)
        lines.append((str(number), *cells, exemption["reason"]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _costs(row: dict[str, Any]) -> list[str]:
    return [str(row["tokens"]), f"{row['kv_bytes'] / 2**20:.2f}"]


def _source(path: str, machine: dict[str, Any], command: str) -> str:
    device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    return (
        f"From [{path}]({path}) (`{command}`): commit {machine['commit'] or 'unknown'}, "
        f"{versions}, {device}, {machine['threads']} threads."
    )


#: (page, region, results file, what makes the one of the other). Regions without a file stay.
REGIONS: tuple[tuple[str, str, Path, Callable[[dict[str, Any]], str]], ...] = (
    ("README.md", "table", ASSETS / "results.json", accuracy_region),
    ("README.md", "bench", ASSETS / "bench.json", bench_region),
    ("README.md", "worlds", ASSETS / "reference_eval.json", worlds_region),
    ("README.md", "picture", METHODS, picture_region),
    ("docs/results.md", "methods", METHODS, methods_region),
    ("docs/results.md", "schedules", SCHEDULES, schedules_region),
    ("docs/results.md", "adaptive", ADAPTIVE, adaptive_region),
    ("docs/results.md", "layer_times", LAYER_TIMES, layer_times_region),
    ("docs/tuning.md", "tune", TUNED, tune_region),
    ("adapters/README.md", "adapters", ADAPTERS, adapters_region),
    ("docs/reference-model.md", "reference", ASSETS / "reference_eval.json", reference_region),
    ("docs/exactness.md", "matrix", ASSETS / "matrix.json", matrix_region),
    ("docs/exactness.md", "exemptions", ASSETS / "matrix.json", exemptions_region),
    ("docs/benchmarking.md", "pareto", ASSETS / "pareto.json", pareto_region),
    ("docs/benchmarking.md", "imports", ASSETS / "import_time.json", import_region),
    ("docs/benchmarking.md", "selection", ASSETS / "selection.json", selection_region),
    ("docs/serving.md", "engine", RESULTS / "vllm.json", engine_region),
    ("docs/serving.md", "load", RESULTS / "serving.json", load_region),
    ("docs/evaluating.md", "lmms", RESULTS / "lmms.json", lmms_region),
    ("docs/bare-towers.md", "retrieval", ASSETS / "retrieval.json", retrieval_region),
)


def documents() -> dict[Path, str]:
    """Every page with generated regions, made anew from the results files that exist."""
    pages: dict[Path, str] = {}

    def put(page: str, region: str, content: str) -> None:
        path = ROOT / page
        text = pages.get(path) or path.read_text(encoding="utf-8")
        pages[path] = insert(text, region, content)

    for page in ("README.md", "docs/families.md"):
        put(page, "families", families_table())
    for page, region, file, make in REGIONS:
        results = current(file)
        if results is not None:
            put(page, region, make(results))
    study = current(ASSETS / "reference_eval.json")
    return {**pages, WEIGHTS_DIR / "README.md": card(training_log(), study)}


def current(file: Path) -> dict[str, Any] | None:
    """Results from a file; None where there is none, or it is of other reference weights."""
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    weights = WEIGHTS_DIR / "model.safetensors"
    return found if found.get("weights") in (None, digest(weights)) else None


def training_log() -> dict[str, Any]:
    """What is known of the training of the shipped weights."""
    return json.loads(TRAINING_LOG.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def main() -> None:
    """Take over a demonstration, if asked to, and write the pages."""
    parser = argparse.ArgumentParser(description="Put measured tables and pictures into the docs.")
    parser.add_argument("--demo", type=Path, help="folder that `vlmcompress demo` wrote")
    folder = parser.parse_args().demo
    if folder is not None:
        ASSETS.mkdir(parents=True, exist_ok=True)
        for name in ("kept.png", "curve.png", "results.json"):
            shutil.copy(folder / name, ASSETS / name)
    plot_learning(training_log(), ASSETS / "learning.png")
    front, compared = current(ASSETS / "pareto.json"), current(METHODS)
    if front is not None:
        plot_pareto(front, ASSETS / "pareto.png")
    if compared is not None:
        plot_comparison(compared, ASSETS / "methods.png")
    for path, content in documents().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
