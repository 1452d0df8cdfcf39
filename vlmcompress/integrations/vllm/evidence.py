"""Reading attention inside an engine's tower, beside the engine's own kernel.

An engine fuses the projections to q, k and v and may split heads over devices. What its attention
is about to get is read in front of it, the rows that the method asked for are made as `patch` makes
them, and the heads of all devices are put together in the order of their ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import ConfigError
from vlmcompress.families.towers import QueriesKeys
from vlmcompress.integrations.vllm.serving import Serving
from vlmcompress.live.evidence import attention_received, cls_row, wide
from vlmcompress.live.session import Session

Gather = Callable[[Tensor], Tensor]
"""[b, heads of this device, n, head_dim] to [b, heads, n, head_dim]."""


class TowerReader:
    """Hooks in front of the attention of the layers that a method looks at.

    Attributes:
        session: of the pass that runs; None outside of one.
    """

    def __init__(self, serving: Serving, layers: nn.ModuleList, gather: Gather) -> None:
        """Put the hooks on.

        Args:
            serving: what is wanted.
            layers: the tower's blocks, as far as the engine has built them.
            gather: puts heads together.

        Raises:
            ConfigError: for a layer that the engine has not built, since nothing behind it is read.
        """
        self.session: Session | None = None
        self._gather, self._skip = gather, int(serving.has_cls)
        for index in sorted(serving.resolved.all()):
            if index >= len(layers):
                raise ConfigError(
                    f"{serving.stage.method.name} looks at tower layer {index}, and the engine "
                    f"builds layers 0 to {len(layers) - 1}, those whose output the connector "
                    "reads; name one of them in the method's options."
                )
            attention = layers[index].get_submodule("self_attn.attn")
            attention.register_forward_pre_hook(partial(self._read, index))

    def start(self, session: Session) -> None:
        """Let the next pass leave its evidence in `session`."""
        self.session = session

    @torch.no_grad()
    def _read(self, layer: int, module: Any, args: tuple[Tensor, ...]) -> None:
        session = self.session
        if session is None:
            return
        q, k = (
            self._gather(x.unflatten(-1, (-1, module.head_size)).transpose(1, 2)) for x in args[:2]
        )
        qk = QueriesKeys(q, k, float(module.scale))
        if layer in session.cls_layers:
            session.cls_rows[layer] = [cls_row(qk)]
        if layer in session.received_layers:
            session.received_rows[layer] = [attention_received(qk, skip=self._skip)]
        if layer in session.wide_layers:
            session.wide_rows[layer] = [cls_row(wide(qk))]
        if layer in session.key_layers:
            session.keys[layer] = [k[:, :, self._skip :].transpose(1, 2)]


def pick_views(session: Session, views: Tensor) -> None:
    """Leave out views that only fill up a batch.

    Args:
        session: with evidence of all views.
        views: [v] int64, those that are real.
    """
    for captured in (session.cls_rows, session.received_rows, session.wide_rows, session.keys):
        for layer, (values,) in captured.items():
            captured[layer] = [values[views.to(values.device)]]
