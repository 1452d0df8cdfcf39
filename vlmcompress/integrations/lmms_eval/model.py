"""The model `vlmcompress` of lmms-eval: any image-text model of transformers, compressed or not.

It derives from lmms-eval's base class and not from its generic model (`chat/huggingface.py`): in
0.7.3 that one looks model types up in a list of classes, so that it loads models without their
language head, and names sounds to processors that refuse the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from eval_harness.sweep.naming import unknown
from vlmcompress.core.errors import ConfigError, UnsupportedInputError
from vlmcompress.integrations.lmms_eval.options import Options, loaded
from vlmcompress.integrations.lmms_eval.recording import Generated, generate

#: Of tasks that do not say how long answers may be.
_NEW_TOKENS = 1024


class VLMCompress(lmms):
    """A model behind `generate_until` tasks with pictures; batches are padded on the left.

    Attributes:
        handle: of the patch; None for the uncompressed model.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        *,
        method: str | None = None,
        keep: float | int | str | None = None,
        adapter: str | None = None,
        positions: str | None = None,
        seed: int | None = None,
        clip: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        system_prompt: str | None = None,
        **unknown_ones: Any,
    ) -> None:
        """Load and patch.

        Arguments are those of `Options` and `loaded`; `batch_size` is questions at a time, and
        `system_prompt` a text or a file that holds it. Where accelerate runs several processes
        each takes the device that it is given. Others are refused.

        Raises:
            ConfigError, ConfigTypeError, UnknownMethodError: for bad options, before anything is
                loaded.
            UnsupportedModelError: for a model that cannot be loaded or compressed.
        """
        super().__init__()
        for name in unknown_ones:
            raise ConfigError(
                unknown("model argument", name, VLMCompress.__init__.__kwdefaults__ or {})
            )
        options = Options(pretrained, method, keep, adapter, positions, seed, clip)
        self.batch_size = _whole("batch_size", batch_size)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        self._model, self.processor = loaded(
            pretrained, dtype, device, device_map, attn_implementation
        )
        self.processor.tokenizer.padding_side = "left"  # a decoder does not go on behind padding
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        self.handle = options.apply(self._model, self.processor)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return torch.device(self._model.device)

    def clean(self) -> None:
        """Let go of the model, which the handle would hold."""
        self.handle = None
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers with the tokens that the language model read (padding aside) and wrote.

        As in lmms-eval's own models, `until` does not cut answers. The run's summary gets the mean
        model TTFT (`model_ttft`, seconds per batch).

        Raises:
            UnsupportedInputError: for tasks with videos or sounds.
        """
        results: list[Any] = [None] * len(requests)
        calls: list[Generated] = []
        with tqdm(desc="vlmcompress", total=len(requests), disable=self.rank != 0) as bar:
            for places in _batches(requests, self.batch_size):
                batch = [requests[place] for place in places]
                made, answers = self._answers(batch)
                calls.append(made)
                for place, answer in zip(places, answers, strict=True):
                    results[place] = answer
                bar.update(len(batch))
        _log(calls, len(requests))
        return results

    def _answers(self, batch: Sequence[Instance]) -> tuple[Generated, list[GenerationResult]]:
        inputs = self._inputs([self._messages(request) for request in batch])
        tokenizer = self.processor.tokenizer
        how = _decoding(batch[0].args[2])
        made = generate(
            self._model, self.handle, inputs, pad_token_id=tokenizer.pad_token_id, **how
        )
        texts = tokenizer.batch_decode(made.ids, skip_special_tokens=True)
        for request, text in zip(batch, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:3:2], text)
        counts = map(TokenCounts, made.read, made.written)
        return made, [*map(GenerationResult, texts, counts)]

    def _messages(self, request: Instance) -> ChatMessages:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        if self.system_prompt:
            messages = self._apply_system_prompt(messages, self.system_prompt)
        return ChatMessages(messages=messages)

    def _inputs(self, chats: Sequence[ChatMessages]) -> Any:
        pictures = []
        for chat in chats:
            images, videos, sounds = chat.extract_media()
            if videos or sounds:
                raise UnsupportedInputError(
                    "The task shows videos or sounds; the model vlmcompress takes pictures only."
                )
            pictures += images
        texts = [
            self.processor.apply_chat_template(chat.to_hf_messages(), add_generation_prompt=True)
            for chat in chats
        ]
        shown = {"images": pictures} if pictures else {}
        inputs = self.processor(text=texts, **shown, padding=True, return_tensors="pt")
        return inputs.to(self.device, self._model.dtype)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse.

        Raises:
            UnsupportedInputError: always.
        """
        raise UnsupportedInputError("vlmcompress generates answers; choose a generate_until task.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse.

        Raises:
            UnsupportedInputError: always.
        """
        raise UnsupportedInputError("vlmcompress answers in one turn; choose a task of one turn.")


def _batches(requests: Sequence[Instance], size: int) -> list[list[int]]:
    """Places of requests that are asked together: of one way to generate, in the order given."""
    groups: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[2].items())), []).append(place)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _decoding(asked: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` from a task's `generation_kwargs`; greedy at temperature 0."""
    how = {
        "max_new_tokens": asked.get("max_new_tokens", _NEW_TOKENS),
        "num_beams": asked.get("num_beams", 1),
    }
    temperature = asked.get("temperature") or 0
    if temperature <= 0:
        return {**how, "do_sample": False}
    return {**how, "do_sample": True, "temperature": temperature, "top_p": asked.get("top_p")}


def _log(calls: Sequence[Generated], requests: int) -> None:
    seconds, tokens = sum(c.seconds for c in calls), sum(sum(c.written) for c in calls)
    more: dict[str, float] = {"total_requests": requests}
    if calls:
        more["model_ttft"] = sum(call.ttft for call in calls) / len(calls)
    log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, additional_metrics=more)


def _whole(name: str, value: int | str) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, 1 or more.")
    return int(value)
