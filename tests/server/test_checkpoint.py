"""Checkpoints: whole or not at all, the newest intact one, and going on from it."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cluster import RUN, BookedMachine, Cluster
from desk import Desk
from processes import DEADLINE_S, Processes, Server, status_of, wait_until
from safetensors.numpy import save

import loscar_worker as loscar
from loscar_core.config import RunConfig, ServerLimits
from loscar_core.errors import ConfigError, LoscarError, WrongRunError
from loscar_core.messages import Answer
from loscar_core.plan import RoundKind
from loscar_core.saved_state import SavedState
from loscar_core.selection import SelectionKind
from loscar_core.server_machine import ServerMachine
from loscar_core.server_state import Phase
from loscar_core.state import Position
from loscar_core.values import ValueType
from loscar_deploy.client import Client
from loscar_server.app import ServerOptions, ServerProcess, run_id_bytes
from loscar_server.checkpoint import Checkpoints, read
from loscar_wire.transport import ClientSecurity

SPARSE: dict[str, Any] = {
    "selection": SelectionKind.SWEEP,
    "density": 0.25,
    "value_type": ValueType.BFLOAT16,
    "seed": 7,
}
VALUES = (0.1, 1 / 3, -2.7, 1e-3, 5.55, 0.7, -0.123, 9.1)


def contribute(desk: Desk, rounds: int) -> Desk:
    for _ in range(rounds):
        for peer in (1, 2):
            desk.contribute(peer, VALUES[desk.round % len(VALUES)] * peer)
        for peer in (1, 2):
            desk.drained(peer)
    return desk


def trained(rounds: int = 5) -> Desk:
    """A server in the middle of a run whose answers are quantised."""
    return contribute(Desk(dimension=40, statistics=3, config=SPARSE).start(1, 2), rounds)


def state_of(machine: ServerMachine, now: float = 100.0) -> SavedState:
    saved = machine.saved_state(now)
    assert saved is not None
    return saved


def same(a: SavedState, b: SavedState) -> bool:
    arrays = [(s.replica.vector, s.replica.statistics, s.residual) for s in (a, b)]
    equal = all(
        (x is None and y is None) or (x is not None and y is not None and x.tobytes() == y.tobytes())
        for x, y in zip(*arrays, strict=True)
    )
    return equal and a.metadata() == b.metadata()


@contextmanager
def opened(folder: Path, keep: int = 3) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(folder, keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def two_states() -> list[SavedState]:
    """An older and a newer state of one run."""
    desk = trained(4)
    older = state_of(desk.machine)
    return [older, state_of(contribute(desk, 1).machine)]


# --- files --------------------------------------------------------------------------------------------------


def test_a_state_is_read_back_bit_for_bit(tmp_path: Path, two_states: list[SavedState]) -> None:
    for saved in two_states:
        assert saved.residual is not None
        assert saved.residual.any()
    with opened(tmp_path / "a" / "new" / "one") as checkpoints:
        for saved in two_states:
            path = checkpoints.write(saved)
            assert same(read(path), saved)
        newest = checkpoints.newest()
        assert newest is not None
        assert same(newest, two_states[1])
        assert newest.replica.vector.flags.writeable


def test_without_statistics_and_without_a_residual(tmp_path: Path) -> None:
    desk = Desk(dimension=9).start(1, 2)
    contribute(desk, 1)
    saved = state_of(desk.machine)
    assert saved.residual is None
    with opened(tmp_path) as checkpoints:
        assert same(read(checkpoints.write(saved)), saved)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    desk = trained(1)
    with opened(tmp_path, keep=2) as checkpoints:
        for _ in range(4):
            checkpoints.write(state_of(contribute(desk, 1).machine))
        assert [p.name for p in checkpoints.paths()] == [
            "state-000001-000000000005.safetensors",
            "state-000001-000000000004.safetensors",
        ]
        later = replace(state_of(desk.machine), epoch=2)
        later.replica.position = Position(1, 1)  # a new process went on from an earlier round
        assert checkpoints.write(later) == checkpoints.paths()[0]
        assert len(checkpoints.paths()) == 2


def test_what_is_newer_does_not_push_out_what_was_just_written(tmp_path: Path, two_states: list[SavedState]) -> None:
    """Damaged files of a later epoch stay where they are, and do not count."""
    with opened(tmp_path, keep=2) as checkpoints:
        for round_ in (7, 8):
            (tmp_path / f"state-000009-{round_:012d}.safetensors").write_bytes(b"torn")
        written = [checkpoints.write(s) for s in two_states]
        assert set(written) < set(checkpoints.paths())
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.replica.position == two_states[1].replica.position


def test_a_file_torn_anywhere_is_no_checkpoint(tmp_path: Path, two_states: list[SavedState]) -> None:
    with opened(tmp_path) as checkpoints:
        path = checkpoints.write(two_states[0])
        data = path.read_bytes()
        for size in range(len(data)):
            path.write_bytes(data[:size])
            with pytest.raises(ConfigError):
                read(path)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, two_states: list[SavedState]) -> None:
    with opened(tmp_path) as checkpoints:
        path = checkpoints.write(two_states[0])
        data = path.read_bytes()
        unnoticed = 0
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
            try:
                found = read(path)
            except LoscarError:
                continue
            unnoticed += 1
            assert same(found, two_states[0]), f"byte {at}"
        assert unnoticed < 10, "only what is no part of the state, such as padding, may change unnoticed"


def foreign(two_states: list[SavedState]) -> dict[str, bytes]:
    return {
        "empty": b"",
        "zeros": bytes(5000),
        "text": b"hello " * 500,
        "another safetensors": save({"vector": np.zeros(3, np.float32)}),
        "another one with metadata": save({"vector": np.zeros(3, np.float32)}, {"crc": "[]", "loscar": "{}"}),
        "a huge header": (1 << 60).to_bytes(8, "little") + b"{}",
    }


@pytest.mark.parametrize("what", [*foreign([]), "a folder", "torn"])
def test_the_one_before_a_damaged_one_is_used(
    what: str, tmp_path: Path, two_states: list[SavedState], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.write(two_states[0])
        path = checkpoints.write(two_states[1])
        if what == "a folder":
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(path.read_bytes()[:-1] if what == "torn" else foreign(two_states)[what])
        newest = checkpoints.newest()
        assert newest is not None
        assert same(newest, two_states[0])
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert str(path) in caplog.text
        assert "trying the one before it" in caplog.text
        assert path.exists(), "nothing is thrown away that somebody may want to look at"


def test_other_files_are_left_alone(tmp_path: Path, two_states: list[SavedState]) -> None:
    for name in ("notes.txt", "state-1-2.safetensors", "model.safetensors", "other.part"):
        (tmp_path / name).write_text("mine")
    with opened(tmp_path, keep=1) as checkpoints:
        assert checkpoints.newest() is None
        for saved in two_states:
            checkpoints.write(saved)
        assert len(checkpoints.paths()) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != "s" or "1-2" in p.name) == [
        "lock",
        "model.safetensors",
        "notes.txt",
        "other.part",
        "state-1-2.safetensors",
    ]


def test_two_servers_cannot_share_a_folder(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ConfigError, match="another server uses this folder"):
        Checkpoints(tmp_path)
    with opened(tmp_path):
        pass  # the first one has given it back


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"checkpoints in .*file"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"checkpoints in .*: Not a directory"):
        Checkpoints(tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match="at least 1"):
        Checkpoints(tmp_path / "folder", keep=0)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from dataclasses import replace
from loscar_core.state import Position
from loscar_server.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]))
saved = checkpoints.newest()
values = np.resize(saved.replica.vector, 40)
while True:
    at = saved.replica.position
    saved.replica.position = Position(at.epoch, at.round + 1)
    saved.replica.vector[:] = at.round + 1
    checkpoints.write(saved)
    print(at.round + 1, flush=True)
"""


def test_a_server_that_is_killed_while_it_writes_leaves_a_whole_one(
    processes: Processes, tmp_path: Path, two_states: list[SavedState]
) -> None:
    folder = tmp_path / "checkpoints"
    with opened(folder) as checkpoints:
        checkpoints.write(two_states[0])
    for more in (3, 4, 5, 6):
        writer = processes.python("-c", WRITER, str(folder))
        wait_until(lambda w=writer, n=more: len(w.out.split()) >= n, "some are written")
        writer.signal(signal.SIGKILL)
        writer.wait()
        told = int(writer.out.split()[-1])
        with opened(folder) as checkpoints:
            found = checkpoints.newest()
            assert found is not None
            assert found.replica.position.round in (told, told + 1)
            assert (found.replica.vector == found.replica.position.round).all()
            assert len(checkpoints.paths()) <= 4, "one more than are kept, when it was killed before it had tidied up"
        assert not list(folder.glob("*.part"))


# --- going on from one: the machine -------------------------------------------------------------------------


def resumed(saved: SavedState, **limits: Any) -> Desk:
    desk = Desk(dimension=40, statistics=3, config=SPARSE, limits=limits)
    desk.machine = ServerMachine(RunConfig(), desk.machine.limits, b"x" * 16, desk.now, saved)
    return desk


def with_state(desk: Desk, peer: int, saved: SavedState, **changes: Any) -> None:
    """A worker joins that holds a state of the run."""
    told = saved.replica
    desk.hello(
        peer,
        epoch=saved.epoch,
        position=told.position,
        digest=told.digest,
        lineage=told.lineage,
        recent=told.history.last(16),
        members=told.members,
        **changes,
    )


def test_a_resumed_server_answers_as_the_one_that_never_died(two_states: list[SavedState], tmp_path: Path) -> None:
    """Bit for bit, with answers of two bytes a value: the residual of the quantisation is there too."""
    lives = trained(5)
    with opened(tmp_path) as checkpoints:
        desk = resumed(read(checkpoints.write(state_of(lives.machine))))
    assert desk.machine.run_id == lives.machine.run_id
    assert desk.machine.phase is Phase.RECOVERING
    for peer in (1, 2):
        desk.hello(peer)
    desk.tick(desk.now + 5)
    assert desk.position == lives.position
    desk.ready(1, 2)
    desk.tick(desk.now + 5)
    assert desk.machine.phase is Phase.RUNNING
    assert desk.machine.epoch == lives.machine.epoch + 1
    before = [len(d.got(1, Answer)) for d in (lives, desk)]
    for each in (lives, desk):
        contribute(each, 8)
    answers = [d.got(1, Answer)[n:] for d, n in zip((lives, desk), before, strict=True)]
    assert len(answers[0]) == 16  # a part of parameters and one of statistics each
    assert answers[0] == answers[1]
    assert desk.machine.replica is not None
    assert lives.machine.replica is not None
    assert desk.machine.replica.vector.tobytes() == lives.machine.replica.vector.tobytes()
    assert desk.position == Position(lives.machine.epoch + 1, lives.round)
    without = replace(state_of(trained(5).machine), residual=None)
    other = resumed(without)
    for peer in (1, 2):
        other.hello(peer)
    other.tick(other.now + 5)
    other.ready(1, 2)
    other.tick(other.now + 5)
    contribute(other, 8)
    assert other.got(1, Answer)[-16:] != answers[0], "the residual matters here"


def test_run_time_and_configuration_go_on_and_the_end_may_be_moved() -> None:
    lives = trained(3)
    saved = state_of(lives.machine, lives.now + 50)
    desk = resumed(saved)
    desk.machine.config = replace(desk.machine.config, rounds=5)
    for peer in (1, 2):
        desk.hello(peer)
    desk.tick(desk.now + 5)
    assert desk.machine.config.value_type is ValueType.BFLOAT16
    assert desk.machine.config.seed == 7
    assert desk.machine.config.rounds == 5
    desk.ready(1, 2)
    desk.tick(desk.now + 5)
    assert desk.machine.elapsed_s(desk.now) == pytest.approx(saved.elapsed_s)
    contribute(desk, 2)
    assert desk.machine.round is not None
    assert desk.machine.round.plan.kind is RoundKind.FINAL


def test_what_workers_hold_counts_when_it_is_newer() -> None:
    lives = trained(3)
    older = state_of(lives.machine)
    newer = state_of(contribute(lives, 2).machine)
    desk = resumed(older)
    for peer in (1, 2):
        with_state(desk, peer, newer)
    asked = [p for p in (1, 2) if any(type(m).__name__ == "SendState" for m in desk.sent[p])]
    assert len(asked) == 1
    assert desk.machine.replica is None, "the checkpoint is not taken"


@pytest.mark.parametrize("majority", [True, False])
def test_the_checkpoint_counts_when_workers_are_behind_it(majority: bool) -> None:
    lives = trained(3)
    older = state_of(lives.machine)
    newer = state_of(contribute(lives, 2).machine)
    desk = resumed(newer)
    with_state(desk, 1, older)
    if majority:
        with_state(desk, 2, older)
    else:
        desk.tick(desk.now + desk.machine.limits.recover_after_s)
    assert desk.position == newer.replica.position
    assert desk.machine.epoch == newer.epoch + 1


def test_one_of_several_that_is_further_than_the_checkpoint_is_waited_for() -> None:
    """The others may hold what it holds; alone, it does not decide before the wait is over."""
    lives = trained(3)
    older = state_of(lives.machine)
    newer = state_of(contribute(lives, 1).machine)
    desk = resumed(older)
    with_state(desk, 1, newer)
    desk.tick(desk.now + 30)
    assert desk.machine.replica is None
    assert desk.machine.phase is Phase.RECOVERING


def test_the_epoch_is_above_that_of_a_checkpoint_that_cannot_be_read(
    tmp_path: Path, two_states: list[SavedState]
) -> None:
    older, newer = two_states[0], replace(two_states[1], epoch=6)
    with opened(tmp_path) as checkpoints:
        checkpoints.write(older)
        path = checkpoints.write(newer)
        path.write_bytes(b"")
        found = checkpoints.newest()
    assert found is not None
    assert found.replica.position == older.replica.position
    desk = resumed(found)
    for peer in (1, 2):
        desk.hello(peer)
    desk.tick(desk.now + 5)
    assert desk.machine.epoch == 7, "epoch 6 has closed rounds that nobody may mistake for ours"


@pytest.mark.parametrize("ahead", [True, False], ids=["the workers are ahead", "the checkpoint is ahead"])
def test_the_ledger_balances_after_a_resumption(ahead: bool) -> None:
    """A whole run in memory: every worker's progress is in the consensus once, whichever state goes on."""
    config = RunConfig(
        density=0.3, selection=SelectionKind.RANDOM, rounds=12, local_steps=2, value_type=ValueType.FLOAT32
    )
    limits = ServerLimits(workers=3, lease_s=1e6, round_cap_s=1e6, recover_after_s=1e9, start_grace_s=0.5)
    cluster = Cluster(3, config, limits=limits, seed=5)
    cluster.connect_all()

    def at(round_: int) -> bool:
        state = cluster.machine.replica
        return state is not None and state.position.round >= round_

    cluster.run(until=lambda: at(4))
    if ahead:
        saved = state_of(cluster.machine, cluster.now)
        cluster.run(until=lambda: all(w.engine.anchor.position.round >= 7 for w in cluster.workers))
    else:
        cluster.run(until=lambda: at(7))
        saved = state_of(cluster.machine, cluster.now)
        assert any(w.engine.anchor.position.round < saved.replica.position.round for w in cluster.workers)
    kept = saved.replica.position.round
    cluster.kill_server()
    machine = BookedMachine(config, limits, RUN, cluster.now, saved)
    machine.book, cluster.server = cluster.book, machine
    cluster.connect_all()
    cluster.run()
    cluster.check_end()
    assert cluster.book is not None
    assert cluster.book.adoptions == 1
    chain = cluster.book.hold(machine).chain()
    took_over = max(n.position.round for n in chain if n.position.epoch == saved.epoch)
    assert took_over >= 7 if ahead else took_over == kept


# --- going on from one: the process -------------------------------------------------------------------------


def test_names_and_numbers_of_runs() -> None:
    assert run_id_bytes("00112233445566778899aabbccddeeFF") == bytes.fromhex("00112233445566778899aabbccddeeff")
    spaced = "0011223344556677 8899aabbccddeeff"[:32]
    for text in ("mine", spaced, "x" * 32, ""):
        assert len(run_id_bytes(text)) == 16
    assert run_id_bytes(None) != run_id_bytes(None)


def running(folder: Path, every_s: float) -> ServerProcess:
    """A server process in this one, in the middle of a run of hand-made peers."""
    limits = ServerLimits(lease_s=1e6)
    options = ServerOptions(listen="127.0.0.1:0", checkpoints=folder, checkpoint_every_s=every_s, limits=limits)
    process = ServerProcess(options)
    desk = at_desk(process)
    desk.start(1, 2)
    contribute(desk, 2)
    return process


def at_desk(process: ServerProcess) -> Desk:
    desk = Desk(dimension=40, statistics=3, config=SPARSE)
    desk.machine = process.service.machine
    desk.now = time.monotonic()
    return desk


def test_writing_holds_nobody_up_and_two_are_never_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes its time: the server answers meanwhile, and its end waits for the disk, then saves the rest."""
    let_go, writing = threading.Event(), threading.Event()
    at_once: list[int] = []
    busy = threading.Lock()
    real = Checkpoints.write

    def slow(self: Checkpoints, state: SavedState) -> Path:
        at_once.append(not busy.acquire(blocking=False))
        writing.set()
        assert let_go.wait(DEADLINE_S)
        path = real(self, state)
        busy.release()
        return path

    monkeypatch.setattr(Checkpoints, "write", slow)

    async def scenario() -> Position:
        process = running(tmp_path, 0.05)
        address = await process.start()
        assert await asyncio.to_thread(writing.wait, DEADLINE_S)
        client = Client(address, ClientSecurity())
        assert (await client.status()).round == 2
        contribute(at_desk(process), 3)
        assert (await client.status()).round == 5
        await client.close()
        closing = asyncio.create_task(process.close())
        done, _ = await asyncio.wait({closing}, timeout=0.3)
        assert not done, "the process would end in the middle of a write"
        let_go.set()
        await asyncio.wait_for(closing, DEADLINE_S)
        assert process.service.machine.replica is not None
        return process.service.machine.replica.position

    position = asyncio.run(scenario())
    assert not any(at_once)
    with opened(tmp_path) as checkpoints:
        newest = checkpoints.newest()
    assert newest is not None
    assert newest.replica.position == position == Position(1, 5)
    assert not list(tmp_path.glob("*.part"))


def test_nothing_new_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Position] = []
    real = Checkpoints.write

    def counted(self: Checkpoints, state: SavedState) -> Path:
        written.append(state.replica.position)
        return real(self, state)

    monkeypatch.setattr(Checkpoints, "write", counted)

    async def scenario() -> None:
        process = running(tmp_path, 0.001)
        await process.start()
        for number in range(1, 6):
            await asyncio.to_thread(wait_until, lambda n=number: len(written) >= n, "it is written")
            contribute(at_desk(process), 1)
        await process.close()

    asyncio.run(scenario())
    assert written == [Position(1, round_) for round_ in range(2, 8)]


class Trainee:
    """A worker in this process that takes a step when it is told to."""

    def __init__(self, server: Server, name: str, features: int = 6, **options: Any) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Linear(features, 2)
        self.session = loscar.join(server.address, self.model, name=name, **options)

    def step(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p += 0.01
        self.session.step()
        time.sleep(0.002)

    def vector(self) -> np.ndarray:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).numpy()

    def train_until(self, condition: Any, what: str) -> None:
        def once() -> Any:
            self.step()
            return condition()

        wait_until(once, what)


FLAGS = ["--density", "1", "--local-steps", "1", "--workers", "1", "--wire-dtype", "bfloat16", "--lease", "10m"]


def checkpoints_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*.safetensors"))


def test_a_killed_server_resumes_from_the_newest_intact_checkpoint(processes: Processes, tmp_path: Path) -> None:
    """And says which; a fresh worker gets its model, rounds and epochs go on."""
    folder = tmp_path / "checkpoints"
    saving = ["--checkpoints", str(folder), "--checkpoint-every", "100ms", "--keep", "2"]
    first = processes.server(*FLAGS, *saving)
    worker = Trainee(first, "w")
    worker.train_until(lambda: len(checkpoints_in(folder)) == 2, "two checkpoints are written")
    first.signal(signal.SIGKILL)
    first.wait()
    worker.session.close()
    assert not list(folder.glob("*.part")) or len(checkpoints_in(folder)) >= 2

    before, newest = checkpoints_in(folder)[-2:]
    newest.write_bytes(newest.read_bytes()[:-3])
    expected = read(before)
    again = processes.server(*FLAGS, *saving, "--resume")
    assert f"checkpoint {newest} is damaged" in again.err
    assert f"resuming run {first.run_id} from its checkpoint at {expected.replica.position}" in again.err
    assert again.run_id == first.run_id
    other = Trainee(again, "another")
    assert other.vector().tobytes() == expected.replica.vector.tobytes()
    assert other.session.run_s >= expected.elapsed_s
    other.train_until(lambda: status_of(again.address).round > expected.replica.position.round + 2, "rounds go on")
    status = status_of(again.address)
    assert status.epoch > expected.epoch
    again.signal(signal.SIGTERM)
    other.train_until(lambda: other.session.finished, "the run ends")
    other.session.close()
    assert again.wait() == 0
    last = read(checkpoints_in(folder)[-1])
    assert last.replica.vector.tobytes() == other.vector().tobytes(), "the end of the run is in a checkpoint too"
    assert last.epoch == status.epoch
    assert len(checkpoints_in(folder)) == 2
    assert not list(folder.glob("*.part"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_without_an_intact_checkpoint_the_workers_have_the_last_word(processes: Processes, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    listen = f"127.0.0.1:{free_port()}"
    saving = ["--checkpoints", str(folder), "--checkpoint-every", "100ms"]
    first = processes.server(*FLAGS, *saving, "--run-id", "mine", listen=listen)
    second = processes.server(*FLAGS, *saving, wait=False)
    worker = Trainee(first, "w")
    worker.train_until(lambda: len(checkpoints_in(folder)) == 3, "checkpoints are written")
    assert second.wait() == 3
    assert "another server uses this folder" in second.err
    first.signal(signal.SIGKILL)
    first.wait()
    held = worker.session.engine.anchor.position.round
    anew = processes.server(*FLAGS, *saving, wait=False)
    assert anew.wait() == 3
    assert "go on with --resume, or name another folder" in anew.err
    # Not before the other one has ended: it uses the folder for a moment.
    other_run = processes.server(*FLAGS, *saving, "--resume", "--run-id", "yours", wait=False)
    assert other_run.wait() == 7
    assert f"the checkpoint is of run {first.run_id}" in other_run.err

    for path in checkpoints_in(folder):
        path.write_bytes(path.read_bytes()[:100])
    nameless = processes.server(*FLAGS, *saving, "--resume", wait=False)
    assert nameless.wait() == 3
    assert "none of the 3 checkpoints" in nameless.err
    assert "give --run-id to recover the run from its workers" in nameless.err
    again = processes.server(*FLAGS, *saving, "--resume", "--run-id", "mine", listen=listen)
    worker.train_until(lambda: worker.session.reconnects == 1, "the worker is back")
    worker.train_until(lambda: status_of(again.address).round > held, "the run goes on where the worker was")
    assert "adopting 1:" in again.err or "adopting 2:" in again.err
    assert worker.session.contributions["returned"] == 0
    worker.session.close()


def test_a_run_without_room_for_checkpoints_goes_on_and_says_so(processes: Processes, tmp_path: Path) -> None:
    """The disk is full (files may not grow any more), then the folder is gone, then everything is well again."""
    folder = tmp_path / "checkpoints"
    server = processes.server(*FLAGS, "--checkpoints", str(folder), "--checkpoint-every", "100ms")
    worker = Trainee(server, "w", features=20_000)  # far more than the server's log has to hold
    worker.train_until(lambda: checkpoints_in(folder), "one is written")
    unlimited = resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    worker.train_until(lambda: "no checkpoint could be written: File too large; the run goes on" in server.err, "full")
    good = checkpoints_in(folder)
    round_ = status_of(server.address).round
    worker.train_until(lambda: status_of(server.address).round > round_ + 3, "rounds go on")
    assert checkpoints_in(folder) == good
    read(good[-1])
    assert not list(folder.glob("*.part"))
    shutil.rmtree(folder)
    worker.train_until(lambda: "no checkpoint could be written: No such file or directory" in server.err, "gone")
    folder.mkdir()
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, unlimited)
    worker.train_until(lambda: checkpoints_in(folder), "one is written again")
    assert json.loads(server.out)["listening"]
    worker.session.close()
    with pytest.raises(WrongRunError):
        process_of_another_run(folder)


def process_of_another_run(folder: Path) -> None:
    """Embedded, the refusal leaves the folder to others."""
    options = ServerOptions(checkpoints=folder.with_name("copy"), resume=True, run_id="other")
    shutil.copytree(folder, folder.with_name("copy"), ignore=shutil.ignore_patterns("lock"))
    try:
        ServerProcess(options)
    finally:
        Checkpoints(folder.with_name("copy")).close()


def test_what_is_being_written_at_the_end_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Position] = []
    writing, let_go = threading.Event(), threading.Event()
    real = Checkpoints.write

    def slow(self: Checkpoints, state: SavedState) -> Path:
        written.append(state.replica.position)
        writing.set()
        assert let_go.wait(DEADLINE_S)
        return real(self, state)

    monkeypatch.setattr(Checkpoints, "write", slow)

    async def scenario() -> None:
        process = running(tmp_path, 0.001)
        await process.start()
        assert await asyncio.to_thread(writing.wait, DEADLINE_S)
        closing = asyncio.create_task(process.close())
        await asyncio.wait({closing}, timeout=0.1)  # it is in the middle of closing now, or still before that
        let_go.set()
        await asyncio.wait_for(closing, DEADLINE_S)

    asyncio.run(scenario())
    assert written == [Position(1, 2)]
