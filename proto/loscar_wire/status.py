"""Errors on the wire: each travels as one gRPC status whose details name its class.

    INVALID_ARGUMENT  "MalformedError: part 3: a message at 512 where 0 was next"

The other side raises the same class with the same text.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

import grpc

from loscar_core.errors import AuthenticationError, ConnectError, LoscarError, ProtocolError, all_errors

_CLASSES = {cls.__name__: cls for cls in all_errors()}
_TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.OK,
}
_TLS_FAILURES = {
    "certificate has expired": "the server's certificate, or its authority's, has expired",
    "certificate is not yet valid": "the server's certificate is not valid yet: is this machine's clock right?",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not one that --tls-ca vouches for",
    "Hostname Verification Check failed": "the server's certificate is for another name or address",
    "WRONG_VERSION_NUMBER": "the server does not speak TLS: leave --tls-ca out, or start it with --tls-cert",
}
"""What the details of a failed handshake name, and what it means to a client; trying again would not help."""
_UNREACHED = {
    "Connection refused": "nothing listens there",
    "Domain name not found": "the name is not known here",
    "Failed parsing HTTP/2": "what listens there does not speak gRPC: is it another program's port?",
    "Socket closed": "a server that wants TLS, or a client's certificate, hangs up like this",
    "Deadline Exceeded": "no answer in time: a firewall may be in between, or it is another program's port",
}
"""What the details of a failed connection name, and what it means to a client."""
_PEER = re.compile(r"ipv[46]:(\S+?:\d+): |errors resolving (\S+?:\d+): ")
MAX_DETAILS = 2000


def to_status(error: LoscarError) -> tuple[grpc.StatusCode, str]:
    """The code and details under which an error travels; details stay printable and short."""
    text = f"{type(error).__name__}: {error}".replace("\n", " ")[:MAX_DETAILS]
    return grpc.StatusCode[error.grpc_status], text


def from_status(code: grpc.StatusCode, details: str | None) -> LoscarError:
    """The error that a status stands for; a status that is not ours becomes a ConnectError or a ProtocolError."""
    name, _, text = (details or "").partition(": ")
    cls = _CLASSES.get(name)
    if cls is not None:
        return cls(text)
    for marker, reason in _TLS_FAILURES.items():
        _, found, more = (details or "").partition(marker)
        if found:
            shown = (found + more).replace("Invalid certificate verification context", "").rstrip(": .OK")
            return AuthenticationError(f"{reason} ({shown:.120})")
    if code in _TRANSIENT:
        return ConnectError(_unreached(details or code.name.lower()))
    return ProtocolError(f"{code.name}: {details}")


def _unreached(details: str) -> str:
    """Why there is no connection, in words of this program's where they are known."""
    failed = details.startswith(("failed to connect", "errors resolving", "Deadline Exceeded"))
    for marker, reason in _UNREACHED.items():
        if failed and marker in details:
            peer = _PEER.search(details)
            where = unquote(peer[1] or peer[2]) + ": " if peer is not None else ""
            return f"{where}{reason} ({marker})"
    return details
