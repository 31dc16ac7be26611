"""`loscar certs`: what is written, for whom it is good, and what is never overwritten."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from loscar_core.errors import ConfigError, SystemRefusedError
from loscar_deploy import certs
from loscar_deploy.certs import make_certificates
from loscar_deploy.cli import main

HOSTS = ["server.example", "*.example", "127.0.0.1", "::1"]


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs") / "pki"
    before = os.umask(0)  # whatever a user's may be
    try:
        written = make_certificates(folder, HOSTS, ["alice", "bob.2"], days=30)
    finally:
        os.umask(before)
    assert set(written) == set(folder.iterdir())
    return folder


def test_a_pair_for_the_authority_the_server_and_each_worker(made: Path) -> None:
    names = ("ca", "server", "alice", "bob.2")
    assert {p.name for p in made.iterdir()} == {f"{n}{end}" for n in names for end in (".pem", "-key.pem")}
    ca = certificate(made / "ca.pem")
    for name in names:
        found = certificate(made / f"{name}.pem")
        found.verify_directly_issued_by(ca)
        key = serialization.load_pem_private_key((made / f"{name}-key.pem").read_bytes(), None)
        assert key.public_key() == found.public_key()
        basic = found.extensions.get_extension_for_oid(ExtensionOID.BASIC_CONSTRAINTS).value
        assert isinstance(basic, x509.BasicConstraints)
        assert basic.ca == (name == "ca")
    assert len({certificate(made / f"{n}.pem").serial_number for n in names}) == len(names)


def test_keys_are_their_owner_s_only(made: Path) -> None:
    for path in made.glob("*-key.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_server_is_known_by_its_names_and_a_worker_is_no_server(made: Path) -> None:
    def names(name: str) -> x509.SubjectAlternativeName:
        value = certificate(made / f"{name}.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert isinstance(value, x509.SubjectAlternativeName)
        return value

    def usages(name: str) -> list[x509.ObjectIdentifier]:
        return list(certificate(made / f"{name}.pem").extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)

    assert names("server").get_values_for_type(x509.DNSName) == ["server.example", "*.example"]
    assert names("server").get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("127.0.0.1"),
        ipaddress.ip_address("::1"),
    ]
    assert names("alice").get_values_for_type(x509.DNSName) == ["alice"]
    assert usages("server") == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert usages("alice") == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_they_are_valid_from_a_little_ago_and_as_long_as_asked(made: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    for path in made.glob("*.pem"):
        if path.name.endswith("-key.pem"):
            continue
        found = certificate(path)
        assert now - datetime.timedelta(hours=2) < found.not_valid_before_utc <= now
        assert abs(found.not_valid_after_utc - now - datetime.timedelta(days=30)) < datetime.timedelta(hours=1)


def test_an_authority_goes_on_and_nothing_outlives_it(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    shutil.copytree(made, folder)
    before = contents(folder)
    written = make_certificates(folder, [], ["carol"], days=3000)
    assert [p.name for p in written] == ["carol.pem", "carol-key.pem"]
    assert before.items() < contents(folder).items()
    carol, ca = certificate(folder / "carol.pem"), certificate(folder / "ca.pem")
    carol.verify_directly_issued_by(ca)
    assert carol.not_valid_after_utc == ca.not_valid_after_utc


@pytest.mark.parametrize("there", ["server.pem", "server-key.pem", "alice.pem", "alice-key.pem"])
def test_nothing_is_overwritten_and_nothing_written_beside_it(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(ConfigError, match=f"{there} is there already: remove it to make a new one"):
        make_certificates(tmp_path, ["localhost"], ["alice"])
    assert contents(tmp_path) == {there: b"mine"}


@pytest.mark.parametrize("missing", ["ca.pem", "ca-key.pem"])
def test_half_an_authority_is_not_replaced_by_another(missing: str, made: Path, tmp_path: Path) -> None:
    """Somebody keeps the authority's key elsewhere: another ca.pem would shut out everybody who has the first."""
    folder = tmp_path / "pki"
    shutil.copytree(made, folder)
    (folder / missing).unlink()
    before = contents(folder)
    with pytest.raises(ConfigError, match=f"{missing} is missing: without both files"):
        make_certificates(folder, [], ["carol"])
    assert contents(folder) == before


def test_an_authority_that_cannot_sign_says_why(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> str:
        with pytest.raises(ConfigError) as found:
            make_certificates(tmp_path / name, [], ["carol"])
        assert not (tmp_path / name / "carol.pem").exists()
        return str(found.value)

    for name in ("garbage", "swapped"):
        shutil.copytree(made, tmp_path / name)
    (tmp_path / "garbage" / "ca.pem").write_text("no certificate")
    assert "are not an authority that this command made" in refused("garbage")
    shutil.copy(made / "server-key.pem", tmp_path / "swapped" / "ca-key.pem")
    assert "is not the key of" in refused("swapped")
    with monkeypatch.context() as patch:
        patch.setattr(certs, "BACKDATED", datetime.timedelta(days=9))
        make_certificates(tmp_path / "old", [], [], days=-1)
    assert "ca.pem expired on 2" in refused("old")


@pytest.mark.parametrize("name", ["ca", "server", "a/b", "..", ".a", "", "a b", "wörker", "x" * 65])
def test_names_that_cannot_be_a_worker_s(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the worker's name"):
        make_certificates(tmp_path / "pki", ["localhost"], ["alice", name])
    assert not (tmp_path / "pki").exists()
    with pytest.raises(ConfigError, match="is not one of its own"):
        make_certificates(tmp_path / "pki", [], ["twice", "twice"])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"certificates in .*file"):
        make_certificates(tmp_path / "file", ["localhost"], [])


@pytest.mark.parametrize("saved", [0, 1])
def test_a_full_disk_leaves_nothing_behind(saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, left = tmp_path / "pki", [saved]

    class Certificate:
        def public_bytes(self, _: object) -> bytes:
            raise OSError(errno.ENOSPC, "No space left on device")

    def save(pair: certs.Pair, certificate: Any, key: Any, made: list[Path]) -> list[Path]:
        left[0] -= 1
        return whole(pair, certificate if left[0] >= 0 else Certificate(), key, made)

    whole = certs._save
    with monkeypatch.context() as patch:
        patch.setattr(certs, "_save", save)
        with pytest.raises(SystemRefusedError, match=r"certificates in .*pki: No space left on device"):
            make_certificates(folder, ["localhost"], [])
    assert list(folder.iterdir()) == []
    assert len(make_certificates(folder, ["localhost"], [])) == 4


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pki"
    assert main(["certs", str(folder), "--workers", "w", "--json"]) == 0
    assert {Path(p) for p in json.loads(capsys.readouterr().out)["written"]} == set(folder.iterdir())
    assert main(["certs", str(folder), "--hosts", "", "--workers", "v"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / "v.pem"), str(folder / "v-key.pem")]
    assert main(["certs", str(folder)]) == 3
    assert "server.pem is there already" in capsys.readouterr().err
