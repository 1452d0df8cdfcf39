"""A learned codebook, shared by all images, for the codes of clusters (after arXiv 2503.16980)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.extras import require
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.connector.clustered import Clustered
from vlmcompress.methods.learned import Learned, fresh, required
from vlmcompress.methods.options import check_choice, check_count, check_number
from vlmcompress.methods.trained import ConnectorShape

Kind = Literal["residual", "grouped", "factorized"]
KINDS: tuple[Kind, ...] = ("residual", "grouped", "factorized")


@dataclass(frozen=True)
class VQCodebook(Clustered):
    """Clusters as in `vqtoken`; their codes are replaced by the nearest ones of a learned codebook.

    The codebook of VQToken is made anew of every image. This one is trained and belongs to all, so
    that a row is a few symbols (`Codebook.forward`) and what the LLM reads is made of a fixed
    vocabulary. It is one of

    - `residual`: `levels` codebooks, each for what the ones before leave over (RVQ);
    - `grouped`: the channels in `groups`, each with residual codebooks of its own (HiFi-Codec,
      arXiv 2305.02765; WeTok, arXiv 2508.05599, also quantises group by group);
    - `factorized`: one codebook with codes of unit length in `channels` channels, nearest by cosine
      (ViT-VQGAN, arXiv 2110.04627).

    Rows, or groups of them, are projected to `channels` channels and back. Codebooks, their moving
    averages, the replacement of dead codes and the exchange between processes are those of
    vector-quantize-pytorch (the extra `vq`); make the parts after the process group.

    The parts start in evaluation mode. To train them, call `handle.parts.train()` and add
    `handle.parts.take_loss()`, the commitment loss of the passes since the last call, to the loss;
    gradients of the LLM's loss pass the nearest code by the library's rotation trick. Dead codes
    are replaced by rows drawn with the global random state, in training only.

    Attributes:
        kind: of the codebook.
        size: codes in each codebook.
        levels: codebooks one after the other, of `residual` and `grouped`.
        groups: of channels, of `grouped`; they divide the LLM's width.
        channels: of a code.
        decay: of the moving averages that codes follow in training.
    """

    name: ClassVar[str] = "vq_codebook"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.16980"
    kind: Kind = "residual"
    size: int = 1024
    levels: int = 4
    groups: int = 4
    channels: int = 32
    decay: float = 0.8

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice(self.name, "kind", self.kind, KINDS)
        check_count(self.name, "size", self.size, 2)
        for option in ("levels", "groups", "channels"):
            check_count(self.name, option, getattr(self, option))
        check_number(self.name, "decay", self.decay, 0, 1)

    def parts(self, shape: ConnectorShape) -> Codebook:
        """The codebook.

        Raises:
            MissingExtraError: without vector-quantize-pytorch.
            ConfigError: for groups that do not divide the LLM's width, or weights made for others.
            CheckpointError: for weights that cannot be used.
        """
        if self.kind == "grouped" and shape.out % self.groups:
            raise ConfigError(
                f"vq_codebook's {self.groups} groups do not divide the LLM's width of {shape.out}; "
                "choose others."
            )
        made = {"width": shape.out, "size": self.size, "channels": self.channels}
        if self.kind != "factorized":
            made["levels"] = self.levels
        if self.kind == "grouped":
            made["groups"] = self.groups
        return fresh(lambda: Codebook(self.kind, self.decay, **made), self.seed, self.weights)

    def rows(self, tokens: VisualTokens, codes: Tensor, labels: Tensor) -> Tensor:
        """The codebook's rows nearest to the clusters'."""
        parts = required(tokens.parts, Codebook, "connector")
        quantised: Quantised = parts(codes)
        return quantised.rows


class Quantised(NamedTuple):
    """Rows made of codes.

    Attributes:
        rows: [b, k, width].
        symbols: int64 number of each row's code in each codebook: [b, k], with `levels` behind it
            where there are several, and `groups` before it.
    """

    rows: Tensor
    symbols: Tensor


class Codebook(Learned):
    """A quantiser of vector-quantize-pytorch, as a method's learned part.

    Args:
        kind: `residual`, `grouped` or `factorized`.
        decay: of the moving averages; what is trained with one is used with any.
        made: width, size and channels, and levels and groups where the kind has them.
    """

    def __init__(self, kind: Kind, decay: float, **made: int) -> None:
        super().__init__(method="vq_codebook", kind=kind, **made)
        self.width = made["width"]
        self.quantiser = _quantiser(kind, decay, **made)
        self._losses: list[Tensor] = []
        for module in self.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if not buffer.is_floating_point():  # whether codes were drawn, which they are
                    module.register_buffer(name, buffer, persistent=False)
        self.eval()

    def forward(self, codes: Tensor) -> Quantised:
        """Rows made of the nearest codes.

        Args:
            codes: [b, k, width], means of rows of unit length.
        """
        scale = math.sqrt(self.width)  # that of a normalised row, which codebooks are drawn for
        with torch.autocast(codes.device.type, enabled=False):
            rows, symbols, loss = self.quantiser(codes.float() * scale)
        if self.training:
            self._losses.append(loss.sum())
        return Quantised(rows / scale, symbols)

    def take_loss(self) -> Tensor:
        """The commitment loss, a scalar, of all passes in training mode since the last call.

        Summed over codebooks, mean over rows; 0 when there was no pass.
        """
        losses, self._losses = self._losses, []
        return torch.stack(losses).sum() if losses else next(self.buffers()).new_zeros(())

    def __getstate__(self) -> dict[str, Any]:
        # Losses belong to the graph of a pass, which cannot be copied.
        return {**self.__dict__, "_losses": []}


def _quantiser(
    kind: Kind,
    decay: float,
    *,
    width: int,
    size: int,
    channels: int,
    levels: int = 1,
    groups: int = 1,
) -> nn.Module:
    library = require("vector_quantize_pytorch")
    options = {
        "dim": width,
        "codebook_size": size,
        "codebook_dim": channels,
        "decay": decay,
        "threshold_ema_dead_code": 2,
    }
    quantiser: nn.Module
    if kind == "factorized":
        quantiser = library.VectorQuantize(**options, use_cosine_sim=True)
    elif kind == "grouped":
        quantiser = library.GroupedResidualVQ(**options, groups=groups, num_quantizers=levels)
    else:
        quantiser = library.ResidualVQ(**options, num_quantizers=levels)
    return quantiser
