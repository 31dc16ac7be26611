"""Where the small HTTP servers beside a run listen."""

from __future__ import annotations

import socket
import socketserver
from typing import Any, TypeVar

from loscar_core.errors import ConfigError
from loscar_wire.transport import cannot_listen, format_address, parse_address

S = TypeVar("S", bound=socketserver.TCPServer)


def bound_at(listen: str, option: str, kind: type[S], *arguments: Any) -> tuple[S, str]:
    """A server of this kind, of the address' family, and where it listens.

    Args:
        listen: HOST:PORT; port 0 takes a free one.
        option: where `listen` came from, for messages.
        arguments: the server's own, after the address.

    Raises:
        ConfigError: the address cannot be read, or its host is not known.
        PortInUseError: nothing can listen there.
    """
    host, port = parse_address(listen, option)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{option}: cannot listen on {format_address(host, port)}: {reason}") from None
    try:
        of_family: type[S] = type("_FamilyServer", (kind,), {"address_family": found[0][0]})
        server = of_family(found[0][4][:2], *arguments)  # type: ignore[arg-type]
    except OSError as error:
        raise cannot_listen(option, host, port, error) from None
    return server, format_address(host, int(server.server_address[1]))
