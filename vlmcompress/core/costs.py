"""What a prompt costs a decoder-only language model: operations by formula, bytes from its cache.

Operations are 2 x multiply-accumulates of the matrix products; attention is not halved for
causality, as no kernel skips exactly half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


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
    return (
        None
        if shape is None
        else layered_flops(config, [(length, length)] * shape[0], batch, logits)
    )


def layered_flops(
    config: Any,
    lengths: Sequence[tuple[int, int]],
    batch: int = 1,
    logits: int = 1,
    written: int = 0,
) -> int | None:
    """FLOPs of one prefill whose layers work on different lengths.

    Args:
        config: text config with Llama's attribute names.
        lengths: per layer, rows in its attention and rows in its MLP.
        batch: rows.
        logits: positions per row for which logits are computed.
        written: rows whose keys and values alone are made, over all layers.

    Returns:
        FLOPs, or None where the config does not describe a dense Llama-like stack.
    """
    shape = _shape(config)
    if shape is None:
        return None
    _, hidden, intermediate, q, kv, vocab = shape
    projections, mlp = 2 * hidden * (2 * q + 2 * kv), 3 * 2 * hidden * intermediate
    layers = sum(a * (projections + 2 * 2 * a * q) + m * mlp for a, m in lengths)
    return batch * (layers + written * 2 * hidden * 2 * kv + 2 * logits * hidden * vocab)


def tower_flops(
    rows: Sequence[tuple[int, int]], attention: int, mlp: int, width: int, batch: int = 1
) -> int:
    """FLOPs of the blocks of a vision transformer; patch embedding and heads are not among them.

    What a method computes to choose among rows is not counted either.

    Args:
        rows: per block, rows in its attention and rows in its MLP.
        attention: weights of a block's projections (query, key, value and output).
        mlp: weights of its MLP.
        width: of all heads together.
        batch: images.
    """
    blocks = (2 * a * (attention + 2 * a * width) + 2 * m * mlp for a, m in rows)
    return batch * sum(blocks)


def cache_bytes(cache: Any) -> int | None:
    """Bytes of all keys and values that a transformers cache holds; None where there are none."""
    layers = getattr(cache, "layers", None)
    if not layers:
        return None
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


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
