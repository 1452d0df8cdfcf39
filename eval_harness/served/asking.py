"""Questions with pictures, as an OpenAI client sends them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from openai import OpenAI
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A question about no, one or several pictures, which come first."""

    question: str
    images: tuple[Image.Image, ...] = ()

    def messages(self, broken: bool = False) -> list[dict[str, Any]]:
        """The chat as the OpenAI interface takes it.

        Args:
            broken: whether pictures arrive cut off in the middle.
        """
        urls = [_data_url(image, broken) for image in self.images]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        text = {"type": "text", "text": self.question}
        return [{"role": "user", "content": [*parts, text]}]


@dataclass(frozen=True)
class Embedded:
    """A question about a picture whose rows ([k, d]) are sent in its place."""

    question: str
    rows: Tensor

    def messages(self, broken: bool = False) -> list[dict[str, Any]]:
        """The chat as vLLM takes it (`--enable-mm-embeds`); nothing is ever cut off."""
        file = io.BytesIO()
        np.save(file, self.rows.float().numpy())
        data = base64.b64encode(file.getvalue()).decode()
        part = {"type": "image_embeds", "image_embeds": data}
        return [{"role": "user", "content": [part, {"type": "text", "text": self.question}]}]


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        tokens: ids of the answer.
        prompt_tokens: of the prompt, as the engine counted them.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int


def client(url: str) -> OpenAI:
    """An OpenAI client of a server."""
    return OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)


def ask(
    api: Any, model: str, prompt: Prompt | Embedded, new_tokens: int, broken: bool = False
) -> Answer:
    """One greedy answer, which does not end early.

    Raises:
        openai.APIError: for a request that fails.
    """
    made = api.chat.completions.create(
        model=model,
        messages=prompt.messages(broken),
        temperature=0,
        max_tokens=new_tokens,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return Answer(tuple(made.choices[0].token_ids), made.usage.prompt_tokens)


def ask_all(
    api: Any, model: str, prompts: Sequence[Prompt], new_tokens: int, at_once: int
) -> list[Answer]:
    """Answers to many, some of them at once."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda one: ask(api, model, one, new_tokens), prompts))


def _data_url(image: Image.Image, broken: bool) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    data = file.getvalue()
    data = data[: len(data) // 2] if broken else data
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
