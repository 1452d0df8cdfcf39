"""Reading the tower's attention beside its own kernel.

The q and k that a layer makes anyway are read by forward hooks on its projections; only the rows
that a method asked for are turned into attention weights, in float32. The kernel, its inputs and
its outputs are untouched, so what the connector reads stays bit-equal under any attention
implementation, FlashAttention included, and no n x n map is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmcompress.families.towers import INPUT, QueriesKeys, Tower
from vlmcompress.live.session import Session, current

#: Rows of the attention matrix held at once while attention received is averaged over queries.
QUERY_BLOCK = 64


def cls_row(qk: QueriesKeys) -> Tensor:
    """Softmax row of the first query over all tokens but the first: [b, heads, n - 1] float32.

    The [CLS] column is dropped after the softmax and the rest not renormalised, as all published
    methods do.
    """
    logits = qk.q[:, :, :1].float() @ qk.k.float().transpose(-1, -2)
    return _biased(logits * qk.scale, qk).softmax(-1)[:, :, 0, 1:]


def _biased(logits: Tensor, qk: QueriesKeys) -> Tensor:
    """Logits ([b, heads, rows, n]) with what is added to every key's, if anything is."""
    return logits if qk.bias is None else logits + qk.bias.float()[:, None, None]


def wide(qk: QueriesKeys) -> QueriesKeys:
    """All heads as one head of full width, with the scale of that width."""
    q, k = (x.transpose(1, 2).flatten(2)[:, None] for x in (qk.q, qk.k))
    return QueriesKeys(q, k, q.shape[-1] ** -0.5, bias=qk.bias)


def attention_received(qk: QueriesKeys, *, skip: int = 0) -> Tensor:
    """Attention each token receives, averaged over all queries: [b, heads, n - skip] float32.

    Queries are taken in blocks, so that memory is O(n) although time is O(n^2).

    Args:
        qk: queries and keys of a layer.
        skip: leading tokens that are no patches; they neither ask nor appear.
    """
    keys = qk.k.float().transpose(-1, -2)
    queries = qk.q[:, :, skip:]
    total = torch.zeros(*qk.k.shape[:3], dtype=torch.float32, device=qk.k.device)
    for block in queries.split(QUERY_BLOCK, dim=2):
        weights = _biased((block.float() @ keys).mul_(qk.scale), qk).softmax(-1)
        total += weights.sum(2)
    return total[:, :, skip:] / queries.shape[2]


def _per_image(qk: QueriesKeys) -> Iterator[QueriesKeys]:
    """Split a packed row into its images; a batch stays one."""
    if qk.lengths is None:
        yield qk
        return
    q, k = qk.q.split(qk.lengths, dim=2), qk.k.split(qk.lengths, dim=2)
    yield from (QueriesKeys(a, b, qk.scale) for a, b in zip(q, k, strict=True))


def _on_projection(layer: int, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    session = current()
    if session is not None and session.reads(layer) and not session.idle:
        session.projections[layer, name] = output.detach()


def _on_attention(
    layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> None:
    session = current()
    if session is None or session.tower is None or not session.reads(layer) or session.idle:
        return
    with session.watch.span("evidence"), torch.no_grad():
        _capture(session, session.tower, layer, module, args, kwargs)


def _capture(
    session: Session, tower: Tower, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    outputs = {name: session.projections.pop((layer, name)) for name in tower.projections}
    if not tower.projections:
        outputs[INPUT] = args[0].detach()
    qk = tower.queries_keys(module, outputs, kwargs)
    if session.run is not None:
        values = session.projections.pop((layer, tower.values), None)
        if values is not None:
            outputs[tower.values] = values
        reads = session.run.reads_values(layer)
        qk = session.run.saw(layer, qk, tower.value_heads(module, outputs) if reads else None)
    images = list(_per_image(qk))
    skip = int(tower.has_cls)
    if layer in session.cls_layers:
        session.cls_rows[layer] = [cls_row(image) for image in images]
    if layer in session.received_layers:
        session.received_rows[layer] = [attention_received(image, skip=skip) for image in images]
    if layer in session.wide_layers:
        session.wide_rows[layer] = [cls_row(wide(image)) for image in images]
    if layer in session.key_layers:
        session.keys[layer] = [image.k[:, :, skip:].transpose(1, 2) for image in images]


class EvidenceHooks:
    """The hooks on one tower's projections and attention modules."""

    def __init__(self, tower: Tower, layers: nn.ModuleList) -> None:
        self._handles: list[RemovableHandle] = []
        self._projections: dict[tuple[int, str], tuple[nn.Module, RemovableHandle]] = {}
        self._tower = tower
        for index, layer in enumerate(layers):
            attention = layer.get_submodule(tower.attention)
            hook = partial(_on_attention, index)
            self._handles.append(attention.register_forward_hook(hook, with_kwargs=True))
        self.refresh(layers)

    def refresh(self, layers: nn.ModuleList) -> None:
        """Follow projections that were replaced since, as PEFT does when it adds LoRA to them."""
        for index, layer in enumerate(layers):
            attention = layer.get_submodule(self._tower.attention)
            for name in self._tower.projections:
                module = attention.get_submodule(name)
                known = self._projections.get((index, name))
                if known is not None and known[0] is module:
                    continue
                if known is not None:
                    known[1].remove()
                handle = module.register_forward_hook(partial(_on_projection, index, name))
                self._projections[index, name] = (module, handle)

    def remove(self) -> None:
        """Take every hook off."""
        for handle in [*self._handles, *(handle for _, handle in self._projections.values())]:
            handle.remove()
        self._handles.clear()
        self._projections.clear()
