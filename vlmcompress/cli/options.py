"""Options that several commands have, in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

_CHECKPOINT = "A folder, a hub id or 'reference'."

# What is asked and on what

Model: TypeAlias = Annotated[str, typer.Option(help=_CHECKPOINT)]
ModelArgument: TypeAlias = Annotated[str, typer.Argument(help=_CHECKPOINT)]
Weights: TypeAlias = Annotated[str, typer.Option(help="Folder of a model trained on the scenes.")]
Dtype: TypeAlias = Annotated[
    str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")
]
Precision: TypeAlias = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Device: TypeAlias = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Processes: TypeAlias = Annotated[int, typer.Option(min=1, help="One-thread processes.")]

# How it is compressed

Method: TypeAlias = Annotated[
    str | None, typer.Option(help="A method or a spec such as 'vtc_cls:0.25'.")
]
Keep: TypeAlias = Annotated[
    str | None,
    typer.Option(help="What is kept of each image: a fraction (0.1), a count (64) or auto."),
]
Adapter: TypeAlias = Annotated[
    str | None, typer.Option(help="A trained one in place of --method: a folder or a hub id.")
]
Positions: TypeAlias = Annotated[str, typer.Option(help="auto, contiguous or original.")]
Clip: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="For methods that read the question: the CLIP model whose vision tower this is, "
        "a folder, a hub id or 'reference'."
    ),
]

# What is measured

TextQuestions: TypeAlias = Annotated[
    int, typer.Option(min=0, help="Questions about texts; 0 for none.")
]
Seeds: TypeAlias = Annotated[int, typer.Option(min=1, help="Runs of random methods.")]
Clock: TypeAlias = Annotated[
    str, typer.Option(help="wall, or cpu: processor time, for one thread on a busy machine.")
]

# Where results go

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Out: TypeAlias = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]
PartsOut: TypeAlias = Annotated[Path, typer.Option(help="JSON to write; parts are kept in build/.")]
Parts: TypeAlias = Annotated[
    Path | None, typer.Option(help="Where parts are kept; build/NAME.parts if not given.")
]
