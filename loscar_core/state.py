"""Positions, lineages and the inclusion table: what makes two copies of a run's state comparable.

A *position* (epoch, round) says how far a state has come. Every server process opens a new epoch, so two servers
that both close "round 12" are told apart. A *lineage* lists which epoch closed which rounds, so that two states
find the last round that they share. The *inclusion table* says, for each member, the last round that its
contribution was counted in and which parts of it: it decides for every contribution in flight whether it is in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loscar_core.errors import MalformedError

INCARNATION_BYTES = 16
MAX_SLOTS = 1 << 20
"""What a roster may claim; a server has a slot for a member, not for each name that there ever was."""
LEAST_TABLE_ENTRIES = 1024
"""Members that the inclusion table remembers at least; twice as many as there are slots when that is more. The longest
absent are forgotten first."""
FORGOTTEN = bytes(INCARNATION_BYTES)
"""Nobody's incarnation: its entry holds the last round of whoever was forgotten."""


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """How far a state has come: `round` rounds are committed, the last of them by server epoch `epoch`.

    Ordered by epoch first. (0, 0) is a worker that has never joined.
    """

    epoch: int = 0
    round: int = 0

    def __str__(self) -> str:
        return f"{self.epoch}:{self.round}"


@dataclass(frozen=True, slots=True)
class Lineage:
    """Which epoch closed which rounds: pairs (epoch, first round that it closed), both strictly growing.

    Epochs that closed no round leave no entry.
    """

    spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for (e0, r0), (e1, r1) in zip(self.spans, self.spans[1:], strict=False):
            if e1 <= e0 or r1 <= r0:
                raise MalformedError(f"lineage {self.spans} does not grow")

    def closed(self, position: Position) -> Lineage:
        """The lineage after `position` was committed on top of this one."""
        if self.spans and self.spans[-1][0] == position.epoch:
            return self
        return Lineage((*self.spans, (position.epoch, position.round)))

    def epoch_of(self, round_: int) -> int:
        """The epoch that closed a round; 0 for rounds before the first."""
        epoch = 0
        for e, first in self.spans:
            if first > round_:
                break
            epoch = e
        return epoch

    def truncated(self, round_: int) -> Lineage:
        """The lineage of the same history as of an earlier round."""
        return Lineage(tuple(span for span in self.spans if span[1] <= round_))

    def last_common_round(self, round_: int, other: Lineage, other_round: int) -> int:
        """The last round that two histories, at `round_` and at `other_round`, both hold."""
        limit = min(round_, other_round)
        for first in sorted({f for _, f in (*self.spans, *other.spans)}):
            if first > limit:
                break
            if self.epoch_of(first) != other.epoch_of(first):
                return first - 1
        return limit


YOUNG_S = 120.0
"""Run time for which all rounds of a server's epoch may yet be given up, when those come who hold another state of the
run: workers can undo so much."""


@dataclass(frozen=True, slots=True)
class Included:
    """A member's entry in the inclusion table: the last round it is in, and a bitmap of that round's parts."""

    round: int = 0
    parts: int = 0


class InclusionTable:
    """For each incarnation: the last round that it was included in, and which parts.

    Rounds are recorded as the bitmaps that travel in answers (one bit a slot, one bitmap a part) and folded into
    per-member entries only when somebody asks, so that recording a round costs the same for 4 and 400 members.
    """

    def __init__(self, entries: Mapping[bytes, Included] | None = None) -> None:
        self._entries: dict[bytes, Included] = dict(entries or {})
        self._pending: list[tuple[int, tuple[bytes, ...], Sequence[bytes | None]]] = []

    def record(self, round_: int, bitmaps: Sequence[bytes], roster: Sequence[bytes | None]) -> None:
        """Note a committed round.

        Args:
            round_: the round's number.
            bitmaps: for each part the members in its sum; bit s (least significant first) stands for slot s.
            roster: the incarnation that held each slot in that round. Kept by reference: pass a list that is
                replaced, not changed, when a slot changes hands.
        """
        self._pending.append((round_, tuple(bitmaps), roster))
        if len(self._pending) >= 32:
            self._fold()

    def _fold(self) -> None:
        for round_, bitmaps, roster in self._pending:
            masks: dict[int, int] = {}
            for part, bitmap in enumerate(bitmaps):
                for slot in bits(bitmap):
                    masks[slot] = masks.get(slot, 0) | (1 << part)
            shared = {mask: Included(round_, mask) for mask in set(masks.values())}
            for slot, mask in masks.items():
                incarnation = roster[slot] if slot < len(roster) else None
                if incarnation is not None:
                    # Re-inserted at the end, so that the first entries are the longest absent.
                    self._entries.pop(incarnation, None)
                    self._entries[incarnation] = shared[mask]
        most = max(LEAST_TABLE_ENTRIES, 2 * len(self._pending[-1][2])) if self._pending else len(self._entries)
        self._pending.clear()
        if len(self._entries) > most:
            last = self._entries.pop(FORGOTTEN, Included()).round
            while len(self._entries) >= most:
                last = max(last, self._entries.pop(next(iter(self._entries))).round)
            self._entries = {FORGOTTEN: Included(last), **self._entries}

    def of(self, incarnation: bytes) -> Included:
        """A member's entry; round 0 when it was never included."""
        self._fold()
        return self._entries.get(incarnation, Included())

    def knows(self, incarnation: bytes, round_: int) -> bool:
        """Whether the table says if a member's contribution to a round is in: not when it may have been forgotten."""
        self._fold()
        return incarnation in self._entries or round_ > self.of(FORGOTTEN).round

    def entries(self) -> dict[bytes, Included]:
        """A copy of the whole table."""
        self._fold()
        return dict(self._entries)

    def copy(self) -> InclusionTable:
        return InclusionTable(self.entries())


def bits(bitmap: bytes) -> list[int]:
    """Positions of the set bits, least significant bit of the first byte first."""
    number = int.from_bytes(bitmap, "little")
    found = []
    while number:
        low = number & -number
        found.append(low.bit_length() - 1)
        number ^= low
    return found


def bitmap(positions: Iterable[int], size: int) -> bytes:
    """⌈size/8⌉ bytes with the given bits set; the inverse of `bits`."""
    number = 0
    for position in positions:
        number |= 1 << position
    return number.to_bytes((size + 7) // 8, "little")
