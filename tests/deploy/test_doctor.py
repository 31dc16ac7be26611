"""`loscar doctor`: every check, well and unwell; the exit status is that of the first thing that is wrong."""

from __future__ import annotations

import datetime
import errno
import importlib.util
import json
import shutil
import socket
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from processes import Processes

from loscar_core.errors import all_errors
from loscar_deploy import certs, doctor
from loscar_deploy.certs import make_certificates
from loscar_deploy.cli import main
from loscar_deploy.doctor import PACKAGES, check_certificate, check_versions

ROOT = Path(__file__).resolve().parent.parent.parent
OWN_HINTS = ["give an address of this machine, or 0.0.0.0 for all of them"]
Examine = Callable[..., dict[str, Any]]


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Examine:
    """Runs the command for one check; gives what it found, which must be told the same way with and without --json."""

    def run(check: str, *arguments: object) -> dict[str, Any]:
        words = ["doctor", *(str(a) for a in arguments)]
        status = main([*words, "--json"])
        findings = json.loads(capsys.readouterr().out)
        found: dict[str, Any] = next(f for f in findings if f["check"] == check)
        first = next((f["exit_code"] for f in findings if f["state"] == "failed"), 0)
        assert status == first
        for each in findings:
            assert each.keys() == {"check", "state", "text", "exit_code"}
            assert (each["state"] == "failed") == (each["exit_code"] != 0)
            assert each["state"] in ("ok", "warning", "failed")
        if found["state"] == "failed":
            hints = [e.hint for e in all_errors() if e.exit_code == found["exit_code"]] + OWN_HINTS
            assert any(found["text"].endswith("; " + hint) for hint in hints), "and says what to do"
        return found

    return run


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    make_certificates(folder / "good", ["127.0.0.1"], ["w"])
    make_certificates(folder / "other", ["127.0.0.1"], [])
    make_certificates(folder / "soon", ["127.0.0.1"], [], days=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs, "BACKDATED", datetime.timedelta(days=9))
        make_certificates(folder / "past", ["127.0.0.1"], [], days=-1)
        patch.setattr(certs, "BACKDATED", datetime.timedelta(days=-2))
        make_certificates(folder / "future", ["127.0.0.1"], [])
    return folder


def test_what_is_installed_is_told_and_good_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines] == ["python", "loscar", *PACKAGES, "torch"]
    assert all(line.startswith("ok       ") for line in lines)
    assert metadata.version("grpcio") in lines[2]


def test_the_versions_wanted_are_those_of_the_package() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    bounds = dict(w.split(";")[0].strip().split(">=") for w in wanted)
    assert bounds.items() >= PACKAGES.items()


def test_what_is_too_old_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "safetensors":
            raise metadata.PackageNotFoundError(package)
        return {"grpcio": "1.72.0", "protobuf": "6.30.0", "numpy": "2.0.0rc1"}.get(package, "99.0+cpu")

    monkeypatch.setattr(doctor.metadata, "version", version)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    found = {f.check: (f.state, f.exit_code) for f in check_versions()}
    assert found["grpcio"] == ("failed", 6)
    assert found["protobuf"] == ("ok", 0)
    assert found["numpy"] == ("ok", 0)
    assert found["safetensors"] == ("failed", 3)
    assert found["torch"] == ("warning", 0)
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4, "final", 0))
    assert next(f for f in check_versions() if f.check == "python").exit_code == 3


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_ports(examine: Examine, taken: int) -> None:
    assert examine("listen", "--listen", "127.0.0.1:0")["state"] == "ok"
    found = examine("listen", "--listen", f"127.0.0.1:{taken}")
    assert found["exit_code"] == 10
    assert f"cannot listen on 127.0.0.1:{taken}: Address already in use" in found["text"]
    elsewhere = examine("listen", "--listen", "192.0.2.1:5000")
    assert elsewhere["exit_code"] == 10
    assert "Cannot assign requested address" in elsewhere["text"]
    assert examine("listen", "--listen", "nonsense")["exit_code"] == 3


def test_certificates(examine: Examine, pki: Path, tmp_path: Path) -> None:
    def look(kind: str, *more: object, key: str = "") -> dict[str, Any]:
        flags = ["--server-cert", pki / kind / "server.pem", "--server-key", pki / (key or kind) / "server-key.pem"]
        return examine("server certificate", *flags, *more)

    good = look("good", "--tls-ca", pki / "good" / "ca.pem")
    assert good["state"] == "ok"
    assert "is valid for 364 days more" in good["text"]
    assert look("soon")["state"] == "warning"
    for kind, said in (("past", "expired on 2"), ("future", "is valid only from 2")):
        found = look(kind)
        assert found["exit_code"] == 11
        assert f"{kind}/server.pem {said}" in found["text"]
    swapped = look("good", key="other")
    assert swapped["exit_code"] == 3
    assert "other/server-key.pem does not belong to" in swapped["text"]
    stranger = look("good", "--tls-ca", pki / "other" / "ca.pem")
    assert stranger["exit_code"] == 11
    assert "good/server.pem was not signed by" in stranger["text"]
    missing = examine("server certificate", "--server-cert", pki / "nothing.pem")
    assert missing["exit_code"] == 3
    assert missing["text"].startswith(f"{pki}/nothing.pem: No such file or directory; ")
    keys = examine("server certificate", "--server-cert", pki / "good" / "server-key.pem")
    assert keys["exit_code"] == 3
    assert "server-key.pem holds no certificate" in keys["text"]
    reverse = ["--server-cert", pki / "good" / "server.pem", "--server-key", pki / "good" / "server.pem"]
    assert "server.pem holds no key without a password" in examine("server certificate", *reverse)["text"]


def test_a_worker_s_own_pair(examine: Examine, pki: Path) -> None:
    own = ["--tls-cert", pki / "good" / "w.pem", "--tls-key", pki / "good" / "w-key.pem"]
    assert examine("own certificate", *own, "--tls-ca", pki / "good" / "ca.pem")["state"] == "ok"
    assert examine("authority", *own, "--tls-ca", pki / "past" / "ca.pem")["exit_code"] == 11


def test_a_key_that_others_can_read_is_warned_about(pki: Path, tmp_path: Path) -> None:
    pair = [Path(shutil.copy(pki / "good" / name, tmp_path)) for name in ("server.pem", "server-key.pem")]
    assert [f.state for f in check_certificate("x", *pair)] == ["ok"]
    pair[1].chmod(0o640)
    found = list(check_certificate("x", *pair))
    assert [f.state for f in found] == ["warning", "ok"]
    assert "server-key.pem can be read by others: chmod 600" in found[0].text


def test_without_the_library_certificates_are_not_looked_at(pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [found] = check_certificate("x", pki / "past" / "server.pem", None)
    assert found.state == "warning"
    assert "pip install 'loscar[certs]'" in found.text


def test_a_server_is_reached_or_it_is_said_why_not(
    examine: Examine, processes: Processes, pki: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = pki / "good"
    pair = ["--tls-cert", str(good / "server.pem"), "--tls-key", str(good / "server-key.pem")]
    server = processes.server("--token", "right", *pair)
    there = ["--server", server.address, "--tls-ca", good / "ca.pem"]
    found = examine("server", *there, "--token", "right")
    assert found["state"] == "ok"
    assert f"run {server.run_id[:8]}, waiting, round 0, 0 members" in found["text"]
    for flags, code, said in (
        ([*there, "--token", "wrong"], 11, "wrong token"),
        (there, 11, "wants a token"),
        (
            ["--server", server.address, "--tls-ca", pki / "other" / "ca.pem"],
            11,
            "is not one that --tls-ca vouches for",
        ),
        (["--server", server.address], 4, "a server that wants TLS"),
        (["--server", "127.0.0.1:1"], 4, "Connection refused"),
        (["--server", "no-such-host.invalid:1"], 4, "the name is not known"),
        (["--server", "nonsense"], 3, "expected HOST:PORT"),
    ):
        found = examine("server", *flags)
        assert found["exit_code"] == code, found
        assert said in found["text"]
    monkeypatch.setattr("loscar_deploy.client.CALL_TIMEOUT_S", 0.5)
    silent = examine("server", "--server", f"127.0.0.1:{taken}")
    assert silent["exit_code"] == 4
    monkeypatch.setattr(doctor, "PROTOCOL_VERSION", 99)
    other = examine("server", *there, "--token", "right")
    assert other["exit_code"] == 6
    assert "speaks protocol 1, this is 99" in other["text"]


def test_data_and_folders(examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "300 training samples, 100 for testing" in examine("task", "--task", "tiny_task:Tiny")["text"]
    assert examine("task", "--task", "nothing")["exit_code"] == 8
    assert examine("task", "--task", "a9a", "--data-dir", tmp_path)["exit_code"] == 9
    found = examine("out", "--out", tmp_path / "new" / "folder")
    assert found["state"] in ("ok", "warning")
    assert found["text"].startswith(f"{tmp_path} can be written, ")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert examine("out", "--out", tmp_path / "file" / "x")["exit_code"] == 3

    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        found = examine("out", "--out", tmp_path)
    assert found["exit_code"] == 21
    assert f"{tmp_path} cannot be written: No space left on device" in found["text"]
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "the probe is gone"
    monkeypatch.setattr(doctor, "LEAST_DISK_BYTES", 1 << 62)
    assert examine("out", "--out", tmp_path)["state"] == "warning"


def test_the_first_failure_is_the_exit_status(capsys: pytest.CaptureFixture[str], taken: int, tmp_path: Path) -> None:
    flags = ["--listen", f"127.0.0.1:{taken}", "--server", "127.0.0.1:1", "--task", "nothing"]
    assert main(["doctor", *flags]) == 10
    states = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert states.count("failed") == 3
