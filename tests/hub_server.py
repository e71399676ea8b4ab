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

LARGE = (".safetensors", ".bin")
SLICE = 32 << 10  # bytes sent at once

# How an answer with bytes of a large file can go wrong; ``Hub.troubles`` is a list of these.
TROUBLES = ("none", "cut", "short", "long", "whole", "elsewhere", "hangup", "429", "503")


@dataclass
class Hub:
    """What it serves, and how badly.

    Attributes:
        refuse: path pattern -> status to answer with, instead.
        cut: path pattern -> bytes after which connections break, each of them.
        wrong: names of files served with a byte changed.
        ranges: whether range requests are heeded.
        delay: seconds before an answer, and ``delays`` more: path pattern -> seconds.
        rate: bytes per second and connection, 0 for as fast as it goes.
        link_uses: large files are redirected to another origin, by links that are good for so many requests.
        troubles: what happens to the next requests for bytes of large files, in order.
        pause: what a 429 or 503 asks to wait, in the words of Retry-After.
        requests: (method, path, range), in order.
        leaked: requests that brought a token to the other origin.
        sent: bytes of files; ``busy``: answers with bytes of large files under way, and ``busiest`` their most.
    """

    folder: Path
    name: str = "org/model"
    commit: str = "a" * 40
    refuse: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    ranges: bool = True
    delay: float = 0.0
    delays: dict[str, float] = field(default_factory=dict)
    rate: float = 0.0
    link_uses: int = 0
    troubles: list[str] = field(default_factory=list)
    pause: str = "0"
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    sent: int = 0
    busy: int = 0
    busiest: int = 0
    url: str = ""
    other_url: str = ""
    links: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _digests: dict[tuple[Path, int], str] = field(default_factory=dict)

    def digest(self, path: Path) -> str:
        """The hash that the hub has of a file."""
        key = (path, path.stat().st_mtime_ns)
        if key not in self._digests:
            data = path.read_bytes()
            large = path.name.endswith(LARGE)
            hasher = hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)
            self._digests[key] = hasher.hexdigest()
        return self._digests[key]

    def info(self) -> dict[str, object]:
        siblings = []
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            size, digest = path.stat().st_size, self.digest(path)
            entry: dict[str, object] = {"rfilename": path.relative_to(self.folder).as_posix(), "size": size}
            if path.name.endswith(LARGE):
                entry |= {"blobId": "0" * 40, "lfs": {"sha256": digest, "size": size, "pointerSize": 130}}
            else:
                entry["blobId"] = digest
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
        with hub.lock:
            hub.requests.append((self.command, path, asked))
        time.sleep(hub.delay + sum(more for pattern, more in hub.delays.items() if re.search(pattern, path)))
        for pattern, status in hub.refuse.items():
            if re.search(pattern, path):
                headers = (
                    {"Retry-After": hub.pause} if status in (429, 503) else {"X-Error-Message": "refused"}
                )
                self._send(status, b"", headers if status != 401 else {})
                return
        if path.startswith(f"/api/models/{hub.name}"):
            self._send(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"})
            return
        match = re.fullmatch(rf"/{hub.name}/resolve/{hub.commit}/(.+)", path)
        if path.startswith("/link/"):
            match = re.fullmatch(r"/link/\d+/(.+)", path)
            with hub.lock:
                if "Authorization" in self.headers:
                    hub.leaked.append(path)
                left = hub.links.get(path, 0)
                hub.links[path] = left - 1
            if left <= 0:
                self._send(403, b"", {})
                return
        file = hub.folder / match[1] if match else None
        if file is None or not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if match else "RepoNotFound"})
            return
        if hub.link_uses and file.name.endswith(LARGE) and not path.startswith("/link/"):
            with hub.lock:
                link = f"/link/{len(hub.links)}/{file.relative_to(hub.folder).as_posix()}"
                hub.links[link] = hub.link_uses
            self._send(302, b"", {"Location": hub.other_url + link})
            return
        self._send_file(file, asked, body, path)

    def _send_file(self, file: Path, asked: str, body: bool, path: str) -> None:
        hub = self.hub
        size = file.stat().st_size
        start, stop = 0, size
        headers = {"ETag": f'"{hub.digest(file)}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
        most = next((n for pattern, n in hub.cut.items() if re.search(pattern, path)), None)
        trouble, status, large = "none", 200, body and file.name.endswith(LARGE)
        with hub.lock:
            if large and hub.troubles:
                trouble = hub.troubles.pop(0)
        if trouble in ("429", "503"):
            self._send(int(trouble), b"", {"Retry-After": hub.pause})
            return
        if trouble == "hangup":
            self.close_connection = True
            return
        if (span := re.fullmatch(r"bytes=(\d+)-(\d+)", asked)) and hub.ranges and trouble != "whole":
            start, stop = int(span[1]), min(int(span[2]) + 1, size)
            if trouble == "short":
                stop = max(start + 1, (start + stop) // 2)
            if trouble == "long":
                stop = min(size, stop + 1000)
            if trouble == "elsewhere":
                start = start // 2 or 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            status = 206
        with open(file, "rb") as f:
            f.seek(start)
            data = f.read(stop - start)
        if file.name in hub.wrong and stop == size:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if trouble == "cut":
            most = len(data) // 2
        with hub.lock:
            hub.busy += large
            hub.busiest = max(hub.busiest, hub.busy)
        try:
            self._send(status, data, headers, body, most)
        finally:
            with hub.lock:
                hub.busy -= large

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], body: bool = True, most: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        cut = data[:most]
        began = time.perf_counter()
        for start in range(0, len(cut), SLICE):
            piece = cut[start : start + SLICE]
            try:
                self.wfile.write(piece)
            except ConnectionError:  # the client has left
                self.close_connection = True
                return
            with self.hub.lock:
                self.hub.sent += len(piece)
            if self.hub.rate:
                due = began + (start + len(piece)) / self.hub.rate
                time.sleep(max(0.0, due - time.perf_counter()))
        if len(cut) < len(data):
            self.close_connection = True


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    hub.url, hub.other_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
