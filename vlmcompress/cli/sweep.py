"""`vlmcompress eval run`: models, methods, keeps and tasks against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmcompress.cli.options import Clip, Device, Json
from vlmcompress.cli.output import emit, table
from vlmcompress.cli.values import keep_of, words
from vlmcompress.loading import clip_of, device_of, load

FAILED = 3
"""Exit code of a sweep that went through with samples that failed."""
_INTERRUPTED = 130


def run(
    sweep: Annotated[
        Path | None, typer.Argument(help="YAML file with these options; those given here win.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of samples and results; a stopped sweep goes on.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder, a hub id or 'reference' (the default).")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Comma-separated: reference, reference_text, folders, files."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names or spec strings, separated by semicolons.")
    ] = None,
    keeps: Annotated[str | None, typer.Option(help="Comma-separated.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="A trained adapter to ask as well: a folder or a hub id."),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Of rows that name none.")] = None,
    split: Annotated[str | None, typer.Option(help="Only rows of this split.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First questions of each task.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="With {question}, and {options} if wanted.")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None,
    device: Device = "auto",
    positions: Annotated[str | None, typer.Option(help="auto, contiguous or original.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Questions at a time.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of random methods and intervals.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of random methods.")] = None,
    clip: Clip = None,
    reuse_tower: Annotated[
        bool | None, typer.Option(help="Run the tower once per picture where that can be.")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Forget the answers in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Ask every task under every method and budget; the full model and `random` come first.

    Exit codes: 0; 1 for an error; 3 where samples failed (they are named in the folder); 130 when
    interrupted, with results of what was answered.
    """
    from eval_harness.sweep.plan import plan_of, read_yaml
    from eval_harness.sweep.processes import Processes
    from eval_harness.sweep.run import sweep as go
    from vlmcompress.core.errors import ConfigError

    given = {
        "model": model,
        "tasks": None if tasks is None else words(tasks),
        "methods": None if methods is None else words(methods, ";"),
        "keeps": None if keeps is None else [keep_of(keep) for keep in words(keeps)],
        "adapter": adapter,
        "metric": metric,
        "split": split,
        "limit": limit,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "dtype": dtype,
        "positions": positions,
        "batch": batch,
        "seed": seed,
        "seeds": seeds,
        "clip": clip,
        "reuse_tower": reuse_tower,
    }
    options = {} if sweep is None else read_yaml(sweep)
    folder = out or options.pop("out", None)
    if folder is None:
        raise ConfigError("A sweep needs a folder for its answers; give --out FOLDER.")
    options.update({name: value for name, value in given.items() if value is not None})
    plan = plan_of({name: value for name, value in options.items() if name != "out"})
    team = Processes.here(cpu=device_of(device).type == "cpu")

    def subject(processes: Processes) -> tuple[Any, Any, Any]:
        loaded, processor = load(plan.model, plan.dtype, processes.device(device))
        text = None if plan.clip is None else clip_of(plan.clip, loaded.device)
        return loaded, processor, text

    with _Progress(show=team.first) as shown:
        try:
            results = go(plan, folder, subject, processes=team, fresh=fresh, progress=shown.passed)
        except KeyboardInterrupt:
            typer.echo(f"Interrupted; {folder} holds what was answered.", err=True)
            raise typer.Exit(_INTERRUPTED) from None
    if team.first:
        emit(results, text(results), as_json)
    if results["failed"]:
        typer.echo(f"{results['failed']} answers failed: 'error' in {folder}/samples.", err=True)
        raise typer.Exit(FAILED)


class _Progress:
    """A bar per task on stderr, or none."""

    def __init__(self, show: bool) -> None:
        self._show = show
        self._task = ""
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def passed(self, task: str, total: int | None, questions: int) -> None:
        """Some questions of a task are answered, now or before."""
        from tqdm import tqdm

        if not self._show:
            return
        if task != self._task:
            self.__exit__()
            self._task, self._bar = task, tqdm(desc=task, total=total, leave=False)
        self._bar.update(questions)


def text(results: dict[str, Any]) -> str:
    """Scores and paired differences as tables for a reader."""
    from eval_harness.sweep.tables import foot, of_task

    parts = [
        f"{head}\n\n{table(header, rows)}"
        for head, header, rows in map(of_task, results["tasks"].items())
    ]
    return "\n\n".join([*parts, foot(results)])
