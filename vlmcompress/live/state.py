"""What a patched model carries: one attribute, gone after `remove()`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vlmcompress.families import Family
from vlmcompress.live.clip import TextSource
from vlmcompress.live.entrance import EntranceHooks
from vlmcompress.live.evidence import EvidenceHooks
from vlmcompress.live.reduction import ReductionHooks
from vlmcompress.methods.pipeline import Pipeline

if TYPE_CHECKING:
    from vlmcompress.core.report import CallRecord
    from vlmcompress.live.barepass import TowerPass
    from vlmcompress.live.forward import Restore
    from vlmcompress.live.layerrun import LayerRun
    from vlmcompress.live.layers import LayerHooks

#: The one attribute a patched model has.
ATTRIBUTE = "_vlmcompress"


class ThreadState(threading.local):
    """What belongs to the calls of one thread.

    Attributes:
        disabled: depth of `with handle.disabled()`.
        generating: depth of patched `generate` calls.
        pending: how the running forward's logits are restored.
        last: record of this thread's last compressed call.
        prefill: the short call that runs inside `generate`, and when its prefill began.
        generated: the short call that runs inside `generate`, until that ends.
        layers: the run inside the language model of this thread's call.
        tower: the running call of a tower that has no language model.
    """

    def __init__(self) -> None:
        self.disabled = 0
        self.generating = 0
        self.pending: Restore | None = None
        self.last: CallRecord | None = None
        self.prefill: Any = None
        self.generated: Any = None
        self.layers: LayerRun | None = None
        self.tower: TowerPass | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ThreadState:
        """A copied model starts with no calls."""
        return ThreadState()

    def __reduce__(self) -> Any:
        """Likewise for pickling."""
        return (ThreadState, ())


@dataclass
class Settings:
    """What `Handle.set` may change; replaced whole, so that a running call is not disturbed.

    Attributes:
        pipeline: the methods.
        chosen_by_default: whether the method was chosen by the library.
    """

    pipeline: Pipeline
    chosen_by_default: bool


@dataclass
class State:
    """Everything `patch` put on a model.

    Attributes:
        family: facts about the model.
        settings: what is applied.
        processor: the caller's processor, for overlays and questions.
        restore_length: whether logits get the caller's length.
        local: per-thread state.
        handles: hooks to take off.
        evidence: hooks on the tower, where its attention can be read.
        reduction: hooks on the tower's blocks, where a stage inside it was ever asked for.
        layers: hooks on the language model's layers, where a stage inside it was ever asked for.
        entrance: hooks where rows enter the language model, where a method was ever asked for that
            works there.
        calls: how many forwards and generates came with and without images.
        generate: a `generate` that others had set on the instance before; None where there was
            none.
        clip: embeds questions and patches, for methods that read the question.
        question: what is asked where a call does not say.
    """

    family: Family
    settings: Settings
    processor: Any = None
    restore_length: bool = True
    local: ThreadState = field(default_factory=ThreadState)
    handles: list[RemovableHandle] = field(default_factory=list)
    evidence: EvidenceHooks | None = None
    reduction: ReductionHooks | None = None
    layers: LayerHooks | None = None
    entrance: EntranceHooks | None = None
    calls: Counter[str] = field(default_factory=Counter)
    generate: Callable[..., Any] | None = None
    clip: TextSource | None = None
    question: Any = None

    @property
    def active(self) -> bool:
        """Whether calls of this thread are compressed."""
        return self.local.disabled == 0


def state_of(model: nn.Module) -> State | None:
    """The state of a patched model, None of any other."""
    return model.__dict__.get(ATTRIBUTE)
