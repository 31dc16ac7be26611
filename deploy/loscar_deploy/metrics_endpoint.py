"""Serves metrics over HTTP in the Prometheus text format, on a thread of its own.

The pages come from prometheus_client, which belongs to the extra `loscar[metrics]` and is imported here only when
`--metrics` is given. The HTTP server is the standard library's with what a long run needs: idle connections end, a
client that breaks off leaves no traceback on standard error, and binding asks no name service.
"""

from __future__ import annotations

import contextlib
import logging
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from loscar_core.errors import ConfigError
from loscar_deploy.listening import bound_at
from loscar_wire.transport import parse_address

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

log = logging.getLogger("loscar")

IDLE_S = 10.0
"""How long a connection may say nothing."""

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _Handler(WSGIRequestHandler):
    timeout = IDLE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request for metrics from %s broke off", client_address, exc_info=True)


class MetricsEndpoint:
    """The metrics of one process at one address, until closed.

    Args:
        listen: HOST:PORT; port 0 takes a free one.

    Attributes:
        address: where it listens.

    Raises:
        ConfigError: prometheus_client is not installed, or nothing can listen there.
    """

    def __init__(self, listen: str) -> None:
        parse_address(listen, "--metrics")
        try:
            from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
        except ImportError:
            raise ConfigError("--metrics needs the Prometheus client: pip install 'loscar[metrics]'") from None
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._server, self.address = bound_at(listen, "--metrics", _Server, _Handler)
        self._server.set_app(_guarded(make_wsgi_app(self._registry)))
        self._thread: threading.Thread | None = None

    def serve(self, collector: Collector) -> None:
        """Answer from now on, with the process's own figures and the collector's."""
        self._registry.register(collector)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Free the port."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _guarded(app: WsgiApp) -> WsgiApp:
    """An app that answers 503 where a collector fails, in place of a traceback."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            return app(environ, start_response)
        except Exception as error:
            log.warning("the metrics could not be collected: %r", error)
            start_response("503 Service Unavailable", [("Content-Type", "text/plain; charset=utf-8")])
            return [b"the metrics could not be collected\n"]

    return guarded


@contextlib.contextmanager
def metrics_at(listen: str | None) -> Iterator[MetricsEndpoint | None]:
    """The endpoint of --metrics, closed at the end; None when there is to be none. Raises as `MetricsEndpoint`."""
    if listen is None:
        yield None
        return
    endpoint = MetricsEndpoint(listen)
    try:
        yield endpoint
    finally:
        endpoint.close()
