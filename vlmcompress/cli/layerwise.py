"""`vlmcompress eval schedules` and `adaptive`: methods inside the language model at equal cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmcompress.cli.options import Device, Json, Parts, PartsOut, Processes, Weights
from vlmcompress.cli.output import emit, progress, table
from vlmcompress.cli.values import words
from vlmcompress.loading import REFERENCE, load, location

_BATCH = 64


def schedules(
    out: PartsOut,
    questions: Annotated[int, typer.Option(min=1, help="About objects, of the test split.")] = 2000,
    methods: Annotated[str, typer.Option(help="Comma-separated; every one if not given.")] = "",
    budgets: Annotated[
        str, typer.Option(help="Means over layers of the share of visual tokens.")
    ] = "0.75,0.5,0.25",
    adapters: Annotated[
        str, typer.Option(help="Comma-separated folders of methods with thresholds of their own.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of random dropping.")] = 3,
    weights: Weights = REFERENCE,
    processes: Processes = 2,
    parts: Parts = None,
    as_json: Json = False,
) -> None:
    """Accuracy of schedules inside the language model that cost the same; goes on when stopped."""
    from eval_harness import layerwise
    from eval_harness.provenance import save

    plan = layerwise.Plan(
        questions=questions,
        methods=tuple(words(methods)) if methods else layerwise.schedules(),
        budgets=tuple(float(budget) for budget in words(budgets)),
        adapters=tuple(words(adapters)),
        seeds=seeds,
    )
    with progress("parts", 1 + len(plan.specs())) as bar:
        results = layerwise.study(
            plan,
            parts or Path("build") / f"{out.stem}.parts",
            weights=location(weights),
            processes=processes,
            progress=lambda _name: bar.update(),
        )
    save(results, out)
    emit(results, _text(results), as_json)


def _text(results: dict[str, Any]) -> str:
    from eval_harness.layerwise_tables import rows

    head = (
        f"{results['questions']} questions about {results['images']} scenes; accuracy in %, 95 % "
        f"interval; {100 * results['full'][0]:.1f} with all tokens, "
        f"{100 * results['blind'][0]:.1f} without the image"
    )
    return f"{head}\n\n{table(*rows(results))}"


def adaptive(
    adapters: Annotated[
        str, typer.Option(help="Comma-separated folders: one method, trained with several seeds.")
    ],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    questions: Annotated[int, typer.Option(min=1, help="Of the test split.")] = 2000,
    validation: Annotated[
        int, typer.Option(min=1, help="Of the validation split, to choose fixed layers by.")
    ] = 512,
    trials: Annotated[
        int, typer.Option(min=1, help="Lists of layers tried for each fixed schedule.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Of the choice of layers and the bootstrap.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Trained thresholds against fixed schedules of equal FLOPs whose layers were tuned."""
    from eval_harness.provenance import save
    from eval_harness.schedules import against_schedules, spent
    from eval_harness.tuning import tuned
    from vlmcompress import hub
    from vlmcompress.methods.decoder.base import LayerReducer
    from vlmcompress.reference.data import samples
    from vlmcompress.reference.study import digest
    from vlmcompress.reference.weights import WEIGHTS_DIR

    kind: Any = LayerReducer
    methods = [hub.learned(folder, kind) for folder in words(adapters)]
    model, processor = load(REFERENCE, device=device)
    held_out: Any = list(samples("validation", validation))
    asked: Any = samples("test", questions)
    like = spent(model, processor, methods[0], held_out, _BATCH)
    with progress("batches", -(-validation // _BATCH) + -(-questions // _BATCH)) as bar:
        options: Any = {"batch_size": _BATCH, "seed": seed, "progress": lambda _line: bar.update()}
        sites = len(methods[0].layers)
        chosen = tuned(model, processor, held_out, like, sites, trials, **options)
        found = against_schedules(
            model,
            processor,
            methods,
            asked,
            layers={name: row["layers"] for name, row in chosen.items()},
            **options,
        )
    found["machine"]["shape"] = REFERENCE
    results = {
        "weights": digest(WEIGHTS_DIR / "model.safetensors"),
        "adapters": [Path(folder).name for folder in words(adapters)],
        "validation": validation,
        "tuned": chosen,
        **found,
    }
    save(results, out)
    emit(results, _adaptive_text(results), as_json)


def _adaptive_text(results: dict[str, Any]) -> str:
    from eval_harness.layerwise_tables import adaptive_rows

    head = (
        f"{results['questions']} questions; {len(results['runs'])} training(s); "
        f"{results['average_keep']:.1%} of the visual tokens on average over layers"
    )
    return f"{head}\n\n{table(*adaptive_rows(results))}"
