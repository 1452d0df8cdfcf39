"""A conversation, asked over a returned cache or all at once."""

from __future__ import annotations

import torch

from tests import tiny
from tests.seam import oracle
from tests.tiny import Prompt


class Talk:
    """A conversation: grows ids and pixels, asks over the cache or all at once."""

    def __init__(self, model, rows=1):
        self.model, self.rows = model, rows
        self.ids, self.aligned, self.pixels, self.cache = None, {}, [], None

    def say(self, images, text, seed):
        """Append a user turn; its images are the new ones."""
        call = tiny.inputs(self.model, [Prompt(images, text)] * self.rows, seed=seed)
        self.new = {k: v for k, v in call.items() if k.startswith(("pixel", "image"))}
        if images:
            self.pixels.append(self.new)
        ids = call["input_ids"]
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in call:
                old = self.aligned.get(name, call[name][:, :0])
                width = 0 if self.ids is None else self.ids.shape[1]
                gap = old.new_zeros(self.rows, width - old.shape[1])
                self.aligned[name] = torch.cat([old, gap, call[name]], 1)
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], 1)

    def arguments(self, pixels):
        mask = torch.ones_like(self.ids)
        return {"input_ids": self.ids, "attention_mask": mask, **self.aligned, **pixels}

    def answer(self, new_tokens=4):
        """Over the cache, with the new images only."""
        more = {} if self.cache is None else {"past_key_values": self.cache}
        out = self.model.generate(
            **self.arguments(self.new),
            **more,
            **oracle.greedy(self.model, new_tokens),
            return_dict_in_generate=True,
        )
        self.cache, self.ids = out.past_key_values, out.sequences
        return out.sequences

    def answer_uncached(self, new_tokens=4):
        """One run over everything, with all images."""
        return self.model.generate(
            **self.arguments(self.all_pixels()),
            **oracle.greedy(self.model, new_tokens),
            use_cache=False,
        )

    def all_pixels(self):
        """Images of all turns, in the order of the rows."""
        out = {}
        for name in self.pixels[0] if self.pixels else ():
            parts = [turn[name].chunk(self.rows) for turn in self.pixels]
            out[name] = torch.cat([part[row] for row in range(self.rows) for part in parts])
        return out
