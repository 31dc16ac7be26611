"""Sessions in this process against a server in another: whole runs, wrong uses, and what must never block."""

from __future__ import annotations

import random
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from processes import DEADLINE_S, Processes, Server, status_of, wait_until
from torch import Tensor, nn

import loscar_worker as loscar
from loscar_core.errors import (
    ConfigError,
    ConnectError,
    ModelChangedError,
    NonFiniteError,
    RefusedError,
    SessionFailedError,
)
from loscar_core.worker_engine import WorkerEngine
from loscar_worker.background import Background
from loscar_worker.model import ModelView
from loscar_worker.round_record import RoundRecord
from loscar_worker.session import Session

pytestmark = pytest.mark.timeout(100)


class Trainer:
    """A model on noisy linear data; `step` is one optimizer step and one `session.step`."""

    def __init__(self, seed: int = 0, model: nn.Module | None = None, lr: float = 0.05) -> None:
        torch.manual_seed(seed)
        self.model = model if model is not None else nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=lr)
        self.generator = torch.Generator().manual_seed(seed + 1)

    def train(self) -> Tensor:
        x = torch.randn(8, 6, generator=self.generator)
        loss: Tensor = (self.model(x) - x[:, :2]).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def step(self, session: Session) -> None:
        session.step(loss=self.train())

    def run(self, session: Session, deadline_s: float = DEADLINE_S) -> None:
        end = time.monotonic() + deadline_s
        while not session.finished:
            self.step(session)
            assert time.monotonic() < end, "the run does not end"

    def vector(self) -> np.ndarray:
        return torch.cat([p.detach().float().reshape(-1) for p in self.model.parameters()]).numpy()


QUICK = ["--density", "0.5", "--local-steps", "2", "--workers", "1"]


def join(server: Server, trainer: Trainer, name: str = "w", **options: Any) -> Session:
    return loscar.join(server.address, trainer.model, name=name, **options)


def departed(server: Server, name: str) -> str:
    """Why a member left, once it has."""
    found = wait_until(lambda: [d for d in status_of(server.address).departures if d.name == name], f"{name} has left")
    return str(found[-1].reason)


# --- whole runs ---------------------------------------------------------------------------------------------


def test_two_workers_end_with_the_same_model(processes: Processes) -> None:
    """Different initial models, one of them is taken over; in the end both hold the consensus."""
    server = processes.server("--density", "0.3", "--local-steps", "2", "--workers", "2", "--rounds", "6")
    trainers = [Trainer(0), Trainer(1)]
    rounds: list[list[RoundRecord]] = [[], []]

    def work(i: int) -> Session:
        with join(server, trainers[i], f"w{i}", slot=i, on_round=rounds[i].append) as session:
            assert not session.finished
            trainers[i].run(session)
            return session

    with ThreadPoolExecutor(2) as pool:
        sessions = list(pool.map(work, range(2)))
    assert np.array_equal(trainers[0].vector(), trainers[1].vector())
    for i, session in enumerate(sessions):
        assert session.slot == i
        assert session.run_id == server.run_id
        assert session.contributions == {"sent": 7, "included": 7, "returned": 0, "outstanding": 0}
        assert [r.round for r in rounds[i]] == list(range(1, 8))
        assert [r.kind for r in rounds[i]] == ["train"] * 6 + ["final"]
        assert all(r.included for r in rounds[i])
        assert all(r.local_steps >= 2 for r in rounds[i][:-1])
        assert sum(r.local_steps + r.overlap_steps for r in rounds[i]) == session.steps
        assert departed(server, f"w{i}") == "finished"
    reports = status_of(server.address)
    assert reports.phase == "finished"
    assert not reports.refused


def test_sessions_one_after_the_other_and_at_once(processes: Processes) -> None:
    servers = [processes.server(*QUICK, "--rounds", "3", wait=False) for _ in range(4)]
    for server in servers:
        server.wait_listening()
    for server in servers[:2]:
        trainer = Trainer()
        with join(server, trainer) as session:
            trainer.run(session)
        assert session.contributions["included"] == 4
    # Two at once in one thread: overlapped, so neither waits for the other.
    trainers = [Trainer(0), Trainer(1)]
    with join(servers[2], trainers[0]) as first, join(servers[3], trainers[1]) as second:
        end = time.monotonic() + DEADLINE_S
        while not (first.finished and second.finished):
            for session, trainer in zip((first, second), trainers, strict=True):
                if not session.finished:
                    trainer.step(session)
            assert time.monotonic() < end
    assert not np.array_equal(trainers[0].vector(), trainers[1].vector())
    assert sum(t.name == "loscar" for t in threading.enumerate()) == 1, "all sessions share one background thread"


class Odd(nn.Module):
    """Tied weights, a frozen layer, a scalar, two dtypes and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.last = nn.Linear(6, 2, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(torch.tanh(self.again(self.norm(self.first(x)))))
        out: Tensor = self.last(x.bfloat16()).float() * self.scale
        return out


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_an_odd_model(processes: Processes, wire: str) -> None:
    server = processes.server(*QUICK[:4], "--workers", "2", "--rounds", "5", "--wire-dtype", wire)

    def trainer(seed: int) -> Trainer:
        torch.manual_seed(7)
        return Trainer(seed, Odd())

    trainers = [trainer(0), trainer(1)]
    frozen = trainers[0].model.get_parameter("frozen.weight").clone()
    before = trainers[0].vector()

    def work(i: int) -> None:
        with join(server, trainers[i], f"w{i}", slot=i) as session:
            trainers[i].run(session)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    first, second = (dict(t.model.state_dict()) for t in trainers)
    for name, value in first.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, second[name]), name
            assert value.isfinite().all(), name
    model = trainers[0].model
    assert torch.equal(model.get_parameter("frozen.weight"), frozen)
    assert model.get_submodule("again").weight is model.get_submodule("first").weight
    assert first["last.weight"].dtype is torch.bfloat16
    assert (first["norm.running_var"] > 0).all()
    assert not np.array_equal(trainers[0].vector(), before)


# --- wrong uses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.float64)], ids=["half", "to"])
def test_moving_the_model_after_joining(processes: Processes, change: Callable[[nn.Module], object]) -> None:
    server = processes.server(*QUICK)
    trainer = Trainer()

    def change_and_step(session: Session) -> None:
        trainer.step(session)
        change(trainer.model)
        for _ in range(200):
            session.step()

    with pytest.raises(ModelChangedError, match=r"0\.weight was moved or cast"), join(server, trainer) as session:
        change_and_step(session)
    assert departed(server, "w") == "failed"


def test_not_a_number_is_never_sent(processes: Processes) -> None:
    server = processes.server(*QUICK)
    trainer = Trainer()

    def spoil_and_step(session: Session) -> None:
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(float("nan"))
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            session.step()

    with pytest.raises(NonFiniteError, match="nothing was sent"), join(server, trainer) as session:
        spoil_and_step(session)
    assert departed(server, "w") == "failed"
    assert not status_of(server.address).refused
    assert session.contributions["sent"] == session.contributions["included"]


def test_a_pace_that_never_trains_is_refused_and_leaves(processes: Processes) -> None:
    server = processes.server("--workers", "1", "--local-steps", "0")
    with pytest.raises(ConfigError, match="without ever training"):
        join(server, Trainer(), overlap_steps=0)
    assert departed(server, "w") == "failed"
    for wrong in ({"local_steps": -1}, {"overlap_steps": "soon"}):
        with pytest.raises(ConfigError, match="neither a number of steps nor auto"):
            join(server, Trainer(), **wrong)


def test_a_step_after_the_end_of_the_session(processes: Processes) -> None:
    server = processes.server(*QUICK, "--overlap-steps", "0")
    trainer = Trainer()
    session = join(server, trainer)
    trainer.step(session)
    session.close()
    session.close()
    assert departed(server, "w") == "left"
    with pytest.raises(SessionFailedError, match="closed"):
        session.step()


def test_a_taken_slot_and_a_full_server_are_said_as_they_are(processes: Processes) -> None:
    server = processes.server(*QUICK)
    trainer = Trainer()
    with join(server, trainer, "first", slot=0), pytest.raises(RefusedError, match="slot 0 belongs to 'first'"):
        join(server, Trainer(), "second", slot=0, connect_timeout_s=0.6)


def test_a_silent_address_is_given_up_in_time() -> None:
    """Something listens there and never answers: the time-out counts all the same."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ConnectError, match="within 1 s"):
            loscar.join(address, nn.Linear(2, 2), connect_timeout_s=1.0)
        assert time.monotonic() - started < 8


# --- waiting and not waiting --------------------------------------------------------------------------------


@pytest.fixture
def frozen() -> Iterator[Callable[[Server], None]]:
    """Stops a server process; it goes on at the test's end at the latest."""
    stopped: list[Server] = []

    def freeze(server: Server) -> None:
        server.signal(signal.SIGSTOP)
        stopped.append(server)

    yield freeze
    for server in stopped:
        if server.popen.poll() is None:
            server.signal(signal.SIGCONT)


def test_an_overlapped_step_never_blocks(processes: Processes, frozen: Callable[[Server], None]) -> None:
    server = processes.server(*QUICK)
    trainer = Trainer()
    with join(server, trainer) as session:
        wait_until(lambda: trainer.step(session) or session.contributions["included"] >= 3, "rounds are closed")
        frozen(server)
        slowest, steps = 0.0, 0
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            loss = trainer.train()
            started = time.perf_counter()
            session.step(loss=loss)
            slowest = max(slowest, time.perf_counter() - started)
            steps += 1
        assert steps > 50
        assert slowest < 0.3, "a step waited for the server"
        assert session.idle_s == 0
        assert session.contributions["outstanding"] <= 1
        before = session.contributions["included"]
        server.signal(signal.SIGCONT)
        wait_until(lambda: trainer.step(session) or session.contributions["included"] > before + 2, "it goes on")
        assert session.reconnects == 0
        assert session.idle_fraction == 0
    assert departed(server, "w") == "left"


def test_a_blocking_step_waits_and_counts_it(processes: Processes, frozen: Callable[[Server], None]) -> None:
    server = processes.server(*QUICK, "--overlap-steps", "0")
    trainer = Trainer()
    with join(server, trainer) as session:
        for _ in range(6):
            trainer.step(session)
        assert session.idle_s > 0
        before = session.idle_s
        frozen(server)
        release = threading.Timer(0.6, server.signal, [signal.SIGCONT])
        release.start()
        for _ in range(4):
            trainer.step(session)
        release.join()
        assert session.idle_s - before >= 0.5
        assert 0 < session.idle_fraction <= 1
        # A signal handler can end the waiting, so that the loop can end.
        frozen(server)
        threading.Timer(0.2, session.interrupt).start()
        started = time.monotonic()
        for _ in range(4):
            trainer.step(session)
        assert time.monotonic() - started < 5
        server.signal(signal.SIGCONT)


def test_a_dead_background_task_fails_the_next_step(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    server = processes.server(*QUICK, "--overlap-steps", "0")
    trainer = Trainer()
    session = join(server, trainer)
    trainer.step(session)

    def broken(_: object) -> None:
        raise ZeroDivisionError("the cause")

    monkeypatch.setattr(session.engine, "received", broken)
    with pytest.raises(SessionFailedError, match="ZeroDivisionError") as caught:
        trainer.run(session)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(SessionFailedError):
        session.step()
    session.close()
    assert departed(server, "w") in ("left", "failed", "stream-closed")


# --- between the two threads --------------------------------------------------------------------------------


def test_the_end_comes_with_the_last_update(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the scheduling of the threads, nobody trains on after the last round, or for ever."""
    publish = Background._publish

    def slow(self: Background, *args: Any, **changes: Any) -> None:
        if "ended" in changes:
            time.sleep(0.1)
        publish(self, *args, **changes)

    monkeypatch.setattr(Background, "_publish", slow)
    pace = ["--local-steps", "2", "--overlap-steps", "1"]
    server = processes.server("--density", "0.5", *pace, "--workers", "1", "--rounds", "4", "--final-round", "none")
    trainer = Trainer()
    with join(server, trainer) as session:
        trainer.run(session, 15)
    assert session.steps == 4 * 3


def test_a_newcomer_starts_at_its_anchor(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that are closed while a newcomer still loads its first model count once, not twice."""
    load = ModelView.load_vector

    def slow(self: ModelView, values: np.ndarray) -> None:
        if self.layout.parameters[0].name == "0.weight" and threading.current_thread().name == "late":
            time.sleep(0.4)
        load(self, values)

    sent: list[float] = []
    snapshot = WorkerEngine.snapshot

    def weighed(self: WorkerEngine, round_: int, *args: Any) -> Any:
        effects = snapshot(self, round_, *args)
        if self.name == "late" and effects:
            sent.append(float(np.abs(self.ledger.records[round_].sent).max()))
        return effects

    monkeypatch.setattr(ModelView, "load_vector", slow)
    monkeypatch.setattr(WorkerEngine, "snapshot", weighed)
    server = processes.server("--density", "1", "--local-steps", "2", "--workers", "1", "--final-round", "none")
    first, late = Trainer(0), Trainer(1)
    done = threading.Event()

    def newcomer() -> None:
        with join(server, late, "late") as session:
            wait_until(lambda: session.step() or session.contributions["included"] >= 3, "the newcomer takes part")
        done.set()

    with join(server, first, "first") as session:
        wait_until(lambda: first.step(session) or session.contributions["included"] >= 2, "rounds are closed")
        thread = threading.Thread(target=newcomer, name="late")
        thread.start()
        wait_until(lambda: first.step(session) or done.is_set(), "the newcomer is through")
        thread.join()
    assert len(sent) >= 3
    assert max(sent) < 1e-6, "a worker that never trains has nothing to contribute"


# --- beside forked processes --------------------------------------------------------------------------------


def test_forked_data_loaders_beside_a_live_session(processes: Processes) -> None:
    """40 epochs with forked workers; in a process of its own, since a crash would take the tests with it."""
    server = processes.server("--density", "0.5", "--local-steps", "2", "--workers", "1")
    script = textwrap.dedent(
        f"""
        import loscar_worker as loscar
        import torch
        from torch import nn
        import warnings
        from torch.utils.data import DataLoader, TensorDataset

        warnings.filterwarnings("ignore", "This DataLoader will create")  # on a single core
        model = nn.Linear(6, 2)
        data = TensorDataset(torch.randn(24, 6), torch.randn(24, 2))
        loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.set_num_threads(1)
        with loscar.join("{server.address}", model, name="forking") as session:
            for epoch in range(40):
                batches = 0
                for x, y in loader:
                    (model(x) - y).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    session.step()
                    batches += 1
                assert batches == 6
            assert session.reconnects == 0
            assert session.contributions["included"] > 10
        print("all epochs done")
        """
    )
    process = processes.python("-c", script)
    assert process.wait(80) == 0, process.err
    assert "all epochs done" in process.out
    assert process.err == ""
    assert departed(server, "forking") == "left"


@pytest.mark.parametrize("first", ["loscar_worker", "loscar_deploy.cli"])
def test_grpc_is_told_about_forks_before_it_is_imported(processes: Processes, first: str) -> None:
    script = textwrap.dedent(
        f"""
        import os, sys
        class Spy:
            def find_spec(self, name, path=None, target=None):
                if name == "grpc":
                    print("fork support:", os.environ.get("GRPC_ENABLE_FORK_SUPPORT"))
        sys.meta_path.insert(0, Spy())
        import {first}
        import loscar_worker.session
        """
    )
    process = processes.python("-c", script)
    assert process.wait() == 0, process.err
    assert process.out.strip() == "fork support: 0"


def test_reconnecting_leaves_the_training_loops_randomness_alone() -> None:
    """Its pauses are random, and a seeded loop goes on as if nothing had been tried."""
    before = random.getstate()
    with pytest.raises(ConnectError):
        loscar.join("127.0.0.1:1", nn.Linear(2, 2), connect_timeout_s=0.8)
    assert random.getstate() == before
