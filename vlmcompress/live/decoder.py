"""From a call to the run inside its language model, and back to the call's record."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from vlmcompress.core.costs import layered_flops
from vlmcompress.core.errors import (
    CacheMismatchError,
    ConfigError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from vlmcompress.core.report import CallRecord
from vlmcompress.core.tokens import Segment
from vlmcompress.families import Family
from vlmcompress.families.decoders import Decoder, decoder_of
from vlmcompress.live import layers
from vlmcompress.live.beside import EXAMPLE, check_beside
from vlmcompress.live.columns import create_causal_mask
from vlmcompress.live.layerrun import Act, LayerRun
from vlmcompress.live.rows import LayerRecord, Rows
from vlmcompress.live.state import State
from vlmcompress.methods.decoder.base import LayerReducer, Positions
from vlmcompress.methods.pipeline import LayerStage, Pipeline

#: The attribute of a cache whose layers hold different lengths.
ATTRIBUTE = "_vlmcompress_layers"


def layers_of(cache: Any) -> LayerRecord | None:
    """What a cache knows of the lengths of its layers; None where all are as transformers left."""
    return getattr(cache, ATTRIBUTE, None)


def enter(
    model: Any,
    state: State,
    arguments: Mapping[str, Any],
    record: CallRecord | None = None,
    stages: Sequence[LayerStage] = (),
    prompt: int | None = None,
) -> None:
    """Prepare the language model for a forward that is about to run.

    Args:
        model: the outer model.
        state: what was put on it.
        arguments: of the forward, shortened.
        record: of the call, where this forward is its prefill.
        stages: what acts inside the language model.
        prompt: columns of the conversation that are the prompt's, where a draft may follow it.
    """
    layers.begin(None)
    state.local.layers = None
    past = layers_of(arguments.get("past_key_values"))
    if state.layers is None or (not stages and past is None):
        return
    decoder = state.layers.decoder
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise UnsupportedInputError(
            "Methods inside the language model need a [batch, length] attention_mask, from which "
            "each layer's own mask is made."
        )
    new = ids if ids is not None else arguments["inputs_embeds"][..., 0]
    _check(decoder, arguments, past, new)
    if prompt is not None:
        prompt -= held_columns(arguments.get("past_key_values"))
    rows = _rows(model, arguments, new, mask, record if stages else None, prompt)
    beside = [s for s in stages if not isinstance(s.method, LayerReducer)]
    log: list[int] = []
    if past is not None and not stages and state.active:
        beside, log = list(past.standing), past.exits
    if stages:
        state.layers.refresh()
    run = LayerRun(
        decoder,
        state.layers.parts,
        rows,
        acts=_acts(stages, rows, len(decoder.layers)) if stages else (),
        beside=beside,
        log=log,
        mode=_mode(state),
        mask=mask,
        past=past,
        square_masks=state.family.sees_ahead,
        attach=_attach,
    )
    state.local.layers = run
    layers.begin(run)


def flat_mask(call: Mapping[str, Any], given: Tensor | None) -> Any:
    """The 2-D mask of a forward inside `generate`.

    `generate` makes square ones of it for caches of fixed size; what it has written since is all
    there, and beams and samples repeat rows.

    Args:
        call: arguments of the forward.
        given: [B, L] what `generate` was given.
    """
    mask = call.get("attention_mask")
    if mask is None or given is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    ids, held = call["input_ids"], held_columns(call.get("past_key_values"))
    given = given.repeat_interleave(len(ids) // len(given), 0)[:, : held + ids.shape[1]]
    written = held + ids.shape[1] - given.shape[1]
    return torch.nn.functional.pad(given, (0, written), value=1)


def held_columns(cache: Any) -> int:
    """Columns of the conversation in a cache."""
    held, past = 0 if cache is None else int(cache.get_seq_length()), layers_of(cache)
    return held if past is None else past.columns(held)


def check(model: Any, family: Family, built: Pipeline) -> None:
    """Refuse at patch time what could only fail at the first prompt.

    Raises:
        UnsupportedModelError: for language models whose layers cannot work on different lengths.
        ConfigError: for layers that are not there, out of order or equal after resolution, and for
            positions that cannot be.
    """
    if not built.decoder:
        return
    if "layer_idx" not in inspect.signature(create_causal_mask()).parameters:
        raise UnsupportedModelError(
            "Methods inside the language model need a transformers that makes masks layer by "
            "layer (create_causal_mask with layer_idx); upgrade transformers."
        )
    decoder = decoder_of(model)
    check_beside(built, decoder)
    for stage in built.decoder:
        if not isinstance(stage.method, LayerReducer):
            continue
        sites = stage.method.sites(len(decoder.layers))
        stage.method.counts(EXAMPLE, stage.keep, len(decoder.layers))
        if decoder.between is None and any(site.where == "between" for site in sites):
            raise UnsupportedModelError(
                f"{stage.method.name} acts between a layer's attention and its MLP, and the layers "
                f"of this {family.model_type} model run both side by side; use a method that acts "
                "before layers, such as 'fastv'."
            )
        if family.sees_ahead and stage.method.merges:
            raise UnsupportedModelError(
                f"{stage.method.name} adds merged tokens, and rows of a {family.model_type} prompt "
                "see later ones, among which merged ones have no place; use a method that drops."
            )
    if family.rope == "mrope" and built.config.positions == "contiguous":
        raise ConfigError(
            "positions='contiguous' would leave tokens of an M-RoPE model without their place in "
            "the image at some layers and not at others; use positions='original'."
        )


def leave(state: State, record: CallRecord) -> CallRecord:
    """The record of a call completed by what happened inside the language model."""
    run, state.local.layers = state.local.layers, None
    if run is None or not run.lengths:
        return record
    text = run.decoder.config
    return dataclasses.replace(
        record,
        layer_lengths=tuple(run.lengths),
        layer_tokens=run.tokens(),
        layer_entrants=run.entrants(record.batch),
        soft_masks=tuple(run.soft_masks),
        prefill_flops=layered_flops(text, run.lengths, record.batch, written=run.written),
        ran=record.ran if run.exits is None else partial(tuple, run.exits),
    )


def _mode(state: State) -> Positions | None:
    """Positions behind a site; None leaves them to the methods."""
    wanted = state.settings.pipeline.config.positions
    if wanted == "auto":
        return "original" if state.family.rope == "mrope" else None
    return wanted


def _check(
    decoder: Decoder, arguments: Mapping[str, Any], past: LayerRecord | None, new: Tensor
) -> None:
    """Refuse what would go wrong without a word.

    Raises:
        CacheMismatchError: for a cache of another batch, or one that soft masks were on.
        UnsupportedInputError: when a sliding window would count kept tokens.
    """
    held = held_columns(arguments.get("past_key_values"))
    if past is not None and len(past.layers[0].seen) != len(new):
        raise CacheMismatchError(
            f"The cache was filled by {len(past.layers[0].seen)} rows, the call has {len(new)}."
        )
    if past is not None and past.soft:
        raise CacheMismatchError(
            "The cache was filled under soft masks, which are for training and which it does not "
            "hold; call handle.parts.eval() first to generate, or start without the cache."
        )
    window = decoder.window
    if window is not None and held + new.shape[1] > window:
        raise UnsupportedInputError(
            f"{held + new.shape[1]} tokens are more than the sliding window of {window} that some "
            "layers attend in; it would count the tokens that are left. Use a method between tower "
            "and LLM."
        )


def _rows(
    model: Any,
    arguments: Mapping[str, Any],
    new: Tensor,
    mask: Tensor | None,
    record: CallRecord | None,
    prompt: int | None,
) -> Rows:
    """All columns of the call; which of them are visual, where methods act on them."""
    if mask is None:
        valid = torch.ones(new.shape, dtype=torch.bool, device=new.device)
    else:
        valid = mask[:, -new.shape[1] :].bool()
    if record is None:
        return Rows.all(torch.zeros_like(valid), valid, full=True)
    full = mask is None or bool(valid.all())
    visual = torch.eq(new, model.config.image_token_id) & valid
    unit, place, grid = _places(visual, record)
    return Rows.all(
        visual,
        valid,
        full=full,
        unit=unit,
        place=place,
        grid=grid,
        prompt=prompt,
        answers=_answers(arguments.get("labels")),
    )


def _places(visual: Tensor, record: CallRecord) -> tuple[Tensor, Tensor, Tensor]:
    """Image, place and grid of every visual column: [B, L], [B, L, 2] and [B, L, 2].

    Beams and samples repeat the rows of a batch.
    """
    copies = len(visual) // record.batch
    units = torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(record.kept)])
    tables = [
        _table(segments).to(rows.device)[rows]
        for rows, segments in zip(record.kept, record.segments, strict=True)
    ]
    device = visual.device
    flat = torch.cat([units.to(device)[:, None], torch.cat(tables).to(device)], 1)
    one = flat.new_tensor([-1, 0, 0, 1, 1]).repeat(record.batch, visual.shape[1], 1)
    there = visual[::copies]
    given = int(there.sum())
    if given != len(flat):
        raise UnsupportedInputError(
            f"The language model was given {given} of the prompt's {len(flat)} visual "
            "tokens; methods inside it need the prompt in one piece, without prefill_chunk_size."
        )
    one[there] = flat
    out = one.repeat_interleave(copies, 0)
    return out[..., 0], out[..., 1:3], out[..., 3:]


@lru_cache(maxsize=64)
def _table(segments: tuple[Segment, ...]) -> Tensor:
    """[n_full, 4] row, column, height and width of every token; 0, 0, 1, 1 between rectangles."""
    n = max(segment.slice.stop for segment in segments)
    table = torch.tensor([0, 0, 1, 1]).repeat(n + 1, 1)
    for segment in segments:
        _, h, w = segment.grid
        places = torch.arange(segment.length) % (h * w)
        size = torch.tensor([h, w]).expand(segment.length, 2)
        table[segment.slice] = torch.cat([torch.stack([places // w, places % w], 1), size], 1)
    return table


def _answers(labels: Any) -> Tensor | None:
    """[B, L] bool, rows without a label that one with a label follows."""
    if not isinstance(labels, Tensor):
        return None
    labelled = labels != -100
    follows = torch.zeros_like(labelled)
    follows[:, :-1] = labelled[:, 1:] & ~labelled[:, :-1]
    return follows


def _acts(stages: Sequence[LayerStage], rows: Rows, depth: int) -> list[Act]:
    """Every stage's sites in the order of depth."""
    present = rows.visual.sum(1).tolist()
    acts = []
    for stage in stages:
        if not isinstance(stage.method, LayerReducer):
            continue
        left = [stage.method.counts(n, stage.keep, depth) if n else () for n in present]
        sites = stage.method.sites(depth)
        for number, site in enumerate(sites):
            allowed = tuple(counts[number] if counts else 0 for counts in left)
            acts.append(Act(site, stage.method, number, allowed, stage.parts))
    return sorted(acts, key=lambda act: (act.site.layer, act.site.where == "between"))


def _attach(cache: Any, record: LayerRecord) -> None:
    setattr(cache, ATTRIBUTE, record)
    if record.standing and "reorder_cache" not in vars(cache):
        cache.reorder_cache = MethodType(_reorder, cache)


def _reorder(self: Any, beam_idx: Tensor) -> None:
    """A cache whose beams are put in another order, with what it knows of them."""
    type(self).reorder_cache(self, beam_idx)
    record = layers_of(self)
    if record is not None:
        setattr(self, ATTRIBUTE, record.reordered(beam_idx))
