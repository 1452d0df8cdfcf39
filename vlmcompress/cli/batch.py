"""`vlmcompress batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmcompress.cli.options import (
    Adapter,
    Clip,
    Device,
    Dtype,
    Json,
    Keep,
    Method,
    Model,
    Positions,
)
from vlmcompress.cli.output import emit
from vlmcompress.cli.sweep import FAILED
from vlmcompress.cli.values import keep_of
from vlmcompress.loading import REFERENCE


def batch(
    source: Annotated[
        Path,
        typer.Argument(help="A JSONL or Parquet file, a folder with such, or one of pictures."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of answers; a stopped run goes on.")],
    model: Model = REFERENCE,
    method: Method = None,
    keep: Keep = None,
    adapter: Adapter = None,
    question: Annotated[
        str | None, typer.Option(help="For pictures and rows that bring none.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    batch_size: Annotated[
        int, typer.Option("--batch", min=1, help="Rows at a time in an actor.")
    ] = 8,
    dtype: Dtype = "auto",
    positions: Positions = "auto",
    seed: Annotated[int, typer.Option(help="Of methods that draw numbers.")] = 0,
    clip: Clip = None,
    actors: Annotated[int, typer.Option(min=1, help="Processes with a model each.")] = 1,
    gpus: Annotated[
        float | None, typer.Option(help="Of an actor; one where there are any, if not given.")
    ] = None,
    cpus: Annotated[float, typer.Option(help="Of an actor, which runs so many threads.")] = 1,
    address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster, or auto; otherwise this machine.")
    ] = None,
    device: Device = "auto",
    kind: Annotated[
        str, typer.Option("--format", help="Of the answers: jsonl, parquet.")
    ] = "jsonl",
    part_rows: Annotated[int, typer.Option(min=1, help="Rows of a file of answers.")] = 1000,
    as_json: Json = False,
) -> None:
    """Ask a model about many pictures, in Ray actors on one machine or a cluster.

    Exit codes: 0; 1 for an error; 3 where rows failed (they have an 'error' among the answers).
    """
    from tqdm import tqdm

    from vlmcompress.integrations.ray import BatchPlan, Cluster, run

    plan = BatchPlan(
        model=model,
        method=method,
        keep=None if keep is None else keep_of(keep),
        adapter=adapter,
        question=question,
        new_tokens=new_tokens,
        dtype=dtype,
        positions=positions,
        seed=seed,
        clip=clip,
        batch=batch_size,
    )
    cluster = Cluster(actors, gpus, cpus, address)
    with tqdm(desc="rows", leave=False) as bar:

        def show(done: int, rows: int) -> None:
            bar.total = rows
            bar.update(done - bar.n)

        told = run(
            source,
            out,
            plan,
            cluster,
            device=device,
            kind=kind,
            part_rows=part_rows,
            progress=show,
        )
    text = (
        f"{told['rows']} rows, {told['asked']} of them asked now in {told['seconds']:.0f} s by "
        f"{told['actors']} actors; {told['answered']} answers are in {out}/answers, from "
        f"{told['tokens']['visual_kept']:.1f} of {told['tokens']['visual_in']:.1f} visual tokens."
    )
    emit(told, text, as_json)
    if told["failed"]:
        typer.echo(f"{told['failed']} rows failed: 'error' in {out}/answers.", err=True)
        raise typer.Exit(FAILED)
