"""What happens to rows where they enter the language model, and where they enter each layer.

Two things are done here. The compression tokens of an image that the language model has read
beforehand hold in every layer what they held then: the layers see them as if the image stood in the
prompt, hidden from the text. And rows may be rewritten once, before the first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmcompress.core.errors import CacheMismatchError
from vlmcompress.core.placement import kept_columns
from vlmcompress.families.decoders import Decoder
from vlmcompress.live.compiled import Untraced
from vlmcompress.methods.prompt.llava_mini import Fusible


class Entrant(Protocol):
    """What acts at the entrance of one language model in one forward."""

    decoder: Decoder

    def embedded(self, rows: Tensor) -> Tensor:
        """Rows of the language model's input ([B, L, d]), as they go on."""

    def entering(self, layer: int, rows: Tensor) -> Tensor:
        """Rows of a layer's input ([B, L, d]), as they go on."""

    def leaving(self, rows: Tensor) -> Tensor:
        """Rows of the language model's output ([B, L, d]), as they go on."""


_CURRENT: ContextVar[Entrant | None] = ContextVar("vlmcompress_entrance", default=None)


def begin(entrant: Entrant | None) -> None:
    """Make `entrant` that of this thread's call; None for calls that nothing is done in."""
    _CURRENT.set(entrant)


@contextmanager
def entering(entrant: Entrant | None) -> Iterator[None]:
    """Inside, `entrant` acts and no other does."""
    token = _CURRENT.set(entrant)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class Listener:
    """Remembers what the last rows are at the entrance of every layer, and at last.

    Attributes:
        heard: per layer and behind the last one, [b, k, d].
    """

    def __init__(self, decoder: Decoder, last: int) -> None:
        self.decoder, self._last = decoder, last
        self.heard: list[Tensor] = []

    def embedded(self, rows: Tensor) -> Tensor:
        """Nothing is changed."""
        return rows

    def entering(self, layer: int, rows: Tensor) -> Tensor:
        """Nothing is changed."""
        self.heard.append(rows[:, -self._last :])
        return rows

    def leaving(self, rows: Tensor) -> Tensor:
        """Nothing is changed."""
        self.heard.append(rows[:, -self._last :])
        return rows


class Recital:
    """Puts rows that were read before in the place of those of placeholders, in every layer."""

    def __init__(self, decoder: Decoder, places: Tensor, numbers: Tensor, heard: Tensor) -> None:
        """Prepare a forward.

        Args:
            decoder: the language model.
            places: [B, L] bool, rows that are replaced.
            numbers: [rows] int64, which of `heard` each of them is, in row-major order.
            heard: [layers + 1, total, d].
        """
        self.decoder, self._places, self._numbers, self._heard = decoder, places, numbers, heard

    def embedded(self, rows: Tensor) -> Tensor:
        """They are the method's own rows already."""
        return rows

    def entering(self, layer: int, rows: Tensor) -> Tensor:
        """The rows of placeholders as they were when the image was read."""
        return self._recited(layer, rows)

    def leaving(self, rows: Tensor) -> Tensor:
        """Likewise."""
        return self._recited(-1, rows)

    def _recited(self, layer: int, rows: Tensor) -> Tensor:
        heard = self._heard[layer].to(rows.device, rows.dtype)[self._numbers.to(rows.device)]
        places = self._places.to(rows.device)[..., None].expand_as(rows)
        return rows.masked_scatter(places, heard)


def recital(decoder: Decoder, places: Tensor, batch: int, read: Sequence[Tensor]) -> Recital:
    """What the prompt recites.

    Args:
        decoder: the language model.
        places: [B, L] bool, the prompt's placeholders.
        batch: samples of the call, whose rows beams repeat.
        read: per image [layers + 1, k, d].

    Raises:
        CacheMismatchError: for images that another language model has read.
    """
    first, width = read[0], decoder.config.hidden_size
    if (len(first) - 1, first.shape[-1]) != (len(decoder.layers), width):
        raise CacheMismatchError(
            f"The images were read by a language model of {len(first) - 1} layers and width "
            f"{first.shape[-1]}, and this one has {len(decoder.layers)} and {width}; encode them "
            "with this model."
        )
    copies = len(places) // batch
    one = places[::copies]
    number = (one.flatten().cumsum(0) - 1).view_as(one).repeat_interleave(copies, 0)
    return Recital(decoder, places, number[places], torch.cat(list(read), 1))


class Fused:
    """Rewrites compressed rows and text from all rows of the images, once."""

    def __init__(
        self,
        decoder: Decoder,
        places: Tensor,
        asking: Tensor,
        whole: Sequence[Tensor],
        fuse: Callable[[Fusible], tuple[Tensor, Tensor]],
    ) -> None:
        """Prepare a forward.

        Args:
            decoder: the language model.
            places: [B, L] bool, compressed rows.
            asking: [B, L] bool, rows of text that take part.
            whole: of every row of the batch, all rows of its images, [n, d].
            fuse: what rewrites them.
        """
        self.decoder, self._places, self._asking = decoder, places, asking
        self._whole, self._fuse = whole, fuse

    def embedded(self, rows: Tensor) -> Tensor:
        """Compressed rows and text as they leave the fusion."""
        (visual, filled), (words, there) = (
            (t.to(rows.device) for t in kept_columns(stay, "right"))
            for stay in (self._places, ~self._places)
        )
        whole = [part.to(rows.device, rows.dtype) for part in self._whole]
        lengths = torch.tensor([len(part) for part in whole], device=rows.device)
        vision = nn.utils.rnn.pad_sequence(whole, batch_first=True)
        seen = torch.arange(vision.shape[1], device=rows.device) < lengths[:, None]
        asking = self._asking.to(rows.device).gather(1, words) & there
        prompt = Fusible(
            vision, seen, _columns(rows, visual), filled, _columns(rows, words), asking
        )
        compressed, text = self._fuse(prompt)
        rows = _written(rows, visual, filled, compressed)
        return _written(rows, words, there, text)

    def entering(self, layer: int, rows: Tensor) -> Tensor:
        """Nothing is changed."""
        return rows

    def leaving(self, rows: Tensor) -> Tensor:
        """Nothing is changed."""
        return rows


def _columns(rows: Tensor, index: Tensor) -> Tensor:
    """Rows `index` ([B, m]) of [B, L, d]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _written(rows: Tensor, index: Tensor, valid: Tensor, new: Tensor) -> Tensor:
    """[B, L, d] with `new` ([B, m, d]) in the rows `index`, where valid."""
    spare = torch.where(valid, index, rows.shape[1])[..., None].expand_as(new)
    return torch.cat([rows, rows[:, :1]], 1).scatter(1, spare, new.to(rows.dtype))[:, :-1]


def placeholders(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """[B, L] bool, the prompt's image placeholders among the ids of a forward.

    Args:
        model: the outer model.
        ids: [B, L].
        prompt: columns of this forward that are the prompt's; a draft may follow.
    """
    found = torch.eq(ids, model.config.image_token_id)
    found[:, prompt:] = False
    return found


def _before_decoder(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    entrant = _CURRENT.get()
    rows = kwargs.get("inputs_embeds")
    if entrant is None or entrant.decoder.module is not module or rows is None:
        return None
    return args, {**kwargs, "inputs_embeds": entrant.embedded(rows)}


def _before_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    entrant = _CURRENT.get()
    if entrant is None:
        return None
    number = next((i for i, own in enumerate(entrant.decoder.layers) if own is module), None)
    if number is None:
        return None
    return (entrant.entering(number, args[0]), *args[1:]), kwargs


def _after_decoder(module: nn.Module, args: Any, output: Any) -> Any:
    entrant = _CURRENT.get()
    if entrant is None or entrant.decoder.module is not module:
        return None
    if isinstance(output, tuple):
        return (entrant.leaving(output[0]), *output[1:])
    output.last_hidden_state = entrant.leaving(output.last_hidden_state)
    return output


def _after_model(module: nn.Module, args: Any, output: Any) -> None:
    """Also after a forward that has failed: what it left must not meet the next."""
    begin(None)


class EntranceHooks:
    """The hooks on one language model."""

    def __init__(self, model: nn.Module, decoder: Decoder) -> None:
        after: Callable[..., Any] = Untraced(_after_model)
        self._handles: list[RemovableHandle] = [
            decoder.module.register_forward_pre_hook(_before_decoder, with_kwargs=True),
            decoder.module.register_forward_hook(_after_decoder),
            model.register_forward_hook(after, always_call=True),
            *(
                layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
                for layer in decoder.layers
            ),
        ]

    def remove(self) -> None:
        """Take everything off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
