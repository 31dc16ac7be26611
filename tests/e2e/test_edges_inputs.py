"""Wrong values and missing things: one line that says what, one that says what to do, a documented exit code."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from processes import DEADLINE_S, Processes, Server, status_of

import loscar_worker as loscar
from loscar_core import worker_engine
from loscar_core.errors import all_errors
from loscar_deploy.certs import make_certificates
from loscar_deploy.cli import main
from loscar_deploy.commands.training import BUILT_IN_TASKS
from loscar_deploy.run_data import NO_RUN_FOLDER
from loscar_deploy.run_folder import RunFolder
from loscar_worker.tasks import load_task, task_names

SUPPORT = Path(__file__).parents[1] / "support"
NOBODY = "127.0.0.1:1"
"""No server is there; nothing here should get as far as to ask it."""

Refused = Callable[..., str]
OWN_HINTS = {NO_RUN_FOLDER, "give an address of this machine, or 0.0.0.0 for all of them"}
"""Of errors whose next step is not their class's."""


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in this process: its signal handlers, folder and environment are given back."""
    monkeypatch.chdir(SUPPORT)
    for name in ("LOSCAR_TOKEN", "LOSCAR_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail with an exit code; returns the line that says what is wrong."""

    def run(code: int, *arguments: object) -> str:
        children = psutil.Process().children()
        assert main([str(a) for a in arguments]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        what, to_do = captured.err.splitlines()
        assert what.startswith("loscar: ")
        assert to_do.removeprefix("  ") in {e.hint for e in all_errors() if e.exit_code == code} | OWN_HINTS
        assert psutil.Process().children() == children
        return what.removeprefix("loscar: ")

    return run


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run --json", "server --json", "simulate --json"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--density 0", "--density 0 is outside (0, 1]"),
        ("--density -1", "--density -1 is outside (0, 1]"),
        ("--density 3", "--density 3 is outside (0, 1]"),
        ("--density nan", "--density 'nan' is not a finite number"),
        ("--density much", "--density 'much' is not a number"),
        ("--coordinates 0", "--coordinates '0' is below 1"),
        ("--wire-dtype float8", "--wire-dtype 'float8' is not one of float32, bfloat16, float16, int8"),
        ("--selection topk --method dppf", "--selection topk is not for method dppf"),
        ("--selection tail", "selection tail is not available"),
        ("--merge blend", "merge 'blend' is not one of delay-corrected, overwrite"),
        ("--method dpf", "method 'dpf' is not one of loscar, dppf, mixvr"),
        ("--method dppf:alpha=2", "method dppf: alpha=2 is outside (0, 1]"),
        ("--method dppf --merge overwrite", "--merge is a setting of --method loscar"),
        ("--method local-sgd --overlap-steps 2", "--overlap-steps 2 is not local-sgd, which has 0"),
        ("--method mixvr:budget=1", "both need at least 1"),
        ("--final-round sparse", "--final-round 'sparse' is not one of dense, none"),
        ("--local-steps 0 --overlap-steps 0", "would average without ever training"),
        ("--local-steps many", "--local-steps 'many' is neither a number of steps nor auto"),
        ("--overlap-steps 1.5", "--overlap-steps '1.5' is neither a number of steps nor auto"),
        ("--duration 10", "--duration '10' is not a duration: write a number and us, ms, s, m or h"),
        ("--duration 10d", "--duration '10d' is not a duration"),
        ("--duration=-5s", "--duration '-5s' is not a duration"),
        ("--duration 0s", "--duration '0s' is no time at all"),
        ("--duration 999999h", "--duration '999999h' is longer than 30 years"),
        ("--sync-interval 0ms", "--sync-interval '0ms' is no time at all"),
        ("--rounds 0", "--rounds '0' is below 1"),
        ("--rounds 1e30", "--rounds '1e30' is above 9223372036854775807"),
        ("--rounds inf", "--rounds 'inf' is not a whole number"),
        ("--max-steps 1.5", "--max-steps '1.5' is not a whole number"),
        ("--seed -1", "--seed '-1' is below 0"),
        ("--workers 0", "--workers '0' is below 1"),
    ],
)
def test_what_all_members_of_a_run_share(refused: Refused, command: str, options: str, said: str) -> None:
    assert said in refused(3, *command.split(), *options.split())


def test_what_does_not_go_together_on_a_server(refused: Refused) -> None:
    said = refused(3, "server", "--json", "--selection", "topk", "--aggregate", "median")
    assert said.startswith("aggregate median with selection topk")


@pytest.mark.parametrize("command", ["run --json", "simulate --json"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--link sloth", "link: unknown item 'sloth': use one of none, lan, wan"),
        ("--link rtt=100", "link: rtt: '100' has no unit: write for example 100ms"),
        ("--link wan;lan;none", "link: 3 specs given, separated by ';', but there are 4 workers"),
        ("--slowdown 1,2,3", "--slowdown '1,2,3' has 3 values for 4 workers: give one, or one for each"),
        ("--slowdown 1,1,1,x", "--slowdown 'x' is not a number"),
        ("--slowdown 0.5", "--slowdown '0.5' is below 1: a machine can only be made slower"),
        ("--slowdown nan", "--slowdown 'nan' is not a finite number"),
        ("--step-time fast", "--step-time 'fast' is not a duration"),
        ("--target-loss nan", "--target-loss 'nan' is not a finite number"),
        ("--batch-size 0", "--batch-size '0' is below 1"),
        ("--lr nan", "--lr 'nan' is not a finite number"),
        ("--device cpu,cpu", "--device 'cpu,cpu' has 2 values for 4 workers"),
    ],
)
def test_what_the_workers_of_a_whole_run_get(refused: Refused, command: str, options: str, said: str) -> None:
    assert said in refused(3, *command.split(), *options.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--listen here", "--listen 'here': expected HOST:PORT with a port up to 65535"),
        ("--listen 127.0.0.1:99999", "--listen '127.0.0.1:99999': expected HOST:PORT"),
        ("--listen ::1:50051", "put an IPv6 host in brackets: [::1]:50051"),
        ("--listen 0.0.0.0:0", "0.0.0.0 can be reached from outside: give --tls-cert and --tls-key and --token"),
        ("--resume", "--resume needs --checkpoints"),
        ("--checkpoints DIR/file", "checkpoints in DIR/file: File exists"),
        ("--checkpoints DIR --checkpoint-every 0s", "--checkpoint-every '0s' is no time at all"),
        ("--events DIR", "--events DIR cannot be written: Is a directory"),
        ("--lease 0s", "--lease '0s' is no time at all"),
        ("--aggregate trimmed:0.9", "only trimmed takes a share, between 0 and 0.5"),
        ("--norm-bound 1", "norm bound 1: it is a multiple of the usual size, above 1"),
        ("--run-id=", "--run-id is empty: give a value or leave it out"),
        ("--token=é", "the token must be printable ASCII"),
        ("--tls-cert DIR/file", "--tls-cert and --tls-key belong together"),
        ("--tls-cert DIR/file --tls-key DIR/nothing", "--tls-key DIR/nothing: No such file"),
        ("--tls-cert DIR/file --tls-key DIR/file", "are not a certificate and its key"),
        ("--tls-client-ca DIR/file", "--tls-client-ca needs --tls-cert and --tls-key: without them there is no TLS"),
    ],
)
def test_what_a_server_gets(refused: Refused, tmp_path: Path, options: str, said: str) -> None:
    (tmp_path / "file").write_text("no certificate")
    arguments = ["--listen", "127.0.0.1:0", *options.replace("DIR", str(tmp_path)).split()]
    assert said.replace("DIR", str(tmp_path)) in refused(3, "server", "--json", *arguments)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--server here", "server 'here': expected HOST:PORT"),
        ("--server=", "server '': expected HOST:PORT"),
        ("--server 127.0.0.1:1,", "server '': expected HOST:PORT"),
        ("--partition by-size", "partition 'by-size' is none of iid, by-label, dirichlet:ALPHA"),
        ("--partition dirichlet:-1", "partition 'dirichlet:-1' is none of iid, by-label, dirichlet:ALPHA"),
        ("--workers 4 --slot 4", "there is no slot 4 of 4 workers"),
        ("--slot 1e20", "--slot '1e20' is above 4294967295"),
        ("--slowdown nan", "--slowdown 'nan' is not a finite number"),
        ("--slowdown 0", "--slowdown '0' is below 1"),
        ("--batch-size 0", "--batch-size '0' is below 1"),
        ("--lr -1", "the learning rate is -1.0, it must be positive and finite"),
        ("--device meta", "--device meta: "),
        ("--device abacus", "--device abacus: "),
        ("--threads 1e9", "--threads '1e9' is above 4096"),
        ("--seed 1e30", "--seed '1e30' is above"),
        ("--rejoin maybe", "rejoin 'maybe' is not one of project, keep, drop"),
        ("--local-steps 0 --overlap-steps 0", "would average without ever training"),
        ("--connect-timeout soon", "--connect-timeout 'soon' is not a duration"),
        ("--name=", "--name is empty: give a value or leave it out"),
        ("--run-id=", "--run-id is empty: give a value or leave it out"),
        ("--token=é", "the token must be printable ASCII"),
        ("--result DIR/no/x", "--result DIR/no/x cannot be written: there is no folder DIR/no"),
        ("--rounds-log DIR/no/x", "--rounds-log DIR/no/x cannot be written: there is no folder DIR/no"),
        ("--save-model DIR", "--save-model DIR is a folder: give a file in it"),
        ("--state DIR/no/x", "--state DIR/no/x cannot be written: there is no folder DIR/no"),
        ("--state DIR/file", "--state DIR/file is no worker's state"),
        ("--tls-ca DIR/no", "--tls-ca DIR/no: No such file"),
        ("--tls-ca DIR/file", "--tls-ca DIR/file holds no certificate in PEM"),
        ("--tls-cert DIR/file --tls-key DIR/file", "--tls-cert needs --tls-ca: without it there is no TLS"),
    ],
)
def test_what_a_worker_gets(refused: Refused, tmp_path: Path, options: str, said: str) -> None:
    (tmp_path / "file").write_text("no certificate, no state")
    arguments = ["--server", NOBODY, "--task", "tiny_task:Tiny", *options.replace("DIR", str(tmp_path)).split()]
    assert said.replace("DIR", str(tmp_path)) in refused(3, "worker", *arguments)


@pytest.mark.parametrize(
    "command",
    ["worker", "simulate --json", "doctor --json", "run --json", "compare --json", "compare --json --simulate"],
)
@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("digit", "did you mean digits?"),
        ("nothing.here:factory", "cannot be imported: ModuleNotFoundError: No module named 'nothing'"),
        ("tiny_task:nothing", "cannot be imported: AttributeError: module 'tiny_task' has no attribute 'nothing'"),
        ("tiny_task:broken", "its factory failed: OSError: the factory's own trouble"),
        ("tiny_task:Tiny.hidden", "Tiny.hidden is not callable"),
        ("builtins:list", "its factory returned list, not a loscar_worker.tasks.Task"),
        (":factory", "is not of the form package.module:factory"),
        ("./tiny_task:Tiny", "is not of the form package.module:factory"),
    ],
)
def test_a_task_that_cannot_be_loaded(
    refused: Refused, capsys: pytest.CaptureFixture[str], command: str, task: str, said: str
) -> None:
    """A whole run says so as well before anything has started, or been written."""
    before = list(SUPPORT.glob("runs/*"))
    if command.startswith("doctor"):  # which answers with its findings
        assert main([*command.split(), "--task", task]) == 8
        assert said in capsys.readouterr().out
    else:
        assert said in refused(8, *command.split(), "--task", task)
    assert list(SUPPORT.glob("runs/*")) == before


def test_what_needs_no_look_before_a_run_is_built_in() -> None:
    assert task_names() == BUILT_IN_TASKS


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("a9a", "DIR/a9a is missing; put LIBSVM's file 'a9a' there (from https://"),
        ("mnist", "DIR/mnist/train-images-idx3-ubyte is missing; put MNIST's file"),
        ("cifar10", "DIR/cifar-10-batches-bin/data_batch_1.bin is missing; put the files of CIFAR-10's binary version"),
        ("tiny-imagenet", "DIR/tiny-imagenet-200/wnids.txt is missing; put the unpacked Tiny ImageNet there"),
        ("charlm", "DIR/tinyshakespeare/input.txt is missing; put a UTF-8 text there"),
    ],
)
def test_a_missing_data_file_says_what_to_put_where(refused: Refused, tmp_path: Path, task: str, said: str) -> None:
    for command in (["worker", "--server", NOBODY], ["simulate", "--json"]):
        assert said.replace("DIR", str(tmp_path)) in refused(9, *command, "--task", task, "--data-dir", tmp_path)


def test_a_run_folder_that_cannot_be_one(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert "file cannot be written: File exists" in refused(3, "run", "--json", "--out", tmp_path / "file")
    assert "x cannot be written: Not a directory" in refused(3, "run", "--json", "--out", tmp_path / "file" / "x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    assert "run holds a run already: give another folder" in refused(3, "run", "--json", "--out", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    first, second = RunFolder(None), RunFolder(None)
    assert first.path != second.path
    shutil.rmtree("runs")
    Path("runs").touch()
    assert "--out runs cannot be written: " in refused(3, "run", "--json")


def test_a_model_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    nowhere, other = tmp_path / "nowhere", tmp_path / "other"
    other.write_text("no model")
    assert refused(9, "evaluate", "--json", nowhere) == f"there is no model at {nowhere}"
    assert "is no run folder: it has no config.toml" in refused(9, "evaluate", "--json", tmp_path)
    assert "is not a saved model" in refused(3, "evaluate", "--json", other, "--task", "tiny_task:Tiny")


def test_tools(refused: Refused, tmp_path: Path) -> None:
    assert "port 0 cannot be connected to" in refused(3, "link", "--to", "127.0.0.1:0")
    assert "unknown item 'sloth'" in refused(3, "link", "sloth", "--to", NOBODY)
    assert "--server 'x': expected HOST:PORT" in refused(3, "status", "--json", "--server", "x")
    assert "--server-key needs --server-cert" in refused(3, "doctor", "--json", "--server-key", tmp_path)
    assert "'a b' is neither a host name nor an address" in refused(3, "certs", tmp_path, "--hosts", "a b")
    assert "the worker's name '../a'" in refused(3, "certs", tmp_path, "--workers", "../a")
    assert "--days '1e9' is above 36500" in refused(3, "certs", tmp_path, "--days", "1e9")
    assert not list(tmp_path.iterdir())
    assert "--seconds '-1' is not above 0" in refused(3, "chaos", "--json", "--seconds", "-1")
    assert "--faults '0' is not above 0" in refused(3, "chaos", "--json", "--faults", "0")
    assert "--churn-every '0s' is no time at all" in refused(3, "simulate", "--churn", "0.1", "--churn-every", "0s")
    few = ["simulate", "--json", "--task", "tiny_task:Tiny"]
    assert "churn 2 is outside [0, 1]" in refused(3, *few, "--churn", "2")
    assert "300 coordinates a round: the model has only 259" in refused(3, *few, "--coordinates", "300")


# --- ports and servers --------------------------------------------------------------------------------------


def test_a_port_that_is_taken(refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert refused(10, "server", "--json", "--listen", address) == (
            f"cannot listen on {address}: Address already in use"
        )
        assert f"{address} is already in use" in refused(10, "link", "--to", NOBODY, "--listen", address)
    assert "Cannot assign requested address" in refused(10, "server", "--insecure", "--listen", "192.0.2.1:5000")


def worker(server: Server, *options: str, task: str = "tiny_task:Tiny") -> list[str]:
    return ["worker", "--server", server.address, "--task", task, "--connect-timeout", "20s", *options]


def test_a_worker_that_is_not_of_the_run(
    refused: Refused, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = processes.server("--workers", "1", "--max-members", "100")
    with loscar.join(server.address, load_task("tiny_task:Tiny").make_model(0), name="first"):
        assert refused(5, *worker(server, task="tiny_task:Other")) == (
            "wrong model: the run's parameters have 0.weight float32[16x12] "
            "where this worker's have 0.weight float32[17x12]"
        )
        other = "00112233445566778899aabbccddeeff"
        assert refused(7, *worker(server, "--run-id", other)) == f"this server holds run {server.run_id}, not {other}"
        assert refused(3, *worker(server, "--slot", "5000")) == "slot 5000 is outside 0..99"
        assert "a worker's name must be 1 to 200 printable" in refused(3, *worker(server, "--name", "x" * 201))
        with monkeypatch.context() as patch:
            patch.setattr(worker_engine, "PROTOCOL_VERSION", 99)
            assert refused(6, *worker(server)) == "the worker speaks protocol 99, this server 1"
        reply = status_of(server.address)
        assert reply.phase == "running"
        assert [m.name for m in reply.members] == ["first"]
        counts = {"WrongModelError": 1, "WrongRunError": 1, "ConfigError": 2, "VersionMismatchError": 1}
        assert dict(reply.refused) == counts


def test_a_token_and_a_configuration_that_do_not_fit(refused: Refused, processes: Processes) -> None:
    server = processes.server("--token", "right", "--coordinates", "260")
    assert "this run wants a token" in refused(11, *worker(server))
    assert "wrong token" in refused(11, *worker(server, "--token", "left"))
    # More coordinates than the model has: nobody can know before somebody brings a model.
    assert refused(3, *worker(server, "--token", "right")) == "260 coordinates a round: the model has only 259"
    assert server.popen.poll() is None


def test_certificates_that_do_not_fit(refused: Refused, processes: Processes, tmp_path: Path) -> None:
    """Neither retried nor called an absence."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    make_certificates(mine, ["localhost"], [])
    make_certificates(other, ["localhost"], [])
    flags = ["--tls-cert", str(mine / "server.pem"), "--tls-key", str(mine / "server-key.pem")]
    secure, plain = processes.server(*flags, wait=False), processes.server()
    secure.wait_listening()
    elsewhere = secure.address.replace("127.0.0.1", "localhost")
    stranger = refused(11, *worker(secure, "--server", elsewhere, "--tls-ca", str(other / "ca.pem")))
    assert stranger.startswith("the server's certificate is not one that --tls-ca vouches for (CERTIFICATE_VERIFY")
    renamed = refused(11, *worker(secure, "--tls-ca", str(mine / "ca.pem")))
    assert renamed.startswith("the server's certificate is for another name or address (Hostname")
    unsecured = refused(11, *worker(plain, "--tls-ca", str(mine / "ca.pem")))
    assert unsecured.startswith("the server does not speak TLS: leave --tls-ca out, or")
    swapped = ["--tls-cert", mine / "server.pem", "--tls-key", other / "server-key.pem"]
    assert "are not a certificate and its key" in refused(3, "server", "--listen", "127.0.0.1:0", *swapped)


# --- standard output ----------------------------------------------------------------------------------------


def test_standard_output_that_cannot_be_written(processes: Processes) -> None:
    """Closed from the start, full, or closed by its reader: never a traceback."""
    server = processes.server()
    command = [sys.executable, "-m", "loscar_deploy", "status", "--server", server.address]

    def status(redirection: str, *options: str) -> tuple[int, str]:
        shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command, *options]
        done = subprocess.run(shell, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S)
        return done.returncode, done.stderr

    assert status(">&-") == (0, "")
    full = "loscar: No space left on device\n  check the free space, the permissions and the limits (ulimit -a) of this"
    assert status(">/dev/full") == (21, f"{full} machine\n")
    assert status(">/dev/full", "--json") == (21, f"{full} machine\n")
    reader, writer = os.pipe()
    os.close(reader)
    for options in ([], ["--json"], ["--watch"]):
        done = subprocess.run([*command, *options], stdout=writer, stderr=subprocess.PIPE, timeout=DEADLINE_S)
        assert (done.returncode, done.stderr) == (141, b"")
    os.close(writer)
