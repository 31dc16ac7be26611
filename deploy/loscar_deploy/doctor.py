"""`loscar doctor`: looks at what usually goes wrong and names it.

Each check is one line: what was looked at, what was found, and what to do when that is bad. The exit status is that
of the first failed check.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from loscar_core import PROTOCOL_VERSION
from loscar_core.errors import (
    AuthenticationError,
    ConfigError,
    ConnectError,
    DataMissingError,
    LoscarError,
    SystemRefusedError,
    VersionMismatchError,
)
from loscar_deploy.client import Client
from loscar_wire.transport import ClientSecurity, check_free, parse_address

LEAST_DISK_BYTES = 1 << 30
PROBE_BYTES = 1 << 16
"""Written to see whether there is room for anything."""

SOON_DAYS = 14
PACKAGES = {"grpcio": "1.72.1", "protobuf": "6.30", "numpy": "1.26", "safetensors": "0.4.3"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        state: "ok", "warning" or "failed".
        text: what was found, and what to do.
        exit_code: of the failure it predicts; 0 unless failed.
    """

    check: str
    state: str
    text: str
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Questions:
    """What to look at; None leaves a check out.

    Attributes:
        server: HOST:PORT to reach.
        listen: HOST:PORT that a server here would take.
        security: token and certificates of this client.
        server_certificate, server_key: a server's pair to look at.
        data_dir, task: a task's data.
        out: a folder to be written.
    """

    server: str | None = None
    listen: str | None = None
    security: ClientSecurity = ClientSecurity()
    server_certificate: Path | None = None
    server_key: Path | None = None
    task: str | None = None
    data_dir: Path | None = None
    out: Path | None = None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(p) for p in text.split("+")[0].split(".")[:3] if p.isdigit())


def _failed(check: str, error: LoscarError) -> Finding:
    return Finding(check, "failed", f"{error}; {error.hint}", error.exit_code)


def check_versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 11)
    yield Finding("python", "failed" if old else "ok", f"{python}{'; 3.11 or newer is needed' if old else ''}", 3 * old)
    yield Finding("loscar", "ok", f"{metadata.version('loscar')}, protocol {PROTOCOL_VERSION}")
    for package, least in PACKAGES.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding(package, "failed", "not installed: pip install loscar", ConfigError.exit_code)
            continue
        bad = _version(found) < _version(least)
        text = f"{found}; at least {least} is needed" if bad else found
        yield Finding(package, "failed" if bad else "ok", text, VersionMismatchError.exit_code if bad else 0)
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch", "warning", "not installed; workers need it: pip install 'loscar[worker]'")
    else:
        yield Finding("torch", "ok", metadata.version("torch"))


def check_listen(listen: str) -> Iterator[Finding]:
    try:
        check_free(*parse_address(listen, "--listen"))
        yield Finding("listen", "ok", f"{listen} is free")
    except LoscarError as error:
        yield _failed("listen", error)


def check_certificate(check: str, certificate: Path, key: Path | None, ca: Path | None = None) -> Iterator[Finding]:
    """One certificate: whether it is one, fits its key and its authority, and is valid now."""
    if importlib.util.find_spec("cryptography") is None:
        yield Finding(check, "warning", "cannot be looked at: pip install 'loscar[certs]'")
        return
    import datetime

    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    path = certificate
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        if key is not None:
            path = key
            if serialization.load_pem_private_key(key.read_bytes(), None).public_key() != found.public_key():
                yield _failed(check, ConfigError(f"{key} does not belong to {certificate}"))
                return
        if ca is not None:
            path = ca
            authority = x509.load_pem_x509_certificate(ca.read_bytes())
    except OSError as error:
        yield _failed(check, ConfigError(f"{path}: {error.strerror}"))
        return
    except (ValueError, TypeError):
        yield _failed(
            check, ConfigError(f"{path} holds no {'key without a password' if path == key else 'certificate'}")
        )
        return
    if ca is not None:
        try:
            found.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            yield _failed(check, AuthenticationError(f"{certificate} was not signed by {ca}"))
            return
    if key is not None and os.name == "posix" and key.stat().st_mode & 0o077:
        yield Finding(check, "warning", f"{key} can be read by others: chmod 600 {key}")
    now = datetime.datetime.now(datetime.UTC)
    left = found.not_valid_after_utc - now
    if found.not_valid_before_utc > now:
        text = f"{certificate} is valid only from {found.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: is the clock right?"
        yield _failed(check, AuthenticationError(text))
    elif left.total_seconds() <= 0:
        yield _failed(check, AuthenticationError(f"{certificate} expired on {found.not_valid_after_utc:%Y-%m-%d}"))
    else:
        state = "warning" if left.days < SOON_DAYS else "ok"
        yield Finding(check, state, f"{certificate} is valid for {left.days} days more")


async def _ask(server: str, security: ClientSecurity) -> tuple[Any, float]:
    client = Client(server, security)
    try:
        started = time.monotonic()
        reply = await client.status()
        return reply, time.monotonic() - started
    finally:
        await client.close()


def check_server(server: str, security: ClientSecurity) -> Iterator[Finding]:
    try:
        host, port = parse_address(server, "--server")
        socket.getaddrinfo(host, port)
    except LoscarError as error:
        yield _failed("server", error)
        return
    except OSError as error:
        yield _failed("server", ConnectError(f"{server}: the name is not known ({error.strerror})"))
        return
    try:
        reply, took_s = asyncio.run(_ask(server, security))
    except LoscarError as error:
        yield _failed("server", error)
        return
    if reply.protocol_version != PROTOCOL_VERSION:
        text = f"{server} speaks protocol {reply.protocol_version}, this is {PROTOCOL_VERSION}"
        yield _failed("server", VersionMismatchError(text))
        return
    yield Finding(
        "server",
        "ok",
        f"{server} answered in {took_s * 1000:.0f} ms: run {reply.run_id.hex()[:8]}, {reply.phase}, "
        f"round {reply.round}, {len(reply.members)} members",
    )


def check_task(task: str, data_dir: Path | None) -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield _failed("task", ConfigError("tasks need PyTorch"))
        return
    from loscar_worker.tasks import load_task

    try:
        loaded = load_task(task, data_dir)
        yield Finding("task", "ok", f"{task}: {len(loaded.train)} training samples, {len(loaded.test)} for testing")
    except (DataMissingError, ConfigError) as error:
        yield _failed("task", error)


def check_out(out: Path) -> Iterator[Finding]:
    existing = out
    while not existing.exists():
        existing = existing.parent
    try:
        free = shutil.disk_usage(existing).free
        probe = existing / ".loscar-doctor"
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = SystemRefusedError if full else ConfigError
        yield _failed("out", kind(f"{existing} cannot be written: {error.strerror}"))
        return
    state = "warning" if free < LEAST_DISK_BYTES else "ok"
    yield Finding("out", state, f"{existing} can be written, {free / 1e9:.1f} GB are free")


def examine(questions: Questions) -> list[Finding]:
    """Every check that was asked for, in order."""
    q = questions
    checks: list[Callable[[], Iterator[Finding]]] = [check_versions]
    if q.listen is not None:
        checks.append(lambda: check_listen(q.listen or ""))
    if q.server_certificate is not None:
        own = q.server_certificate
        checks.append(lambda: check_certificate("server certificate", own, q.server_key, q.security.ca))
    elif q.server_key is not None:
        raise ConfigError("--server-key needs --server-cert: the certificate that it should belong to")
    if q.security.ca is not None:
        checks.append(lambda: check_certificate("authority", q.security.ca or Path(), None))
    if q.security.certificate is not None:
        checks.append(lambda: check_certificate("own certificate", q.security.certificate or Path(), q.security.key))
    if q.server is not None:
        checks.append(lambda: check_server(q.server or "", q.security))
    if q.task is not None:
        checks.append(lambda: check_task(q.task or "", q.data_dir))
    if q.out is not None:
        checks.append(lambda: check_out(q.out or Path()))
    return [finding for check in checks for finding in check()]


def report(findings: list[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON-ready values."""
    return [asdict(f) for f in findings]
