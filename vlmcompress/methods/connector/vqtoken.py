"""VQToken: codes of clusters in place of the tokens (arXiv 2503.16980)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import Segment, VisualTokens
from vlmcompress.methods.connector.clustered import Clustered, directions, only
from vlmcompress.methods.connector.vq_attention import VQAttention
from vlmcompress.methods.learned import fresh, required
from vlmcompress.methods.ops import kmeans
from vlmcompress.methods.ops.kmeans import Clusters
from vlmcompress.methods.options import check_count
from vlmcompress.methods.trained import ConnectorShape

#: Places that VQ-Attention tells apart where images have no size of their own.
_FRAME = (16, 16)
#: What the released code adds to the place of the largest second difference.
_RELEASED_OFFSET = 4


@dataclass(frozen=True)
class VQToken(Clustered):
    """A codebook of each image or video, and a token hash map that says where its codes belong.

    All tokens, as the LLM would read them, are clustered by cosine (k-means++, then k-means); codes
    are the means of their clusters' tokens at unit length, multiplied by the tokens' mean length
    (`rescale`). `assignment` is the token hash map, `hash_maps` gives it as (t, h, w). Codes stand
    in the order in which they first appear, each at the place of its first token. k-means draws
    with `seed`.

    `keep` is the fixed length; `keep="auto"` is the adaptive one. Numbers of clusters are tried
    from `smallest` to `largest`, each search starting from the centres of the one before.

    `attention=True` adds VQ-Attention, which needs training: codes are combined with the hash map
    (`VQAttention`). The paper's ablation puts that, trained with the LLM, far above codes alone;
    without it nothing needs training. Tokens must form one rectangle then; images cut into tiles
    need scope='tile'.

    `faithful=True` follows the released code where it differs from the paper: in the adaptive
    length, every number of clusters starts anew, the elbow is not offset by `smallest` and little
    but `smallest` ever comes out, and the silhouette does not depend on the clusters, so that
    `smallest` always does; codes stand in the order of the clusters' numbers; VQ-Attention asks
    frame by frame and gives one row per frame where there are more frames than codes. A released
    checkpoint also needs `rescale=False`, since its codes keep unit length. The released code draws
    from the global random state; empty clusters, of which it makes rows of zeros, take a token
    here.

    Attributes:
        attention: whether codes are combined with the hash map by trained weights.
        heads: of that attention.
        faithful: whether lengths, order and queries are those of the released code.
    """

    name: ClassVar[str] = "vqtoken"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.16980"
    training_free: ClassVar[bool] = True
    attention: bool = False
    heads: int = 8
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self._check_flags("attention", "faithful")
        check_count(self.name, "heads", self.heads)
        if self.weights is not None and not self.attention:
            raise ConfigError(
                "vqtoken's weights are those of VQ-Attention; set attention=True with them."
            )

    @property
    def raster_order(self) -> bool:
        """The order of the clusters' numbers is none."""
        return not self.faithful

    @property
    def learns(self) -> bool:
        """With VQ-Attention."""
        return self.attention

    def parts(self, shape: ConnectorShape) -> VQAttention | None:
        """VQ-Attention; None for codes alone.

        Raises:
            ConfigError: for heads that do not divide the width, and with `faithful=True` where the
                size of images is not known.
            CheckpointError: for weights that cannot be used.
        """
        if not self.attention:
            return None
        if self.faithful and shape.grid is None:
            raise ConfigError(
                "vqtoken's released attention is made for one size of images, and this model has "
                "none; use faithful=False."
            )
        frame, by = shape.grid or _FRAME, "frame" if self.faithful else "code"
        return fresh(lambda: VQAttention(shape.out, frame, self.heads, by), self.seed, self.weights)

    def tokens_kept(self, segments: Sequence[Segment], keep: float | int) -> int:
        """As `keep` says; the released attention gives a row per frame where they are more."""
        k = super().tokens_kept(segments, keep)
        if not self._by_frame:
            return k
        return max(k, _rectangle(segments)[0])

    @property
    def _by_frame(self) -> bool:
        return self.attention and self.faithful

    def counts(self, tokens: VisualTokens) -> list[int]:
        """Codes by the criterion; rows of the released attention where frames are more."""
        rows = _rectangle(tokens.current_segments)[0] if self._by_frame else 1
        return [max(k, rows) for k in super().counts(tokens)]

    def adapt(self, tokens: VisualTokens) -> VisualTokens:
        """As many codes as `counts` says; as released, of clusters found anew."""
        if not self.faithful or tokens.n <= self.smallest:
            return super().adapt(tokens)
        trials, chosen = self.searched(tokens, directions(self.name, tokens))
        return self.compress(tokens, trials[only(self.name, chosen)].k)

    def start(self, tokens: VisualTokens, x: Tensor, k: int) -> Tensor:
        """The centres, [b, k, d], that k-means begins with; as released, of plain k-means++."""
        if not self.faithful:
            return super().start(tokens, x, k)
        return kmeans.seeds(x, k, self.seed, candidates=1, weights=tokens.mass)

    def trials(self, tokens: VisualTokens, x: Tensor, sizes: Sequence[int]) -> list[Clusters]:
        """Clusters of each size; as released, each from a start of its own."""
        if not self.faithful:
            return super().trials(tokens, x, sizes)
        return [self.clusters(tokens, x, self.start(tokens, x, k)) for k in sizes]

    def chosen(self, x: Tensor, trials: Sequence[Clusters]) -> Tensor:
        """[b] which trial each unit takes."""
        if not self.faithful:
            return super().chosen(x, trials)
        if self.criterion == "silhouette" or len(trials) < 3:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        curve = torch.stack([kmeans.distortion(x, c) for c in trials], 1)
        k = curve.diff(n=2, dim=1).argmax(1) + _RELEASED_OFFSET
        return (k - self.smallest).clamp(0, len(trials) - 1)

    def coded(self, tokens: VisualTokens, x: Tensor, clusters: Clusters) -> VisualTokens:
        """Each cluster as one row; as released, each frame where they are more."""
        frames = _rectangle(tokens.current_segments)[0] if self._by_frame else 1
        if frames <= clusters.k:
            return super().coded(tokens, x, clusters)
        labels = kmeans.filled(x, clusters)
        rows = self.rows(tokens, self.codebook(tokens, x, labels, clusters.k), labels)
        place = torch.arange(tokens.n, device=x.device).expand(len(x), -1)
        size = tokens.n // frames
        return tokens.regroup(self.scaled(tokens, rows), place[:, ::size], place // size)

    def rows(self, tokens: VisualTokens, codes: Tensor, labels: Tensor) -> Tensor:
        """Codes, as they are or told where their tokens lie.

        Raises:
            EvidenceError: when VQ-Attention has no parts.
            ConfigError: when the tokens form no rectangle, or another than it was made for.
        """
        if not self.attention:
            return codes
        parts = required(tokens.parts, VQAttention, "connector")
        grid = _rectangle(tokens.current_segments)
        if grid[:2] == (1, 1) and parts.frame[0] > 1:
            raise ConfigError(
                f"VQ-Attention places tokens of a rectangle, and these {tokens.n} form none: an "
                "earlier method thinned them out, or they are of several tiles. Put vqtoken first, "
                "use scope='tile', or attention=False."
            )
        if self.faithful:
            return parts.by_frame(codes, labels.view(len(labels), grid[0], -1))
        return parts.by_code(codes, labels, grid)


def hash_maps(tokens: VisualTokens) -> list[Tensor]:
    """The token hash map: the row that stands for each place now, -1 for none.

    Args:
        tokens: after a method, or before any.

    Returns:
        [b, t, h, w] int64 for each rectangle of the uncompressed image or video.
    """
    where = tokens.assignment
    if where is None:
        where = torch.arange(tokens.n, device=tokens.index.device).expand_as(tokens.index)
    return [where[:, s.slice].reshape(len(where), *s.grid) for s in tokens.segments]


def _rectangle(segments: Sequence[Segment]) -> tuple[int, int, int]:
    """(t, h, w) of tokens that VQ-Attention can place.

    Raises:
        ConfigError: for several rectangles.
    """
    if len(segments) != 1:
        raise ConfigError(
            f"VQ-Attention places the tokens of one rectangle, and there are {len(segments)}; use "
            "scope='tile', or attention=False."
        )
    return segments[0].grid
