"""Requests per second, time to the first token and time per token, at several concurrencies.

The same questions go to servers with and without compression. Times of one server are taken right
after each other; what a machine does beside it moves all of them, so a round measures every server
once and figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from openai import AsyncOpenAI

from eval_harness import machine
from eval_harness.served.asking import Prompt
from eval_harness.served.check import prompts, versions
from eval_harness.served.models import LOADED
from eval_harness.served.server import Server, ServerError
from vlmcompress.reference.study import digest
from vlmcompress.reference.weights import WEIGHTS_DIR

CONCURRENCY = (1, 4, 16, 32)
NEW_TOKENS = 16
#: Every request has an image of its own, so that no cache answers in the tower's place.
OPTIONS = ("--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs", "32")


@dataclass(frozen=True)
class Timing:
    """Seconds of one request: until its first token, and until its last."""

    first: float
    last: float


async def _timed(api: AsyncOpenAI, model: str, prompt: Prompt, new_tokens: int) -> Timing:
    began = time.perf_counter()
    moments: list[float] = []
    stream: Any = await api.chat.completions.create(
        model=model,
        messages=prompt.messages(),  # type: ignore[arg-type]
        temperature=0,
        max_tokens=new_tokens,
        stream=True,
        # Texts of tokens can be empty, or wait for the next ones; ids show each as it comes.
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async for chunk in stream:
        ids = getattr(chunk.choices[0], "token_ids", None) if chunk.choices else None
        moments += [time.perf_counter()] * len(ids or ())
    if len(moments) != new_tokens:
        raise ServerError(f"{new_tokens} tokens were asked for, and {len(moments)} came.")
    return Timing(moments[0] - began, moments[-1] - began)


async def _at_once(
    url: str, model: str, asked: Sequence[Prompt], concurrency: int
) -> tuple[float, list[Timing]]:
    """Seconds of everything and of each request, never more than some at once."""
    room = asyncio.Semaphore(concurrency)
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=1800, max_retries=0) as api:

        async def one(prompt: Prompt) -> Timing:
            async with room:
                return await _timed(api, model, prompt, NEW_TOKENS)

        began = time.perf_counter()
        timings = await asyncio.gather(*map(one, asked))
        return time.perf_counter() - began, list(timings)


def measure(url: str, model: str, asked: Sequence[Prompt], concurrency: int) -> dict[str, float]:
    """Figures of one server at one concurrency.

    Returns:
        `requests_per_s`; medians `ttft_s` (time to the first token) and `tpot_s` (time per output
        token after it).
    """
    seconds, timings = asyncio.run(_at_once(url, model, asked, concurrency))
    return {
        "requests_per_s": len(asked) / seconds,
        "ttft_s": median(t.first for t in timings),
        "tpot_s": median((t.last - t.first) / (NEW_TOKENS - 1) for t in timings),
    }


def round_of(
    folder: Path, log: Path, spec: str | None, asked: Sequence[Prompt], dtype: str
) -> dict[str, dict[str, float]]:
    """Figures of a server by concurrency; what warms it up is not counted."""
    told = {"vlmcompress": {"method": spec, "untested_engine": True}} if spec else None
    with Server(folder, log, told, ("--dtype", dtype, *OPTIONS)) as server:
        measure(server.url, server.model, asked[:8], 4)
        return {str(n): measure(server.url, server.model, _share(asked, n), n) for n in CONCURRENCY}


def _share(asked: Sequence[Prompt], concurrency: int) -> Sequence[Prompt]:
    """Fewer requests where they come one after the other."""
    return asked[: max(8, min(len(asked), 4 * concurrency))]


def summary(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over rounds."""
    return {
        n: {name: median(one[n][name] for one in rounds) for name in rounds[0][n]}
        for n in rounds[0]
    }


def main() -> None:
    """Measure every model with and without compression, in turns."""
    parser = argparse.ArgumentParser(description="An engine's throughput with short images.")
    parser.add_argument("--out", type=Path, required=True, help="results file")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and logs")
    parser.add_argument("--methods", default="vtc_cls:0.1", help="specs, separated by commas")
    parser.add_argument("--models", default=",".join(LOADED), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3, help="servers of each kind")
    parser.add_argument("--requests", type=int, default=96, help="questions at most")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    specs = [None, *asked.methods.split(",")]
    rows = []
    for name in asked.models.split(","):
        make, dtype = LOADED[name]
        folder = make(asked.work / name)
        questions = _distinct(asked.requests)
        rounds: dict[str | None, list[dict[str, dict[str, float]]]] = {spec: [] for spec in specs}
        for i in range(asked.rounds):
            for spec in specs if i % 2 == 0 else reversed(specs):
                print(f"{name}, {spec or 'whole images'}, round {i + 1}", file=sys.stderr)
                log = asked.work / "load.log"
                rounds[spec].append(round_of(folder, log, spec, questions, dtype))
        rows += [
            {"model": name, "dtype": dtype, "method": spec, "by_concurrency": summary(found)}
            for spec, found in rounds.items()
        ]
    results = {
        "weights": digest(WEIGHTS_DIR / "model.safetensors"),
        "machine": machine.environment(),
        "versions": versions(),
        "plan": {
            "rounds": asked.rounds,
            "requests": asked.requests,
            "new_tokens": NEW_TOKENS,
            "options": list(OPTIONS),
        },
        "rows": rows,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _distinct(n: int) -> list[Prompt]:
    """Questions about n different pictures."""
    found: dict[bytes, Prompt] = {}
    for prompt in prompts("llava", 8 * n):
        found.setdefault(prompt.images[0].tobytes(), prompt)
    return list(found.values())[:n]


if __name__ == "__main__":
    main()
