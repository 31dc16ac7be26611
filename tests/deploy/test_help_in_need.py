"""What somebody new meets first: each mistake ends in a bounded time, with its own code, a cause and a next step."""

from __future__ import annotations

import datetime
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import DEADLINE_S, Process, Processes, descendants
from torch import nn

from loscar_core.errors import (
    AuthenticationError,
    ConfigError,
    ConnectError,
    PortInUseError,
    SystemRefusedError,
    all_errors,
)
from loscar_deploy import certs, run_folder
from loscar_deploy.cli import main
from loscar_deploy.run_data import NO_RUN_FOLDER
from loscar_deploy.run_folder import RunFolder
from loscar_wire.status import from_status
from loscar_wire.transport import check_free, parse_address
from loscar_worker import join

SUPPORT = Path(__file__).parents[1] / "support"
TINY = ["--task", "tiny_task:Tiny"]


def told(process: Process, code: int) -> str:
    """The cause in the error's one line; the next step is the line below it."""
    assert process.wait() == code, process.err
    assert "Traceback" not in process.err
    cause, step = process.err.strip().splitlines()[-2:]
    assert cause.startswith("loscar: ")
    assert step.startswith("  ")
    return cause.removeprefix("loscar: ")


# --- addresses ----------------------------------------------------------------------------------------------


@pytest.fixture
def held() -> Iterator[str]:
    """An address that somebody else listens at."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield f"127.0.0.1:{holder.getsockname()[1]}"


def test_where_nothing_listens(processes: Processes) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        said = told(processes.loscar("status", "--server", address), 4)
    assert said == f"{address}: nothing listens there (Connection refused)"


def test_where_another_program_listens(processes: Processes, tmp_path: Path) -> None:
    page = processes.python("-m", "http.server", "0", "--bind", "127.0.0.1", cwd=tmp_path)
    page.says("Serving HTTP on")
    address = "127.0.0.1:" + page.out.partition("port ")[2].split()[0]
    for command in ("status", "doctor"):
        process = processes.loscar(command, "--server", address)
        assert process.wait() == 4
        assert f"{address}: what listens there does not speak gRPC: is it another program's port?" in (
            process.out + process.err
        )


@pytest.mark.parametrize(
    ("details", "said"),
    [
        (
            "errors resolving no.invalid:1: [field:hostname lookup error:address lookup failed for no.invalid:1: "
            "Domain name not found]",
            "no.invalid:1: the name is not known here (Domain name not found)",
        ),
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv6:%5B::1%5D:5: Failed to connect to remote "
            "host: Connection refused",
            "[::1]:5: nothing listens there (Connection refused)",
        ),
        ("Deadline Exceeded", "no answer in time: a firewall may be in between, or it is another program's port"),
        ("Socket closed", "Socket closed"),
        ("anything else", "anything else"),
    ],
)
def test_what_grpc_says_is_said_in_other_words(details: str, said: str) -> None:
    found = from_status(grpc.StatusCode.UNAVAILABLE, details)
    assert isinstance(found, ConnectError)
    assert str(found).startswith(said)


def test_a_url_is_no_address() -> None:
    with pytest.raises(ConfigError, match=r"expected HOST:PORT alone, without http://$"):
        parse_address("http://server:50051", "--server")


def test_tls_to_a_server_without_it_names_both_ways_out() -> None:
    details = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Ssl handshake failed: "
    details += "SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER: Invalid certificate "
    found = str(from_status(grpc.StatusCode.UNAVAILABLE, details + "verification context: OK"))
    assert found == (
        "the server does not speak TLS: leave --tls-ca out, or start it with --tls-cert (WRONG_VERSION_NUMBER)"
    )


def test_a_clock_that_is_off_is_asked_about(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates of a machine whose clock is days ahead; or this machine's is behind."""
    with monkeypatch.context() as patch:
        patch.setattr(certs, "BACKDATED", datetime.timedelta(days=-2))
        certs.make_certificates(tmp_path, ["127.0.0.1"], [])
    pair = ["--tls-cert", str(tmp_path / "server.pem"), "--tls-key", str(tmp_path / "server-key.pem")]
    server = processes.server(*pair)
    ask = processes.loscar("status", "--server", server.address, "--tls-ca", str(tmp_path / "ca.pem"))
    said = told(ask, 11)
    assert said.startswith("the server's certificate is not valid yet: is this machine's clock right? ("), said
    with pytest.raises(AuthenticationError, match="is this machine's clock right"):
        join(server.address, nn.Linear(2, 2), tls_ca=str(tmp_path / "ca.pem"), connect_timeout_s=20.0)


# --- ports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--metrics", "--dashboard"])
def test_a_taken_port_has_its_code_whatever_it_was_for(option: str, held: str, processes: Processes) -> None:
    server = processes.server(option, held, wait=False)
    assert told(server, 10) == f"{option}: cannot listen on {held}: Address already in use"
    assert "--listen" not in PortInUseError.hint, "it may be any option's"


def test_a_run_whose_server_cannot_start_ends_with_its_code(held: str, processes: Processes, tmp_path: Path) -> None:
    run = processes.loscar("run", *TINY, "--dashboard", held, "--out", str(tmp_path / "out"), cwd=SUPPORT)
    assert told(run, 10).startswith(f"the server did not start: --dashboard: cannot listen on {held}: ")


def test_addresses_that_are_not_to_be_had_have_a_step_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PortInUseError) as found:
        check_free("192.0.2.1", 5000)
    assert "address of this machine" in found.value.hint

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refused)
    with pytest.raises(PortInUseError) as denied:
        check_free("127.0.0.1", 80)
    assert "below 1024" in denied.value.hint
    assert PortInUseError.hint not in (found.value.hint, denied.value.hint), "the class keeps its own"


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_what_is_no_run_folder(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert main([command, str(path)]) == 9
        cause, step = capsys.readouterr().err.splitlines()
        assert str(path) in cause
        assert step == f"  {NO_RUN_FOLDER}"


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "out")

    def full(_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "dumps", full)
    with pytest.raises(SystemRefusedError, match=r"out/metrics\.jsonl cannot be written: No space left on device"):
        folder.append_metrics({})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("metrics.jsonl", "{} cannot be written: No space left on device"),
        (
            "workers/w0.rounds.jsonl",
            "no worker is left: w0 ended with status 21: --rounds-log {} cannot be written: No space left on device",
        ),
    ],
)
def test_a_run_that_meets_a_full_disk_ends_with_the_file_s_name(
    file: str, said: str, processes: Processes, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "workers").mkdir(parents=True)
    (out / file).symlink_to("/dev/full")
    pace = ["--link", "none", "--step-time", "1ms", "--sync-interval", "2ms", "--duration", "10m"]
    run = processes.loscar("run", *TINY, "--workers", "1", *pace, "--out", str(out), cwd=SUPPORT)
    assert told(run, 21) == said.format(out / file)
    assert f"the run folder is {out}" in run.out


# --- Ctrl+C -------------------------------------------------------------------------------------------------

LOADING = """
import _signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "loscar_deploy.cli":
            BEFORE
sys.meta_path.insert(0, Interrupting())
from loscar_deploy.entry import main
sys.exit(main())
"""


def loaded(before: str) -> subprocess.CompletedProcess[str]:
    """`loscar --version`, with something happening while it is loaded."""
    code = LOADING.replace("BEFORE", before)
    return subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_ctrl_c_while_the_command_is_loaded_ends_it_without_a_word() -> None:
    done = loaded("_signal.raise_signal(_signal.SIGINT)")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_loaded_it_treats_ctrl_c_as_before() -> None:
    after = "; import atexit; atexit.register(lambda: print(_signal.getsignal(_signal.SIGINT)))"
    done = loaded("pass" + after)
    assert done.returncode == 0
    assert "default_int_handler" in done.stdout
    with_nohup = subprocess.run(
        ["sh", "-c", "trap '' INT; exec \"$0\" \"$@\"", sys.executable, "-m", "loscar_deploy", "--version"],
        capture_output=True, text=True, timeout=DEADLINE_S, check=True,
    )  # fmt: skip
    assert with_nohup.stdout.startswith("loscar ")


IMPORTING = """
import signal, sys
class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "MODULE":
            sys.meta_path.remove(self)
            print("MODULE", flush=True)
            Dying()
sys.meta_path.insert(0, Interrupting())
from loscar_deploy.entry import main
sys.exit(main())
"""
"""Ctrl+C comes while a module is looked for, in a destructor: an exception does not get out of that."""


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("loscar_deploy.run", "run"),
        ("uvloop", "run"),
        ("torch", "run --task tiny_task:Tiny"),
        ("torch", "simulate --task tiny_task:Tiny"),
        ("uvloop", "server --listen 127.0.0.1:0"),
        ("torch", "worker --server 127.0.0.1:1 --connect-timeout 1s"),
    ],
)
def test_ctrl_c_while_a_command_imports_what_it_needs_is_not_lost(
    module: str, command: str, processes: Processes, tmp_path: Path
) -> None:
    where = {"PYTHONPATH": str(SUPPORT)}
    process = processes.python("-c", IMPORTING.replace("MODULE", module), *command.split(), cwd=tmp_path, **where)
    assert process.wait() == 130, process.err
    assert (process.out.split(), process.err) == ([module], "")
    assert not descendants(process.pid)
    assert not any(tmp_path.glob("runs/*/logs/*"))


# --- all of them --------------------------------------------------------------------------------------------


def test_every_error_has_a_code_a_cause_and_a_step() -> None:
    for error in all_errors():
        assert error.summary, error.__name__
        assert len(error.hint.split()) > 3, error.__name__
        assert error("x").with_hint("another step").hint == "another step"
        assert error("x").hint == error.hint
