"""What a server must refuse before it starts, and what it says then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval_harness.served.models import llava
from eval_harness.served.server import Server, ServerError

#: What is told, and a part of the message. The first is tried on a whole server.
REFUSED: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"method": "vtc_cls", "keep": "auto"}, "its count depends on the picture"),
    ({"method": "quecc", "keep": 0.1}, "it reads the question"),
    ({"method": "fastv@2:0.5"}, "between vision tower and language model"),
    ({"method": "vtc_cls:0.5 | divprune:0.5"}, "an engine takes one method"),
    ({"method": "vtc_cls", "keep": 0}, "keep is 0"),
    ({"method": "vtc_cls", "keep": 0.1, "positions": "original"}, "one by one"),
    ({"method": "vtc_clas", "keep": 0.1}, "Unknown method"),
    ({"methods": "vtc_cls"}, "unknown keys methods"),
)


def check(work: Path) -> list[str]:
    """Try all of them.

    Args:
        work: for the model and the server's log.

    Returns:
        What was refused, as it was told.

    Raises:
        ServerError: for one that was not, or with another message.
    """
    from vllm.engine.arg_utils import EngineArgs

    folder = llava(work / "llava")
    for told, why in REFUSED:
        overrides = {"vlmcompress": {**told, "untested_engine": True}}
        try:
            EngineArgs(model=str(folder), hf_overrides=overrides).create_model_config()
        except Exception as error:  # the engine wraps what plugins raise
            if why in str(error):
                continue
            raise ServerError(f"{dict(told)} was refused with {error}; wanted {why!r}.") from error
        raise ServerError(f"{dict(told)} was not refused.")
    _on_a_server(folder, work)
    return [json.dumps(told) for told, _ in REFUSED]


def _on_a_server(folder: Path, work: Path) -> None:
    told, why = REFUSED[0]
    log = work / "refused.log"
    code = Server(folder, log, {"vlmcompress": dict(told)}).run_to_end()
    if code == 0 or why not in log.read_text(encoding="utf-8", errors="replace"):
        raise ServerError(f"The server ended with {code}; see {log}, where {why!r} should stand.")
