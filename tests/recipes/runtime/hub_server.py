"""A hub on this machine, as far as downloads ask: repositories are folders, each with one commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_REVISIONS = ("main", "v1", COMMIT)


@dataclass
class Hub:
    """The hub.

    Attributes:
        root: Holds the repositories: ``org/name``, and ``datasets/org/name``.
        url: Its address.
        asked: Files that were downloaded.
    """

    root: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)


@contextmanager
def hub_of(root: Path) -> Iterator[Hub]:
    """Serves the repositories below a folder while open."""
    hub = Hub(root)

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if path.startswith("api/"):
            kind, _, rest = path.removeprefix("api/").partition("/")
            name, action, tail = _split(rest, ("/revision/", "/tree/"))
            repository = self.served.root / ("datasets" if kind == "datasets" else "") / name
            self._describe(repository, action, tail)
        else:
            name, _, tail = _split(path, ("/resolve/",))
            self._send_file(self.served.root / name / tail.partition("/")[2])

    def _describe(self, repository: Path, action: str, revision: str) -> None:
        if repository.name == "gated":
            self._refuse(403, "GatedRepo")
            return
        if not repository.is_dir():
            self._refuse(404, "RepoNotFound")
            return
        if revision.partition("/")[0] not in _REVISIONS:
            self._refuse(404, "RevisionNotFound")
            return
        files = [file for file in sorted(repository.rglob("*")) if file.is_file()]
        names = [str(file.relative_to(repository)) for file in files]
        found: object = {"id": repository.name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        if action == "/tree/":
            sizes = [file.stat().st_size for file in files]
            found = [
                {"type": "file", "path": name, "size": size, "oid": "0"}
                for name, size in zip(names, sizes, strict=True)
            ]
        self._send(json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _send_file(self, file: Path) -> None:
        if not file.is_file():
            self._refuse(404, "EntryNotFound")
            return
        data = file.read_bytes()
        if self.command == "GET":
            self.served.asked.append(file.name)
        self._send(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", {"X-Error-Code": code, "Content-Type": "application/json"}, status)


def _split(path: str, marks: tuple[str, ...]) -> tuple[str, str, str]:
    for mark in marks:
        if mark in path:
            return path.partition(mark)[0], mark, path.partition(mark)[2]
    return path, "", ""
