"""From a call to what is done at the language model's entrance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmcompress.core.errors import UnsupportedInputError
from vlmcompress.core.report import CallRecord
from vlmcompress.families.decoders import Decoder, decoder_of
from vlmcompress.live import entrance
from vlmcompress.live.calls import ShortCall
from vlmcompress.live.decoder import held_columns
from vlmcompress.live.layercopies import run_layer
from vlmcompress.live.question import rows_of
from vlmcompress.live.state import State
from vlmcompress.methods.prompt.llava_mini import Fusible, Fusion


def leave() -> None:
    """Nothing is done in the forward that is about to run."""
    entrance.begin(None)


def enter(model: Any, state: State, arguments: Mapping[str, Any], short: ShortCall) -> None:
    """Prepare the language model for a forward that brings images.

    Args:
        model: the outer model.
        state: what was put on it.
        arguments: of the forward.
        short: the call it belongs to.

    Raises:
        UnsupportedInputError: when the prompt does not come in one piece, or the images were
            encoded for another method than the model's.
        CacheMismatchError: for images that another language model has read.
    """
    encoded = short.encoded
    if encoded is None:
        return
    if state.entrance is None:
        raise UnsupportedInputError(
            "These images were encoded by a method that goes on where the prompt enters the "
            "language model, and none was ever put on this one; patch it with that method."
        )
    ids = arguments["input_ids"]
    prompt = short.arguments["input_ids"].shape[1]
    if state.local.generating:
        prompt -= held_columns(arguments.get("past_key_values"))
    places = entrance.placeholders(model, ids, prompt)
    decoder, batch = decoder_of(model), short.record.batch
    check_whole(places[:: len(ids) // batch], short.record)
    if encoded.heard:
        entrance.begin(entrance.recital(decoder, places, batch, encoded.heard))
        return
    asking = ~places & _given(arguments, ids)
    asking[:, prompt:] = False
    whole = _by_row(encoded.whole, places, batch, short.record.tokens_after)
    entrance.begin(entrance.Fused(decoder, places, asking, whole, _fusion(state, decoder)))


def check_whole(places: Tensor, record: CallRecord) -> None:
    """Refuse a prompt that comes in pieces.

    Args:
        places: [B, L] bool, placeholders that a forward brings.
        record: of the call.

    Raises:
        UnsupportedInputError: when some are missing.
    """
    found, total = int(places.sum()), sum(record.tokens_after)
    if found != total:
        raise UnsupportedInputError(
            f"The language model was given {found} of the prompt's {total} visual tokens; "
            f"{record.method} needs the prompt in one piece, without prefill_chunk_size."
        )


def _given(arguments: Mapping[str, Any], ids: Tensor) -> Tensor:
    """[B, L] bool, columns that are neither padding nor have a label."""
    given = torch.ones_like(ids, dtype=torch.bool)
    mask, labels = arguments.get("attention_mask"), arguments.get("labels")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        given &= mask[:, -ids.shape[1] :].bool().to(ids.device)
    if isinstance(labels, Tensor):
        given &= labels.to(ids.device) == -100
    return given


def _by_row(
    whole: Sequence[Tensor], places: Tensor, batch: int, counts: Sequence[int]
) -> list[Tensor]:
    """All rows of the images of every row of the batch, [n, d] each; beams repeat rows.

    Args:
        whole: of every image.
        places: [B, L] bool, placeholders.
        batch: samples of the call.
        counts: tokens left of every image.
    """
    copies = len(places) // batch
    owners = rows_of(places[::copies].sum(1).tolist(), counts)
    nothing = whole[0][:0]
    samples = [
        torch.cat([nothing, *(w for w, owner in zip(whole, owners, strict=True) if owner == b)])
        for b in range(batch)
    ]
    return [sample for sample in samples for _ in range(copies)]


def _fusion(state: State, decoder: Decoder) -> Callable[[Fusible], tuple[Tensor, Tensor]]:
    """The trained parts of the method that fuses.

    Raises:
        UnsupportedInputError: when the model has none.
    """
    stages = state.settings.pipeline.stages
    parts = stages[-1].parts if stages else None
    if not isinstance(parts, Fusion) or not len(parts.prefusion_layers):
        raise UnsupportedInputError(
            "These images are to be fused with the text, and the method that does so is no longer "
            "this model's; set it again, or encode the images anew."
        )
    run = partial(run_layer, decoder, 3 if state.family.rope == "mrope" else 1)

    def fuse(prompt: Fusible) -> tuple[Tensor, Tensor]:
        parts.follow(prompt.text.device)
        return parts.fuse(prompt, run)

    return fuse
