"""Queries and keys of a decoder layer, and the attention that some of its rows pay."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecoderAttention:
    """Queries and keys of one layer, as its kernel got them (normed, rotated).

    Attributes:
        q: [B, heads, L, head_dim] queries of the rows at the site.
        k: [B, kv_heads, C, head_dim] keys: those of earlier turns, the rows', then whatever a
            preallocated cache holds beyond them.
        scale: factor on the logits.
        seen: [B, past + L] bool, keys that are no padding.
        past: keys of earlier turns.
        mask: [B, 1, L, C] what the kernel adds to the logits (or bool, what may be seen), where a
            row may see later rows; None where it sees those before it.
        bias: [B, past + L] added to the logits of every key: the log of soft masks in training;
            None for none.
        softcap: bound that logits are pressed under; None for none.
    """

    q: Tensor
    k: Tensor
    scale: float
    seen: Tensor
    past: int = 0
    mask: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None

    def logits(self, rows: Tensor) -> Tensor:
        """Scaled logits of some queries: [B, heads, r, C] float32, nothing hidden.

        Args:
            rows: [B, r].
        """
        q = _rows(self.q, rows).float()
        b, heads, r, head_dim = q.shape
        grouped = q.reshape(b, self.k.shape[1], -1, r, head_dim)
        logits: Tensor = grouped @ self.k.float()[:, :, None].transpose(-1, -2)
        return logits.reshape(b, heads, r, -1) * self.scale

    def weights(self, rows: Tensor) -> Tensor:
        """Softmax rows of some queries over all keys: [B, heads, r, L] float32.

        Keys of earlier turns take part in the softmax and are then left out.

        Args:
            rows: [B, r].
        """
        return self.over_all(rows)[..., self.past : self.past + self.q.shape[2]]

    def over_all(self, rows: Tensor) -> Tensor:
        """The same over every key, those of earlier turns too: [B, heads, r, C] float32."""
        logits = self.logits(rows)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        hidden = ~self._may_see(rows, logits.shape[-1])
        if self.mask is not None and self.mask.dtype != torch.bool:
            logits = logits + _rows(self.mask, rows).float()
        if self.bias is not None:
            beyond = logits.shape[-1] - self.bias.shape[1]
            logits = logits + torch.nn.functional.pad(self.bias, (0, beyond))[:, None, None]
        return logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()

    def taken(self, rows: Tensor) -> DecoderAttention:
        """The same of some rows: queries and keys of the others are gone.

        Args:
            rows: [B, R].
        """
        past = torch.arange(self.past, device=rows.device).expand(len(rows), -1)
        keys = torch.cat([past, rows + self.past], 1)
        mask = self.mask
        if mask is not None:
            mask = _rows(_rows(mask, rows).transpose(2, 3), keys).transpose(2, 3)
        return replace(
            self,
            q=_rows(self.q, rows),
            k=_rows(self.k, keys),
            seen=self.seen.gather(1, keys),
            mask=mask,
            bias=None if self.bias is None else self.bias.gather(1, keys),
        )

    def _may_see(self, rows: Tensor, keys: int) -> Tensor:
        """[B, 1, r, keys] bool."""
        beyond = keys - self.seen.shape[1]
        seen = torch.nn.functional.pad(self.seen, (0, beyond))[:, None, None]
        if self.mask is None:
            order = torch.arange(keys, device=rows.device) - self.past
            return seen & (order <= rows[:, None, :, None])
        if self.mask.dtype == torch.bool:
            return seen & _rows(self.mask, rows)
        return seen.expand(-1, 1, rows.shape[1], -1)


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """Rows ([B, r]) of [B or 1, heads, L, d]: [B, heads, r, d]."""
    values = values.expand(len(rows), -1, -1, -1)
    return values.gather(2, rows[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))
