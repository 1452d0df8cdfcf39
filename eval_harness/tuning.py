"""Fixed schedules at the FLOPs of an adaptive method, their layers chosen on held-out questions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from eval_harness.asking import Asking, Cell, Entry, Sample, ask
from eval_harness.schedules import FIXED, Spent, matched
from vlmcompress.core.errors import ConfigError
from vlmcompress.methods import create
from vlmcompress.methods.decoder.base import LayerReducer


def candidates(
    name: str, sites: int, like: Spent, config: Any, trials: int, seed: int = 0
) -> list[LayerReducer]:
    """Schedules of one method that cost the same, at different layers.

    Args:
        name: of a method with `layers` and `average_keep`.
        sites: how many layers it drops before.
        like: what the adaptive method spends on the questions that it is tuned on.
        config: of the language model.
        trials: how many schedules; fewer where there are not so many.
        seed: of the choice among all.

    Raises:
        ConfigError: where no layers let so many tokens go.
    """
    depth = like.tokens.shape[1]
    every = list(itertools.combinations(range(1, depth), sites))
    random.Random(seed).shuffle(every)
    kinds = [create(name, layers=layers) for layers in every]
    made = (matched(m, like, config) for m in kinds if isinstance(m, LayerReducer))
    found = list(itertools.islice((m for m in made if m is not None), trials))
    if not found:
        raise ConfigError(
            f"{name} with {sites} sites cannot be as cheap as what it is compared with; drop at "
            "fewer, earlier layers."
        )
    return found


def tuned(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    like: Spent,
    sites: int,
    trials: int,
    *,
    batch_size: int = 64,
    seed: int = 0,
    new_tokens: int = 6,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The best of several schedules of every fixed method, on questions that nobody else sees.

    Args:
        model: an unpatched VLM.
        processor: with a chat template.
        samples: questions to choose by.
        like: what the adaptive method spends on them.
        sites: of the adaptive method; `fastv` drops at one.
        trials: schedules of each method.
        batch_size: questions at a time.
        seed: of the choice of layers and of random dropping.
        new_tokens: longest answer.
        progress: called with a line of text after each batch.

    Returns:
        {method: `layers` (the best), `tried` {layers: share of right answers}}.
    """
    config = model.config.get_text_config()
    every = {
        name: candidates(name, sites if everywhere else 1, like, config, trials, seed)
        for name, everywhere in FIXED
    }
    named = {f"{m.name} {_layers(m)}": m for row in every.values() for m in row}
    plan = Asking(
        {name: Entry.of(method) for name, method in named.items()}, (None,), controls=False
    )
    answers = ask(
        model,
        processor,
        samples,
        plan,
        batch_size=batch_size,
        seed=seed,
        new_tokens=new_tokens,
        progress=progress,
    )
    share = {name: float(answers.right[Cell("auto", name, None)].mean()) for name in named}
    out = {}
    for name, row in every.items():
        tried = {_layers(m): share[f"{name} {_layers(m)}"] for m in row}
        best = max(row, key=lambda m: tried[_layers(m)])
        out[name] = {"layers": list(best.options()["layers"]), "tried": tried}
    return out


def _layers(method: LayerReducer) -> str:
    return " ".join(map(str, method.options()["layers"]))
