"""`vlmcompress calibrate`: fit methods to a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmcompress.cli.options import Device, Dtype, Json, ModelArgument
from vlmcompress.cli.output import emit, progress, table
from vlmcompress.loading import REFERENCE, load

if TYPE_CHECKING:
    from PIL.Image import Image

app = typer.Typer(no_args_is_help=True, help="Fit methods to a model.")


@app.callback()
def main() -> None:
    """Fit methods to a model."""


@app.command()
def fitprune(
    model: ModelArgument = REFERENCE,
    out: Annotated[Path, typer.Option(help="JSON to write; 'fitprune(schedule=...)' reads it.")] = (
        Path("fitprune.json")
    ),
    flops: Annotated[
        float, typer.Option(help="Share of the language model's prefill FLOPs that is left.")
    ] = 0.5,
    samples: Annotated[int, typer.Option(min=1, help="Prompts to look at.")] = 64,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='Lines of JSON, {"image": path from there, "question": text}; drawn scenes of '
            "the reference model where not given.",
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How many visual tokens FitPrune drops in which layer of a model, for a budget of FLOPs."""
    from vlmcompress.calibrate import fitprune as run

    loaded, processor = load(model, dtype, device)
    prompts = list(islice(_drawn(samples) if data is None else _listed(data), samples))
    with progress("prompts", len(prompts)) as bar:
        found = run(loaded, processor, prompts, flops, progress=lambda: bar.update())
    results = {
        "method": "fitprune",
        "model": model,
        "flops": found.cost,
        "tolerance": found.tolerance,
        "samples": len(prompts),
        "data": "reference scenes" if data is None else data.name,
        "left": list(found.left),
    }
    rows = [[str(i), f"{share:.3f}"] for i, share in enumerate(found.left)]
    shown = table(["layer", "left"], rows)
    emit(results, f"{shown}\n\nFLOPs left: {found.cost:.3f}; written to {out}", as_json, out)


@app.command("early_exit")
def early_exit(
    model: ModelArgument = REFERENCE,
    out: Annotated[Path | None, typer.Option(help="JSON to write as well.")] = None,
    where: Annotated[str, typer.Option(help="decoder or tower.")] = "decoder",
    layers: Annotated[
        float | None, typer.Option(help="Most of the layers that may be run, on average.")
    ] = None,
    agreement: Annotated[
        float | None, typer.Option(help="Or: least share of tokens that must stay the same.")
    ] = None,
    first: Annotated[
        float, typer.Option(help="Earliest layer to leave behind: its number, or a share below 1.")
    ] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Of each answer, in the decoder.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Prompts to look at.")] = 64,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Prompts, as for fitprune."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """From which similarity on layers of a model can be left out, for a budget or an agreement."""
    from vlmcompress.calibrate import early_exit as run
    from vlmcompress.core.errors import ConfigError

    if where not in ("decoder", "tower"):
        raise ConfigError(f"where is {where!r}; it must be 'decoder' or 'tower'.")
    loaded, processor = load(model, dtype, device)
    prompts = list(islice(_drawn(samples) if data is None else _listed(data), samples))
    earliest = int(first) if first == int(first) else first
    with progress("prompts", len(prompts)) as bar:
        found = run(
            loaded,
            processor,
            prompts,
            where="tower" if where == "tower" else "decoder",
            first=earliest,
            layers=layers,
            agreement=agreement,
            tokens=tokens,
            progress=lambda: bar.update(),
        )
    name = "early_exit_tower" if where == "tower" else "early_exit"
    spec = f"{name}(threshold={found.threshold!r}, first={found.first})"
    results = {
        "method": name,
        "spec": spec,
        "model": model,
        "threshold": found.threshold,
        "first": found.first,
        "layers": found.layers,
        "agreement": found.agreement,
        "samples": len(prompts),
        "tokens": tokens if where == "decoder" else 1,
        "data": "reference scenes" if data is None else data.name,
    }
    text = f"{spec}\n{found.layers:.3f} of the layers run, {found.agreement:.3f} of the tokens stay"
    emit(results, text, as_json, out)


def _drawn(n: int) -> Iterator[tuple[Image, str]]:
    """Questions about drawn scenes that no test is made of."""
    from vlmcompress.reference.data import samples

    return ((sample.image, sample.question) for sample in samples("train", n))


def _listed(path: Path) -> Iterator[tuple[Image, str]]:
    """Questions about pictures, from a file.

    Raises:
        ConfigError: for a line that is none.
    """
    from PIL import Image

    from vlmcompress.core.errors import ConfigError

    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            image, question = path.parent / entry["image"], str(entry["question"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"Line {number} of {path} is {line!r}; it must be a JSON object with image and "
                "question."
            ) from error
        yield Image.open(image).convert("RGB"), question
