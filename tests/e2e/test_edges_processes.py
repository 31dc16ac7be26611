"""Signals, deaths and absences of real processes: what goes on, what ends how, and that nothing is left behind."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from crew import Gate
from processes import Process, Processes, Server, alive, descendants, status_of, wait_until
from safetensors.numpy import load_file

import loscar_worker as loscar
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_worker.tasks import load_task

SUPPORT = Path(__file__).parents[1] / "support"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _in_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SUPPORT)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def worker(processes: Processes, address: str, *options: str, task: str = "tiny_task:Tiny") -> Process:
    flags = ["--server", address, "--task", task, "--step-time", "2ms", "--threads", "1"]
    return processes.loscar("worker", *flags, *options, cwd=SUPPORT)


def departure(server: Server, name: str) -> pb.DepartureStatus:
    """Why a member left, once it has."""
    found = wait_until(lambda: [d for d in status_of(server.address).departures if d.name == name], f"{name} has left")
    last: pb.DepartureStatus = found[-1]
    return last


def rounds_go_on(address: str, rounds: int = 3) -> None:
    before = status_of(address).round
    wait_until(lambda: status_of(address).round >= before + rounds, "rounds go on")


def gone(children: list[psutil.Process]) -> bool:
    return not any(alive(child) for child in children)


# --- no server ----------------------------------------------------------------------------------------------


@pytest.fixture
def deaf() -> Iterator[tuple[str, Callable[[], int]]]:
    """An address where every connection is closed at once, and how many there were."""
    count = 0

    def accept() -> None:
        nonlocal count
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            count += 1
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}", lambda: count
        listening.shutdown(socket.SHUT_RDWR)


def test_a_worker_looks_for_its_server(processes: Processes, deaf: tuple[str, Callable[[], int]]) -> None:
    """It says once that there is none, tries again with back-off, gives up in time, and takes one that comes late."""
    nowhere, connections = deaf
    late = free_address()
    in_vain = worker(processes, nowhere, "--connect-timeout", "3s")
    patient = worker(processes, late, "--connect-timeout", "1m")
    patient.says("no server at")
    server = processes.server("--workers", "1", "--rounds", "3", "--local-steps", "2", "--linger", "0s", listen=late)
    assert patient.wait() == 0
    assert server.wait() == 0
    assert patient.err.count("no server at") == 1
    assert in_vain.wait() == 4
    lines = in_vain.err.splitlines()
    assert len(lines) == 3
    assert f"no server at {nowhere} yet (" in lines[0]
    assert lines[0].endswith("): trying for 3 s")
    assert lines[1].startswith(f"loscar: no server at {nowhere} within 3 s: ")
    assert lines[2] == "  check that the server runs and that its address and port are reachable from here"
    assert in_vain.out == patient.out == ""
    # Pauses from .25 s on, doubled; gRPC connects a few times for each. Without pauses it would be hundreds.
    assert 2 <= connections() <= 30


# --- whole runs ---------------------------------------------------------------------------------------------


def start_run(processes: Processes, out: Path, *options: str, task: str = "tiny_task:Tiny", **env: str) -> Process:
    flags = ["--link", "none", "--step-time", "2ms", "--sync-interval", "40ms", "--json", "--out", str(out)]
    return processes.loscar("run", *flags, "--task", task, *options, cwd=SUPPORT, **env)


def started(run: Process, count: int) -> list[psutil.Process]:
    """The run's children, once there are so many."""

    def children() -> list[psutil.Process] | None:
        found = descendants(run.pid)
        return found if len(found) >= count else None

    found: list[psutil.Process] = wait_until(children, f"{count} children are there")
    return found


def test_a_run_that_cannot_start_ends_with_its_workers_code(processes: Processes, tmp_path: Path) -> None:
    missing = ["--task", "a9a", "--data-dir", str(tmp_path)]
    runs = [start_run(processes, tmp_path / "a", "--workers", "1", *missing)]
    runs.append(start_run(processes, tmp_path / "b", "--workers", "1", "--coordinates", "300"))
    children = [child for run in runs for child in started(run, 2)]
    assert [run.wait() for run in runs] == [9, 3]
    said = [run.err.splitlines()[-2] for run in runs]
    assert said[0].startswith(f"loscar: w0 ended with status 9: task a9a: {tmp_path}/a9a is missing; put LIBSVM's file")
    assert said[1] == "loscar: w0 ended with status 3: 300 coordinates a round: the model has only 259"
    for run in runs:
        assert run.out == ""
        assert "Traceback" not in run.err
    assert gone(children)


def test_the_second_ctrl_c_forces_a_run(processes: Processes, tmp_path: Path) -> None:
    run = start_run(processes, tmp_path / "out", "--workers", "1", "--duration", "10m")
    run.says(" round ")
    children = started(run, 2)
    run.signal(signal.SIGINT)
    run.says("ending the run after this round; once more to stop at once")
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    assert run.out == ""
    assert "Traceback" not in run.err
    wait_until(lambda: gone(children), "no process is left behind")
    assert (tmp_path / "out" / "metrics.jsonl").is_file()
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_signal_while_the_result_is_evaluated_changes_nothing(processes: Processes, tmp_path: Path) -> None:
    """And a token in the environment is the run's own."""
    gate = tmp_path / "gate"
    run = start_run(
        processes,
        tmp_path / "out",
        *("--workers", "1", "--rounds", "5"),
        task="tiny_task:Gated",
        GATE=str(gate),
        LOSCAR_TOKEN="secret",
    )
    wait_until(gate.with_suffix(".reached").exists, "the evaluation has begun")
    assert not descendants(run.pid)
    run.signal(signal.SIGTERM)
    run.says("writing the run folder; once more to stop at once")
    gate.with_suffix(".open").touch()
    assert run.wait() == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == json.loads(run.out)
    assert summary["stopped"] == "all rounds are done"


def test_a_run_goes_on_without_a_killed_worker_and_leaves_nobody_when_it_is_killed(
    processes: Processes, tmp_path: Path
) -> None:
    run = start_run(processes, tmp_path / "out", "--workers", "2", "--duration", "10m", "--evaluate-every", "5")
    run.says(" round ")
    children = started(run, 4)
    next(c for c in children if "worker" in c.cmdline()).kill()
    run.says("was ended by signal 9: ")
    metrics = tmp_path / "out" / "metrics.jsonl"

    def last() -> dict[str, Any]:
        line: dict[str, Any] = json.loads(metrics.read_text().splitlines()[-1])
        return line

    def last_round() -> int:
        return int(last()["round"])

    before = last_round()
    wait_until(lambda: last_round() >= before + 3, "rounds go on")
    assert last()["departures"] == {"stream-closed": 1}
    assert run.popen.poll() is None
    run.signal(signal.SIGKILL)
    wait_until(lambda: gone(children), "no process is left behind")


def test_a_run_ends_without_its_server(processes: Processes, tmp_path: Path) -> None:
    run = start_run(processes, tmp_path / "out", "--workers", "1", "--duration", "10m")
    run.says(" round ")
    children = started(run, 2)
    next(c for c in children if "server" in c.cmdline()).kill()
    assert run.wait() == 20
    assert run.out == ""
    assert run.err.splitlines()[-2].startswith("loscar: server was ended by signal 9: ")
    assert gone(children)


def test_a_run_whose_workers_all_diverge(processes: Processes, tmp_path: Path) -> None:
    run = start_run(processes, tmp_path / "out", "--workers", "2", "--duration", "10m", task="tiny_task:Diverging")
    children = started(run, 3)
    assert run.wait() == 13
    assert run.out == ""
    for name in ("w0", "w1"):
        assert re.search(rf"^{name} ended with status 13: round \d+: the model's progress: .*not finite", run.err, re.M)
    what, to_do = run.err.splitlines()[-2:]
    assert re.match(r"loscar: no worker is left: w\d ended with status 13: ", what)
    assert to_do == "  the training diverged: lower the learning rate, or clip gradients"
    assert gone(children)


# --- servers and workers by themselves ----------------------------------------------------------------------


def test_members_of_a_deployment_leave_one_by_one(processes: Processes, tmp_path: Path) -> None:
    """SIGTERM, SIGINT, SIGKILL and NaN each take one worker; the last one stays until the server is asked to stop."""
    server = processes.server("--workers", "5", "--sync-interval", "40ms", "--density", "0.5")
    result = tmp_path / "result.json"
    state = tmp_path / "soon gone" / "state"
    state.parent.mkdir()
    polite = [
        worker(processes, server.address, "--name", "term", "--state", str(state)),
        worker(processes, server.address, "--name", "int"),
    ]
    killed = worker(processes, server.address, "--name", "kill")
    diverging = worker(processes, server.address, "--name", "nan", task="tiny_task:Diverging")
    staying = worker(processes, server.address, "--name", "stay", "--result", str(result))
    assert diverging.wait() == 13
    assert departure(server, "nan").reason == "failed"
    assert "not finite" in departure(server, "nan").detail
    state.parent.rmdir()
    polite[0].signal(signal.SIGTERM)
    polite[1].signal(signal.SIGINT)
    assert [w.wait() for w in polite] == [0, 0]
    for process, name in zip(polite, ("term", "int"), strict=True):
        assert departure(server, name).reason == "left"
        assert process.out == ""
        assert process.err.count("leaving after this step; once more to stop at once\n") == 1
    assert f"--state {state} cannot be written" in polite[0].err
    killed.signal(signal.SIGKILL)
    assert departure(server, "kill").reason == "stream-closed"
    rounds_go_on(server.address)
    assert [m.name for m in status_of(server.address).members] == ["stay"]
    server.signal(signal.SIGINT)
    assert staying.wait() == 0
    assert server.wait() == 0
    assert json.loads(result.read_text())["finished"]
    for process in (server, *polite, killed, diverging, staying):
        assert "Traceback" not in process.err


def test_the_second_signal_ends_a_server_and_a_worker_at_once(processes: Processes) -> None:
    """Neither could end in order: the worker is in a step of ten minutes, the server waits for a worker."""
    server = processes.server("--workers", "2", "--round-cap", "10m", "--local-steps", "1")
    slow = worker(processes, server.address, "--step-time", "10m", "--name", "slow")
    with loscar.join(server.address, load_task("tiny_task:Tiny").make_model(0), name="idle"):
        wait_until(lambda: status_of(server.address).phase == "running", "the run starts")
        slow.says("joined run")
        slow.signal(signal.SIGTERM)
        slow.says("leaving after this step; once more to stop at once")
        assert slow.popen.poll() is None
        slow.signal(signal.SIGTERM)
        assert slow.wait() == 143
        server.signal(signal.SIGINT)
        server.says("ending the run; once more to stop at once")
        assert server.popen.poll() is None
        server.signal(signal.SIGINT)
        assert server.wait() == 130
    assert server.err.endswith(
        "loscar: stopped before the run's end\n  a signal asked for it; what was written until then is kept\n"
    )


def test_a_worker_that_still_waits_for_others_leaves_at_once(processes: Processes) -> None:
    server = processes.server("--workers", "2")
    waiting = worker(processes, server.address, "--name", "alone")
    wait_until(lambda: [m.name for m in status_of(server.address).members] == ["alone"], "it has joined")
    waiting.signal(signal.SIGINT)
    assert waiting.wait() == 130
    assert departure(server, "alone").reason == "left"
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_worker_that_has_not_been_welcomed_yet_says_goodbye(processes: Processes) -> None:
    """Its hello is with the server, the answer still on its way over a far link."""
    server = processes.server("--workers", "2")
    gate = Gate(server.address, "rtt=2s")
    try:
        waiting = worker(processes, gate.address, "--name", "alone")
        wait_until(lambda: [m.name for m in status_of(server.address).members] == ["alone"], "its hello has arrived")
        waiting.signal(signal.SIGINT)
        assert waiting.wait() == 130
        assert departure(server, "alone").reason == "left"
    finally:
        gate.close()


def test_a_worker_is_told_that_the_run_was_ended_before_it_began(processes: Processes) -> None:
    server = processes.server("--workers", "2", "--linger", "0s")
    waiting = worker(processes, server.address, "--name", "alone")
    wait_until(lambda: [m.name for m in status_of(server.address).members] == ["alone"], "it has joined")
    server.signal(signal.SIGTERM)
    assert waiting.wait() == 130
    assert "the run was ended before it began" in waiting.err
    assert server.wait() == 0


# --- a server that comes back -------------------------------------------------------------------------------


def test_a_killed_server_gets_the_run_back_from_its_workers(processes: Processes, tmp_path: Path) -> None:
    """No disk: a new process with the same run id and address, and the state that the workers hold."""
    flags = ["--run-id", "phoenix", "--workers", "2", "--rounds", "80"]
    first = processes.server(*flags, "--sync-interval", "40ms", "--density", "0.3")
    workers = [
        worker(
            processes,
            first.address,
            *("--name", f"w{i}", "--slot", str(i), "--save-model", str(tmp_path / f"{i}.safetensors")),
            *("--result", str(tmp_path / f"{i}.json"), "--rounds-log", str(tmp_path / f"{i}.jsonl")),
        )
        for i in (0, 1)
    ]
    wait_until(lambda: status_of(first.address).round >= 10, "rounds are closed")
    first.signal(signal.SIGKILL)
    first.wait()
    # How rounds are made is the run's, and comes back from the workers; when it ends is the server's to say.
    second = processes.server(*flags, listen=first.address)
    assert second.run_id == first.run_id
    assert [w.wait() for w in workers] == [0, 0]
    reply = status_of(second.address)
    assert (reply.phase, reply.epoch, reply.round) == ("finished", 2, 81)
    assert reply.config.density == 0.3
    assert not reply.refused
    second.signal(signal.SIGTERM)
    assert second.wait() == 0
    models = [load_file(tmp_path / f"{i}.safetensors") for i in (0, 1)]
    for name, values in models[0].items():
        assert np.array_equal(values, models[1][name]), name
    for i, process in enumerate(workers):
        figures = json.loads((tmp_path / f"{i}.json").read_text())
        assert figures["finished"]
        assert figures["reconnects"] >= 1
        total = figures["contributions"]
        assert total["sent"] == total["included"] + total["returned"] + total["outstanding"]
        closed = [json.loads(line) for line in (tmp_path / f"{i}.jsonl").read_text().splitlines()]
        assert closed[-1]["round"] == 81
        assert closed[-1]["kind"] == "final"
        assert process.err.count("training on, reconnecting") == 1
        assert process.err.count("connected again") == 1
        assert "Traceback" not in process.err


# --- watching -----------------------------------------------------------------------------------------------


def test_a_run_is_watched_until_it_ends(processes: Processes) -> None:
    """One JSON value a line and nothing else, or plain lines; names stay text."""
    server = processes.server("--workers", "1", "--local-steps", "1")
    with loscar.join(server.address, load_task("tiny_task:Tiny").make_model(0), name="7") as session:
        as_json = processes.loscar("status", "--watch", "--json", "--server", server.address)
        plain = processes.loscar("status", "--watch", "--server", server.address)
        wait_until(lambda: as_json.out.count("\n") >= 2, "it goes on watching")
        plain.says("round 0")
        server.signal(signal.SIGINT)
        while not session.finished:
            session.step()
        assert as_json.wait() == plain.wait() == 0
    replies = [json.loads(line) for line in as_json.out.splitlines()]
    assert replies[0]["phase"] == "running"
    assert replies[0]["members"][0]["name"] == "7"
    assert replies[-1]["phase"] == "finished"
    assert "\x1b" not in plain.out
    assert as_json.err == plain.err == ""
