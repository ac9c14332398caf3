"""A web server with ranges on loopback, in threads: it counts its answers, waits before each, and fails as told."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

# A fault is a function of the handler that answers a request in its own way; False: the request is answered as usual.
Fault = Callable[["_Handler"], bool]


class WebServer:
    """The files of a folder under `url`.

    Attributes:
        requests, bytes: answered so far, of bodies.
        fault: what a test puts in the way.
        latency_s: before every answer.
    """

    def __init__(self, folder: Path, latency_s: float = 0.0) -> None:
        self.folder, self.latency_s = folder, latency_s
        self.fault: Fault = lambda _handler: False
        self._lock = threading.Lock()
        self.forget()
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Also after `stop`, on the same port."""
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """As a server that was killed: nobody listens, and open connections are cut."""
        self._server.shutdown()
        self._server.cut()
        self._server.server_close()
        self._thread.join()

    def forget(self) -> None:
        """Count from 0 again."""
        self.requests = self.bytes = 0
        self.headers_seen: list[dict] = []

    def count(self, size: int, headers: dict) -> None:
        with self._lock:
            self.requests, self.bytes = self.requests + 1, self.bytes + size
            self.headers_seen.append(headers)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args) -> None:
        self._open: set = set()
        super().__init__(*args)

    def process_request(self, request, client_address) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def cut(self) -> None:
        for request in self._open:
            try:
                request.shutdown(2)
            except OSError:
                continue

    def handle_error(self, *_args) -> None:
        # A client that was cut off.
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer's head and body are two writes; with Nagle's algorithm the second would wait for the reader.
    disable_nagle_algorithm = True
    owner: WebServer

    def log_message(self, *_args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        time.sleep(self.owner.latency_s)
        if self.owner.fault(self):
            return
        path = self.owner.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.answer(404)
            return
        status = path.stat()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        etag = {"ETag": _etag(path, status.st_size, status.st_mtime_ns), "Accept-Ranges": "bytes"}
        if span is None:
            self.answer(200, path.read_bytes(), etag)
            return
        first, last = int(span[1]), min(int(span[2]), status.st_size - 1)
        if first >= status.st_size:
            self.answer(416)
            return
        with open(path, "rb") as file:
            file.seek(first)
            data = file.read(last - first + 1)
        self.answer(206, data, {**etag, "Content-Range": f"bytes {first}-{last}/{status.st_size}"})

    def answer(self, status: int, body: bytes = b"", headers: dict | None = None, *, cut: int = 0) -> None:
        """Args: cut: leave out so many bytes of the body that the header promises, and hang up."""
        body = body if self.command == "GET" else body[:0] if status >= 300 else body
        self.owner.count(len(body) if self.command == "GET" else 0, dict(self.headers))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) - cut])
            self.wfile.flush()
        self.close_connection = self.close_connection or cut > 0


@lru_cache(maxsize=1024)
def _etag(path: Path, _size: int, _modified_ns: int) -> str:
    """Of the content, so that a file that is put back has its own again."""
    return f'"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"'
