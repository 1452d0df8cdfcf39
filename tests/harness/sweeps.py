"""What tests of sweeps share: a small plan, and what lies in a folder."""

from __future__ import annotations

import json

from eval_harness.sweep.plan import plan_of

TASK = {"task": "reference", "limit": 10, "new_tokens": 3}


def plan(**options):
    """A plan of one method at one budget."""
    given = {"methods": ["vtc_cls"], "keeps": [0.1], "batch": 4, "tasks": [TASK], **options}
    return plan_of(given)


def samples(folder, task="reference"):
    """{name of a file: its text}."""
    files = sorted((folder / "samples" / task).iterdir())
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def rows(folder, label, task="reference"):
    """The lines of a setting."""
    return [json.loads(line) for line in samples(folder, task)[f"{label}.jsonl"].splitlines()]
