"""A server that is stopped without ending its run: real processes, and books that must balance."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crew import Crew, crew_in, free_address
from processes import Processes, Server, status_of, wait_until

from loscar_server.checkpoint import Checkpoints
from loscar_server.events import read_events

pytestmark = pytest.mark.timeout(180)

PAUSED = 128 + signal.SIGTERM
FLAGS = ("--pause-on", "term")
GATED = """
import os, sys, time
from pathlib import Path
from loscar_deploy.cli import main
from loscar_server.checkpoint import Checkpoints

gate, write = Path(os.environ["GATE"]), Checkpoints.write

def slowly(*args):
    gate.with_suffix(".reached").touch()
    while not gate.exists():
        time.sleep(0.01)
    return write(*args)

Checkpoints.write = slowly
sys.exit(main(sys.argv[1:]))
"""
"""A server whose disk answers when the file $GATE is there."""


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    with crew_in(tmp_path, monkeypatch) as found:
        yield found


def events(crew: Crew, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(crew.folder / "events.jsonl") if e["event"] == kind]


def rounds_go_on(crew: Crew, server: Server, rounds: int = 3) -> None:
    goal = status_of(server.address).round + rounds
    crew.train_until(lambda: status_of(server.address).round >= goal, "rounds go on")


def a_round_is_open(crew: Crew) -> list[str]:
    """Two of three have contributed to it; their incarnations."""
    crew.resting = {"w2"}
    waiting = [crew.sessions[name] for name in ("w0", "w1")]
    crew.train_until(lambda: all(s.contributions["outstanding"] for s in waiting), "two have contributed")
    crew.resting = {"w0", "w1", "w2"}
    return [s.engine.incarnation.hex() for s in waiting]


def pause(server: Server) -> None:
    """In the middle of a run, as a supervisor does; the workers are sent away with a reason to come back."""
    server.signal(signal.SIGTERM)
    assert server.wait() == PAUSED, server.err
    assert "pausing the run" in server.err
    assert "ending the run" not in server.err
    assert server.err.count("left: server-stopped (the server is shutting down)") == 3
    assert "Traceback" not in server.err


def went_on(crew: Crew, server: Server, contributors: list[str], held: set[int], round_: int) -> None:
    """In a new epoch from where the workers were, with what was in flight, and every step accounted for."""
    crew.train_until(lambda: len(events(crew, "running")) == 2, "the run goes on")
    running = events(crew, "running")[1]
    assert (running["epoch"], running["position"], running["recovered"]) == (2, [1, round_], True)
    crew.resting = set()
    rounds_go_on(crew, server)
    next_ = next(e for e in events(crew, "round") if e["epoch"] == 2)
    assert (next_["round"], next_["previous"] in held) == (round_ + 1, True)
    assert set(contributors) <= {i for part in next_["parts"] for i in part}
    assert all(s.reconnects == 1 for s in crew.sessions.values())
    assert all(s.contributions["returned"] == 0 for s in crew.sessions.values())
    server.signal(signal.SIGINT)  # what still ends the run
    found = crew.audited()
    assert found.failures == []
    assert found.lost == found.doubled == 0
    assert server.wait() == 0, server.err


@pytest.mark.parametrize("checkpoints", [True, False], ids=["from its checkpoint", "from its workers"])
def test_a_paused_run_goes_on_with_nothing_lost(processes: Processes, crew: Crew, *, checkpoints: bool) -> None:
    folder = crew.folder / "checkpoints"
    disk = ["--checkpoints", str(folder), "--checkpoint-every", "1h", "--resume"] if checkpoints else []
    first = processes.server(*crew.flags, *FLAGS, *disk, "--workers", "3")
    crew.join(dict.fromkeys(("w0", "w1", "w2"), first.address))
    rounds_go_on(crew, first)
    contributors = a_round_is_open(crew)
    anchors = [s.engine.anchor for s in crew.sessions.values()]
    held, [round_] = {a.digest for a in anchors}, {a.position.round for a in anchors}
    pause(first)
    if checkpoints:
        assert f"at 1:{round_}, which is saved" in first.err
        store = Checkpoints(folder)
        saved = store.newest()
        store.close()  # a lock on the folder would keep the next server out
        assert saved is not None
        assert saved.replica.position.round == round_
        assert {saved.replica.digest} == held
    else:
        assert f"at 1:{round_}, which the workers hold" in first.err
    assert not any(s.finished for s in crew.sessions.values())
    steps = {name: s.steps for name, s in crew.sessions.items()}
    crew.resting = {"w2"}
    for _ in range(5):  # nobody needs a server for that
        crew.step()
    assert [s.steps - steps[name] for name, s in crew.sessions.items()] == [5, 5, 0]
    crew.resting = {"w0", "w1", "w2"}
    second = processes.server(*crew.flags, *FLAGS, *disk, listen=first.address)
    assert ("resuming run" in second.err) == checkpoints
    went_on(crew, second, contributors, held, round_)


def test_a_second_signal_does_not_wait_for_the_disk(processes: Processes, crew: Crew, tmp_path: Path) -> None:
    """Told again while the checkpoint cannot be written, the server ends; the workers hold the state all the same."""
    gate, folder = tmp_path / "gate", tmp_path / "checkpoints"
    disk = ["--checkpoints", str(folder), "--checkpoint-every", "1h"]
    address = free_address()
    arguments = ["server", "--listen", address, "--json", *crew.flags, *FLAGS, *disk, "--workers", "3"]
    first = processes.python("-c", GATED, *arguments, GATE=str(gate))
    first.says("listening")
    crew.join(dict.fromkeys(("w0", "w1", "w2"), address))
    crew.train_until(lambda: status_of(address).round >= 3, "rounds go on")
    contributors = a_round_is_open(crew)
    anchors = [s.engine.anchor for s in crew.sessions.values()]
    held, [round_] = {a.digest for a in anchors}, {a.position.round for a in anchors}
    first.signal(signal.SIGTERM)
    wait_until(gate.with_suffix(".reached").exists, "the checkpoint is begun")
    assert first.popen.poll() is None
    first.signal(signal.SIGTERM)
    assert first.wait() == 130, first.err
    assert not list(folder.glob("*.safetensors"))
    second = processes.server(*crew.flags, *FLAGS, *disk, "--resume", listen=address)
    assert "no checkpoint to resume from" in second.err
    went_on(crew, second, contributors, held, round_)


def test_a_server_without_a_run_and_one_whose_run_is_over_just_end(processes: Processes, crew: Crew) -> None:
    waiting = processes.server(*crew.flags, *FLAGS)
    waiting.signal(signal.SIGTERM)
    assert waiting.wait() == PAUSED
    assert "paused; no run was on here" in waiting.err
    over = processes.server(*crew.flags, *FLAGS, "--workers", "1", "--rounds", "3", "--linger", "1h")
    crew.join({"w0": over.address})
    crew.train_until(lambda: crew.sessions["w0"].finished, "the run ends")
    over.says("run finished")
    over.signal(signal.SIGTERM)
    assert over.wait() == 0, over.err


def test_another_signal_can_be_the_one(processes: Processes, crew: Crew) -> None:
    """For supervisors whose SIGTERM goes to every process at a time; SIGTERM is then what it was."""
    server = processes.server(*crew.flags, "--pause-on", "hup")
    server.signal(signal.SIGHUP)
    assert server.wait() == 128 + signal.SIGHUP
    server = processes.server(*crew.flags, "--pause-on", "hup", "--linger", "0s")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "ending the run" in server.err
