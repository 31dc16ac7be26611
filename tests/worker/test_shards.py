"""A model spread over several servers: real servers, sessions in this process."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import DEADLINE_S, Processes, Server, status_of, wait_until
from safetensors.numpy import load_file
from torch import nn

import loscar_worker as loscar
from loscar_core.errors import ConfigError, ConnectError, WrongRunError
from loscar_core.layout import joined
from loscar_worker.round_record import RoundRecord
from loscar_worker.session import Session

pytestmark = pytest.mark.timeout(100)

COMMON = ("--run-id", "spread", "--start-grace", "300ms", "--recover-after", "1s")


class Trainer:
    """A model with statistics on noisy linear data."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
        self.generator = torch.Generator().manual_seed(seed + 1)

    def step(self, session: Session) -> None:
        x = torch.randn(8, 6, generator=self.generator)
        loss = (self.model(x) - x[:, :2]).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for p in self.model.parameters():
                p -= 0.05 * p.grad
                p.grad = None
        session.step(loss=loss)

    def vector(self) -> np.ndarray:
        norm = self.model[1]
        tensors = [p.detach() for p in self.model.parameters()] + [norm.running_mean, norm.running_var]
        return torch.cat([t.reshape(-1) for t in tensors]).numpy()


def shard_flags(index: int, count: int, *flags: str, workers: int) -> list[str]:
    return [*COMMON, "--shard", f"{index}/{count}", "--workers", str(workers), *flags]


def start(processes: Processes, count: int, *flags: str, workers: int, ending: tuple[str, ...] = ()) -> list[Server]:
    """The servers of all shards; how the run ends is only shard 0's affair."""
    own = [(*flags, *ending) if i == 0 else flags for i in range(count)]
    servers = [processes.server(*shard_flags(i, count, *f, workers=workers), wait=False) for i, f in enumerate(own)]
    for server in servers:
        server.wait_listening()
    return servers


def addresses(servers: list[Server]) -> str:
    return ";".join(server.address for server in servers)


def train(sessions: dict[str, Session], trainers: dict[str, Trainer], until: Callable[[], bool], what: str) -> None:
    """One step of each worker after the other, in one thread, until something holds."""
    end = time.monotonic() + DEADLINE_S
    while not until():
        for name, session in sessions.items():
            if not session.finished:
                trainers[name].step(session)
        assert time.monotonic() < end, f"not in time: {what}"


def join_all(servers: list[Server], trainers: dict[str, Trainer], **options: Any) -> dict[str, Session]:
    """Joined at once: round 1 waits for all of them."""

    def join(name: str) -> Session:
        return loscar.join(addresses(servers), trainers[name].model, name=name, slot=int(name[1:]), **options)

    with ThreadPoolExecutor(len(trainers)) as pool:
        return dict(zip(trainers, pool.map(join, trainers), strict=True))


def round_of(server: Server) -> int:
    return int(status_of(server.address).round)


def final_of(processes: Processes, count: int) -> tuple[np.ndarray, list[Session]]:
    """What a blocking, dense run of two workers ends with."""
    flags = ("--density", "1", "--selection", "all", "--local-steps", "2", "--overlap-steps", "0")
    if count == 1:
        servers = [processes.server("--run-id", "whole", "--workers", "2", *flags, "--rounds", "5")]
    else:
        servers = start(processes, count, *flags, workers=2, ending=("--rounds", "5"))
    trainers = {f"w{i}": Trainer(i) for i in range(2)}

    def work(name: str) -> Session:
        slot = int(name[1:])
        with loscar.join(addresses(servers), trainers[name].model, name=name, slot=slot) as session:
            while not session.finished:
                trainers[name].step(session)
            return session

    with ThreadPoolExecutor(2) as pool:
        sessions = list(pool.map(work, trainers))
    first, second = (t.vector() for t in trainers.values())
    assert np.array_equal(first, second), "the workers end with different models"
    for server in servers:
        assert wait_until(lambda s=server: status_of(s.address).phase == "finished", "the server's run is over")
    return first, sessions


def test_a_spread_run_is_the_same_run(processes: Processes) -> None:
    """Blocking, dense and over the same data, three servers average just as one does, bit by bit."""
    whole, _ = final_of(processes, 1)
    spread, sessions = final_of(processes, 3)
    assert np.array_equal(whole, spread)
    assert [session.slot for session in sessions] == [0, 1]
    for session in sessions:
        assert len(session.further) == 2
        counts = session.contributions
        assert counts["sent"] == counts["included"] >= 3 * 6
        values = session.layout.dimension + session.layout.statistics_size
        assert session.bytes_up >= 6 * 4 * values


def test_overlapped_workers_end_with_the_consensus_of_all_shards(processes: Processes) -> None:
    servers = start(processes, 2, "--density", "0.3", workers=2, ending=("--max-steps", "400"))
    trainers = {"w0": Trainer(0), "w1": Trainer(1)}
    records: list[RoundRecord] = []
    sessions = join_all(servers, trainers, local_steps=3, on_round=records.append)

    def work(name: str) -> None:
        with sessions[name] as session:
            while not session.finished:
                trainers[name].step(session)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, trainers))
    assert np.array_equal(trainers["w0"].vector(), trainers["w1"].vector())
    assert {record.shard for record in records} == {0, 1}
    for shard in (0, 1):
        own = [record for record in records if record.shard == shard]
        assert sum(record.kind == "final" for record in own) == 2
        assert sum(record.kind == "train" for record in own) >= 4
    for session in sessions.values():
        assert session.contributions["outstanding"] == 0
        assert session.idle_fraction == 0.0
    status = [status_of(server.address) for server in servers]
    assert status[0].stop_reason.endswith("has taken 400 steps")
    assert status[1].stop_reason == "the run is over at shard 0"
    assert sum(s.dimension for s in status) == sessions["w0"].layout.dimension


@pytest.mark.parametrize("lost", [0, 1])
def test_a_shard_that_dies_and_comes_back_leaves_the_others_running(processes: Processes, lost: int) -> None:
    """Killed without a disk: the other one's rounds go on meanwhile, and its own do once it is there again."""
    flags = ("--density", "0.5", "--local-steps", "2")
    servers = start(processes, 2, *flags, workers=2)
    trainers = {"w0": Trainer(0), "w1": Trainer(1)}
    sessions = join_all(servers, trainers)
    train(sessions, trainers, lambda: all(round_of(s) >= 3 for s in servers), "both shards' rounds go on")
    other = servers[1 - lost]
    servers[lost].signal(signal.SIGKILL)
    servers[lost].wait()
    before = round_of(other)
    train(sessions, trainers, lambda: round_of(other) >= before + 4, "the other shard's rounds go on")
    if lost == 0:  # nobody joins or ends the run meanwhile
        with pytest.raises(ConnectError):
            loscar.join(addresses(servers), Trainer(2).model, name="w2", connect_timeout_s=0.5)
    servers[lost] = processes.server(*shard_flags(lost, 2, *flags, workers=2), listen=servers[lost].address)
    train(sessions, trainers, lambda: status_of(servers[lost].address).phase == "running", "it is recovered")
    back = round_of(servers[lost])
    assert back >= 3
    train(sessions, trainers, lambda: round_of(servers[lost]) >= back + 3, "its rounds go on")
    sessions["w0"].stop_run("enough")

    def finish(name: str) -> None:
        while not sessions[name].finished:
            trainers[name].step(sessions[name])
        sessions[name].close()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(finish, trainers))
    assert np.array_equal(trainers["w0"].vector(), trainers["w1"].vector())
    for session in sessions.values():
        counts = session.contributions
        assert counts["sent"] == counts["included"] + counts["returned"]
        assert session.reconnects >= 1
    assert [status_of(s.address).epoch for s in servers] == [2 if i == lost else 1 for i in range(2)]


def test_a_newcomer_gets_every_shards_state(processes: Processes) -> None:
    servers = start(processes, 2, "--density", "1", "--local-steps", "2", workers=1)
    trainers = {"w0": Trainer(0)}
    sessions = join_all(servers, trainers)
    train(sessions, trainers, lambda: all(round_of(s) >= 3 for s in servers), "rounds go on")
    trainers["w1"] = Trainer(1)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(loscar.join, addresses(servers), trainers["w1"].model, name="w1")
        train(sessions, trainers, coming.done, "the newcomer is there")
        sessions["w1"] = coming.result()
    assert sessions["w1"].slot == 1
    assert [half.engine.slot for half in sessions["w1"].further] == [1]
    merged = {name: session.contributions["included"] for name, session in sessions.items()}
    train(
        sessions,
        trainers,
        lambda: all(s.contributions["included"] >= merged[n] + 4 for n, s in sessions.items()),
        "both are averaged",
    )
    for session in sessions.values():
        session.close()


def test_a_worker_that_is_started_again_goes_on_with_all_shards(processes: Processes) -> None:
    servers = start(processes, 2, "--density", "0.5", "--local-steps", "2", workers=1)
    trainers = {"w0": Trainer(0)}
    sessions = join_all(servers, trainers)
    train(sessions, trainers, lambda: all(round_of(s) >= 3 for s in servers), "rounds go on")
    state = sessions["w0"].state_dict()
    sent, steps = sessions["w0"].contributions["sent"], sessions["w0"].steps
    sessions["w0"].close()
    with pytest.raises(ConfigError, match="the state is of a run over 2 shards, not 1"):
        loscar.join(servers[0].address, Trainer(0).model, state=state)
    trainers["w0"] = Trainer(5)
    with loscar.join(addresses(servers), trainers["w0"].model, state=state) as session:
        assert (session.name, session.steps, session.slot) == ("w0", steps, 0)
        assert session.contributions["sent"] == sent
        sessions["w0"] = session
        goals = [round_of(s) + 3 for s in servers]
        train(sessions, trainers, lambda: all(round_of(s) >= g for s, g in zip(servers, goals, strict=True)), "on")


# --- bad input ----------------------------------------------------------------------------------------------


def test_servers_in_the_wrong_order_or_number(processes: Processes) -> None:
    servers = start(processes, 2, workers=1)
    model = Trainer(0).model
    for wrong, what in (
        ([servers[1], servers[0]], "this server is shard 1/2 of the run; the worker takes it for shard 0/2"),
        ([servers[0]], "this server is shard 0/2 of the run; the worker takes it for shard 0/1"),
        ([*servers, servers[0]], "this server is shard 0/2 of the run; the worker takes it for shard 0/3"),
    ):
        with pytest.raises(WrongRunError, match=what):
            loscar.join(addresses(wrong), model, name="w")
    stranger = processes.server("--run-id", "another", "--shard", "1/2", "--workers", "1")
    with pytest.raises(WrongRunError, match="this server holds run"):
        loscar.join(addresses([servers[0], stranger]), model, name="w")


def test_shards_that_were_not_started_alike(processes: Processes) -> None:
    first = processes.server(*shard_flags(0, 2, "--density", "0.5", workers=1))
    second = processes.server(*shard_flags(1, 2, "--density", "0.25", workers=1))
    with pytest.raises(ConfigError, match=r"shards 0/2 and 1/2 were not started alike: density is 0\.5 and 0\.25"):
        loscar.join(addresses([first, second]), Trainer(0).model, name="w")


def test_vectors_beside_the_model_take_one_server() -> None:
    with pytest.raises(ConfigError, match="only by one server"):
        loscar.join("a:1;b:1", nn.Linear(2, 2), vectors={"v": torch.zeros(3)})
    with pytest.raises(ConfigError, match="cannot be spread over 9 shards"):
        loscar.join(";".join(f"a:{i + 1}" for i in range(9)), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--shard", "2/2", "--run-id", "r", "--workers", "1"), "there is no shard 2 of 2"),
        (("--shard", "half", "--run-id", "r", "--workers", "1"), "not of the form K/N"),
        (("--shard", "0/2", "--workers", "1"), "--shard needs --run-id and --workers"),
        (("--shard", "0/2", "--run-id", "r"), "--shard needs --run-id and --workers"),
        (("--shard", "1/2", "--run-id", "r", "--workers", "1", "--rounds", "3"), "only shard 0 says when a run ends"),
        (
            ("--shard", "0/2", "--run-id", "r", "--workers", "1", "--method", "mixvr", "--rounds", "3"),
            "takes one server",
        ),
    ],
)
def test_servers_that_cannot_be_a_shard(processes: Processes, flags: tuple[str, ...], what: str) -> None:
    server = processes.server(*flags, wait=False)
    assert server.wait() == ConfigError.exit_code
    assert what in server.err
    assert "Traceback" not in server.err


def test_a_checkpoint_of_another_shard_is_not_resumed_from(processes: Processes, tmp_path: Path) -> None:
    kept = ("--checkpoints", str(tmp_path / "kept"))
    first = processes.server(*shard_flags(0, 2, *kept, "--rounds", "2", "--linger", "0s", workers=1))
    second = processes.server(*shard_flags(1, 2, workers=1))
    trainers = {"w0": Trainer(0)}
    sessions = join_all([first, second], trainers)
    train(sessions, trainers, lambda: sessions["w0"].finished, "the run is over")
    sessions["w0"].close()
    assert first.wait() == 0
    wrong = processes.server(*shard_flags(1, 2, *kept, "--resume", workers=1), wait=False)
    assert wrong.wait() == WrongRunError.exit_code
    assert "the checkpoint is of shard 0/2, and this is to be shard 1/2" in wrong.err


def test_the_model_of_all_shards_is_fetched(processes: Processes, tmp_path: Path) -> None:
    servers = start(processes, 2, "--density", "1", workers=1, ending=("--rounds", "3"))
    trainers = {"w0": Trainer(0)}
    sessions = join_all(servers, trainers)
    train(sessions, trainers, lambda: sessions["w0"].finished, "the run is over")
    sessions["w0"].close()
    out = tmp_path / "model.safetensors"
    nowhere = "127.0.0.1:1"
    text = f"{nowhere},{servers[0].address};{servers[1].address}"
    done = processes.loscar("fetch", "--server", text, "--out", str(out))
    assert done.wait() == 0, done.err
    found = load_file(out)
    model = trainers["w0"].model.state_dict()
    assert found.keys() == {name for name in model if not name.endswith("num_batches_tracked")}
    for name, values in found.items():
        assert np.array_equal(values, model[name].numpy()), name
    for wrong, code in ((f"{servers[1].address};{servers[0].address}", 7), (servers[0].address, 7), (nowhere, 4)):
        done = processes.loscar("fetch", "--server", wrong, "--out", str(tmp_path / "no"))
        assert done.wait() == code, done.err
    assert not (tmp_path / "no").exists()


def test_parts_of_the_layout_make_the_whole(processes: Processes) -> None:
    servers = start(processes, 3, workers=1)
    trainers = {"w0": Trainer(0)}
    sessions = join_all(servers, trainers)
    session = sessions["w0"]
    assert joined([half.engine.layout for half in (session, *session.further)]) == session.layout
    session.close()


HALVES = ("--density", "0.5", "--local-steps", "2")


def without_shard_1(processes: Processes) -> tuple[list[Server], dict[str, Trainer], dict[str, Session]]:
    """A worker in the middle of a run over two servers, the second of which has just been killed."""
    servers = start(processes, 2, *HALVES, workers=1)
    trainers = {"w0": Trainer(0)}
    sessions = join_all(servers, trainers)
    train(sessions, trainers, lambda: all(round_of(s) >= 3 for s in servers), "rounds go on")
    servers[1].signal(signal.SIGKILL)
    servers[1].wait()
    return servers, trainers, sessions


def test_a_shard_that_is_away_at_the_end_is_told_when_it_is_back(processes: Processes) -> None:
    servers, trainers, sessions = without_shard_1(processes)
    session = sessions["w0"]

    def finish() -> None:
        while not session.finished:
            trainers["w0"].step(session)

    with ThreadPoolExecutor(1) as pool:
        session.stop_run("enough")
        finishing = pool.submit(finish)
        wait_until(lambda: status_of(servers[0].address).phase == "finished", "shard 0's run is over")
        assert not finishing.done()
        servers[1] = processes.server(*shard_flags(1, 2, *HALVES, workers=1), listen=servers[1].address)
        finishing.result(DEADLINE_S)
    assert status_of(servers[1].address).phase == "finished"
    session.close()


def test_a_newcomer_does_not_hold_up_one_shard_while_another_is_away(processes: Processes) -> None:
    servers, trainers, sessions = without_shard_1(processes)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(loscar.join, addresses(servers), Trainer(1).model, name="w1")
        there = lambda: any(m.name == "w1" for m in status_of(servers[0].address).members)  # noqa: E731
        train(sessions, trainers, there, "the newcomer is at shard 0")
        goal = round_of(servers[0]) + 10
        train(sessions, trainers, lambda: round_of(servers[0]) >= goal, "rounds go on without it")
        [newcomer] = [m for m in status_of(servers[0].address).members if m.name == "w1"]
        assert newcomer.missed == 0, "it was waited for"
        servers[1] = processes.server(*shard_flags(1, 2, *HALVES, workers=1), listen=servers[1].address)
        train(sessions, trainers, coming.done, "it has joined both")
        with coming.result() as session:
            assert session.slot == 1
    sessions["w0"].close()


def test_a_worker_of_several_shards_hands_over_what_it_has(processes: Processes) -> None:
    """As one that is told to leave: interrupted, and then it parts."""
    servers = start(processes, 2, "--density", "0.3", "--local-steps", "2", workers=2)
    trainers = {"w0": Trainer(0), "w1": Trainer(1)}
    sessions = join_all(servers, trainers)
    train(sessions, trainers, lambda: all(round_of(s) >= 3 for s in servers), "rounds go on")
    sessions["w1"].interrupt()
    with ThreadPoolExecutor(1) as pool:
        parting = pool.submit(sessions["w1"].part, DEADLINE_S)
        train({"w0": sessions["w0"]}, trainers, parting.done, "it has handed over what it has")
        assert parting.result()
    for half in (sessions["w1"], *sessions["w1"].further):
        assert half.parted
    for session in sessions.values():
        session.close()
