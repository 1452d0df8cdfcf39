"""The folder that a training leaves: weights, configuration, results and a card made from them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmcompress.core.config import CompressionConfig, StageConfig
from vlmcompress.reference.card import estimate, markdown
from vlmcompress.training.atp import Trained

WEIGHTS, RESULTS, CARD = "atp.safetensors", "results.json", "README.md"
_HEAD = """
---
license: apache-2.0
library_name: vlmcompress
tags: [vlmcompress, atp, token-pruning]
---

# Thresholds of ATP for {model}

Trained for a mean over the layers of {target:.1%} of the visual tokens, in {steps} steps of {batch}
questions, seed {seed}. {lora}

```sh
{command}
```

```python
from vlmcompress import load_adapter

handle = load_adapter(model, "{folder}")
```
"""
_LORA = "LoRA of rank {rank} on queries and values of the language model was trained with them."
_FROZEN = "The language model itself is as it was."
_MEASURED = """
## Measured

{questions} questions about {images} scenes of the test split. Every fixed schedule keeps the same
{keep:.1%} of the visual tokens, averaged over layers and questions, as these thresholds did:
`pyramiddrop`, `random_layer` and `uniform_layer` at the same sites, by equal shares at each, and
`fastv` all at once at the first. None was tuned, and the thresholds are those of one seed.
Accuracy is the mean over kinds of questions in percent, with 95 % intervals from a bootstrap over
scenes; the difference is paired by question (positive: the thresholds are better). FLOPs are those
of the language model's prefill by formula, relative to all tokens.

{table}

{spread}
"""
_SPREAD = """
The thresholds let through {low:.1%} to {high:.1%} of a prompt's tokens (5th and 95th percentile of
the mean over layers), {behind} of {tokens} tokens behind the last site on average.
"""


def save_weights(trained: Trained, folder: str | Path) -> Path:
    """Write what was learnt and the configuration that loads it.

    Args:
        trained: thresholds, and LoRA where it was trained.
        folder: of the adapter, made if it is missing.

    Returns:
        The file of the thresholds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained.parts.save(folder / WEIGHTS)
    if trained.model is not None:
        for config in trained.model.peft_config.values():
            config.base_model_name_or_path = ""  # else the place of the model on this machine
        trained.model.save_pretrained(folder)
    defaults = type(trained.method)().options()
    chosen = {k: v for k, v in trained.method.options().items() if v != defaults[k]}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    stage = StageConfig(trained.method.name, options={**options, "weights": WEIGHTS})
    CompressionConfig((stage,)).save(folder)
    return folder / WEIGHTS


def write_card(folder: str | Path, results: Mapping[str, Any]) -> None:
    """Write the results, and the card that is made from nothing else.

    Args:
        folder: of the adapter.
        results: `model`, `command`, `plan`, `curve`, and `measured` where it was.
    """
    folder = Path(folder)
    text = json.dumps(results, indent=2) + "\n"
    (folder / RESULTS).write_text(text, encoding="utf-8")
    (folder / CARD).write_text(card(results), encoding="utf-8")


def card(results: Mapping[str, Any]) -> str:
    """The model card, from the results."""
    plan = results["plan"]
    rank = plan["lora"]
    head = _HEAD.format(
        model=results["model"],
        command=results["command"],
        folder=results["folder"],
        lora=_LORA.format(rank=rank) if rank else _FROZEN,
        **{k: plan[k] for k in ("steps", "batch", "seed", "target")},
    )
    measured = results.get("measured")
    return (head + (_measured(measured) if measured else "")).strip() + "\n"


def _measured(found: Mapping[str, Any]) -> str:
    low, high = found["spread"]
    spread = _SPREAD.format(
        low=low, high=high, behind=f"{found['left'][-1]:.1f}", tokens=found["tokens"]
    )
    return _MEASURED.format(
        questions=found["questions"],
        images=found["images"],
        keep=found["average_keep"],
        table=markdown(["", "accuracy", "ATP minus this", "FLOPs"], _rows(found)),
        spread=spread.strip(),
    )


def _rows(found: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    rows = [["all tokens", estimate(found["full"]), estimate(found["over_full"]), "1.000"]]
    for name, row in found["accuracy"].items():
        difference = found["difference"].get(name)
        shown = "" if difference is None else estimate(difference)
        rows.append([f"`{name}`", estimate(row), shown, f"{found['flops'][name]:.3f}"])
    return [*rows, ["no image", estimate(found["blind"]), "", ""]]


def with_weights(trained: Trained, path: str | Path) -> Any:
    """The method that reads what was learnt from its file."""
    return dataclasses.replace(trained.method, weights=str(path))
