"""Loopback servers for the tests of downloads: files with Range, Kaggle's API, and their failures."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LIFETIME = 60.0  # seconds after which a server stops in any case


@dataclass
class Fault:
    """How one request fails: an error status, or after `after` bytes silence, a call or a cut."""

    status: int = 0
    after: int = 0
    silent: bool = False  # keep the connection open and send nothing more
    cut: bool = False  # close the connection
    call: Callable[[], Any] | None = None


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0  # bytes of the body that were sent

    @property
    def range(self) -> str:
        return self.headers.get("range", "")


@dataclass
class Server:
    """The files of a server, its next failures and the requests it has received.

    Each request uses up one of the `faults` whose key is in its path.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    archives: dict[str, str] = field(default_factory=dict)  # address of the archive per Kaggle set
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  # added to those of every file
    requests: list[Request] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if path in request.path]

    def fault(self, path: str) -> Fault:
        for key, faults in self.faults.items():
            if key in path and faults:
                return faults.pop(0)
        return Fault()


def goog_hash(content: bytes) -> str:
    return f"crc32c=AAAAAA==,md5={base64.b64encode(hashlib.md5(content).digest()).decode()}"


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = LIFETIME

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

        def _answer(self, asked: dict[str, Any]) -> None:
            headers = {key.lower(): value for key, value in self.headers.items()}
            request = Request(self.command, self.path, headers)
            server.requests.append(request)
            fault = server.fault(self.path)
            if fault.status:
                message = json.dumps({"code": fault.status, "message": "no"}).encode()
                self._send(request, Fault(), fault.status, message, {"Content-Type": "application/json"})
            elif self.path.endswith("/DownloadDataset"):
                target = server.archives[f"{asked['ownerSlug']}/{asked['datasetSlug']}"]
                self._send(request, fault, 302, b"", {"Location": target})
            elif self.path in server.files:
                self._send_file(request, fault, server.files[self.path])
            else:
                self._send(request, fault, 404, b"not here", {"Content-Type": "text/plain"})

        def _send_file(self, request: Request, fault: Fault, content: bytes) -> None:
            headers = {"Accept-Ranges": "bytes", **server.headers}
            begins = re.fullmatch(r"bytes=(\d+)-", request.range)
            if begins is None:
                self._send(request, fault, 200, content, headers)
            elif int(begins[1]) >= len(content):
                self._send(request, fault, 416, b"", {"Content-Range": f"bytes */{len(content)}"})
            else:
                start = int(begins[1])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self._send(request, fault, 206, content[start:], headers)

        def _send(
            self, request: Request, fault: Fault, status: int, body: bytes, headers: dict[str, str]
        ) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            first = body[: fault.after] if fault.silent or fault.cut or fault.call else body
            self._write(request, first)
            if fault.call:
                fault.call()
            if fault.silent:
                server.stopped.wait(LIFETIME)
            if fault.silent or fault.cut:
                self.close_connection = True
            else:
                self._write(request, body[len(first) :])

        def _write(self, request: Request, body: bytes) -> None:
            try:
                self.wfile.write(body)
                self.wfile.flush()
                request.sent += len(body)
            except OSError:  # the client has closed the connection
                self.close_connection = True

    return Handler


@contextmanager
def serve() -> Iterator[Server]:
    """A server on a free port of this machine; it stops after the block, or after `LIFETIME`."""
    server = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    http.block_on_close = False
    http.handle_error = lambda *_: None  # a client that was killed
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    timer = threading.Timer(LIFETIME, http.shutdown)
    timer.daemon = True
    timer.start()
    try:
        yield server
    finally:
        timer.cancel()
        server.stopped.set()
        http.shutdown()
        http.server_close()
