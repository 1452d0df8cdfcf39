"""`patch`: one call switches compression on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from vlmcompress.core.errors import AlreadyPatchedError, VLMCompressError
from vlmcompress.families import Family, family_of
from vlmcompress.families.bare import BareFamily, bare_family_of
from vlmcompress.live import decoder
from vlmcompress.live.bare import BareHandle, patch_bare, refuse_language
from vlmcompress.live.clip import source_of
from vlmcompress.live.handle import Handle
from vlmcompress.live.inside import with_parts
from vlmcompress.live.install import check_evidence, check_seam, install, outer_model
from vlmcompress.live.state import Settings, State, state_of
from vlmcompress.methods import pipeline
from vlmcompress.methods.limits import refuse_untrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def patch(
    model: PreTrainedModel | Any,
    method: Any = None,
    *,
    keep: float | int | str | None = None,
    processor: Any = None,
    positions: str = "auto",
    seed: int = 0,
    restore_length: bool = True,
    clip: Any = None,
    question: str | Sequence[str] | None = None,
    force: bool = False,
) -> Handle:
    """Compress the visual tokens of `model`, which is called as before.

    Args:
        model: a HuggingFace vision-language model, or a PEFT model around one; or a vision
            transformer without a language model (CLIP, SigLIP, DINOv2, ViT; open_clip; timm), in
            which methods of stage `tower` can act.
        method: a name (`"vtc_cls"`), a configured method, a `CompressionConfig`, a spec string
            (`"vtc_cls:0.25"`) or a list of these. None chooses `vtc_cls` for towers with [CLS],
            `received_attention` for towers without, and `divprune` where attention cannot be read;
            the choice stands in the report. A method named explicitly never falls back. Without
            a language model None is `tome_tower`, and `"tome"` and `"pitome"` mean `"tome_tower"`
            and `"pitome_tower"`.
        keep: what is *kept*: a float in (0, 1] is a fraction of each image's tokens, an int a count
            per image, `"auto"` is decided per image. None only when the method carries its own
            budget.
        processor: the model's processor; overlays need it where it crops or pads, and text-aware
            methods find the question in the prompt by it (the user's text of the last turn).
        positions: `contiguous` renumbers kept tokens in the language model, `original` keeps their
            ids; `auto` is contiguous for 1-D RoPE and original for M-RoPE.
        seed: for methods that draw numbers.
        restore_length: whether logits outside `generate` get the caller's length (zeros at dropped
            positions). False gives the short ones; `handle.last.token_index` maps them.
        clip: for text-aware methods: the CLIP model whose vision tower this is, since checkpoints
            hold no text half. A hub id, a transformers `CLIPModel` (or `(model, tokenizer)`),
            `(open_clip_model, tokenizer)`, or `vlmcompress.reference.load_text_head()`.
        question: for text-aware methods: what is asked, one text or one per row, where a call does
            not say so itself (`model.generate(**inputs, question=...)`).
        force: take a configuration also outside the budgets (`trained_keep`) that its weights were
            trained for.

    Returns:
        A handle that reports, changes, suspends and removes the compression.

    Raises:
        UnsupportedModelError: for models whose family is not known.
        AlreadyPatchedError: for a patched model.
        EvidenceError: when the method looks at something this tower does not have.
        MissingTextError: when the method reads the question and there is no `clip`.
        ConfigError, ConfigTypeError, UnknownMethodError: for bad `method`, `keep`, `positions` or
            `seed`.
        CheckpointError: for a file of trained parts that cannot be used.
    """
    model = outer_model(model)
    if state_of(model) is not None:
        raise AlreadyPatchedError(
            f"This {type(model).__name__} is patched already; call handle.remove() on the first "
            "handle (or vlmcompress.handle_of(model).remove()), or change it with handle.set(...)."
        )
    bare = bare_family_of(model)
    if bare is not None:
        refuse_language(model, positions=positions, clip=clip, question=question)
        return patch_bare(model, bare, method, keep, processor=processor, seed=seed, force=force)
    family = family_of(model)
    check_seam(model)
    built = pipeline.build(
        method,
        keep,
        default=default_method(family, model.base_model),
        positions=positions,
        seed=seed,
    )
    if not force:
        refuse_untrained(built)
    source = source_of(clip, processor, family.tower_module(model.base_model))
    check_evidence(family, model.base_model, built, source)
    decoder.check(model, family, built)
    built = with_parts(family, model.base_model, built)
    settings = Settings(built, method is None)
    state = State(family, settings, processor, restore_length, clip=source, question=question)
    install(model, state)
    return Handle(model)


def handle_of(model: PreTrainedModel | Any) -> Handle:
    """The handle of a patched model (a deep copy of a patched model is patched too).

    Raises:
        VLMCompressError: when the model is not patched.
    """
    model = outer_model(model)
    state = state_of(model)
    if state is None:
        raise VLMCompressError(
            f"This {type(model).__name__} is not patched; call patch(model, keep=...)."
        )
    return BareHandle(model) if isinstance(state.family, BareFamily) else Handle(model)


def default_method(family: Family, base: nn.Module) -> str:
    """What `method=None` stands for on this tower."""
    tower = family.tower(base)
    if tower is None:
        return "divprune"
    if tower.has_cls:
        return "vtc_cls"
    whole = family.whole_layers(base)
    if whole is None:
        return "received_attention"
    return f"received_attention(layers={tuple(sorted(whole)[-2:])})"
