"""Channels and servers: options, credentials, addresses and method names.

The option values are measured ones: a channel with these stays up for minutes of silence behind NAT, notices a
silent peer within half a minute, and reconnects without a long back-off. Keepalive is for NAT only; membership has
heartbeats of its own.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from loscar_core.errors import AuthenticationError, ConfigError, PortInUseError

SERVICE = "loscar.v1.ParameterServer"
TRAIN = f"/{SERVICE}/Train"
STATUS = f"/{SERVICE}/Status"
FETCH_MODEL = f"/{SERVICE}/FetchModel"
STOP = f"/{SERVICE}/Stop"
AVERAGE = f"/{SERVICE}/Average"

MAX_MESSAGE_BYTES = 4 << 20
"""Largest message either side accepts; what is sent stays well below (1 MiB of values)."""

Options = list[tuple[str, int | str]]

_BOTH: Options = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]

CLIENT_OPTIONS: Options = [
    *_BOTH,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 500),
    # No min_reconnect_backoff_ms: it is the time that a connection attempt has, and far servers need their round trips.
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.enable_retries", 0),
    # Otherwise all channels of a process to one address share one connection, and one link's back-pressure.
    ("grpc.use_local_subchannel_pool", 1),
]

SERVER_OPTIONS: Options = [
    *_BOTH,
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # A second server on the same port must fail, not share it.
    ("grpc.so_reuseport", 0),
    # Who connects and then says nothing holds a socket no longer than this.
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_concurrent_streams", 1024),
]


@dataclass(frozen=True, slots=True)
class ClientSecurity:
    """How a client proves who it is, and whom it trusts.

    Attributes:
        token: the run's token, or None.
        ca: PEM of the authority that signed the server's certificate; None for no TLS.
        certificate, key: the client's own, for mutual TLS.
    """

    token: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("--tls-cert and --tls-key belong together: give both or neither")
        if self.certificate is not None and self.ca is None:
            raise ConfigError("--tls-cert needs --tls-ca: without it there is no TLS")


@dataclass(frozen=True, slots=True)
class ServerSecurity:
    """What a server asks of its clients.

    Attributes:
        token: the run's token, or None.
        certificate, key: PEM; None for no TLS.
        client_ca: PEM of the authority that signs clients' certificates, for mutual TLS.
        insecure: a public address without TLS and token is wanted.
    """

    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("--tls-cert and --tls-key belong together: give both or neither")
        if self.client_ca is not None and self.certificate is None:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key: without them there is no TLS")


def parse_address(text: str, option: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPV6]:PORT; `option` names the source in the ConfigError otherwise."""
    if "://" in text:
        raise ConfigError(f"{option} {text!r}: expected HOST:PORT alone, without {text.partition('://')[0].strip()}://")
    if "," in text or ";" in text:
        raise ConfigError(f"{option} {text!r}: one HOST:PORT at a time here")
    host, colon, port_text = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"{option} {text!r}: put an IPv6 host in brackets: [{host}]:{port_text}")
    if not (colon and host and port_text.isascii() and port_text.isdigit() and int(port_text) <= 65535):
        raise ConfigError(f"{option} {text!r}: expected HOST:PORT with a port up to 65535, such as 127.0.0.1:50051")
    return host, int(port_text)


def parse_servers(servers: str | Sequence[str], option: str = "server") -> tuple[tuple[str, ...], ...]:
    """Addresses: of each shard, in order, those that are tried in turn.

    Raises:
        ConfigError: there is none, or one that is malformed.
    """
    if not isinstance(servers, str) and not servers:
        raise ConfigError("no server given")
    text = servers if isinstance(servers, str) else ",".join(servers)
    shards = tuple(tuple(address.strip() for address in shard.split(",")) for shard in text.split(";"))
    for address in (address for shard in shards for address in shard):
        parse_address(address, option)
    return shards


def format_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_free(host: str, port: int) -> None:
    """Raises PortInUseError saying why nothing can listen there, which gRPC itself only logs."""
    found, errors = [], []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        errors.append(error)
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC does: connections of a server that is gone do not hold its port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            errors.append(error)
    # A name may have an address, of IPv6 say, that this machine has not; but none may be taken.
    taken = [error for error in errors if error.errno == errno.EADDRINUSE]
    if taken or len(errors) >= max(1, len(found)):
        raise cannot_listen("", host, port, (taken or errors)[0])


def cannot_listen(option: str, host: str, port: int, error: OSError) -> PortInUseError:
    """What to raise when nothing can listen there.

    Args:
        option: that names the address, or empty.
    """
    said = f"{option}: " if option else ""
    found = PortInUseError(f"{said}cannot listen on {format_address(host, port)}: {error.strerror or error}")
    match error.errno:
        case errno.EADDRNOTAVAIL:
            return found.with_hint("give an address of this machine, or 0.0.0.0 for all of them")
        case errno.EACCES:
            return found.with_hint("ports below 1024 need a privilege: choose a higher one")
    return found


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, security: ServerSecurity) -> str | None:
    """Refuse to serve beyond this machine without TLS and a token, unless that is wanted.

    Returns:
        What is missing although it is wanted so, or None.

    Raises:
        ConfigError: saying what is missing, or that no client could give this token.
    """
    if security.token is not None:
        _check_token_text(security.token)
    if is_loopback(host):
        return None
    missing = " and ".join(
        name
        for name, value in (("--tls-cert and --tls-key", security.certificate), ("--token", security.token))
        if value is None
    )
    if missing and not security.insecure:
        raise ConfigError(f"{host} can be reached from outside: give {missing}, or --insecure if that is meant")
    return missing or None


def channel(target: str, security: ClientSecurity) -> grpc.aio.Channel:
    """A client channel. Raises ConfigError for credentials that cannot be read."""
    if security.ca is None:
        return grpc.aio.insecure_channel(target, options=CLIENT_OPTIONS)
    key = certificate = None
    if security.key is not None and security.certificate is not None:
        key, certificate = _read_pair(security.key, security.certificate)
    credentials = grpc.ssl_channel_credentials(_read_authority(security.ca, "--tls-ca"), key, certificate)
    return grpc.aio.secure_channel(target, credentials, options=CLIENT_OPTIONS)


def add_port(server: grpc.aio.Server, address: str, security: ServerSecurity) -> int:
    """Bind; returns the port. Raises RuntimeError when it is taken, ConfigError for unreadable credentials."""
    if security.certificate is None or security.key is None:
        port: int = server.add_insecure_port(address)
        return port
    pair = _read_pair(security.key, security.certificate)
    client_ca = _read_authority(security.client_ca, "--tls-client-ca") if security.client_ca else None
    credentials = grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)
    secure_port: int = server.add_secure_port(address, credentials)
    return secure_port


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror or error}") from None


def _read_pair(key: Path, certificate: Path) -> tuple[bytes, bytes]:
    """A key and its certificate; gRPC would only log that they do not fit."""
    pair = _read(key, "--tls-key"), _read(certificate, "--tls-cert")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError:
        text = f"--tls-cert {certificate} and --tls-key {key} are not a certificate and its key, in PEM, unencrypted"
        raise ConfigError(text) from None
    return pair


def _read_authority(path: Path, option: str) -> bytes:
    data = _read(path, option)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError:
        raise ConfigError(f"{option} {path} holds no certificate in PEM") from None
    return data


def call_metadata(security: ClientSecurity) -> list[tuple[str, str]]:
    """What a client sends with every call. Raises ConfigError for a token that cannot travel."""
    if not security.token:
        return []
    _check_token_text(security.token)
    return [("authorization", f"Bearer {security.token}")]


def _check_token_text(token: str) -> None:
    # What HTTP/2 carries unchanged; the token itself belongs into no message.
    if not (token.isascii() and token.isprintable() and token == token.strip()):
        raise ConfigError("the token must be printable ASCII without spaces at its ends")


def check_token(metadata: Sequence[Any] | None, token: str | None) -> None:
    """Compare a call's token with the run's in constant time.

    Raises:
        AuthenticationError: it is missing or wrong.
    """
    if token is None:
        return
    given = {str(k): v for k, v in (metadata or ())}.get("authorization")
    if given is None:
        raise AuthenticationError("this run wants a token")
    text = given if isinstance(given, str) else given.decode("latin-1")
    if not hmac.compare_digest(text.encode(), f"Bearer {token}".encode()):
        raise AuthenticationError("wrong token")
