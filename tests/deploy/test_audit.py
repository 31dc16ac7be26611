"""The audit of a chaos run: it passes books that balance, and names what is wrong with each kind that does not."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loscar_core.config import FinalRound, RunConfig
from loscar_core.plan import consolidation, plan_round
from loscar_core.replica import checksum_of
from loscar_deploy.audit import Audit, audit
from loscar_deploy.books import HEADER

DIMENSION = 40
CONFIG = RunConfig(seed=5, density=0.5, final_round=FinalRound.NONE)
NAMES = ["w0", "w1", "w2"]

Floats = NDArray[np.float32]


class Worker:
    """What a worker of the audited run holds and writes down."""

    def __init__(self, number: int, initial: Floats) -> None:
        self.name = f"w{number}"
        self.incarnation = f"{number:032x}"
        self.live = initial.astype(np.float64)
        self.anchor = initial.copy()
        self.stepped = np.zeros(DIMENSION)
        self.forgone = np.zeros(DIMENSION)
        self.taken: dict[int, Floats] = {}
        self.included = 0
        self.lives: list[tuple[str, int]] = []
        self.given_up: list[int] = []

    @property
    def file(self) -> str:
        return f"{self.name}.{self.incarnation}.1.sent"

    def train(self, rng: np.random.Generator) -> None:
        step = rng.normal(0, 0.1, DIMENSION).astype(np.float32)
        self.live += step
        self.stepped += step


class Written:
    """A run of three workers, worked out by hand and written down as its processes would.

    Five rounds; in the third w1 is late. The fourth is first closed by a server that dies with it: only w0 has heard of
    it, and takes it back when the next server closes the fourth without w2.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(1)
        self.initial = self.rng.normal(0, 1, DIMENSION).astype(np.float32)
        self.consensus = self.initial.copy()
        self.digest = checksum_of(self.initial, np.empty(0, np.float32))
        self.workers = [Worker(i, self.initial) for i in range(3)]
        self.events: list[dict[str, Any]] = []
        self.epoch = 1
        self.dense: set[int] = set()

    def take(self, number: int) -> None:
        """Everybody trains, and takes a contribution to a round."""
        at = self.indices(number)
        for w in self.workers:
            w.train(self.rng)
            if number not in w.taken:
                w.taken[number] = (w.live[at] - w.anchor[at]).astype(np.float32)

    def indices(self, number: int) -> NDArray[np.int64]:
        plan = plan_round(CONFIG, DIMENSION, number, stopping=False)
        if number in self.dense:
            plan = consolidation(plan, DIMENSION)
        return plan.indices(CONFIG.seed, DIMENSION)

    def close(
        self, number: int, members: list[Worker], heard: list[Worker], *, summed: list[Worker] | None = None
    ) -> Floats:
        """Close a round with the contributions of some, and let some hear of it. Returns what was added to c[S]."""
        at = self.indices(number)
        total = np.zeros(at.size, np.float32)
        for place, w in enumerate(members if summed is None else summed):
            total = w.taken[number].copy() if place == 0 else total + w.taken[number]
        before = self.consensus[at]
        after = before + total / np.float32(3)
        digest = zlib.crc32(after.tobytes(), self.digest)
        parts = [[w.incarnation for w in members]]
        event = {"event": "round", "epoch": self.epoch, "round": number, "n": 3, "digest": digest}
        kind = "consolidation" if number in self.dense else "train"
        self.events.append(event | {"kind": kind, "previous": self.digest, "parts": parts})
        self.consensus[at] = after
        self.digest = digest
        for w in heard:
            self.merge(w, number, after - w.anchor[at], subtract=w in members)
        return after - before

    def merge(self, w: Worker, number: int, change: Floats, *, subtract: bool) -> None:
        at = self.indices(number)
        w.anchor[at] += change
        w.live[at] += change
        if subtract:
            w.live[at] -= w.taken[number]
            w.included += 1

    def undo(self, w: Worker, number: int, change: Floats) -> None:
        at = self.indices(number)
        w.anchor[at] -= change
        w.live[at] -= change
        w.live[at] += w.taken[number]
        w.included -= 1

    def begin(self) -> None:
        """Rounds 1 and 2, with everybody."""
        for number in (1, 2):
            self.take(number)
            self.close(number, self.workers, self.workers)

    def third(self) -> None:
        w0, _, w2 = self.workers
        self.take(3)
        self.close(3, [w0, w2], self.workers)

    def fourth(self, undo: Callable[[Worker, int, Floats], None] | None = None) -> None:
        w0, w1, _ = self.workers
        self.take(4)
        held, digest = self.consensus.copy(), self.digest
        change = self.close(4, self.workers, [w0])
        self.consensus, self.digest, self.epoch = held, digest, 2
        w0.anchor[self.indices(4)] = held[self.indices(4)] + change
        (undo or self.undo)(w0, 4, change)
        w0.anchor[:] = held
        self.close(4, [w0, w1], self.workers)

    def last(self) -> None:
        self.take(5)
        self.close(5, self.workers, self.workers)

    def whole(self) -> None:
        self.begin()
        self.third()
        self.fourth()
        self.last()

    def audited(self) -> Audit:
        """Write everything down, and audit it."""
        lines = [{"event": "serving", "epoch": 1}, *self.events]
        (self.folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
        for w in self.workers:
            records = [HEADER.pack(number, v.size) + v.tobytes() for number, v in w.taken.items()]
            (self.folder / w.file).write_bytes(b"".join(records))
            values = {
                "name": w.name,
                "lives": [*w.lives, (w.file, len(w.taken))],
                "given_up": w.given_up,
                "position": [2, 5],
                "digest": self.digest,
                "steps": 5,
                "reconnects": 0,
                "contributions": {"sent": len(w.taken), "included": w.included},
            }
            (self.folder / f"{w.name}.json").write_text(json.dumps(values))
            np.savez(
                self.folder / f"{w.name}.npz",
                live=w.live,
                anchor=w.anchor,
                stepped=w.stepped,
                given=np.zeros(DIMENSION),
                forgone=w.forgone,
            )
        return audit(self.folder, NAMES, CONFIG, self.initial)


@pytest.fixture
def run(tmp_path: Path) -> Written:
    return Written(tmp_path)


@pytest.mark.parametrize("dense", [0, 2, 4])
def test_books_that_balance_pass(run: Written, dense: int) -> None:
    run.dense = {dense}
    run.whole()
    found = run.audited()
    assert found.failures == []
    figures = found.figures()
    assert figures["rounds"] == 5
    assert figures["rounds_committed"] == 6
    assert figures["rounds_abandoned"] == 1
    assert figures["contributions_in_consensus"] == 3 + 3 + 2 + 2 + 3
    assert figures["contributions_lost"] == figures["contributions_doubled"] == 0
    assert [w["in_consensus"] for w in figures["ledger"]] == [5, 4, 4]
    for ledger in figures["ledger"]:
        assert ledger["error"] < 1e-6
        assert ledger["smallest_contribution"] > 0.01, "or a lost one would not show"
    expected = np.mean([w.live for w in run.workers], axis=0)
    assert found.live_mean is not None
    np.testing.assert_array_equal(found.live_mean, expected)


def test_a_contribution_that_is_left_out_of_the_sum_is_noticed(run: Written) -> None:
    run.begin()
    run.take(3)
    run.close(3, run.workers, run.workers, summed=run.workers[:2])
    run.fourth()
    run.last()
    assert run.audited().failures == ["round 3 cannot be computed from what was sent"]


def test_a_contribution_that_is_summed_twice_is_noticed(run: Written) -> None:
    run.begin()
    run.take(3)
    run.close(3, run.workers, run.workers, summed=[*run.workers, run.workers[1]])
    run.fourth()
    run.last()
    assert run.audited().failures == ["round 3 cannot be computed from what was sent"]


def test_a_contribution_that_is_in_but_was_kept_is_counted_twice(run: Written) -> None:
    run.whole()
    at = run.indices(5)
    run.workers[1].live[at] += run.workers[1].taken[5]
    run.workers[1].included -= 1
    found = run.audited()
    assert found.figures()["contributions_doubled"] == 1
    assert found.failures[0] == "w1 counts 3 contributions, the server 4"
    assert found.failures[1].startswith("w1: the ledger is out of balance by 0.")


def test_a_contribution_that_is_not_in_but_was_given_away_is_lost(run: Written) -> None:
    run.whole()
    late = run.workers[1]
    late.live[run.indices(3)] -= late.taken[3]
    late.included += 1
    found = run.audited()
    assert found.figures()["contributions_lost"] == 1
    assert found.failures[0] == "w1 counts 5 contributions, the server 4"
    assert found.failures[1].startswith("w1: the ledger is out of balance by 0.")


def test_an_abandoned_round_that_is_not_undone_is_noticed(run: Written) -> None:
    def forget_to_add_back(w: Worker, number: int, change: Floats) -> None:
        w.live[run.indices(number)] -= change
        w.included -= 1

    run.begin()
    run.third()
    run.fourth(forget_to_add_back)
    run.last()
    found = run.audited()
    assert len(found.failures) == 1
    assert found.failures[0].startswith("w0: the ledger is out of balance by 0.")


def test_a_step_that_went_missing_is_noticed(run: Written) -> None:
    run.whole()
    run.workers[2].live[7] -= 1e-4
    assert run.audited().failures == ["w2: the ledger is out of balance by 0.0001"]


def test_a_replica_that_differs_in_one_bit_is_noticed(run: Written) -> None:
    run.whole()
    run.workers[2].anchor.view(np.uint32)[3] ^= 1
    assert "w2 holds another state than w0" in run.audited().failures


def test_a_consensus_that_nobody_computed_is_noticed(run: Written) -> None:
    run.whole()
    for w in run.workers:
        w.anchor[0] += 1
        w.live[0] += 1
    assert run.audited().failures == ["the replayed consensus is not the one that the workers hold"]


def test_a_gap_in_the_servers_log_is_noticed(run: Written) -> None:
    run.whole()
    run.events = [e for e in run.events if e["round"] != 2]
    assert run.audited().failures == ["the final state does not go back to round 1 in the server's log"]


def test_a_contribution_that_nobody_wrote_down_is_noticed(run: Written) -> None:
    run.whole()
    del run.workers[0].taken[2]
    failures = run.audited().failures
    assert failures == [f"round 2 holds a contribution of {run.workers[0].incarnation} that nobody wrote down"]


def test_a_worker_that_did_not_end_is_noticed(run: Written) -> None:
    run.whole()
    NAMES.append("w3")
    try:
        assert run.audited().failures == ["w3 did not end in order"]
    finally:
        NAMES.pop()


def test_a_resumed_worker_is_balanced_without_what_was_not_saved(run: Written) -> None:
    """w2 was saved after round 1, lived on, and was killed after round 3; it comes back under another incarnation, and
    gives up what the consensus may hold already."""
    run.take(1)
    run.close(1, run.workers, run.workers)
    w2 = run.workers[2]
    live, stepped, included = w2.live - w2.anchor, w2.stepped.copy(), w2.included
    run.take(2)
    run.close(2, run.workers, run.workers)
    run.third()
    first_life = w2.file, {**w2.taken}
    w2.lives, w2.incarnation, w2.taken = [(w2.file, 1)], f"{7:032x}", {}
    w2.live, w2.stepped, w2.included = w2.anchor + live, stepped, included
    w2.forgone, w2.live = w2.anchor - w2.live, w2.anchor.astype(np.float64)
    run.fourth()
    run.last()
    records = [HEADER.pack(number, v.size) + v.tobytes() for number, v in first_life[1].items()]
    (run.folder / first_life[0]).write_bytes(b"".join(records))
    found = run.audited()
    assert found.failures == []
    ledger = found.figures()["ledger"][2]
    assert (ledger["lives"], ledger["in_consensus"], ledger["not_known"]) == (2, 2, 2)
    w2.forgone[:] = 0
    assert run.audited().failures[0].startswith("w2: the ledger is out of balance by ")
