"""Servers that die, stall or are cut off, and workers that do: real processes, and books that must balance."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crew import CONFIG, Crew, Gate, crew_in
from processes import DEADLINE_S, Processes, Server, status_of, wait_until

from loscar_core.errors import ReplicaDivergedError
from loscar_deploy.books import close_books
from loscar_server.checkpoint import Checkpoints
from loscar_server.events import read_events

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    with crew_in(tmp_path, monkeypatch) as found:
        yield found


def events(crew: Crew, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(crew.folder / "events.jsonl") if e["event"] == kind]


def round_of(server: Server) -> int:
    return int(status_of(server.address).round)


def rounds_go_on(crew: Crew, server: Server, rounds: int = 3) -> None:
    goal = round_of(server) + rounds
    crew.train_until(lambda: round_of(server) >= goal, "rounds go on")


def end(crew: Crew, server: Server, *others: str) -> None:
    """End the run, and find the books in balance."""
    server.signal(signal.SIGTERM)
    found = crew.audited(others)
    assert found.failures == []
    assert found.lost == found.doubled == 0
    assert server.wait() == 0
    assert "Traceback" not in server.err


def test_a_killed_server_is_replaced_and_what_was_in_flight_counts(processes: Processes, crew: Crew) -> None:
    """Killed while two of three have contributed to the open round: its successor, without a disk, starts from where
    they are, and gets both contributions."""
    first = processes.server(*crew.flags, "--workers", "3")
    crew.join(dict.fromkeys(("w0", "w1", "w2"), first.address))
    rounds_go_on(crew, first)
    crew.resting = {"w2"}
    waiting = [crew.sessions[name] for name in ("w0", "w1")]
    crew.train_until(lambda: all(s.contributions["outstanding"] for s in waiting), "two have contributed")
    held = {s.engine.anchor.digest for s in crew.sessions.values()}
    round_ = crew.sessions["w0"].engine.anchor.position.round
    assert len(held) == 1
    first.signal(signal.SIGKILL)
    first.wait()
    second = processes.server(*crew.flags, listen=first.address)
    crew.resting = {"w0", "w1", "w2"}
    crew.train_until(lambda: len(events(crew, "running")) == 2, "the run goes on")
    running = events(crew, "running")[1]
    assert (running["epoch"], running["position"], running["recovered"]) == (2, [1, round_], True)
    assert "workers hold a state of this run: recovering it" in second.err
    crew.resting = set()
    rounds_go_on(crew, second)
    next_ = next(e for e in events(crew, "round") if e["epoch"] == 2)
    assert next_["round"] == round_ + 1
    assert next_["previous"] in held, "it starts from something else than what the workers held"
    present = {i for part in next_["parts"] for i in part}
    assert {s.engine.incarnation.hex() for s in waiting} <= present
    assert all(s.contributions["returned"] == 0 for s in waiting)
    assert all(s.reconnects == 1 for s in crew.sessions.values())
    end(crew, second)


def test_a_standby_takes_over_and_the_old_server_cannot_split_the_run(processes: Processes, crew: Crew) -> None:
    """The first stalls and the standby, which was there all the time, takes over. The first comes back to life, and is
    asked to take part again when the standby has died: it steps down, and a third goes on."""
    flags = [*crew.flags, "--lease", "3s", "--recover-after", "1s", "--start-grace", "300ms"]
    first = processes.server(*flags, "--workers", "3")
    standby = processes.server(*flags)
    crew.join(dict.fromkeys(("w0", "w1", "w2"), f"{first.address},{standby.address}"))
    rounds_go_on(crew, first)
    assert status_of(standby.address).phase == "waiting"
    first.signal(signal.SIGSTOP)
    crew.train_until(lambda: status_of(standby.address).phase == "running", "the standby takes over")
    rounds_go_on(crew, standby)
    first.signal(signal.SIGCONT)
    crew.train_until(lambda: not status_of(first.address).members, "the first server sees that it is alone")
    assert {d.reason for d in status_of(first.address).departures} <= {"stream-closed", "lease-expired"}
    rounds_go_on(crew, standby)
    assert len(status_of(standby.address).members) == 3
    standby.signal(signal.SIGKILL)
    standby.wait()
    crew.train_until(lambda: first.popen.poll() is not None, "the first server steps down")
    assert first.wait() == 19
    assert "stepping down" in first.err
    assert [e["epoch"] for e in events(crew, "stepped-down")] == [1]
    third = processes.server(*flags, listen=standby.address)
    crew.train_until(lambda: len(events(crew, "running")) == 3, "the third takes over")
    rounds_go_on(crew, third)
    assert [e["epoch"] for e in events(crew, "running")] == [1, 2, 3]
    end(crew, third)


def test_a_fresh_worker_that_is_first_does_not_begin_the_run_anew(processes: Processes, crew: Crew) -> None:
    """It does for as long as it is alone; then the run goes on, and what it did alone goes into that."""
    first = processes.server(*crew.flags, "--workers", "2")
    gate = Gate(first.address)
    try:
        crew.join(dict.fromkeys(("w0", "w1"), gate.address))
        rounds_go_on(crew, first)
        gate.shut()
        first.signal(signal.SIGKILL)
        first.wait()
        second = processes.server(*crew.flags, "--start-grace", "300ms", listen=first.address)
        crew.join({"fresh": second.address})
        rounds_go_on(crew, second)
        gate.open()
        crew.train_until(lambda: len(status_of(second.address).members) == 3, "all three are there")
        rounds_go_on(crew, second)
        assert events(crew, "running")[-1]["recovered"], "the run was begun anew"
        end(crew, second)
    finally:
        gate.close()


def test_a_lone_worker_does_not_take_the_run_to_the_standby(processes: Processes, crew: Crew) -> None:
    """Cut off from the server, it trains on at a standby that waits for more, and comes back when it can."""
    first = processes.server(*crew.flags, "--workers", "3")
    standby = processes.server(*crew.flags, "--recover-after", "1s")
    gate = Gate(first.address)
    try:
        crew.join({"w0": first.address, "w1": first.address, "w2": f"{gate.address},{standby.address}"})
        rounds_go_on(crew, first)
        gate.shut()
        crew.train_until(lambda: status_of(standby.address).phase == "recovering", "it is at the standby")
        rounds_go_on(crew, first)
        crew.train_until(lambda: "waiting for more of them" in standby.err, "the standby waits")
        gate.open()
        crew.train_until(lambda: len(status_of(first.address).members) == 3, "it is back")
        rounds_go_on(crew, first)
        assert len(events(crew, "running")) == 1
        end(crew, first)
    finally:
        gate.close()


def test_a_worker_that_stalls(processes: Processes, crew: Crew) -> None:
    """Stopped, it is waited for once, then suspended, then gone; continued, it comes back and what it had goes out.
    Stopped again and replaced by one of the same name, it ends."""
    server = processes.server(*crew.flags, "--workers", "3", "--lease", "3s", "--round-cap", "1s")
    command = ["-m", "loscar_deploy.chaos_worker", "--server", server.address, "--name", "stalling", "--slot", "2"]
    command += ["--workers", "3", "--folder", str(crew.folder), "--seed", str(CONFIG.seed), "--step-time", "0.01"]
    process = processes.python(*command)
    crew.join(dict.fromkeys(("w0", "w1"), server.address))
    rounds_go_on(crew, server)

    def state() -> str | None:
        return next((m.state for m in status_of(server.address).members if m.name == "stalling"), None)

    process.signal(signal.SIGSTOP)
    crew.train_until(lambda: state() == "suspended", "it is suspended")
    rounds_go_on(crew, server)
    crew.train_until(lambda: state() is None, "it is gone")
    status = processes.loscar("status", "--server", server.address, "--json")
    assert status.wait() == 0
    gone = [d for d in json.loads(status.out)["departures"] if d["name"] == "stalling"]
    assert [d["reason"] for d in gone] == ["lease-expired"]
    assert [e["reason"] for e in events(crew, "gone")] == ["lease-expired"]
    assert "stalling left: lease-expired (nothing heard for 3 s)" in server.err
    rounds_go_on(crew, server)

    process.signal(signal.SIGCONT)
    crew.train_until(lambda: state() == "active", "it is back")
    rounds_go_on(crew, server)
    process.signal(signal.SIGSTOP)
    again = processes.python(*command)
    crew.train_until(lambda: any(e["reason"] == "superseded" for e in events(crew, "gone")), "it is replaced")
    process.signal(signal.SIGCONT)
    crew.train_until(lambda: process.popen.poll() is not None, "it ends")
    assert process.wait() == 15
    assert "a newer worker named 'stalling' has taken over" in process.err
    crew.train_until(lambda: state() == "active", "the new one takes part")
    rounds_go_on(crew, server)
    assert any(e["text"].startswith("stalling starts where w") for e in events(crew, "notice"))
    end(crew, server, "stalling")
    assert again.wait() == 0


def test_a_slow_link_contributes_to_every_round(processes: Processes, crew: Crew) -> None:
    server = processes.server(*crew.flags, "--workers", "3")
    gate = Gate(server.address, "rtt=400ms,rate=100kbit")
    try:
        crew.join({"w0": server.address, "w1": server.address, "far": gate.address})
        rounds_go_on(crew, server, 5)
        end(crew, server)
        far = crew.sessions["far"].engine.incarnation.hex()
        assert all(far in e["parts"][0] for e in events(crew, "round"))
    finally:
        gate.close()


def test_a_worker_whose_replica_diverges_leaves_with_its_reason(processes: Processes, crew: Crew) -> None:
    """It is given the whole state once; when that does not help, it ends, and the others go on."""
    server = processes.server(*crew.flags, "--workers", "3")
    crew.join(dict.fromkeys(("w0", "w1", "bad"), server.address))
    rounds_go_on(crew, server)
    anchor = crew.sessions["bad"].engine.anchor
    right = anchor.next_digest
    anchor.next_digest = lambda *round_: right(*round_) ^ 1  # type: ignore[method-assign]
    with pytest.raises(ReplicaDivergedError, match="left the digest chain again"):
        crew.train_until(lambda: False, "it ends")
    bad = crew.sessions.pop("bad")
    crew.train_until(lambda: len(status_of(server.address).members) == 2, "it is gone")
    [gone] = [d for d in status_of(server.address).departures if d.name == "bad"]
    assert gone.reason == "diverged"
    rounds_go_on(crew, server)
    bad.close()
    server.signal(signal.SIGTERM)
    crew.train_until(lambda: all(s.finished for s in crew.sessions.values()), "the run ends")


def test_who_leaves_politely_takes_nothing_along(processes: Processes, crew: Crew) -> None:
    """A worker that stops training hands over all it has, coordinate by coordinate, before it goes."""
    server = processes.server(*crew.flags, "--workers", "3")
    crew.join(dict.fromkeys(("w0", "w1", "leaver"), server.address))
    rounds_go_on(crew, server)
    leaver = crew.sessions["leaver"]
    crew.resting = {"leaver"}
    outcome: list[bool] = []
    parting = threading.Thread(target=lambda: outcome.append(leaver.part(DEADLINE_S)))
    parting.start()
    crew.train_until(lambda: not parting.is_alive(), "it has parted")
    assert outcome == [True]
    held = leaver.live() - leaver.engine.anchor.vector
    np.testing.assert_allclose(held, 0, atol=1e-6)
    crew.sessions.pop("leaver").close()
    close_books(leaver, crew.folder)
    rounds_go_on(crew, server)
    server.signal(signal.SIGTERM)
    found = crew.audited(["leaver"])
    assert found.failures == ["leaver holds another state than w0"], "an earlier one, with nothing missing in it"


def test_a_dense_round_is_saved_at_once(processes: Processes, tmp_path: Path) -> None:
    """At a low density the consensus is worth saving after a dense round, which comes as soon as it is a twentieth of
    what has been sent; the next regular checkpoint would be ten minutes away."""
    folder = tmp_path / "checkpoints"
    flags = ["--workers", "1", "--density", "0.1", "--local-steps", "1"]
    server = processes.server(*flags, "--checkpoints", str(folder), "--checkpoint-every", "10m")
    worker = processes.loscar("worker", "--server", server.address)
    wait_until(lambda: list(folder.glob("*.safetensors")), "a checkpoint")
    for process in (worker, server):
        process.signal(signal.SIGKILL)
        process.wait()
    saved = Checkpoints(folder, 3).newest()
    assert saved is not None
    assert saved.replica.position.round >= 191
