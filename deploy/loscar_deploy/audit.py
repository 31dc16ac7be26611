"""Balances a run's books: was any progress lost, or counted twice?

It works on what three parties wrote down independently: the server's event log says which contributions each
committed round holds, the workers' logs say what those contributions were, and at the end each worker says where it
is and how far its own steps moved it (see `books`). From that it walks the final state's history backwards
along the digest chain, replays it, and checks

- replicas: every anchor is the same, bit for bit, at the same position;
- replay: the initial model plus the rounds' averages, computed anew from the workers' logs, is that anchor, and
  every digest on the way is what the server wrote;
- ledger: for each worker x − a = (its steps) − (its contributions that are in the consensus), float32's rounding
  apart, and the worker's own count of included contributions is that of the server's log.

A worker that was resumed from a saved state is balanced like the others: what its lives did after their last save is
lost with them, and not in its books.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loscar_core.config import RunConfig
from loscar_core.plan import Part, RoundKind, consolidation, parts_of, plan_round
from loscar_core.replica import Indices, checksum_of
from loscar_deploy.books import Lives, read_sent
from loscar_server.events import read_events

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

ROUNDING = 2e-5
"""Largest difference per coordinate that hundreds of merges in float32 may leave; contributions are of 1e-2."""


@dataclass(frozen=True, slots=True)
class Round:
    """A committed round on the final state's history.

    Attributes:
        kind: of the round, as in its event.
        parts: per part the incarnations in its sum, by slot.
    """

    number: int
    kind: str
    members: int
    digest: int
    previous: int
    parts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Ending:
    """Where a worker ended.

    Attributes:
        values: what it wrote as JSON.
        live, anchor, stepped, given, forgone: see `books`.
    """

    values: dict[str, Any]
    live: Doubles
    anchor: Floats
    stepped: Doubles
    given: Doubles
    forgone: Doubles


@dataclass
class Audit:
    """What was found; `failures` is empty when everything is accounted for."""

    failures: list[str] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    committed: int = 0
    included: int = 0
    lost: int = 0
    doubled: int = 0
    ledgers: list[dict[str, Any]] = field(default_factory=list)
    live_mean: Doubles | None = None

    def figures(self) -> dict[str, Any]:
        """What goes into the verdict."""
        last = self.rounds[-1].number if self.rounds else 0
        return {
            "rounds": last,
            "rounds_committed": self.committed,
            "rounds_abandoned": self.committed - last,
            "contributions_in_consensus": self.included,
            "contributions_lost": self.lost,
            "contributions_doubled": self.doubled,
            "ledger": self.ledgers,
        }


def incarnation_of(name: str) -> str:
    """Whose a file of contributions is."""
    return name.split(".")[-3]


def read_ending(folder: Path, name: str) -> Ending | None:
    """What a worker wrote at its end, or None."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    with np.load(folder / f"{name}.npz") as arrays:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Ending(values, *(arrays[k] for k in ("live", "anchor", "stepped", "given", "forgone")))


def history(events: list[dict[str, Any]], digest: int, round_: int) -> list[Round]:
    """The rounds that lead to a state, oldest first, found backwards by their digests."""
    committed = {(e["round"], e["digest"]): e for e in events if e["event"] == "round"}
    found: list[Round] = []
    while round_ > 0 and (round_, digest) in committed:
        e = committed[round_, digest]
        found.append(Round(round_, e["kind"], e["n"], digest, e["previous"], tuple(tuple(p) for p in e["parts"])))
        round_, digest = round_ - 1, e["previous"]
    return found[::-1]


class Replay:
    """Computes the consensus anew from what the workers say that they sent.

    Args:
        config: the run's.
        initial: the model that it started from, d float32.
        folder: with the workers' logs.
        lives: of each worker, those that it knows of.
    """

    def __init__(self, config: RunConfig, initial: Floats, folder: Path, lives: Iterable[Lives] = ()) -> None:
        self.consensus = initial.copy()
        self._config = config
        self._digest = checksum_of(initial, np.empty(0, np.float32))
        self._sent: dict[tuple[str, int], list[Floats]] = defaultdict(list)
        for path in sorted(folder.glob("*.sent")):
            for number, values in read_sent(path):
                self._sent[incarnation_of(path.name), number].append(values)
        self._others: dict[str, list[str]] = {}
        for worker in lives:
            incarnations = [incarnation_of(name) for name, _ in worker]
            self._others.update(dict.fromkeys(incarnations, incarnations))

    def indices(self, entry: Round) -> Indices:
        """What a round selected."""
        dimension = self.consensus.size
        plan = plan_round(self._config, dimension, entry.number, stopping=False)
        if entry.kind == RoundKind.CONSOLIDATION.name.lower():
            plan = consolidation(plan, dimension)
        return plan.indices(self._config.seed, dimension)

    def sent(self, incarnation: str, number: int) -> list[Floats]:
        """What was taken by that incarnation for a round: one, unless the round was planned anew. A resumed worker
        may also have sent what an earlier life has left in flight."""
        own = self._sent.get((incarnation, number))
        if own is not None:
            return own
        return [v for other in self._others.get(incarnation, ()) for v in self._sent.get((other, number), ())]

    def apply(self, entry: Round) -> str | None:
        """Take a round over; returns what is wrong with it, or None."""
        if self._digest != entry.previous:
            return f"round {entry.number} does not build on the state before it"
        indices = self.indices(entry)
        for choice in self._choices(entry, indices.size):
            values = self.consensus[indices]
            for part, members in zip(parts_of(indices.size), entry.parts, strict=True):
                values[part.start : part.stop] += _mean(part, members, choice, entry.members)
            if zlib.crc32(values.tobytes(), self._digest) == entry.digest:
                self.consensus[indices] = values
                self._digest = entry.digest
                return None
        missing = [i for part in entry.parts for i in part if not self.sent(i, entry.number)]
        if missing:
            return f"round {entry.number} holds a contribution of {missing[0]} that nobody wrote down"
        return f"round {entry.number} cannot be computed from what was sent"

    def _choices(self, entry: Round, size: int) -> Iterator[dict[str, Floats]]:
        members = sorted({i for part in entry.parts for i in part})
        sent = {i: [v for v in self.sent(i, entry.number) if v.size == size] for i in members}
        if all(sent.values()):
            yield {i: found[0] for i, found in sent.items()}
            for i, found in sent.items():
                for other in found[1:]:
                    yield {**{j: f[0] for j, f in sent.items()}, i: other}


def _mean(part: Part, members: tuple[str, ...], sent: dict[str, Floats], divisor: int) -> Floats:
    """As the server computes it: by slot, in float32."""
    total = np.zeros(part.size, np.float32)
    for number, incarnation in enumerate(members):
        values = sent[incarnation][part.start : part.stop]
        total = values.copy() if number == 0 else total + values
    mean: Floats = total / np.float32(max(1, divisor))
    return mean


class Contributions:
    """What one worker contributed, in all lives that it knows of.

    Args:
        lives: see `books`; a life that was resumed sends what the one before it has left in flight.
        given_up: rounds of those that it has forgotten.
        folder: with their files.
    """

    def __init__(self, lives: Lives, given_up: list[int], folder: Path) -> None:
        self._incarnations = [incarnation_of(name) for name, _ in lives]
        self._own: list[dict[tuple[int, int], Floats]] = []  # by round and size: a round may be planned anew
        for name, count in lives:
            known = itertools.islice(read_sent(folder / name), count) if count else ()
            self._own.append({(number, v.size): v for number, v in known if number not in given_up})

    def to(self, number: int, size: int, members: tuple[str, ...]) -> tuple[bool, Floats | None]:
        """Whether it is among the members of a part, and what it knows to have sent for that round."""
        for life in reversed(range(len(self._incarnations))):
            if self._incarnations[life] in members:
                key = (number, size)
                found = (own[key] for own in reversed(self._own[: life + 1]) if key in own)
                return True, next(found, None)
        return False, None


def balance(ending: Ending, replay: Replay, rounds: list[Round], folder: Path) -> dict[str, Any]:
    """A worker's ledger: what its live vector should be, against what it is."""
    dimension = ending.live.size
    contributions = Contributions(ending.values["lives"], ending.values["given_up"], folder)
    contributed = np.zeros(dimension)
    number, not_known, smallest = 0, 0, np.inf
    for entry in rounds:
        indices = replay.indices(entry)
        included, known = False, False
        for part, members in zip(parts_of(indices.size), entry.parts, strict=True):
            here, values = contributions.to(entry.number, indices.size, members)
            included |= here
            if values is not None:
                known = True
                contributed[indices[part.start : part.stop]] += values[part.start : part.stop]
                smallest = min(smallest, float(np.abs(values).max(initial=0.0)))
        number += known
        not_known += included and not known
    progress = ending.live - ending.anchor.astype(np.float64)
    expected = ending.stepped + ending.given + ending.forgone - contributed
    counts = ending.values["contributions"]
    return {
        "name": ending.values["name"],
        "lives": len(ending.values["lives"]),
        "steps": ending.values["steps"],
        "reconnects": ending.values["reconnects"],
        "sent": counts["sent"],
        "included": counts["included"],
        "in_consensus": number,
        "not_known": not_known,
        "error": float(np.abs(progress - expected).max()),
        "progress": float(np.abs(progress).max()),
        "smallest_contribution": smallest if number else 0.0,
        "forgone": float(np.linalg.norm(ending.forgone)),
    }


def audit(folder: Path, names: list[str], config: RunConfig, initial: Floats) -> Audit:
    """Check a finished run.

    Args:
        folder: with `events.jsonl` and what the workers wrote.
        names: of the workers that must have ended in order.
        config: the run's; its final round must be none, since a dense one would hide what is out of balance.
        initial: the model that it started from.
    """
    result = Audit()
    say = result.failures.append
    events = read_events(folder / "events.jsonl")
    result.committed = sum(e["event"] == "round" for e in events)
    endings = [e for e in (read_ending(folder, name) for name in names) if e is not None]
    silent = set(names) - {e.values["name"] for e in endings}
    if silent:
        say(f"{', '.join(sorted(silent))} did not end in order")
    if not endings:
        return result
    first = endings[0]
    for e in endings:
        same = e.values["position"] == first.values["position"] and e.values["digest"] == first.values["digest"]
        if not same or e.anchor.tobytes() != first.anchor.tobytes():
            say(f"{e.values['name']} holds another state than {first.values['name']}")
    rounds = result.rounds = history(events, first.values["digest"], first.values["position"][1])
    if not rounds or rounds[0].number != 1:
        say("the final state does not go back to round 1 in the server's log")
        return result
    replay = Replay(config, initial, folder, [e.values["lives"] for e in endings])
    for entry in rounds:
        wrong = replay.apply(entry)
        if wrong is not None:
            say(wrong)
            return result
    if replay.consensus.tobytes() != first.anchor.tobytes():
        say("the replayed consensus is not the one that the workers hold")
    result.included = sum(len({i for part in entry.parts for i in part}) for entry in rounds)
    for e in endings:
        ledger = balance(e, replay, rounds, folder)
        result.ledgers.append(ledger)
        result.lost += max(0, ledger["included"] - ledger["in_consensus"])
        result.doubled += max(0, ledger["in_consensus"] - ledger["included"])
        if ledger["included"] != ledger["in_consensus"]:
            say(f"{ledger['name']} counts {ledger['included']} contributions, the server {ledger['in_consensus']}")
        if not ledger["error"] <= ROUNDING:
            say(f"{ledger['name']}: the ledger is out of balance by {ledger['error']:.3g}")
    result.live_mean = np.mean([e.live for e in endings], axis=0)
    return result
