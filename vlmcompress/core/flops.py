"""Analytic floating-point operations of a decoder-only language model.

Counts are 2 x multiply-accumulates of the matrix products; attention is not halved for causality,
as no kernel skips exactly half.
"""

from __future__ import annotations

from typing import Any


def prefill_flops(config: Any, length: int, batch: int = 1, logits: int = 1) -> int | None:
    """FLOPs of one prefill.

    Args:
        config: text config with Llama's attribute names.
        length: tokens per row.
        batch: rows.
        logits: positions per row for which logits are computed.

    Returns:
        FLOPs, or None where the config does not describe a dense Llama-like stack.
    """
    shape = _shape(config)
    if shape is None:
        return None
    layers, hidden, intermediate, q, kv, vocab = shape
    per_token = 2 * hidden * (q + 2 * kv) + 2 * q * hidden + 3 * 2 * hidden * intermediate
    attention = 2 * 2 * length * length * q
    return batch * (layers * (length * per_token + attention) + 2 * logits * hidden * vocab)


def _shape(config: Any) -> tuple[int, int, int, int, int, int] | None:
    """(layers, hidden, intermediate, query width, key width, vocabulary)."""
    names = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
    )
    values = [getattr(config, name, None) for name in names]
    latent = getattr(config, "kv_lora_rank", None) is not None
    experts = any(
        getattr(config, n, None) for n in ("n_routed_experts", "num_local_experts", "num_experts")
    )
    if any(not isinstance(v, int) for v in values) or latent or experts:
        return None
    layers, hidden, intermediate, heads, vocab = (int(v) for v in values if v is not None)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return layers, hidden, intermediate, heads * head_dim, kv_heads * head_dim, vocab
