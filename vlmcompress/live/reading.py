"""Images read by the language model before any question is asked, as VoCo tokens need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.families import Family
from vlmcompress.families.decoders import decoder_of
from vlmcompress.live import entrance, layers, positions
from vlmcompress.live.columns import create_causal_mask
from vlmcompress.methods.stages import Group


@dataclass(frozen=True)
class ImageReader:
    """Runs images through a language model, each by itself.

    Attributes:
        family: facts about the model.
        base: the model that holds tower and LLM.
        arguments: of `get_image_features`.
        mode: how positions of the prompt run, which the compression tokens follow.
    """

    family: Family
    base: nn.Module
    arguments: Mapping[str, Any]
    mode: positions.Mode

    def all(self, given: Sequence[Group], made: Sequence[Group]) -> tuple[Tensor, ...]:
        """Of every image, what its compression tokens are in every layer: [layers + 1, k, d].

        Args:
            given: the rows that are read.
            made: the compression tokens.
        """
        whole, index = by_image(given)
        heard: dict[int, Tensor] = {}
        for group in made:
            states = self.read(whole, index, group)
            heard.update(zip(group.owner.tolist(), states.unbind(1), strict=True))
        return tuple(heard[i] for i in sorted(heard))

    def read(
        self, whole: Mapping[int, Tensor], index: Mapping[int, Tensor], group: Group
    ) -> Tensor:
        """What compression tokens are at the entrance of every layer and behind the last.

        All images of a group are one batch, without a cache and outside whatever else is done to
        the layers. Nothing of a prompt is seen, so that the result holds for every prompt.

        Args:
            whole: of each image, the rows that are read, [n, d].
            index: of each image, the places of these in the uncompressed image, [n].
            group: compression tokens of images with equally many rows, [b, k, d].

        Returns:
            [layers + 1, b, k, d].
        """
        owners = group.owner.tolist()
        rows = torch.stack([whole[i] for i in owners])
        rows = torch.cat([rows, group.features.to(rows.dtype)], 1)
        decoder: Any = decoder_of(self.base)
        where = self._positions(torch.stack([index[i] for i in owners]), group)
        listener = entrance.Listener(decoder, group.n)
        with layers.apart(), entrance.entering(listener):
            decoder.module(
                inputs_embeds=rows,
                attention_mask=self._mask(decoder.config, rows),
                position_ids=where,
                use_cache=False,
                return_dict=True,
            )
        return torch.stack([heard.to(rows.device) for heard in listener.heard])

    def _mask(self, config: Any, rows: Tensor) -> Any:
        """None for causal rows; where rows of a prompt see later ones, rows of an image do."""
        if not self.family.sees_ahead:
            return None
        return create_causal_mask()(
            config=config,
            inputs_embeds=rows,
            attention_mask=None,
            past_key_values=None,
            block_sequence_ids=torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device),
        )

    def _positions(self, index: Tensor, group: Group) -> Tensor | None:
        """[3, b, n + k] positions on three axes; None where rows are counted.

        Compression tokens follow the image, or stand at the places of the tokens that they stand
        for in the prompt: as they do there.

        Args:
            index: [b, n] places of the rows that are read.
            group: the compression tokens.
        """
        if self.family.rope != "mrope":
            return None
        grid = self._grid(int(group.owner[0]), group.n_full).to(index.device)
        read = grid[:, index]
        if self.mode == "original":
            return torch.cat([read, grid[:, group.index]], 2)
        following = read.amax((0, 2))[:, None] + 1 + torch.arange(group.n, device=index.device)
        return torch.cat([read, following.expand(3, -1, -1)], 2)

    def _grid(self, image: int, n: int) -> Tensor:
        """[3, n] positions of an image's tokens at the start of a prompt."""
        device = next(v.device for v in self.arguments.values() if isinstance(v, Tensor))
        config: Any = self.base.config
        ids = torch.full((1, n), config.image_token_id, device=device)
        call = {
            "input_ids": ids,
            "image_grid_thw": self.arguments["image_grid_thw"][image : image + 1],
            "mm_token_type_ids": torch.ones_like(ids),
        }
        deltas = self.base.rope_deltas
        found = positions.of_prompt(self.base, call)
        self.base.rope_deltas = deltas  # those of the last prompt, which is still being answered
        assert found is not None  # the call has an image
        return found[:, 0]


def by_image(groups: Sequence[Group]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Rows [n, d] and their places [n] of every image, in the order of the images."""
    places = [(int(owner), group, i) for group in groups for i, owner in enumerate(group.owner)]
    places.sort(key=lambda place: place[0])
    rows = {owner: group.features[i] for owner, group, i in places}
    return rows, {owner: group.index[i] for owner, group, i in places}
