"""A model hub on the loopback interface that serves real folders to the real client."""

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """Repositories are the folders ORG/NAME in `root`; with a `status`, everything answers that."""

    root: Path
    status: int
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        self.asked.append("/".join(path))
        if self.status:
            return self._send(self.status, b'{"error": "no"}')
        name = path[2:4] if path[:2] == ["api", "models"] else path[:2]
        folder = self.root.joinpath(*name)
        if not folder.is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path[:2] != ["api", "models"]:  # ORG/NAME/resolve/COMMIT/FILE
            data = folder.joinpath(*path[4:]).read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            return self._send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        if "tree" in path:
            told: Any = [
                {
                    "type": "file",
                    "path": name,
                    "oid": "0" * 40,
                    "size": (folder / name).stat().st_size,
                }
                for name in files
            ]
        else:
            told = {
                "id": "/".join(name),
                "sha": COMMIT,
                "siblings": [{"rfilename": f} for f in files],
            }
        return self._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET  # noqa: N815 - its name in the standard library

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(root: Path, status: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Yield the hub's address and the growing list of paths that it was asked for."""
    asked: list[str] = []
    kind = type("Of", (Hub,), {"root": root, "status": status, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def silent() -> Iterator[str]:
    """Yield the address of one that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
