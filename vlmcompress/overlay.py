"""Pictures of what the language model saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmcompress.core.errors import UnsupportedInputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmcompress.core.report import CallRecord

#: Brightness of what was dropped, and the grey it fades to.
DIM, GREY = 0.25, 0.55


def draw_overlay(image: Image, record: CallRecord, unit: int, processor: Any = None) -> Image:
    """`image` with the patches dimmed that were dropped.

    Args:
        image: the picture the processor was given.
        record: the call.
        unit: which of its images this was.
        processor: where it crops or pads, the picture is drawn as the tower saw it; without a
            processor the token grid is laid over the whole picture.
    """
    from PIL import Image as Images

    view = as_seen(image, processor)
    seen = seen_patches(record, unit)
    mask = Images.fromarray((seen.numpy() * 255).astype("uint8")).resize(
        view.size, Images.Resampling.NEAREST
    )
    grey = Images.new("RGB", view.size, (round(255 * GREY),) * 3)
    return Images.composite(view, Images.blend(grey, view, DIM), mask)


def seen_patches(record: CallRecord, unit: int) -> Tensor:
    """[h, w] bool: which tokens were kept or merged into one that was.

    Raises:
        UnsupportedInputError: when the image's tokens do not lie on a grid.
    """
    segments, assignment = record.segments[unit], record.assignments[unit]
    n, covered = record.tokens_before[unit], sum(s.length for s in segments)
    if covered not in (n, n - 1):  # a single view may end in a newline
        raise UnsupportedInputError(
            f"Image {unit} has {n} tokens that lie on no grid; it cannot be drawn."
        )
    if assignment is None:
        assignment = torch.zeros(n, dtype=torch.long)
    seen = [(assignment[s.slice] >= 0).view(s.grid[1:]).cpu() for s in segments]
    if len(seen) == 1:
        return seen[0]
    whole, tiles = seen[0], seen[1][:, :-1]  # the last column holds the newlines
    return tiles | _stretched(whole, tiles.shape)


def _stretched(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask [h, w] laid over another grid of the same picture."""
    return torch.nn.functional.interpolate(mask[None, None].float(), tuple(shape))[0, 0] > 0


def as_seen(image: Image, processor: Any) -> Image:
    """The picture as the tower saw it: cropped or padded as by the processor, not normalised."""
    from PIL import Image as Images

    image = image.convert("RGB")
    transform = getattr(processor, "image_processor", processor)
    crops = getattr(transform, "do_center_crop", False) or getattr(transform, "do_pad", False)
    if transform is None or not crops:
        return image
    pixels = transform(image, do_normalize=False, return_tensors="pt")["pixel_values"]
    pixels = pixels.reshape(-1, *pixels.shape[-3:])[0].clamp(0, 1)
    return Images.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().cpu().numpy())
