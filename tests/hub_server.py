"""A server that speaks the hub's protocol, on loopback: one repository, range requests, and faults on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LARGE = ".safetensors"


@dataclass
class Hub:
    """What it serves, and how badly.

    Attributes:
        refuse: path pattern -> status to answer with, instead.
        cut: path pattern -> bytes after which connections break, each of them.
        wrong: names of files served with a byte changed.
        ranges: whether range requests are heeded.
        delay: seconds before each answer.
        requests: (method, path, range), in order.
    """

    folder: Path
    name: str = "org/model"
    commit: str = "a" * 40
    refuse: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    ranges: bool = True
    delay: float = 0.0
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    def info(self) -> dict[str, object]:
        siblings = []
        for path in sorted(self.folder.iterdir()):
            data = path.read_bytes()
            entry: dict[str, object] = {
                "rfilename": path.name,
                "size": len(data),
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            }
            if path.name.endswith(LARGE):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"id": self.name, "sha": self.commit, "siblings": siblings, "private": False, "tags": []}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        asked = self.headers.get("Range", "")
        hub.requests.append((self.command, path, asked))
        time.sleep(hub.delay)
        for pattern, status in hub.refuse.items():
            if re.search(pattern, path):
                self._send(status, b"", {"X-Error-Message": "refused"} if status != 401 else {})
                return
        if path.startswith(f"/api/models/{hub.name}"):
            self._send(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"})
            return
        match = re.fullmatch(rf"/{hub.name}/resolve/{hub.commit}/(.+)", path)
        file = hub.folder / match[1] if match else None
        if file is None or not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if match else "RepoNotFound"})
            return
        data = file.read_bytes()
        digest = (
            hashlib.sha256(data)
            if file.name.endswith(LARGE)
            else hashlib.sha1(b"blob %d\0" % len(data) + data)
        )
        if file.name in hub.wrong:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {"ETag": f'"{digest.hexdigest()}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
        status = 200
        if (span := re.fullmatch(r"bytes=(\d+)-(\d+)", asked)) and hub.ranges:
            start, stop = int(span[1]), min(int(span[2]) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        most = next((n for pattern, n in hub.cut.items() if re.search(pattern, path)), None)
        self._send(status, data, headers, body, most)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], body: bool = True, most: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:most])
            self.hub.sent += len(data[:most])
            if most is not None and len(data) > most:
                self.close_connection = True


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
