"""Runs a sweep: batch by batch, setting by setting, kept as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from eval_harness import machine
from eval_harness.provenance import versions
from eval_harness.sweep import results, store
from eval_harness.sweep.asker import Asker
from eval_harness.sweep.plan import SweepPlan
from eval_harness.sweep.processes import Processes
from eval_harness.sweep.settings import identity_of
from eval_harness.sweep.store import Answers
from eval_harness.sweep.tasks import Task, open_task
from eval_harness.sweep.worker import Worker, cells_of
from vlmcompress.core.errors import ConfigError


def sweep(
    plan: SweepPlan,
    folder: str | Path,
    load: Callable[[Processes], tuple[Any, Any, Any]],
    *,
    processes: Processes | None = None,
    fresh: bool = False,
    progress: Callable[[str, int | None, int], None] | None = None,
) -> dict[str, Any]:
    """Ask everything, keep every answer, and compare.

    What a stopped sweep has kept is not asked again. Ctrl-C leaves `results.json` of what is there,
    marked as not complete, before it goes on as `KeyboardInterrupt`.

    Args:
        plan: what is asked.
        folder: of answers and results; of this sweep alone.
        load: gives model, processor and what `patch` takes as `clip`, for these processes.
        processes: that share the work; this one alone if not given.
        fresh: forget the answers that are there.
        progress: called after each batch with the task's name, how many questions it has (None
            where that is not known), and how many the batch had.

    Returns:
        The results (`results.summary`), also written to `results.json` in the folder.

    Raises:
        ConfigError: for tasks that cannot be read, or a folder of another sweep.
        ResultsError: for a folder that another sweep writes to, or a full disk.
    """
    folder, team = Path(folder), processes or Processes()
    tasks = [open_task(config) for config in plan.tasks]
    _refuse_twins(tasks)
    with ExitStack() as stack:
        part = team.on_first(lambda: _enter(stack, folder, plan, tasks, fresh)) + team.rank
        model, processor, clip = load(team)
        where = machine.describe(model)
        with Asker(model, processor, plan, clip) as asker:
            worker = Worker(asker, plan, folder, part, team, progress)
            try:
                for task in tasks:
                    worker.ask(task)
            except KeyboardInterrupt:
                if team.count == 1:  # the others cannot be waited for
                    _finish(plan, tasks, folder, where, [worker.report()], complete=False)
                raise
        reports = team.gather(worker.report())
        return team.on_first(lambda: _finish(plan, tasks, folder, where, reports))


def _enter(
    stack: ExitStack, folder: Path, plan: SweepPlan, tasks: Sequence[Task], fresh: bool
) -> int:
    """Take the folder; the number of the first new part."""
    stack.enter_context(store.locked(folder))
    if fresh:
        store.forget(folder)
    store.claim(folder, _identity(plan, tasks))
    return store.next_part(folder)


def _finish(
    plan: SweepPlan,
    tasks: Sequence[Task],
    folder: Path,
    where: dict[str, Any],
    reports: Sequence[dict[str, float]],
    complete: bool = True,
) -> dict[str, Any]:
    cells = cells_of(plan)
    for task in tasks:
        for cell in cells:
            Answers.of(folder, task.name, cell.label, 0).join()
    found = results.summary(
        plan,
        {task.name: task.identity for task in tasks},
        lambda task, cell: Answers.of(folder, task, cell.label, 0).rows(),
        cells,
    )
    told = {
        "complete": complete,
        **found,
        "time": results.overhead(reports),
        "processes": len(reports),
        "commit": where["commit"],
        "versions": versions(),
        "machine": where,
    }
    store.write_json(folder / store.RESULTS, told)
    return told


def _identity(plan: SweepPlan, tasks: Sequence[Task]) -> dict[str, Any]:
    return {
        "common": {**plan.identity(), "versions": versions()},
        "tasks": {task.name: task.identity for task in tasks},
        "settings": {s.label: [identity_of(s), s.runs] for s in plan.settings},
    }


def _refuse_twins(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two tasks are called {name!r}; give one of them a 'name'.")
