"""What methods inside the language model learn, made for one model."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from vlmcompress.families.decoders import decoder_of
from vlmcompress.methods.base import Method
from vlmcompress.methods.decoder.base import DecoderShape
from vlmcompress.methods.learned import Learned
from vlmcompress.methods.pipeline import LayerStage, Pipeline


def with_layer_parts(base: nn.Module, built: Pipeline, before: Pipeline | None = None) -> Pipeline:
    """`built` with what its methods inside the language model learn.

    Args:
        base: the model without its head.
        built: a pipeline that was checked.
        before: the one it replaces. Its parts stay, trained as they are, for the same method as
            long as they are made for the same.

    Raises:
        CheckpointError, ConfigError: for a file that cannot be used.
    """
    if not any(stage.method.learns for stage in built.decoder):
        return built
    decoder: Any = decoder_of(base)
    shape = DecoderShape(len(decoder.layers), int(decoder.config.hidden_size))
    device = next(decoder.module.parameters()).device
    old: list[tuple[Method, Learned | None]] = []
    if before is not None:
        old = [(stage.method, stage.parts) for stage in before.decoder]

    def learning(stage: LayerStage) -> LayerStage:
        parts = stage.method.parts(shape)
        if parts is None:
            return stage
        parts = known(stage.method, parts, old)
        parts.follow(device)
        return dataclasses.replace(stage, parts=parts)

    return dataclasses.replace(built, decoder=tuple(map(learning, built.decoder)))


def known(method: Method, made: Learned, old: list[tuple[Method, Learned | None]]) -> Learned:
    """The parts that an equal stage had before, or those just made; a stage gives its own once.

    Args:
        method: of the stage.
        made: for it, just now.
        old: methods and parts of the stages before; what is given is taken out.
    """
    for i, (other, parts) in enumerate(old):
        if parts is not None and other == method and parts.config == made.config:
            del old[i]
            return parts
    return made
