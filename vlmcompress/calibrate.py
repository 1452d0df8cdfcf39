"""Fitting methods to a model: FitPrune's schedule, and the threshold of an early exit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vlmcompress.core.costs import layered_flops
from vlmcompress.core.errors import UnsupportedModelError
from vlmcompress.families.decoders import decoder_of
from vlmcompress.live.patch import patch
from vlmcompress.methods.decoder.fitting import Cost, Fit, Sample, fit
from vlmcompress.methods.decoder.statistics import AttentionStatistics
from vlmcompress.methods.decoder.watching import LayerWatch, TowerWatch
from vlmcompress.methods.ops.exits import ExitFit, Passage, fit_threshold
from vlmcompress.methods.ops.similarity import first_exit
from vlmcompress.methods.options import Layer
from vlmcompress.methods.tower.early_exit import EarlyExitTower

Prompts = Iterable[tuple[Image.Image, str]]


def fitprune(
    model: Any,
    processor: Any,
    prompts: Prompts,
    budget: float,
    *,
    progress: Callable[[], object] = lambda: None,
) -> Fit:
    """The schedule of FitPrune for a model.

    Args:
        model: a vision-language model that is not patched; it is as before afterwards.
        processor: the model's.
        prompts: images with questions, such as the model is asked.
        budget: share of the prefill's FLOPs in the language model that is left, in (0, 1]. It is
            met by the prompts on average.
        progress: called after every prompt.

    Raises:
        UnsupportedModelError: for a language model whose FLOPs are not known, or whose layers
            cannot be halved.
        ConfigError: for no prompt, or a budget that cannot be met.
    """
    cost = cost_of(model)
    return fit(attention_statistics(model, processor, prompts, progress=progress), cost, budget)


@torch.no_grad()
def early_exit(
    model: Any,
    processor: Any,
    prompts: Prompts,
    *,
    where: Literal["decoder", "tower"] = "decoder",
    first: Layer = 0,
    layers: float | None = None,
    agreement: float | None = None,
    tokens: int = 1,
    progress: Callable[[], object] = lambda: None,
) -> ExitFit:
    """The threshold of `early_exit`, or of `early_exit_tower`, for a model.

    Args:
        model: a vision-language model that is not patched; it is as before afterwards.
        processor: the model's.
        prompts: images with questions, such as the model is asked.
        where: which layers may be left early.
        first: the earliest layer behind which they may be left.
        layers: most of the layers that may be run, on average, in (0, 1]; or
        agreement: least share of the answers' tokens that must stay the same, in [0, 1].
        tokens: of each answer that are looked at; the first alone for the tower.
        progress: called after every prompt.

    Raises:
        ConfigError: for no prompt, or what no threshold can meet.
        UnsupportedModelError: for layers that cannot be left early.
    """
    passages: list[Passage] = []
    look = _tower_passages if where == "tower" else _decoder_passages
    for image, question in prompts:
        inputs = processor(
            text=[prompt_of(processor, question)], images=[image], return_tensors="pt"
        )
        passages += look(model, inputs.to(model.device, model.dtype), tokens)
        progress()
    depth = len(passages[0].similar) if passages else 1
    return fit_threshold(
        passages, first=first_exit(first, depth), layers=layers, agreement=agreement
    )


def _decoder_passages(model: Any, inputs: Any, tokens: int) -> list[Passage]:
    """A passage for each token of an answer."""
    watch, decoder = LayerWatch(), decoder_of(model)
    with patch(model, watch):
        greedy = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        ids = model.generate(**inputs, **greedy)[0, -tokens:]
    passages = []
    for token, (similar, rows) in zip(ids, watch.take(), strict=True):
        head = model.get_output_embeddings()
        found = head(decoder.module.norm(rows[:, 0])).argmax(-1)  # type: ignore[operator]
        passages.append(_passage(similar, (found == token).cpu()))
    return passages


def _tower_passages(model: Any, inputs: Any, tokens: int) -> list[Passage]:
    """One passage for a prompt; what leaving changes is tried for every layer."""
    own = _first_token(model, inputs)
    watch = TowerWatch()
    with patch(model, watch):
        model(**inputs, logits_to_keep=1)
    ((similar, _),) = watch.take()
    same = []
    for layer in range(len(similar)):
        with patch(model, EarlyExitTower(threshold=-1, first=layer)):
            same.append(_first_token(model, inputs) == own)
    return [_passage(similar, torch.tensor(same))]


def _first_token(model: Any, inputs: Any) -> int:
    return int(model(**inputs, logits_to_keep=1).logits[0, -1].argmax())


def _passage(similar: Tensor, same: Tensor) -> Passage:
    """Of [layers but the last, B] similarities, all of which must be reached."""
    least = torch.cat([similar.amin(1), torch.ones(1)])
    return Passage(least, torch.cat([same, torch.ones(1, dtype=torch.bool)]))


@torch.no_grad()
def attention_statistics(
    model: Any,
    processor: Any,
    prompts: Prompts,
    *,
    progress: Callable[[], object] = lambda: None,
) -> list[Sample]:
    """What the visual tokens of each prompt receive in each layer.

    Args:
        model: see `fitprune`.
        processor: the model's.
        prompts: images with questions.
        progress: called after every prompt.
    """
    recorder, samples = AttentionStatistics(), []
    with patch(model, recorder):
        for image, question in prompts:
            inputs = processor(
                text=[prompt_of(processor, question)], images=[image], return_tensors="pt"
            )
            model(**inputs.to(model.device, model.dtype), logits_to_keep=1)
            samples += recorder.take()
            progress()
    return samples


def cost_of(model: Any) -> Cost:
    """FLOPs of a model's language model by the rows of its layers.

    Raises:
        UnsupportedModelError: when they are not known.
    """
    config = decoder_of(model).config

    def cost(lengths: Any) -> float:
        flops = layered_flops(config, lengths, logits=0)
        if flops is None:
            raise UnsupportedModelError(
                f"The FLOPs of a {config.model_type} are not known (experts or latent attention); "
                "write the schedule's shares by hand."
            )
        return float(flops)

    return cost


def prompt_of(processor: Any, question: str) -> str:
    """The text of a question about one image, by the processor's template where there is one."""
    if not getattr(processor, "chat_template", None):
        return f"{getattr(processor, 'image_token', '')}{question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(turns, add_generation_prompt=True)
    return text
