"""`loscar certs`: an authority of one's own, and certificates for a server and its workers.

For runs among machines of one owner. Everything is made by the `cryptography` package; the authority's key stays in
the folder, so that more certificates can be made later.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from loscar_core.errors import ConfigError, SystemRefusedError

DEFAULT_DAYS = 365
BACKDATED = datetime.timedelta(hours=1)  # clocks differ between machines


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


def make_certificates(folder: Path, hosts: list[str], workers: list[str], days: int = DEFAULT_DAYS) -> list[Path]:
    """Make (or go on with) an authority, a server certificate for `hosts`, and one for each worker.

    Args:
        folder: gets ca.pem, ca-key.pem, server.pem, server-key.pem, and NAME.pem, NAME-key.pem for each worker.
        hosts: names and addresses under which workers reach the server.
        workers: names for client certificates.
        days: how long they are valid.

    Returns:
        The files that were written.

    Raises:
        ConfigError: the folder cannot be written, a certificate or its key is there already, the authority can sign no
            more, or a name cannot be in a certificate; nothing was written.
        SystemRefusedError: the disk is full; nothing was left there.
    """
    made: list[Path] = []
    for name in workers:
        # It names files in this folder, beside those of the authority and the server, and a certificate holds 64.
        if not re.fullmatch(r"\w[\w.-]{0,63}", name, re.ASCII) or name in ("ca", "server") or workers.count(name) > 1:
            raise ConfigError(
                f"the worker's name {name!r} is not one of its own, of at most 64 letters, digits, points and dashes"
            )
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9.:*-]+", host):
            raise ConfigError(f"{host!r} is neither a host name nor an address")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        authority = Pair(folder / "ca.pem", folder / "ca-key.pem")
        names = ["server"] * bool(hosts) + workers
        pairs = {name: Pair(folder / f"{name}.pem", folder / f"{name}-key.pem") for name in names}
        for path in (p for pair in pairs.values() for p in (pair.certificate, pair.key)):
            if path.exists():
                raise ConfigError(f"{path} is there already: remove it to make a new one")
        written: list[Path] = []
        if authority.certificate.exists() or authority.key.exists():
            ca, ca_key = _load(authority)
        else:
            ca, ca_key = _authority(days)
            written += _save(authority, ca, ca_key, made)
        for name, pair in pairs.items():
            written += _save(pair, *_signed(name, hosts if name == "server" else [], ca, ca_key, days), made)
    except BaseException as error:
        for path in made:  # half of an authority would be in the way of the next attempt
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        kind = SystemRefusedError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
        raise kind(f"certificates in {folder}: {error.strerror or error}") from None
    return written


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int, ca: x509.Certificate | None = None
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    until = now + datetime.timedelta(days=days)
    if ca is not None:
        until = min(until, ca.not_valid_after_utc)  # nobody accepts it any longer than its authority
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(until)
    )


def _authority(days: int) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = "loscar authority"
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        _builder(subject, _name(subject), key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256()), key


def _signed(
    name: str, hosts: list[str], ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, days: int
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        _builder(name, ca.subject, key.public_key(), days, ca)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(h) for h in hosts or [name]]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    return builder.sign(ca_key, hashes.SHA256()), key


def _general(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)


def _save(pair: Pair, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, made: list[Path]) -> list[Path]:
    """Write both files; whichever has been begun is in `made`."""
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # Created readable by its owner only: a later chmod would leave a moment in which anybody can read it.
    descriptor = os.open(pair.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    made.append(pair.key)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
    with pair.certificate.open("xb") as file:
        made.append(pair.certificate)
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
    return [pair.certificate, pair.key]


def _load(pair: Pair) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
        key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} is missing: without both files an authority signs nothing more") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{pair.certificate} and {pair.key} are not an authority that this command made") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{pair.key} is not the key of {pair.certificate}")
    if certificate.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise ConfigError(f"{pair.certificate} expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
    return certificate, key
