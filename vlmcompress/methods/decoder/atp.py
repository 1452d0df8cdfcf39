"""ATP-LLaVA: thresholds of each prompt's own decide which visual tokens go on (arXiv 2412.00447).

https://arxiv.org/abs/2412.00447
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from vlmcompress.core.errors import ConfigError, ConfigTypeError
from vlmcompress.core.report import SoftMask
from vlmcompress.methods.base import CountKind, Layer
from vlmcompress.methods.decoder.attending import mean_over_heads, packed
from vlmcompress.methods.decoder.base import (
    DecoderShape,
    DecoderState,
    LayerReducer,
    Reads,
    Reduction,
    Site,
    sites_before,
)
from vlmcompress.methods.learned import Learned, check_weights, fresh
from vlmcompress.methods.options import check_count, check_layers, check_number


@dataclass(frozen=True)
class ATP(LayerReducer):
    """Adaptive token pruning: after some layers a token goes on that is important or on a grid.

    Importance S_r is the mean of what visual queries say of a token (head mean of the logits, no
    softmax) and of what text queries pay it (head mean of the softmax rows). Spatial augmented
    pruning adds S_s: tokens on an even grid of rate R score 1 - lambda R, all others 0; of several
    grids the sparser one scores higher, so that the threshold chooses how dense a grid stays. A
    token goes on where S_r > theta_r or S_s > theta_s; the two thresholds come from a small trained
    head that is shown both means of the prompt at hand, and at least one token goes on. Positions
    are kept.

    In training (`handle.parts.train()`) nothing is dropped: later layers' attention is multiplied
    by max(sigmoid(T (S_r - theta_r)), sigmoid(T (S_s - theta_s))), site after site, before it is
    normalised. The larger T, the closer to dropping. What thresholds are compared with is
    measured, also then, on the tokens that dropping would have left, and carries no gradient.

    The authors have published no code. Their importance adds logits to probabilities; here both
    are first brought to [0, 1] over the visual tokens of the prompt, unless `normalise` is off. The
    grids' rates are ours. Text queries are those of the prompt: labels behind the last instruction
    do not ask in training, since they are not there at inference.

    Attributes:
        layers: behind how many layers tokens go; the paper's 4, 14 and 24 of 32.
        sample_rates: rates of the grids, of which a stride is the square root of the inverse.
        lambda_sample: what a grid's rate takes off its score.
        temperature: T.
        normalise: whether both parts of the importance are brought to [0, 1].
        width: of the heads.
        seed: of the untrained heads.
        weights: file of the trained ones.
    """

    name: ClassVar[str] = "atp"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.00447"
    count_kind: ClassVar[CountKind] = "content"
    training_free: ClassVar[bool] = False
    reads: ClassVar[Reads] = "previous"
    layers: tuple[Layer, ...] = (4 / 32, 14 / 32, 24 / 32)
    sample_rates: tuple[float, ...] = (1 / 16, 1 / 4)
    lambda_sample: float = 3.0
    temperature: float = 10.0
    normalise: bool = True
    width: int = 64
    seed: int = 0
    weights: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, self.layers)
        check_number(self.name, "lambda_sample", self.lambda_sample, 0, math.inf)
        check_number(self.name, "temperature", self.temperature, 0, math.inf)
        check_count(self.name, "width", self.width)
        check_count(self.name, "seed", self.seed, 0)
        check_weights(self.name, self.weights)
        if not isinstance(self.sample_rates, tuple):
            raise ConfigTypeError(
                f"atp's sample_rates are {self.sample_rates!r}; give a tuple of rates, such as "
                "(0.25,), or () for no grid."
            )
        for rate in self.sample_rates:
            check_number(self.name, "sample_rate", rate, 0, 1)
            if rate == 0:
                raise ConfigError("atp's sample_rate is 0; it must be above.")
        if self.temperature == 0:
            raise ConfigError("atp's temperature is 0, at which nothing can be learnt; use 10.")
        if not isinstance(self.normalise, bool):
            raise ConfigTypeError(f"atp's normalise is {self.normalise!r}; it must be a bool.")

    @property
    def own_budget(self) -> bool:
        """Always: the thresholds decide."""
        return True

    @property
    def learns(self) -> bool:
        """Always."""
        return True

    def sites(self, depth: int) -> tuple[Site, ...]:
        """Before the layers that follow."""
        return sites_before(self.name, self.layers, depth)

    def counts(self, n: int, keep: float | int | None, depth: int) -> tuple[int, ...]:
        """At most all."""
        return (n,) * len(self.layers)

    def parts(self, shape: DecoderShape) -> Thresholds:
        """A head per site, which does not mask softly until it is put into training mode."""
        layers = [site.layer for site in self.sites(shape.depth)]

        def make() -> Thresholds:
            return Thresholds(
                layers,
                self.width,
                normalise=self.normalise,
                sample_rates=self.sample_rates,
                lambda_sample=self.lambda_sample,
            )

        return fresh(make, self.seed, self.weights).eval()

    def queries(self, state: DecoderState) -> Tensor:
        """[B, r] rows of the instruction's text."""
        return packed(_asking(state))[0]

    def reduce(self, site: int, state: DecoderState, k: Tensor) -> Reduction:
        """Drop what reaches neither threshold; mask it softly while the heads are trained."""
        present = state.visual if state.faint is None else state.visual & ~state.faint
        parts = state.learnt(Thresholds)
        margin = self._margin(site, state, present, parts)
        reached = (margin > 0) & present
        spared = ~reached.any(1, keepdim=True) & _first_best(margin, present)
        keep = ~state.visual | reached | spared
        if not parts.training:
            return Reduction(keep)
        return Reduction(keep, soft=logsigmoid(self.temperature * margin).masked_fill(spared, 0))

    def _margin(self, site: int, state: DecoderState, present: Tensor, parts: Thresholds) -> Tensor:
        """[B, L] by how much each row is above the nearer of the two thresholds."""
        received, asked = received_logits(state, present), text_attention(state)
        if self.normalise:
            received, asked = to_unit(received, present), to_unit(asked, present)
        means = torch.stack([_mean(received, present), _mean(asked, present)], 1)
        with torch.autocast(means.device.type, enabled=False):
            redundant, spatial = parts(site, means).unbind(1)
        importance = (received + asked) / 2
        return torch.maximum(
            importance - redundant[:, None], self.spatial(state) - spatial[:, None]
        )

    def spatial(self, state: DecoderState) -> Tensor:
        """[B, L] float32, 1 - lambda R for rows on the grid of rate R, 0 elsewhere."""
        score = torch.zeros(state.visual.shape, device=state.visual.device)
        for rate in self.sample_rates:
            stride = max(1, round(rate**-0.5))
            on = (state.place % stride == stride // 2).all(-1) & state.visual
            score = torch.where(on, score.clamp(min=1 - self.lambda_sample * rate), score)
        return score


class ThresholdHead(nn.Module):
    """From both means of a prompt to its two thresholds.

    Args:
        width: of the layer between.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shared = nn.Linear(2, width)
        self.redundant, self.spatial = nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, means: Tensor) -> Tensor:
        """[B, 2] thresholds in (0, 1) of importance and place, from [B, 2] means."""
        shared = self.shared(means)
        return torch.cat([self.redundant(shared), self.spatial(shared)], 1).sigmoid()


class Thresholds(Learned):
    """The heads of all sites.

    Args:
        layers: before which the sites are.
        width: of the heads.
        made_for: further options that thresholds depend on.
    """

    def __init__(self, layers: Sequence[int], width: int, **made_for: Any) -> None:
        super().__init__(method="atp", layers=layers, width=width, **made_for)
        self.heads = nn.ModuleDict({str(layer): ThresholdHead(width) for layer in layers})

    def forward(self, site: int, means: Tensor) -> Tensor:
        """[B, 2] thresholds at the site of that number, from [B, 2] means."""
        head = self.heads[str(self.config["layers"][site])]
        thresholds: Tensor = head(means)
        return thresholds


def received_logits(state: DecoderState, present: Tensor) -> Tensor:
    """[B, L] logits of every row's key, averaged over heads and visual queries.

    The mean of products is the product with the mean query, so that no map is made. Queries before
    a key count like those behind it.

    Args:
        state: with the attention that was read.
        present: [B, L] bool, the visual queries.
    """
    attention = state.attended()
    count = present.sum(1).clamp(min=1)[:, None, None]
    q = (attention.q.float() * present[:, None, :, None]).sum(2) / count
    b, kv_heads, _, head_dim = attention.k.shape
    q = q.reshape(b, kv_heads, -1, head_dim).mean(2)
    k = attention.k[:, :, attention.past : attention.past + present.shape[1]].float()
    return (q[:, :, None] * k).sum(-1).mean(1) * attention.scale


def text_attention(state: DecoderState) -> Tensor:
    """[B, L] what the instruction's text pays every row, averaged over heads and queries."""
    rows, there = packed(_asking(state))
    weights = mean_over_heads(state, rows) * there[..., None]
    return weights.sum(1) / there.sum(1, keepdim=True).clamp(min=1)


def to_unit(values: Tensor, among: Tensor) -> Tensor:
    """[B, L] with the least of `among` ([B, L] bool) at 0 and the largest at 1."""
    low = values.masked_fill(~among, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~among, -torch.inf).amax(1, keepdim=True)
    span = high - low
    unit = (values - low) / span.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(span > 0, unit, 0)


def budget_loss(
    masks: Sequence[SoftMask],
    depth: int,
    target: float,
    *,
    lambda_atp: float = 0.05,
    lambda_target: float = 0.2,
) -> Tensor:
    """What ATP-LLaVA adds to the loss so that tokens go: fewer late ones, and `target` on average.

    lambda_atp * sum over sites of (share kept) * (layers before it), and lambda_target times the
    distance, in tokens, of the mean over layers from its target. What is counted is what would be
    kept outside training, with the gradient of the soft masks, whose own sum differs from it.

    Args:
        masks: `handle.last.soft_masks` of a call in training.
        depth: layers of the model.
        target: wanted mean over layers of the share of visual tokens in their attention.
        lambda_atp: weight of late tokens.
        lambda_target: weight of the distance, per token.

    Raises:
        ConfigError: without masks, for a target that no thresholds can meet.
    """
    if not masks:
        raise ConfigError(
            "There are no soft masks to count; call the model after handle.parts.train()."
        )
    layers = [mask.layer for mask in masks]
    if not layers[0] / depth < target <= 1:
        raise ConfigError(
            f"target is {target}; with a first site before layer {layers[0]} of {depth} the mean "
            f"over layers lies between {layers[0] / depth:.3f} and 1."
        )
    n = masks[0].visual.sum(1)
    shares = torch.stack([_counted(mask) for mask in masks])[:, n > 0] / n[n > 0]
    late = (shares.mean(1) * shares.new_tensor(layers)).sum()
    runs = shares.new_tensor([b - a for a, b in zip(layers, [*layers[1:], depth], strict=True)])
    tokens = (layers[0] + (shares * runs[:, None]).sum(0)) / depth * n[n > 0]
    distance = (tokens.mean() - target * n[n > 0].float().mean()).abs()
    return lambda_atp * late + lambda_target * distance


def _counted(mask: SoftMask) -> Tensor:
    """[B] tokens that would be kept, with the gradient of the soft ones."""
    soft = mask.weights.sum(1)
    return soft + (mask.kept.sum(1) - soft).detach()


def _asking(state: DecoderState) -> Tensor:
    """[B, L] bool, text behind the image up to the end of the last instruction; else the last row.

    Labels that belong to no instruction are all taken for text that asks.
    """
    rows = torch.arange(state.text.shape[1], device=state.text.device)
    asking = state.text
    if state.answers is not None:
        end = torch.where(state.answers, rows, -1).amax(1, keepdim=True)
        prompt = asking & (rows <= end)
        asking = torch.where(prompt.any(1, keepdim=True), prompt, asking)
    return torch.where(asking.any(1, keepdim=True), asking, rows == state.last)


def _mean(values: Tensor, among: Tensor) -> Tensor:
    return (values * among).sum(1) / among.sum(1).clamp(min=1)


def _first_best(values: Tensor, among: Tensor) -> Tensor:
    """[B, L] bool, the first of the largest values; none where there is nothing to choose from."""
    best = values.masked_fill(~among, -torch.inf).argmax(1, keepdim=True)
    return torch.zeros_like(among).scatter(1, best, True) & among
