"""A task of lmms-eval whose questions are those of a task of `vlmcompress eval run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

from lmms_eval.api.task import ConfigurableMessagesTask

from eval_harness.sweep.naming import unknown
from eval_harness.sweep.tasks import TaskConfig, open_task
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.extras import require
from vlmcompress.integrations.lmms_eval.documents import documents

#: How long answers may be is lmms-eval's `generation_kwargs`.
_OPTIONS = {field.name for field in dataclasses.fields(TaskConfig)} - {"task", "new_tokens"}


class Questions(ConfigurableMessagesTask):
    """`dataset_path` is a name, a file or a folder; `dataset_kwargs` are the task's options."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={k: v for k, v in config.items() if k != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the questions; nothing is downloaded.

        Raises:
            ConfigError: for unknown options, and what `open_task` refuses.
            DataError: for a row that cannot be asked.
        """
        options = dataset_kwargs or {}
        for name in options:
            if name not in _OPTIONS:
                raise ConfigError(unknown("option in dataset_kwargs", name, _OPTIONS))
        given = {"task": self.DATASET_PATH, **options}
        open_task(TaskConfig(**given))
        # A folder of its own, gone with the task: in a cache old drawings would outlive a change.
        self._folder = TemporaryDirectory(prefix="vlmcompress-lmms-")
        rows = require("datasets").Dataset.from_generator(
            _rows, gen_kwargs={"given": given}, features=_features(), cache_dir=self._folder.name
        )
        self.dataset = {self.config.test_split: rows}
        self.dataset_no_image = {self.config.test_split: rows.remove_columns("pictures")}


def _rows(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return documents(open_task(TaskConfig(**given)))


def _features() -> Any:
    datasets = require("datasets")
    text = datasets.Value("string")
    pictures = {"bytes": [datasets.Value("binary")], "path": [text]}
    lists = {name: [text] for name in ("answers", "options")}
    texts = {name: text for name in ("id", "prompt", "metric", "image_id", "kind")}
    return datasets.Features({**texts, **lists, "pictures": pictures})
