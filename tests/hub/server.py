"""A Hub on loopback: keeps what is committed, serves it again, and records every request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_only_for_this_test"


@dataclass
class Repository:
    """Files by name, and whether it is private."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class FakeHub:
    """State of the server.

    Attributes:
        endpoint: its address.
        repositories: by `models/user/name` or `datasets/user/name`.
        cards: metadata of other models, by id.
        calls: method, path and token of every request.
        commits: headers of the commits.
        validated: cards that it was asked to check.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[tuple[str, str, str | None]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    validated: list[str] = field(default_factory=list)

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        owner, name = body.get("organization"), body["name"]
        kind, name = f"{body.get('type') or 'model'}s", f"{owner}/{name}" if owner else name
        url = {"url": f"{self.endpoint}/{name}", "name": name}
        if f"{kind}/{name}" in self.repositories:
            return 409, {"error": "You already created this repo", **url}
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.repositories[f"{kind}/{name}"] = Repository(private)
        return 200, url

    def address(self, kind: str, name: str) -> str:
        """Of the one commit."""
        place = name if kind == "models" else f"{kind}/{name}"
        return f"{self.endpoint}/{place}/commit/{REVISION}"

    def commit(self, kind: str, name: str, lines: list[dict[str, Any]]) -> Any:
        repository = self.repositories[f"{kind}/{name}"]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value)
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
        return {
            "commitUrl": self.address(kind, name),
            "commitOid": REVISION,
            "hookOutput": "",
            "success": True,
        }

    def info(self, name: str, repository: Repository) -> Any:
        siblings = [{"rfilename": path} for path in sorted(repository.files)]
        return {"id": name, "sha": REVISION, "private": False, "tags": [], "siblings": siblings}

    def tree(self, repository: Repository) -> Any:
        return [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in sorted(repository.files.items())
        ]


_REPOSITORY = r"/api/(models|datasets)/([^/]+/[^/]+)"


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _record(self) -> str:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.calls.append((self.command, path, token))
        return path

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json", **(headers or {})}
        self._send(status, json.dumps(data).encode(), kind)

    def _missing(self, code: str) -> None:
        self._json({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def do_POST(self) -> None:
        path, body = self._record(), self._body()
        if path == "/api/repos/create":
            status, answer = self.hub.create(json.loads(body))
            return self._json(answer, status)
        if path == "/api/validate-yaml":
            self.hub.validated.append(json.loads(body)["content"])
            return self._json({"errors": [], "warnings": []})
        found = re.fullmatch(rf"{_REPOSITORY}/(preupload|commit)/(.+)", path)
        repository = found and self.hub.repositories.get(f"{found[1]}/{found[2]}")
        if not found or repository is None:
            return self._missing("RepoNotFound")
        if found[3] == "preupload":
            files = json.loads(body)["files"]
            modes = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._json({"files": modes})
        lines = [json.loads(line) for line in body.splitlines()]
        return self._json(self.hub.commit(found[1], found[2], lines))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._record()
        found = re.fullmatch(rf"{_REPOSITORY}/tree/.+", path)
        repository = found and self.hub.repositories.get(f"{found[1]}/{found[2]}")
        if repository is not None:
            return self._json(self.hub.tree(repository))
        found = re.fullmatch(rf"{_REPOSITORY}(/revision/.+)?", path)
        if found:
            card = self.hub.cards.get(found[2])
            if card is not None:
                return self._json({"id": found[2], "sha": REVISION, "cardData": card, "tags": []})
            repository = self.hub.repositories.get(f"{found[1]}/{found[2]}")
            if repository is None:
                return self._missing("RepoNotFound")
            return self._json(self.hub.info(found[2], repository))
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repository = found and self.hub.repositories.get(f"models/{found[1]}")
        if not found or repository is None:
            return self._missing("RepoNotFound")
        if found[3] not in repository.files:
            return self._missing("EntryNotFound")
        data = repository.files[found[3]]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": REVISION}
        return self._send(200, data, headers)


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A running server with nothing on it."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
