"""Which worker's anchor a server that lost its state takes over.

The rule: once a majority of the last round's members has said hello (or after a wait), adopt the furthest anchor whose
digest chain goes on from what a majority holds. A majority of a round's members has committed the round before it, so
any majority that says hello contains one that is at most one round behind the furthest: nothing that a worker has
forgotten how to take back is undone.

A claim that is further but whose chain does not reach back to the majority's point is either a liar's, or that of a
worker which was cut off at a standby, or honest, and then it is the majority that was cut off. While somebody is
missing, such a claim makes the server wait; otherwise it is refused. So neither a liar with a far position nor a lone
worker moves the run. Once as many claim as the last round had members, there is nobody to wait for.

After the wait fewer may vouch, but as many workers as make a majority have to be there, if only fresh ones: with fewer,
the others may well be going on without us, at another server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, replace

from loscar_core.messages import Hello
from loscar_core.state import Position

Point = tuple[Position, int]
"""A state by its position and digest."""

START: Point = (Position(), 0)
"""Stands for the state before round 1, whoever began the run."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's word about its anchor.

    Attributes:
        peer: its stream.
        position, digest: what it holds; round 0 when it knows the run, but has closed no round.
        members: n of the last round.
        chain: the last points that it passed, without a gap up to what it holds, which is the last.
    """

    peer: int
    position: Position
    digest: int
    members: int
    chain: tuple[Point, ...]

    @classmethod
    def of(cls, peer: int, hello: Hello) -> Claim:
        if hello.position.round == 0:
            return cls(peer, hello.position, hello.digest, 0, (START,))
        by_round = {e.position.round: (e.position, e.digest) for e in hello.recent}
        by_round[0] = START
        chain = [(hello.position, hello.digest)]
        while (before := by_round.get(chain[-1][0].round - 1)) is not None and before[0] < chain[-1][0]:
            chain.append(before)
        return cls(peer, hello.position, hello.digest, max(1, hello.members), tuple(chain[::-1]))


@dataclass(frozen=True, slots=True)
class Choice:
    """Whose anchor to ask for, and why."""

    peer: int
    position: Position
    digest: int
    vouchers: int
    by_majority: bool


def choose(claims: list[Claim], *, waited: bool, present: int | None = None) -> Choice | None:
    """Pick the anchor to adopt.

    Args:
        claims: one per worker that knows the run.
        waited: `--recover-after` has passed, so fewer than a majority may decide.
        present: workers that are there, fresh ones included; None when it does not matter how many they are.

    Returns:
        None while it is too early to decide, while too few are there, or when no worker has closed a round.
    """
    holders = [c for c in claims if c.position.round > 0]
    if not holders:
        return None
    missing = not waited and len(claims) < max(c.members for c in holders)
    if missing and len(claims) < min(c.members for c in holders) // 2 + 1:
        return None
    vouchers = Counter(point for c in claims for point in c.chain)
    points = {point for c in holders for point in c.chain}
    needed = {point: _needed(point, claims) for point in points}
    # One voucher among several claims proves nothing, even where a round had but one member.
    safe = [p for p in points if vouchers[p] >= needed[p] and (vouchers[p] > 1 or len(claims) == 1)]
    if safe:
        base = max(safe, key=_by_round)
    elif missing:
        return None
    else:
        enough = [p for p in points if present is None or present >= needed[p]]
        if not enough:
            return None
        base = max(enough, key=lambda p: (vouchers[p], _by_round(p)))
    connected = [c for c in holders if base in c.chain]
    if missing and any(c.position.round > base[0].round for c in holders if c not in connected):
        return None
    best = max(connected, key=lambda c: (c.position.round, c.position.epoch, -c.peer))
    return Choice(best.peer, best.position, best.digest, vouchers[base], vouchers[base] >= needed[base])


def behind(claims: list[Claim], begun: Container[Point]) -> list[Claim]:
    """The same claims; who holds a run that was begun anew here comes behind those who hold the run that it was before,
    as one that has closed no round, however far it has come. There have to be as many of these.

    Args:
        begun: what was closed of the run that was begun anew.
    """
    others = [c for c in claims if (c.position, c.digest) not in begun]
    own = [c for c in claims if (c.position, c.digest) in begun]
    if not 0 < len([c for c in others if c.position.round > 0]) >= len(own):
        return claims  # fewer than those who are to come behind them do not prove anything
    return others + [replace(c, position=Position(c.position.epoch, 0), members=0, chain=(START,)) for c in own]


def _needed(point: Point, claims: list[Claim]) -> int:
    """A majority of the members of a point's round, as most of those say who stopped there (or passed it)."""
    told = [c.members for c in claims if c.chain[-1] == point and c.members]
    told = told or [c.members for c in claims if point in c.chain and c.members]
    counts = Counter(told)
    return max(counts, key=lambda n: (counts[n], n)) // 2 + 1


def _by_round(point: Point) -> tuple[int, int, int]:
    position, digest = point
    return position.round, position.epoch, digest
