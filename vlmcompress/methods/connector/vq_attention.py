"""VQ-Attention: codes and the places of their tokens combined (VQToken, arXiv 2503.16980)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, one_hot

from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.learned import Learned

#: Of the released module.
_HIDDEN, _DROPOUT, _SMALL = 2048, 0.1, 0.01


class VQAttention(Learned):
    """A linear map of the token hash map and one decoder layer over the codebook.

    Names and shapes of its parameters are those of the released checkpoint, in both readings:

    `by_code`: every code asks by where its tokens lie. Its query is the code itself plus the map of
    the places that belong to it, and what the layer gives is added to the code. Untrained, that is
    next to nothing, and training starts from the codebook.

    `by_frame`: as released. Every frame asks by its row of cluster numbers, taken as real numbers;
    frames, or codes, are repeated until there are as many of both, and what the layer gives takes
    the place of the codes. An image has a single query, and all of its rows are equal.

    It starts in evaluation mode; call `train()` to train it with the released dropout.

    Args:
        width: of the LLM's rows.
        frame: (height, width) in tokens that the map of places has; others are averaged over to it.
        heads: of the attention; they divide the width.
        by: `code` or `frame`, which of the two it is for.

    Raises:
        ConfigError: for heads that do not divide the width.
    """

    def __init__(self, width: int, frame: tuple[int, int], heads: int, by: str) -> None:
        super().__init__(method="vqtoken", width=width, frame=frame, heads=heads, by=by)
        if width % heads:
            raise ConfigError(
                f"vqtoken's {heads} heads do not divide the LLM's width of {width}; choose others."
            )
        self.width, self.frame = width, frame
        self.to_q_proj = nn.Linear(math.prod(frame), width)
        layer = nn.TransformerDecoderLayer(width, heads, _HIDDEN, _DROPOUT, batch_first=True)
        self.transformer_decoder = nn.TransformerDecoder(layer, 1)
        for name, parameter in self.named_parameters():
            _as_released(name, parameter)
        self.eval()

    def by_code(self, codes: Tensor, labels: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[b, k, width] codes that know where their tokens lie.

        Args:
            codes: [b, k, width], means of rows of unit length.
            labels: [b, n] code of each token.
            grid: (t, h, w) of the tokens, in raster order.
        """
        with torch.autocast(codes.device.type, enabled=False):
            memory = codes.float() * math.sqrt(self.width)  # the scale of a normalised row
            share = one_hot(labels, codes.shape[1]).float().view(len(codes), *grid, -1)
            query = memory + self.to_q_proj(self._places(share)) + _times(share, self.width)
            told: Tensor = self.transformer_decoder(query, memory)
            return codes + told / math.sqrt(self.width)

    def by_frame(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """[b, max(t, k), width] as released.

        Args:
            codes: [b, k, width].
            numbers: [b, t, places of a frame] cluster number of each token.

        Raises:
            ConfigError: for frames of another size.
        """
        if numbers.shape[2] != math.prod(self.frame):
            raise ConfigError(
                f"vqtoken's module was made for frames of {math.prod(self.frame)} tokens and got "
                f"{numbers.shape[2]}; give images of the size it was made for, or faithful=False."
            )
        rows = torch.arange(max(numbers.shape[1], codes.shape[1]), device=codes.device)
        with torch.autocast(codes.device.type, enabled=False):
            query = self.to_q_proj(numbers.float())[:, rows % numbers.shape[1]]
            told: Tensor = self.transformer_decoder(query, codes.float()[:, rows % codes.shape[1]])
        return told

    def _places(self, share: Tensor) -> Tensor:
        """[b, k, places] in how many of the frames a place belongs to each code, as a share."""
        places = share.mean(1).permute(0, 3, 1, 2)
        if tuple(places.shape[2:]) != self.frame:
            places = adaptive_avg_pool2d(places, self.frame)
        return places.flatten(2)


def _times(share: Tensor, width: int) -> Tensor:
    """[b, k, width] when the tokens of each code are seen; 0 for a single frame.

    The mean over them of the sines and cosines of their frames' numbers.

    Args:
        share: [b, t, h, w, k] 1 where a token belongs to a code.
        width: of the result.
    """
    b, t, _, _, k = share.shape
    if t == 1:
        return share.new_zeros(b, k, width)
    frames = share.sum((2, 3)).transpose(1, 2)
    frames = frames / frames.sum(2, keepdim=True).clamp(min=1)
    rate = torch.exp(torch.arange(0, width, 2, device=share.device) * (-math.log(1e4) / width))
    angle = torch.arange(t, device=share.device)[:, None] * rate
    waves = torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :width]
    return frames @ waves


@torch.no_grad()
def _as_released(name: str, parameter: nn.Parameter) -> None:
    """Biases 0, matrices uniform (Glorot), scales of norms near 0."""
    if parameter.ndim > 1:
        nn.init.xavier_uniform_(parameter)
    elif name.endswith("bias"):
        nn.init.zeros_(parameter)
    else:
        nn.init.uniform_(parameter, -_SMALL, _SMALL)
