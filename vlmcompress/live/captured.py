"""What was captured in one tower pass, patch by patch, as evidence of images, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import EvidenceError
from vlmcompress.core.tokens import Evidence
from vlmcompress.families import Family
from vlmcompress.families.base import Layout, Reduce
from vlmcompress.live.session import Session


@dataclass(frozen=True)
class Captured:
    """The captures of one pass and what tells where they belong.

    Attributes:
        family: facts about the model.
        base: the model that holds tower and LLM.
        session: the pass.
        arguments: of `get_image_features`.
        lengths: uncompressed tokens of every image of the call.
    """

    family: Family
    base: nn.Module
    session: Session
    arguments: Mapping[str, Any]
    lengths: Sequence[int]

    def evidence(self, units: Sequence[int], layout: Layout, n: int) -> Evidence:
        """Evidence of some images.

        Args:
            units: the images wanted; they share one layout.
            layout: theirs.
            n: tokens that each of them has.

        Raises:
            EvidenceError: when the tower gives attention for another number of tokens.
        """

        def rows(captured: Mapping[int, list[Tensor]]) -> dict[int, Tensor]:
            return {
                layer: self._followed(layer, values, units, layout, "sum")
                for layer, values in captured.items()
            }

        def keys(layer: int, values: list[Tensor]) -> Tensor:
            by_patch = [value.permute(0, 2, 3, 1) for value in values]
            by_token = self._followed(layer, by_patch, units, layout, "mean")
            return by_token.permute(0, 3, 1, 2)

        evidence = Evidence(
            rows(self.session.cls_rows),
            rows(self.session.received_rows),
            {layer: keys(layer, values) for layer, values in self.session.keys.items()},
            wide_cls_attention=rows(self.session.wide_rows),
            cls_features=self._cls_features(units),
            norms=self._norms(units, layout),
            states={layer: self._states(layer, units, layout) for layer in self.session.levels},
        )
        for captured in (*evidence.cls_attention.values(), *evidence.received_attention.values()):
            if captured.shape[-1] != n:
                raise EvidenceError(
                    f"The tower gives attention for {captured.shape[-1]} tokens but an image has "
                    f"{n}; use a method that needs none, such as 'divprune'."
                )
        return evidence

    def _followed(
        self,
        layer: int,
        values: Sequence[Tensor],
        units: Sequence[int],
        layout: Layout,
        reduce: Reduce,
        *,
        behind: bool = False,
    ) -> Tensor:
        """What was captured of a layer, brought through the reductions that came after it."""
        run = self.session.acted
        if run is not None:
            values = [run.followed(layer, value, reduce, behind=behind) for value in values]
        return self._by_token(values, units, layout, reduce)

    def _by_token(
        self, values: Sequence[Tensor], units: Sequence[int], layout: Layout, reduce: Reduce
    ) -> Tensor:
        return self.family.by_token(self.base, self.arguments, values, units, layout, reduce)

    def _cls_features(self, units: Sequence[int]) -> Tensor | None:
        """[units, d] what the connector would read of [CLS]."""
        if not self.session.state_layers:
            return None
        states = [self.session.cls_states[layer] for layer in self.session.state_layers]
        return torch.cat(states, -1)[list(units)]

    def _norms(self, units: Sequence[int], layout: Layout) -> Tensor | None:
        """[units, n] length of the states that the connector reads, where it was asked for."""
        norms, run, tower = self.session.norms, self.session.reduced, self.session.tower
        if norms is None or tower is None:
            return None
        norms = norms[..., int(tower.has_cls) :]
        if run is not None:
            return norms.gather(1, run.order())[list(units)]
        values = [norms[:, None]] if norms.ndim > 1 else self._per_image(norms[None])
        return self._by_token(values, units, layout, "mean")[:, 0]

    def _states(self, layer: int, units: Sequence[int], layout: Layout) -> Tensor:
        """[units, n, d] outputs of a layer."""
        states, tower = self.session.levels[layer], self.session.tower
        assert tower is not None  # its layers were read
        if states.ndim > 2:
            values = [states[:, int(tower.has_cls) + tower.registers :].transpose(1, 2)]
        else:
            values = self._per_image(states.T)
        return self._followed(layer, values, units, layout, "mean", behind=True).transpose(1, 2)

    def _per_image(self, values: Tensor) -> list[Tensor]:
        """Values of the patches of all images in one row ([c, patches]), as [1, c, n] of each."""
        patches = values.shape[1] // sum(self.lengths)
        parts = values.split([n * patches for n in self.lengths], 1)
        return [part[None] for part in parts]
