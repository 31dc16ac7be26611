"""`--dashboard`: one look a second at the run, kept for the page, and who may see it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from http import HTTPStatus
from importlib import resources

from loscar_core.errors import AuthenticationError, ConfigError
from loscar_deploy.dashboard.history import History
from loscar_deploy.dashboard.http import HttpServer, Reply, Request
from loscar_deploy.dashboard.look import Look, look_at
from loscar_server.service import ParameterService
from loscar_wire.transport import ServerSecurity, check_exposure, check_token, is_loopback, parse_address

log = logging.getLogger("loscar")

OPTION = "--dashboard"
EVERY_S = 1.0
LOOK_S = 5.0
"""How long the event loop may take for a look; then there is a gap in the page."""

_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
"""All that there is, by its exact path: nothing a client says becomes a file's name."""
STATE = "/state.json"


class Dashboard:
    """The page of one server process, until closed.

    Args:
        listen: HOST:PORT; port 0 takes a free one.
        security: the server's own: the same token, certificate and rules about public addresses.

    Attributes:
        address: where it listens.
        url: for a browser.

    Raises:
        ConfigError: a public address without TLS and token, unreadable credentials, or nothing can listen there.
    """

    def __init__(self, listen: str, security: ServerSecurity) -> None:
        host, _ = parse_address(listen, OPTION)
        missing = check_exposure(host, security)
        if missing is not None:
            log.warning("the dashboard on %s is served without %s: whoever can reach it can read it", host, missing)
        # A page of somebody else's could have its name lead here, and read what has no token.
        self._local_only = is_loopback(host) and security.token is None
        self._token = security.token
        self._files = {
            path: Reply(resources.files(__package__).joinpath(name).read_bytes(), kind)
            for path, (name, kind) in _FILES.items()
        }
        self._history = History()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._watching: threading.Thread | None = None
        tls = _tls(security)
        self._server = HttpServer(listen, OPTION, tls)
        self.address = self._server.address
        self.url = f"{'http' if tls is None else 'https'}://{self.address}/"

    def watch(self, service: ParameterService, loop: asyncio.AbstractEventLoop) -> None:
        """Serve from now on what is seen of this service, which belongs to this loop."""
        with self._lock:
            self._history.add(look_at(service, time.monotonic()))
        self._server.serve(self._answer)
        self._watching = threading.Thread(target=self._watch, args=(service, loop), name="dashboard looks", daemon=True)
        self._watching.start()

    def close(self) -> None:
        """Free the port, end every connection, look no more."""
        self._over.set()
        self._server.close()
        if self._watching is not None:
            self._watching.join()

    # --- looking (on a thread) ------------------------------------------------------------------------------

    def _watch(self, service: ParameterService, loop: asyncio.AbstractEventLoop) -> None:
        due = time.monotonic() + EVERY_S
        while not self._over.wait(max(0.0, due - time.monotonic())):
            due = max(due, time.monotonic()) + EVERY_S  # what a busy loop has missed is not made up for
            answer: Future[Look] = Future()
            try:
                loop.call_soon_threadsafe(_look, service, answer)
            except RuntimeError:  # the loop has ended
                return
            found = self._taken(answer)
            if found is not None:
                with self._lock:
                    self._history.add(found)

    def _taken(self, answer: Future[Look]) -> Look | None:
        """A look once it is taken; None when the loop is too busy for it, or this dashboard is closed meanwhile."""
        until = time.monotonic() + LOOK_S
        while not self._over.is_set() and time.monotonic() < until:
            done, _ = wait((answer,), 0.1)
            if done:
                error = answer.exception()
                if error is None:
                    return answer.result()
                log.warning("the dashboard could not look at the run: %r", error)
                return None
        answer.cancel()
        return None

    # --- answering (on threads of the HTTP server's) --------------------------------------------------------

    def _answer(self, request: Request) -> Reply:
        if self._local_only and not _names_this_machine(request.headers.get("host", "")):
            text = b"this page is for this machine only: open it as http://localhost or http://127.0.0.1\n"
            return Reply(text, status=HTTPStatus.MISDIRECTED_REQUEST)
        if request.path == STATE:
            return self._state(request)
        found = self._files.get(request.path)
        return found or Reply(b"Not Found\n", status=HTTPStatus.NOT_FOUND)

    def _state(self, request: Request) -> Reply:
        given = request.headers.get("authorization")
        try:
            check_token(() if given is None else (("authorization", given),), self._token)
        except AuthenticationError as error:
            told = (("WWW-Authenticate", "Bearer"),)
            return Reply(f"{error}\n".encode(), status=HTTPStatus.UNAUTHORIZED, headers=told)
        asked = re.fullmatch(r"(?:since=(\d{1,15}))?", request.query, re.ASCII)
        if asked is None:
            return Reply(b"the query is since=NUMBER or nothing\n", status=HTTPStatus.BAD_REQUEST)
        with self._lock:
            found = self._history.since(int(asked[1] or 0))
        body = json.dumps(found, separators=(",", ":"), allow_nan=False).encode()
        return Reply(body, "application/json")


def _look(service: ParameterService, answer: Future[Look]) -> None:
    """On the loop."""
    if answer.set_running_or_notify_cancel():
        try:
            answer.set_result(look_at(service, time.monotonic()))
        except Exception as error:  # a page is no reason to end a run
            answer.set_exception(error)


def _names_this_machine(host: str) -> bool:
    """A Host header with a loopback address or localhost."""
    name = re.sub(r":\d*$", "", host.strip().lower())
    return is_loopback(name.removeprefix("[").removesuffix("]"))


def _tls(security: ServerSecurity) -> ssl.SSLContext | None:
    """What the gRPC port asks of its clients, for a browser. Raises ConfigError for credentials that cannot be read."""
    if security.certificate is None or security.key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(security.certificate, security.key, password="")
        if security.client_ca is not None:
            context.load_verify_locations(cafile=security.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"{OPTION}: the TLS files cannot be used: {error.strerror or error}") from None
    return context


@contextlib.contextmanager
def dashboard_at(listen: str | None, security: ServerSecurity) -> Iterator[Dashboard | None]:
    """The page of --dashboard, closed at the end; None when there is to be none. Raises as `Dashboard`."""
    if listen is None:
        yield None
        return
    dashboard = Dashboard(listen, security)
    try:
        yield dashboard
    finally:
        dashboard.close()
