"""The contract of compressors whose work ends at the language model's entrance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.base import Method, Stage
from vlmcompress.methods.trained import ConnectorShape, LearnedCompressor


@dataclass(frozen=True)
class PromptCompressor(LearnedCompressor):
    """Between tower and LLM, and once more where the prompt enters the LLM.

    `compress` makes the rows that the prompt's placeholders will hold. What else is done with them
    and with the rows it was given, `reads_images` and `fuses` say. It is the last method before the
    LLM, and its parts are made for one count of tokens.
    """

    stage: ClassVar[Stage] = "prompt"

    @property
    def reads_images(self) -> bool:
        """Whether the LLM reads each image by itself: its rows, and behind them the new ones.

        In the prompt, these then hold in every layer what they held there.
        """
        return False

    @property
    def fuses(self) -> int:
        """Layers in which its parts rewrite the new rows and the text from all rows of the images.

        They do so where the prompt enters the LLM.
        """
        return 0

    def count(self, shape: ConnectorShape) -> int:
        """Tokens that parts are made for.

        Raises:
            ConfigError: when a fraction stands for another count in every image.
        """
        if shape.tokens is None:
            raise ConfigError(
                f"{self.name} learns something for each token, and this tower takes images of any "
                "size, of which a fraction is another count each time; give keep as a count."
            )
        return shape.tokens

    def refuse_count(self, n: int, k: int, made: int) -> ConfigError:
        """What is wrong with images whose count is not that of the parts.

        Args:
            n: tokens of an image.
            k: what is to be left of them.
            made: what the parts are for.
        """
        return ConfigError(
            f"An image of {n} tokens is to become {k}, and {self.name}'s parts are made for "
            f"{made}; give keep as a count that every image has."
        )


def check_last(connector: Sequence[Method], decoder: Sequence[Method]) -> None:
    """Refuse what would come between a method of the prompt and what it does there.

    Args:
        connector: methods between tower and LLM, in the order given.
        decoder: those inside the LLM.

    Raises:
        ConfigError: for a method behind it, or inside an LLM whose rows it holds.
    """
    for i, method in enumerate(connector):
        if not isinstance(method, PromptCompressor):
            continue
        if i + 1 < len(connector):
            raise ConfigError(
                f"{method.name} works on up to the language model's entrance, and "
                f"{connector[i + 1].name!r} stands behind it; name {method.name} last of those "
                "before the language model."
            )
        if method.reads_images and decoder:
            raise ConfigError(
                f"{method.name}'s tokens come into every layer of the language model as it read "
                f"them before, so that {decoder[0].name!r} cannot act there; use one of them."
            )
