"""An HTTP server for a few read-only pages, on threads of its own, with limits on everything a client can hold.

The standard library parses the requests; what it lacks for a long run beside an event loop is here: a request's head
has a size and a deadline as a whole, bodies are refused, connections are counted and end with the server, and TLS
handshakes happen on the connection's own thread.
"""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from loscar_deploy.listening import bound_at

log = logging.getLogger("loscar")

MOST_CONNECTIONS = 32
MOST_HEAD_BYTES = 8192
HEAD_S = 5.0
"""How long a request's head, or a handshake, may take as a whole."""
IDLE_S = 15.0
"""How long a connection may say nothing between two requests."""
SEND_S = 15.0
"""How long a client may take nothing of an answer."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""With every answer: nothing from elsewhere is loaded, nothing is sent elsewhere, nobody frames it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for.

    Attributes:
        path, query: as they came, still encoded.
        headers: by lower-case name, the first of each.
    """

    path: str
    query: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    headers: tuple[tuple[str, str], ...] = ()


Answer = Callable[[Request], Reply]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def version_string(self) -> str:
        return "loscar"

    def log_message(self, format: str, *args: Any) -> None:
        """One request a second is not worth a line."""

    def handle_one_request(self) -> None:
        self.close_connection = True
        head = self._head()
        if not head:
            return
        self.requestline, self.request_version, self.command = "", "HTTP/1.1", ""
        if len(head) > MOST_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        self.rfile = io.BytesIO(head)
        self.raw_requestline = self.rfile.readline()
        if self.parse_request():
            self._answer()

    def _head(self) -> bytes:
        """A request's bytes up to the empty line; more than allowed of one that is too long, nothing of half a one."""
        with contextlib.suppress(OSError):
            self.connection.settimeout(IDLE_S)
            head: bytes = self.connection.recv(MOST_HEAD_BYTES + 1)
            end = time.monotonic() + HEAD_S
            while head and b"\r\n\r\n" not in head and b"\n\n" not in head and len(head) <= MOST_HEAD_BYTES:
                left = end - time.monotonic()
                if left <= 0:
                    return b""
                self.connection.settimeout(left)
                more = self.connection.recv(MOST_HEAD_BYTES + 1 - len(head))
                if not more:
                    return b""
                head += more
            return head
        return b""

    def _answer(self) -> None:
        if self.request_version == "HTTP/0.9":
            self._refuse(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
        elif self.command not in ("GET", "HEAD"):
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET, HEAD"))
        elif self.headers.get("Transfer-Encoding") or self.headers.get("Content-Length", "0").strip() != "0":
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        elif "Host" not in self.headers or self.rfile.read(1):  # a second request before this one is answered
            self._refuse(HTTPStatus.BAD_REQUEST)
        else:
            self._reply(self._found())

    def _found(self) -> Reply:
        path, _, query = self.path.partition("?")
        headers: dict[str, str] = {}
        for name, value in self.headers.items():
            headers.setdefault(name.lower(), value)
        try:
            return self.server.answer(Request(path, query, headers))
        except Exception as error:
            log.warning("the dashboard could not answer: %r", error)
            return Reply(b"the dashboard could not answer\n", status=HTTPStatus.SERVICE_UNAVAILABLE)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the parser refuses."""
        self._refuse(HTTPStatus(code))

    def _refuse(self, status: HTTPStatus, *headers: tuple[str, str]) -> None:
        """And end the connection: what follows on it may be a body."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"  # an answer without headers would help nobody
        self._reply(Reply(f"{status.phrase}\n".encode(), status=status, headers=headers))

    def _reply(self, reply: Reply) -> None:
        self.connection.settimeout(SEND_S)
        self.send_response(reply.status)
        for name, value in (*HEADERS.items(), *reply.headers):
            self.send_header(name, value)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 16

    answer: Answer
    tls: ssl.SSLContext | None = None

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self._open: dict[socket.socket, socket.socket] = {}  # as accepted -> what is spoken on
        self._lock = threading.Lock()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        with self._lock:
            room = len(self._open) < MOST_CONNECTIONS
            if room:
                self._open[request] = request
        return room

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(HEAD_S)
        with self.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False) as secure:
            with self._lock:
                self._open[request] = secure
            secure.do_handshake()
            super().finish_request(secure, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request for the dashboard from %s broke off", client_address, exc_info=True)

    def end_connections(self) -> None:
        with self._lock:
            for connection in self._open.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class HttpServer:
    """Answers at one address, until closed.

    Args:
        listen: HOST:PORT; port 0 takes a free one.
        option: where `listen` came from, for messages.
        tls: for HTTPS.

    Attributes:
        address: where it listens.

    Raises:
        ConfigError: nothing can listen there.
    """

    def __init__(self, listen: str, option: str, tls: ssl.SSLContext | None = None) -> None:
        self._server, self.address = bound_at(listen, option, _Server)
        self._server.tls = tls
        self._thread: threading.Thread | None = None

    def serve(self, answer: Answer) -> None:
        """Answer from now on; `answer` is called on threads of this server's."""
        self._server.answer = answer
        self._thread = threading.Thread(target=self._server.serve_forever, name="dashboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Free the port and end every connection."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.end_connections()
