"""Pictures of regressions, with what the language model saw drawn on them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eval_harness.report.inputs import Run
from eval_harness.report.regressions import Fall, Regression
from vlmcompress.core.errors import ConfigError, VLMCompressError

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 288
"""Longer side of a picture on the page, in pixels."""


@dataclass(frozen=True)
class Shown:
    """A picture on the page.

    Attributes:
        uri: its data; empty where there is none.
        why: what there is instead.
    """

    uri: str = ""
    why: str = ""


@dataclass(frozen=True)
class Sample:
    """A regression as the page shows it.

    Attributes:
        regression: the answers.
        question: as the task words it; empty where the task is not at hand.
        picture: as the task holds it.
        overlays: {label of a setting: the picture with everything dimmed that was dropped}.
        more: pictures of the question beside the one shown.
    """

    regression: Regression
    question: str = ""
    picture: Shown = Shown()
    overlays: Mapping[str, Shown] = field(default_factory=dict)
    more: int = 0


@dataclass(frozen=True)
class _Asked:
    question: str
    prompt: str
    images: Sequence[Image]


def samples(
    run: Run,
    regressions: Sequence[Regression],
    *,
    tasks: Sequence[str] = (),
    model: str | None = None,
    device: str = "auto",
    overlays: bool = True,
) -> list[Sample]:
    """The questions and pictures of regressions.

    Which patches were kept is not among the answers; the model is asked again, one question at a
    time, under every setting that lost on it. Methods that draw numbers may draw others than in
    the batches of the sweep.

    Args:
        run: a sweep.
        regressions: of it.
        tasks: files and folders of tasks that are not drawn by the library.
        model: a folder or hub id, where the one that the run names is not at hand.
        device: where it runs.
        overlays: whether kept patches are drawn.
    """
    found = dict(_questions(run, regressions, tasks))
    shown = [_sample(one, found.get((one.task, one.index))) for one in regressions]
    if overlays and any(sample.picture.uri for sample in shown):
        shown = _with_overlays(run, shown, found, model or run.model, device)
    return shown


def _questions(
    run: Run, regressions: Sequence[Regression], tasks: Sequence[str]
) -> Iterator[tuple[tuple[str, int], _Asked]]:
    """{(task, index): the question} of the tasks that are at hand and the same as they were."""
    from eval_harness.sweep.tasks import open_task

    wanted: dict[str, set[int]] = {}
    for one in regressions:
        wanted.setdefault(one.task, set()).add(one.index)
    for name, indices in wanted.items():
        config = _config(run, name, tasks)
        if config is None:
            continue
        task = open_task(config)
        if task.identity != run.asked["tasks"][name]:
            raise ConfigError(
                f"Task {config.task!r} is not what {str(run.folder)!r} was asked; name the files "
                "as they were then."
            )
        for index, question in enumerate(task.questions()):
            if index in indices:
                images = [picture.open() for picture in question.pictures]
                asked = _Asked(question.question, task.prompt(question), images)
                yield (name, index), asked
            if index >= max(indices):
                break


def _config(run: Run, name: str, tasks: Sequence[str]) -> Any:
    """How to open a task again; None where its files were not named."""
    from eval_harness.sweep.tasks import DRAWN, TaskConfig

    identity = run.asked["tasks"][name]
    asked = {key: identity[key] for key in ("metric", "split", "limit", "prompt", "new_tokens")}
    if "world" in identity:
        world = {value: key for key, value in DRAWN.items()}[identity["world"]]
        return TaskConfig(world, name, **asked)
    path = next((path for path in tasks if Path(path).stem == name or path == name), None)
    return None if path is None else TaskConfig(path, name, **asked)


def _sample(regression: Regression, asked: _Asked | None) -> Sample:
    if asked is None or not asked.images:
        why = "The task's files were not named (--tasks)." if asked is None else "No picture."
        return Sample(regression, asked.question if asked else "", Shown(why=why))
    picture = Shown(data_uri(asked.images[0]))
    return Sample(regression, asked.question, picture, more=len(asked.images) - 1)


def _with_overlays(
    run: Run,
    shown: Sequence[Sample],
    found: Mapping[tuple[str, int], _Asked],
    name: str,
    device: str,
) -> list[Sample]:
    """The same with overlays; where the model cannot be loaded, with the reason in their place."""
    from vlmcompress import patch
    from vlmcompress.loading import clip_of, device_of, load

    common = run.asked["common"]
    try:
        model, processor = load(name, common["dtype"], device)
        clip = common["clip"] and clip_of(common["clip"], device_of(device))
        adapter = common.get("adapter")
        options = {"positions": common["positions"], "clip": clip, "processor": processor}
        with patch(model, "uniform", keep=1, **options) as handle:
            return [
                replace(sample, overlays=_drawn(handle, processor, sample, asked, adapter))
                for sample in shown
                for asked in [found.get((sample.regression.task, sample.regression.index))]
            ]
    except VLMCompressError as error:
        return [replace(sample, overlays=_refused(sample, error)) for sample in shown]


def _refused(sample: Sample, error: Exception) -> dict[str, Shown]:
    return {fall.label: Shown(why=str(error)) for fall in sample.regression.falls}


def _drawn(
    handle: Any, processor: Any, sample: Sample, asked: _Asked | None, adapter: Any
) -> dict[str, Shown]:
    if asked is None or not asked.images:
        return {}
    from eval_harness.asking import prompt_of

    text = prompt_of(processor, asked.prompt, len(asked.images))
    inputs = processor(text=[text], images=[list(asked.images)], return_tensors="pt")
    inputs = inputs.to(handle.model.device, handle.model.dtype)
    return {
        fall.label: _overlay(handle, inputs, fall, asked.images[0], adapter)
        for fall in sample.regression.falls
    }


def _overlay(handle: Any, inputs: Any, fall: Fall, image: Image, adapter: Any) -> Shown:
    """The picture with everything dimmed that did not get to the last layer."""
    method = fall.method
    if adapter is not None and method == adapter["name"]:
        if adapter["kind"] != "LoRA":  # LoRA has no say in which tokens stay
            return Shown(why="what was kept depends on trained weights, which are not part of it")
        method = adapter["method"]
    try:
        handle.set(method=method, keep=fall.keep, seed=fall.row["seed"])
        with torch.no_grad():
            handle.model(**inputs, logits_to_keep=1)
        return Shown(data_uri(handle.overlay(image, layer=-1)))
    except VLMCompressError as error:
        return Shown(why=str(error))


def data_uri(image: Image) -> str:
    """A picture as it stands in a page: PNG, its longer side `SIDE` pixels."""
    from PIL import Image as Images

    scale = SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # Enlarged patches must keep their edges.
    how = Images.Resampling.NEAREST if scale > 1 else Images.Resampling.LANCZOS
    stream = io.BytesIO()
    image.convert("RGB").resize((width, height), how).save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
