"""The fuzzers' own parts: honest runs get far, mutations differ, and a short run without guidance finds nothing."""

from __future__ import annotations

import random
from pathlib import Path

from conversation import MESSAGE, SERVERS, WorkerTarget, drive, frames
from honest import honest_runs
from mutations import mutated
from processes import Processes

FUZZ = Path(__file__).parent.parent / "fuzz"


def test_honest_conversations_get_far_and_nobody_is_refused() -> None:
    """Mutations of runs that end at the door would never reach the rounds."""
    runs = honest_runs()
    assert len(runs) == 6 * len(SERVERS)
    for data in runs:
        target = drive(data)
        if isinstance(target, WorkerTarget):
            assert target.engine.anchor.position.round >= 5
            assert target.engine.ledger.included >= 4
            assert not target.ended
        else:
            assert target.machine.replica is not None
            assert target.machine.replica.position.round >= 3
            assert not target.machine.refused


def test_mutated_conversations_break_nothing() -> None:
    rng = random.Random(5)
    pool = honest_runs()
    refused: dict[str, int] = {}
    rounds = merged = 0
    for _ in range(300):
        target = drive(mutated(rng.choice(pool), rng))
        if isinstance(target, WorkerTarget):
            merged += target.merged > 1
            continue
        machine = target.machine
        rounds += machine.replica is not None and machine.replica.position.round > 1
        for kind, count in machine.refused.items():
            refused[kind] = refused.get(kind, 0) + count
    # They are neither harmless nor all of them refused at once.
    assert rounds > 100
    assert merged > 30
    assert refused["MalformedError"] > 30
    assert len(refused) > 4


def test_mutations_leave_conversations_readable() -> None:
    rng = random.Random(6)
    [data, *_] = honest_runs()
    told = [f for f in frames(data) if f[0] == MESSAGE]
    changed = [f for f in frames(mutated(data, rng)) if f[0] == MESSAGE]
    assert len(told) > 10
    assert len(changed) > len(told) // 2
    assert any(mutated(data, rng) != data for _ in range(3))


def test_the_driver_counts_and_reports(processes: Processes, tmp_path: Path) -> None:
    fuzz = processes.python(str(FUZZ), "--blind", "--runs", "60", "--seed", "3", "--crashes", str(tmp_path / "crashes"))
    assert fuzz.wait() == 0, fuzz.err
    inputs, crashes, hangs, memory = fuzz.out.splitlines()
    assert inputs.startswith("inputs   60 in ")
    assert inputs.endswith("mutated from seed 3")
    assert crashes == "crashes  0"
    assert hangs.startswith("hangs    0 ")
    assert "MB after 10 % of the inputs" in memory
    assert not (tmp_path / "crashes").exists()
    short = processes.python(str(FUZZ), "--blind", "--runs", "1e9", "--seconds", "0.2")
    assert short.wait() == 1  # fewer inputs than were asked for
    assert "1000000000 were wanted" in short.out
