"""One call of a vision transformer without a language model, from its begin to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.core.costs import tower_flops
from vlmcompress.core.errors import UnsupportedInputError, UnsupportedModelError
from vlmcompress.core.report import CallRecord
from vlmcompress.core.tokens import Segment
from vlmcompress.families.bare import BareFamily, scaled
from vlmcompress.families.towers import Tower
from vlmcompress.live.session import Session, current, running
from vlmcompress.live.sparserun import run_of
from vlmcompress.live.state import State, state_of
from vlmcompress.live.timing import Stopwatch
from vlmcompress.live.tower import may_skip
from vlmcompress.live.towerrun import TowerRun

#: Arguments of a tower's call that speak of rows as they were, or want maps of them.
_OF_ROWS = ("attention_mask", "attn_mask", "is_causal", "output_attentions")


@dataclass
class TowerPass:
    """A call of a tower that runs.

    Attributes:
        run: the stage inside the tower.
        watch: the stage clock.
        context: keeps the pass's session current; left at the end.
        spec: of the configuration in force.
        pixels: [b, channels, height, width].
        start: the moment at which it began.
    """

    run: TowerRun
    watch: Stopwatch
    context: AbstractContextManager[Session]
    spec: str
    pixels: Tensor
    start: Any


def begin(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the tower's forward: begin a pass, unless compression is switched off.

    Raises:
        UnsupportedInputError: for calls that speak of rows which will not be there.
    """
    state = state_of(host)
    if state is None:
        return
    _leave(state)  # one that an interrupt has broken off
    if not state.active:
        return
    tower, built = _facts(state)[1], state.settings.pipeline
    layers = tower.layers(host)
    _check_call(host, layers, kwargs)
    pixels = _pixels(args, kwargs)
    watch, depth = Stopwatch(pixels.device), len(layers)
    assert built.tower is not None  # checked when the method was chosen
    run = run_of(built.tower, tower, depth, depth - 1, in_order=True)
    assert state.evidence is not None  # a patched model has hooks
    state.evidence.refresh(layers)
    context = running(Session(watch, tower, run=run))
    context.__enter__()
    state.local.tower = TowerPass(run, watch, context, built.config.to_spec(), pixels, watch.mark())


def end(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After the tower's forward: end the pass and remember it, unless an error broke it off.

    Raises:
        UnsupportedModelError: when the blocks did not run in it.
    """
    state = state_of(host)
    done = None if state is None else _leave(state)
    if state is None or done is None or output is None:
        return
    if not done.run.began:
        raise UnsupportedModelError(
            "The blocks of the vision tower did not run in this call (something answers in its "
            "place), so no method inside the tower could act."
        )
    done.watch.add("tower", done.start, done.watch.mark())
    state.calls["with"] += 1
    state.local.last = _record(host, state, done)


def outside(state: State, block: nn.Module, args: Any) -> None:
    """Count runs of the first block that did not come by the tower's forward."""
    if state.active and current() is None:
        state.calls["without"] += 1


def before_mean(skip: int, module: nn.Module, args: Any, output: Any) -> Any:
    """Scale rows so that the plain mean over them that follows is the mean by mass.

    Args:
        skip: leading rows that are not among the averaged.
        module: the last to see the rows.
        args: its arguments.
        output: [b, n, d], or a model output that holds it as `last_hidden_state`.
    """
    run = _reduced()
    if run is None:
        return None
    rows = output if isinstance(output, Tensor) else output.last_hidden_state
    first, patches = rows[:, :skip], scaled(rows[:, skip:], run.mass()[:, skip:])
    rows = torch.cat([first, patches], 1)
    if isinstance(output, Tensor):
        return rows
    return type(output)(**{**output, "last_hidden_state": rows})


def before_pool(
    skip: int, mask: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Add the log of what each row stands for to the logits of an attention that pools rows.

    Args:
        skip: leading rows that it does not see.
        mask: its argument for that.
        module: the attention.
        args: its arguments; the last holds the rows.
        kwargs: its others.
    """
    run = _reduced()
    if run is None:
        return None
    bias = run.mass()[:, skip:].log().to(args[-1].dtype)
    return args, {**kwargs, mask: bias if mask == "key_padding_mask" else bias[:, None, None]}


def _facts(state: State) -> tuple[BareFamily, Tower]:
    family = state.family
    assert isinstance(family, BareFamily)  # this module's hooks go on no other
    assert family.own_tower is not None
    return family, family.own_tower


def _reduced() -> TowerRun | None:
    """The run of this thread's pass, once it has taken rows away."""
    session = current()
    return None if session is None else session.reduced


def _leave(state: State) -> TowerPass | None:
    """End this thread's pass, if there is one."""
    running_pass, state.local.tower = state.local.tower, None
    if running_pass is not None:
        running_pass.context.__exit__(None, None, None)
    return running_pass


def _pixels(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The images of a call.

    Raises:
        UnsupportedInputError: when there are none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 4:
            return value
    raise UnsupportedInputError(
        "The tower was called without images ([b, channels, height, width]), of which a method "
        "inside it could reduce the patches."
    )


def _check_call(host: nn.Module, layers: nn.ModuleList, kwargs: Mapping[str, Any]) -> None:
    """Refuse what speaks of rows that will not be there."""
    given = {name: kwargs.get(name) for name in _OF_ROWS}
    maps = getattr(getattr(host, "config", None), "output_attentions", None)
    given["output_attentions"] = given["output_attentions"] or maps
    for name, value in given.items():
        if value is not None and value is not False:
            raise UnsupportedInputError(
                f"The call carries {name}, which speaks of all rows in every block, and a method "
                "inside the tower takes rows away; leave it out, or call inside "
                "`with handle.disabled():`."
            )
    checkpointed = any(getattr(part, "grad_checkpointing", False) for part in host.modules())
    if torch.is_grad_enabled() and (checkpointed or not may_skip(layers)):
        raise UnsupportedInputError(
            "Gradient checkpointing of the vision tower runs its blocks a second time, which "
            "cannot be followed by a method inside the tower; switch it off."
        )
    if host.training and any(type(part).__name__ == "PatchDropout" for part in host.modules()):
        raise UnsupportedInputError(
            "Patch dropout takes random patches away in training, and the places of those that "
            "are left are not known; build the model without it, or call eval()."
        )


def _record(host: nn.Module, state: State, done: TowerPass) -> CallRecord:
    (family, tower), run = _facts(state), done.run
    n, b = run.n_full, len(done.pixels)
    h, w = family.grid(done.pixels, n)
    kept = run.source() if run.reduced else torch.arange(n, device=done.pixels.device).expand(b, n)
    assignments = list(run.assignment()) if run.reduced else [None] * b
    costs = _costs(host, tower)
    width, rows = run.state.hidden.shape[-1], n + int(tower.has_cls) + tower.registers
    whole = [(rows, rows)] * len(run.rows)
    return CallRecord(
        method=done.spec,
        positions=None,
        tokens_before=(n,) * b,
        tokens_after=(kept.shape[1],) * b,
        kept=tuple(kept),
        assignments=tuple(assignments),
        segments=((Segment("image", (1, h, w), slice(0, n)),),) * b,
        batch=b,
        prompt_length=None,
        short_length=None,
        tower_patches=run.plan if run.acted else (),
        tower_keys=run.keys,
        tower_run=run.ran,
        tower_flops=tower_flops(run.rows, *costs, width, b),
        tower_flops_before=tower_flops(whole, *costs, width, b),
        clock=done.watch.seconds,
    )


def _costs(host: nn.Module, tower: Tower) -> tuple[int, int]:
    """Weights of the projections of a block's attention, and of its MLP."""
    block = tower.layers(host)[0]
    attention, mlp = block.get_submodule(tower.attention), block.get_submodule(tower.mlp)
    inner = getattr(attention, "in_proj_weight", None)
    return _weights(attention) + (0 if inner is None else inner.numel()), _weights(mlp)


def _weights(module: nn.Module) -> int:
    linear = (part for part in module.modules() if isinstance(part, nn.Linear))
    return sum(part.in_features * part.out_features for part in linear)
