"""A proxy in front of an S3 server that injects faults into the traffic, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from typing import Self

STALL_S = 3.0


class Proxy(socketserver.ThreadingTCPServer):
    """Forwards bytes; `script(method, number)` gives the fault for a request, or None. Serves in its context.

    Faults: "reset" and "cut" end the answer after 100 kB, with and without a TCP reset; "lost"
    ends it before its first byte, after the server has served it; "busy" and "broken" answer 503 and 500
    instead; "stall" sends nothing for three seconds.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.upstream = ("127.0.0.1", int(upstream.rpartition(":")[2]))
        self.script: Callable[[str, int], str | None] = lambda method, number: None
        self.seen: list[str] = []
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def endpoint(self) -> str:
        """URL for clients."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def fault(self, method: str, path: str) -> str | None:
        """What to do to this request; `path` is /BUCKET/KEY."""
        del path
        with self.lock:
            number = self.seen.count(method)
            self.seen.append(method)
            return self.script(method, number)

    def passing(self, count: int) -> None:
        """Called before so many bytes of an answer go on to the client."""

    def handle_error(self, *_: object) -> None:
        """Clients that go away in the middle are what this is for."""


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:  # noqa: C901  # one loop, read from top to bottom
        with socket.create_connection(self.server.upstream) as upstream, contextlib.suppress(OSError):
            fault, sent = None, 0
            while True:
                ready, _, _ = select.select([self.request, upstream], [], [])
                if self.request in ready:
                    data = self.request.recv(1 << 16)
                    if not data:
                        return
                    method, _, rest = data.partition(b"\r\n")[0].decode("latin1").partition(" ")
                    if method in {"GET", "PUT", "HEAD"}:
                        fault, sent = self.server.fault(method, rest.partition(" ")[0].partition("?")[0]), 0
                    if fault in {"busy", "broken"}:
                        status = b"503 Busy" if fault == "busy" else b"500 Broken"
                        self.request.sendall(
                            b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                        )
                        return
                    upstream.sendall(data)
                if upstream in ready:
                    data = upstream.recv(1 << 16)
                    if not data:
                        return
                    interim = data.startswith(b"HTTP/1.1 100 ")
                    if fault == "lost" and not interim:
                        return
                    if fault == "stall" and not sent:
                        time.sleep(STALL_S)
                    self.server.passing(len(data))
                    self.request.sendall(data)
                    sent += len(data)
                    if fault in {"reset", "cut"} and sent > 100_000:
                        if fault == "reset":
                            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                            self.request.close()
                        return
