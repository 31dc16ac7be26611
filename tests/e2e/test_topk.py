"""Runs in which each worker sends its largest changes: real processes, deaths on both sides, shards, bad messages."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from processes import DEADLINE_S, Process, Processes, Server, status_of, wait_until
from raw import NO_STATISTICS, HandWorker, RawStream, engine_of
from safetensors.numpy import load_file

import loscar_worker as loscar
from loscar_core.indices import IndexCoding, encode_indices
from loscar_core.messages import Contribution
from loscar_core.worker_effects import Emit
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_worker.session import Session

pytestmark = pytest.mark.timeout(150)

TOPK = ("--selection", "topk", "--start-grace", "300ms", "--recover-after", "1s", "--run-id", "largest")


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def rounds_go_on(server: Server, rounds: int = 4) -> None:
    goal = int(status_of(server.address).round) + rounds
    wait_until(lambda: status_of(server.address).round >= goal, f"{rounds} more rounds")


def member(server: Server, name: str) -> pb.MemberStatus | None:
    return next((m for m in status_of(server.address).members if m.name == name), None)


@pytest.mark.parametrize("value_type", ["float32", "int8"])
def test_workers_and_servers_die_and_the_run_goes_on(processes: Processes, tmp_path: Path, value_type: str) -> None:
    """A worker is killed and replaced, then the server is, without a disk: what the workers hold goes on."""
    address = free_address()
    flags = [*TOPK, "--density", "0.05", "--wire-dtype", value_type, "--local-steps", "2"]
    started = 0

    def start(name: str) -> Process:
        nonlocal started
        started += 1
        files = ["--save-model", str(tmp_path / f"{name}.safetensors"), "--result", str(tmp_path / f"{name}.json")]
        command = ["worker", "--server", address, "--task", "digits", "--name", name, "--step-time", "4ms", *files]
        return processes.loscar(*command)

    first = processes.server(*flags, "--workers", "3", listen=address)
    workers = {name: start(name) for name in ("w0", "w1", "w2")}
    wait_until(lambda: status_of(address).round >= 4, "the run is on")

    workers["w2"].signal(signal.SIGKILL)
    wait_until(lambda: member(first, "w2") is None, "the server has noticed")
    rounds_go_on(first)
    workers["w2"] = start("w2")
    wait_until(lambda: (m := member(first, "w2")) is not None and m.contributed >= 3, "the new one takes part")

    reached = status_of(address).round - 2
    first.signal(signal.SIGKILL)
    first.wait()
    second = processes.server(*flags, listen=address)
    wait_until(lambda: status_of(address).phase == "running", "the run goes on")
    assert status_of(address).epoch == 2
    assert status_of(address).round > reached
    wait_until(lambda: len(status_of(address).members) == 3, "all of them are back")
    rounds_go_on(second)

    second.signal(signal.SIGTERM)
    for name, worker in workers.items():
        assert worker.wait() == 0, f"{name}: {worker.err}"
    assert second.wait() == 0, second.err
    models = [load_file(tmp_path / f"{name}.safetensors") for name in workers]
    for model in models[1:]:
        assert all(model[key].tobytes() == value.tobytes() for key, value in models[0].items())
    for name in workers:
        counts = json.loads((tmp_path / f"{name}.json").read_text())["contributions"]
        assert counts["sent"] == counts["included"] + counts["returned"]
        assert counts["included"] >= 4
    assert "Traceback" not in first.err + second.err + "".join(w.err for w in workers.values())


class Line:
    """A line that is fitted by hand: local steps are random, so that what was sent can be told from what was not."""

    def __init__(self, server: str, name: str, dimension: int = 500) -> None:
        self.model = torch.nn.Linear(dimension, 1, bias=False)
        with torch.no_grad():
            self.model.weight.zero_()
        self.rng = np.random.default_rng(len(name))
        self.session = loscar.join(server, self.model, name=name)

    def step(self) -> None:
        if not self.session.finished:
            size = self.model.weight.numel()
            with torch.no_grad():
                self.model.weight += torch.from_numpy(self.rng.normal(size=size).astype(np.float32))
            self.session.step()

    @property
    def held(self) -> np.ndarray:
        """x − a."""
        return self.model.weight.detach().numpy().ravel() - self.session.engine.anchor.vector


def joined(address: str, *names: str) -> list[Line]:
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(lambda name: Line(address, name), names))


def until(lines: list[Line], condition: Callable[[], bool], what: str) -> None:
    def once() -> bool:
        for line in lines:
            line.step()
        return condition()

    wait_until(once, what)


def test_who_parts_hands_over_everything(processes: Processes) -> None:
    """The largest first, until nothing is left: also where most of it has not been trained."""
    server = processes.server(*TOPK, "--density", "0.1", "--local-steps", "1", "--workers", "2")
    stays, leaves = joined(server.address, "stays", "leaves")
    until([stays, leaves], lambda: status_of(server.address).round >= 3, "rounds are closed")
    assert np.abs(leaves.held).max() > 0.1
    with ThreadPoolExecutor(1) as pool:
        parting = pool.submit(leaves.session.part, DEADLINE_S)
        until([stays], parting.done, "it has parted")
        assert parting.result()
    np.testing.assert_allclose(leaves.held, 0, atol=1e-5)
    leaves.session.close()
    stays.session.close()


def test_shards_take_the_largest_of_their_own_range(processes: Processes) -> None:
    flags = [*TOPK, "--density", "0.1", "--local-steps", "1", "--workers", "2"]
    servers = [processes.server(*flags, "--shard", f"{i}/2", wait=False) for i in range(2)]
    for server in servers:
        server.wait_listening()
    lines = joined(";".join(server.address for server in servers), "w0", "w1")
    sessions: list[Session] = [line.session for line in lines]
    until(lines, lambda: all(status_of(s.address).round >= 4 for s in servers), "rounds on both")
    servers[0].signal(signal.SIGTERM)
    with ThreadPoolExecutor(2) as pool:
        ending = [pool.submit(until, [line], lambda s=line.session: s.finished, "the end") for line in lines]
        for end in ending:
            end.result()
    first, second = (line.model.weight.detach().numpy() for line in lines)
    assert first.tobytes() == second.tobytes()
    for session in sessions:
        counts = session.contributions
        assert counts["sent"] == counts["included"] + counts["returned"]
        session.close()


# --- bad messages -------------------------------------------------------------------------------------------

D, K = 60, 6


def taken(worker: HandWorker, delta: np.ndarray) -> list[Contribution]:
    """What an honest worker would send for the open round."""
    opened = worker.wait_open()
    worker.opened = None
    values = worker.engine.anchor.vector + delta
    effects = worker.engine.snapshot(opened.plan.round, values, NO_STATISTICS, 1, 0, opened.opening)
    assert effects
    return [e.message for e in effects if isinstance(e, Emit) and isinstance(e.message, Contribution)]


def close_round(worker: HandWorker, delta: np.ndarray) -> None:
    """Take part in the open round, which nobody else does."""
    messages = taken(worker, delta)
    for message in messages:
        worker.stream.send(message)
    while worker.engine.anchor.position.round < messages[0].round:
        worker.pump()


FAR = encode_indices(np.arange(1000, 1000 + K), 2000)
BENT: dict[str, tuple[Callable[[Contribution], Contribution], grpc.StatusCode, str]] = {
    "an index out of range": (lambda m: replace(m, indices=FAR), grpc.StatusCode.INVALID_ARGUMENT, "MalformedError"),
    "a repeated index": (
        lambda m: replace(m, indices=b"\x00" + b"\xff"),  # more steps than values
        grpc.StatusCode.INVALID_ARGUMENT,
        "MalformedError",
    ),
    "too many": (lambda m: replace(m, total=K + 1), grpc.StatusCode.INVALID_ARGUMENT, "of a selection of 6"),
    "too few": (lambda m: replace(m, total=K - 1), grpc.StatusCode.INVALID_ARGUMENT, "of a selection of 6"),
    "another base": (lambda m: replace(m, base=1), grpc.StatusCode.INVALID_ARGUMENT, "indices from 1"),
    "another coding": (
        lambda m: replace(m, coding=IndexCoding.PLAIN, indices=np.arange(K, dtype="<u4").tobytes()),
        grpc.StatusCode.FAILED_PRECONDITION,
        "WrongSelectionError",
    ),
    "as if it were seeded": (
        lambda m: replace(m, coding=None, indices=b"", total=0),
        grpc.StatusCode.FAILED_PRECONDITION,
        "WrongSelectionError",
    ),
    "a selection of another round": (
        lambda m: replace(m, checksum=1),
        grpc.StatusCode.FAILED_PRECONDITION,
        "WrongSelectionError",
    ),
    "not a number": (
        lambda m: replace(m, values=np.full(K, np.nan, "<f4").tobytes()),
        grpc.StatusCode.INVALID_ARGUMENT,
        "NonFiniteError",
    ),
}


def test_bad_contributions_are_refused_by_name_and_have_no_effect(processes: Processes) -> None:
    server = processes.server(*TOPK, "--coordinates", str(K))
    down = np.zeros(D, np.float32)
    down[::10] = -1.0
    with grpc.insecure_channel(server.address) as channel, RawStream(channel, deadline_s=140.0) as good:
        honest = HandWorker(good, engine_of("good", D))
        honest.keep_alive()
        close_round(honest, down)
        for number, (bend, code, said) in enumerate(BENT.values()):
            with RawStream(channel) as bad:
                liar = HandWorker(bad, engine_of(f"bad{number}", D))
                liar.wait_open()
                while (m := member(server, f"bad{number}")) is None or m.exchange != "awaited":
                    close_round(honest, down)
                while liar.engine.anchor.position.round < honest.engine.anchor.position.round:
                    liar.pump()
                [message] = taken(liar, np.full(D, 1e6, np.float32))
                bad.send(bend(message))
                status, details = bad.status()
            assert status is code, details
            assert said in details
            close_round(honest, down)
        vector = honest.engine.anchor.vector
    assert vector.max() <= 0
    assert np.flatnonzero(vector).tolist() == np.flatnonzero(down).tolist()
    assert vector.min() >= -honest.engine.anchor.position.round
    assert sum(status_of(server.address).refused.values()) == len(BENT)
