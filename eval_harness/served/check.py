"""Whether an engine with the plugin answers as the patched model of transformers does.

Every case is a server of its own: one model under one method. It is asked the same questions as
transformers, in float32 and greedily, and beside them what a server meets in life: several pictures
in a prompt, none at all, one that is cut off. Then it must stop.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openai import BadRequestError

from eval_harness import machine
from eval_harness.served import asking, expected, refusals
from eval_harness.served.asking import Answer, Embedded, Prompt
from eval_harness.served.cases import CASES, KEEP, Case, prepare
from eval_harness.served.expected import Expected
from eval_harness.served.server import Server
from vlmcompress.core.errors import VLMCompressError
from vlmcompress.integrations.vllm.registry import engine_version
from vlmcompress.reference.data import samples
from vlmcompress.reference.study import digest
from vlmcompress.reference.weights import WEIGHTS_DIR

NEW_TOKENS = 8
AT_ONCE = 8
#: Best logits that are closer than this may change places by rounding.
CLOSE = 1e-3
SHARE_EQUAL = 0.99
_SIZES = ((224, 224), (448, 224), (224, 448), (300, 400))


class MismatchError(VLMCompressError, AssertionError):
    """An engine does not answer as transformers does."""


def prompts(model: str, n: int) -> list[Prompt]:
    """Questions about single pictures; of several sizes where the model cuts pictures up."""
    made = []
    for i, sample in enumerate(samples("test", n)):
        image = sample.image
        if model in ("llava_next", "qwen2_vl", "qwen2_5_vl"):
            image = image.resize(_SIZES[i % len(_SIZES)])
        made.append(Prompt(sample.question, (image,)))
    return made


def others(model: str) -> list[Prompt]:
    """Questions about several pictures, and about none."""
    one, two, three = (p.images[0] for p in prompts(model, 24)[::8])
    return [
        Prompt("How many objects are there?", (one, two)),
        Prompt("What shape is the red object?", (one, two, three)),
        Prompt("How many objects are there?"),
    ]


def compare(
    wanted: Sequence[Expected],
    got: Sequence[Answer],
    by_rounding: Callable[[int], bool] = lambda prompt: False,
) -> dict[str, int]:
    """How many answers are equal.

    Args:
        wanted: answers of transformers.
        got: answers of the engine.
        by_rounding: whether the engine's answer to a prompt is another one because rounding decides
            what the method chooses there.

    Raises:
        MismatchError: for another token before the first close step, other numbers of tokens in a
            prompt, or too few answers that are equal to the end.
    """
    equal = 0
    for i, (want, have) in enumerate(zip(wanted, got, strict=True)):
        if have.prompt_tokens != want.prompt_tokens:
            raise MismatchError(
                f"Prompt {i} has {have.prompt_tokens} tokens in the engine and "
                f"{want.prompt_tokens} in transformers."
            )
        sure = want.close_until(CLOSE)
        if have.tokens[:sure] != want.tokens[:sure] and not by_rounding(i):
            raise MismatchError(
                f"Prompt {i}: the engine answers {have.tokens}, transformers {want.tokens}; the "
                f"first {sure} steps are beyond doubt."
            )
        equal += have.tokens == want.tokens
    if equal < SHARE_EQUAL * len(wanted):
        raise MismatchError(f"Only {equal} of {len(wanted)} answers are equal to the end.")
    return {"prompts": len(wanted), "equal": equal}


def run(case: Case, work: Path, n: int) -> dict[str, Any]:
    """One case from start to stop.

    Args:
        case: model and method.
        work: for models and the server's log.
        n: questions about single pictures.
    """
    setup = prepare(case, work)
    asked, more = prompts(case.model, n), others(case.model)
    wanted = expected.answers(setup.truth, [*asked, *more], case.spec, NEW_TOKENS)
    log = work / f"{case.model}-{case.method.partition('(')[0]}.log"
    told = {"vlmcompress": {**setup.told, "untested_engine": True}}
    with Server(setup.served, log, told, setup.options, setup.environment) as server:
        api, name = asking.client(server.url), setup.asked_as or server.model
        got = asking.ask_all(api, name, [*asked, *more], NEW_TOKENS, AT_ONCE)
        _broken_alone(api, name, asked, got)
        if case.model == "llava":
            rows = expected.encoded(setup.truth, asked[0], case.spec)
            _not_twice(api, name, Embedded(asked[0].question, rows), got[0])

    def rounded(i: int) -> bool:
        tokens = got[i].tokens
        return expected.by_rounding(setup.truth, asked[i], case.spec, NEW_TOKENS, tokens)

    compare(wanted[n:], got[n:])
    return {
        "model": case.model,
        "method": case.method,
        "keep": KEEP,
        **compare(wanted[:n], got[:n], rounded),
        "prompt_tokens_full": sum(w.full_tokens for w in wanted[:n]),
        "prompt_tokens": sum(g.prompt_tokens for g in got[:n]),
    }


def _broken_alone(api: Any, model: str, asked: Sequence[Prompt], got: Sequence[Answer]) -> None:
    """A picture that is cut off fails its own request, and the next is answered as before."""
    try:
        asking.ask(api, model, asked[0], NEW_TOKENS, broken=True)
    except BadRequestError:
        pass
    else:
        raise MismatchError("A picture that is cut off was answered.")
    again = asking.ask(api, model, asked[0], NEW_TOKENS)
    if again != got[0]:
        raise MismatchError(f"After a broken request: {again}; before it: {got[0]}.")


def _not_twice(api: Any, model: str, embedded: Embedded, first: Answer) -> None:
    """Rows that a client has compressed itself are taken as they are."""
    answer = asking.ask(api, model, embedded, NEW_TOKENS)
    if answer != first:
        raise MismatchError(f"Rows in place of the picture: {answer}; the picture: {first}.")


def versions() -> dict[str, str]:
    """Of the engine and of what both sides run on."""
    names = ("torch", "transformers", "openai")
    return {"vllm": engine_version(), **{name: version(name) for name in names}}


def main() -> None:
    """Run the cases asked for, or all, and write what came out."""
    parser = argparse.ArgumentParser(description="Compare an engine's answers with transformers'.")
    parser.add_argument("--out", type=Path, required=True, help="results file")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and logs")
    parser.add_argument("--prompts", type=int, default=200, help="questions in every case")
    parser.add_argument("--cases", help="model:method, with commas; the others stay")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    known = {case.name: case for case in CASES}
    chosen = list(known) if asked.cases is None else asked.cases.split(",")
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"unknown cases {', '.join(unknown)}; there are {', '.join(known)}")
    results: dict[str, Any] = {
        "weights": digest(WEIGHTS_DIR / "model.safetensors"),
        "machine": machine.environment(),
        "versions": versions(),
        "plan": {"new_tokens": NEW_TOKENS, "at_once": AT_ONCE, "close": CLOSE},
        "refused": [],
        "cases": [],
    }
    if asked.cases is not None:
        results |= _kept(asked.out, results)
    else:
        results["refused"] = refusals.check(asked.work)
    done = {f"{row['model']}:{row['method']}": row for row in results["cases"]}
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = run(known[name], asked.work, asked.prompts)
        done[name] = {**found, "commit": results["machine"]["commit"]}
        print(f"{name}: {found}", file=sys.stderr, flush=True)
        results["cases"] = [done[name] for name in known if name in done]
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _kept(file: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What a results file of the same weights and versions says of refusals and cases."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    if any(found[key] != results[key] for key in ("weights", "versions", "plan")):
        return {}
    commit = found["machine"]["commit"]
    rows = [{"commit": commit, **row} for row in found["cases"]]
    return {"refused": found["refused"], "cases": rows}


if __name__ == "__main__":
    main()
