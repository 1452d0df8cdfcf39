"""The user's questions by image, in two parts that have no image in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from eval_harness.sweep.questions import Question
from eval_harness.sweep.tasks import Task, TaskConfig, open_task
from eval_harness.tune.judge import HELD_OUT, SEARCH
from vlmcompress.core.errors import ConfigError

_LEAST = 8  # images of a part


@dataclass(frozen=True)
class Asked:
    """A question with the task that it belongs to."""

    task: Task
    question: Question


@dataclass(frozen=True)
class Samples:
    """Questions in two parts.

    Attributes:
        parts: {part: the questions about each of its images}.
        identity: JSON-ready, whatever they depend on.
        unreadable: rows that cannot be asked.
    """

    parts: Mapping[str, Sequence[Sequence[Asked]]]
    identity: dict[str, Any]
    unreadable: int = 0

    @classmethod
    def read(cls, tasks: Sequence[TaskConfig], *, held_out: float, seed: int) -> Samples:
        """Read tasks and cut them in two.

        Which part an image is in, and where, depends on its name and the seed alone, not on the
        order of the rows.

        Args:
            tasks: as `vlmcompress eval run` takes them.
            held_out: share of the images that the search does not see.
            seed: of the cut.

        Raises:
            ConfigError: for tasks that cannot be read, a share out of range, or too few images.
        """
        if not 0 < held_out < 1:
            raise ConfigError(f"held_out is {held_out!r}; it must lie between 0 and 1.")
        opened = [open_task(config) for config in tasks]
        images: dict[str, list[Asked]] = {}
        unreadable = 0
        for task in opened:
            for question in task.questions():
                if question.error:
                    unreadable += 1
                else:
                    key = f"{task.name}/{question.image_id}"
                    images.setdefault(key, []).append(Asked(task, question))
        order = sorted(images, key=lambda key: sha256(f"{seed}:{key}".encode()).digest())
        cut = len(order) - round(len(order) * held_out)
        if min(cut, len(order) - cut) < _LEAST:
            raise ConfigError(
                f"The questions are about {len(order)} images, of which {len(order) - cut} are "
                f"held out; both parts need {_LEAST} images or more."
            )
        parts = {SEARCH: order[:cut], HELD_OUT: order[cut:]}
        return cls(
            {part: [images[key] for key in keys] for part, keys in parts.items()},
            {
                "tasks": {task.name: task.identity for task in opened},
                "held_out": held_out,
                "seed": seed,
            },
            unreadable,
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Images of each part."""
        return {part: len(images) for part, images in self.parts.items()}

    @property
    def widest(self) -> int:
        """Questions about the image that most are about."""
        return max(len(image) for images in self.parts.values() for image in images)

    @property
    def questions(self) -> dict[str, int]:
        """Questions of each part."""
        return {part: sum(map(len, images)) for part, images in self.parts.items()}
