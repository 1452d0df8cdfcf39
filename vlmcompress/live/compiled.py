"""Living with `torch.compile`: what it must not trace, and what it must forget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlmcompress.core.errors import UnsupportedModelError


class Untraced:
    """A hook that runs as Python when the module it sits on is compiled.

    Hooks of the outer model look at ids and counts, which would break the graph in dozens of
    places; kept out of it, they leave the language model to the compiler in one piece.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._run = torch.compiler.disable(hook)

    def __call__(self, *args: Any) -> Any:
        """Run the hook."""
        return self._run(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Untraced:
        """It finds the model it works for in its arguments, so that copies may share it."""
        return self

    def __reduce__(self) -> Any:
        """Refuse pickling, which would bring the model's own methods back without ours.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "A patched model cannot be pickled (torch.save of a whole model, spawned processes). "
            "Call handle.remove() first and patch again where it is loaded, or use "
            "model.save_pretrained(...), which saves the model alone."
        )


def forget_compiled(model: nn.Module) -> None:
    """Have compiled parts of a model compiled anew, after its hooks have changed.

    The compiler does not notice hooks that come and go inside what it has compiled; it would go on
    without them.
    """
    if any(_is_compiled(module) for module in model.modules()):
        torch.compiler.reset()


def unwrapped(model: Any) -> Any:
    """The module inside `torch.compile(module)`, anything else as it is."""
    return getattr(model, "_orig_mod", model)


def _is_compiled(module: nn.Module) -> bool:
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or unwrapped(module) is not module
