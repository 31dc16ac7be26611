"""One-off averages: a vector of each worker, gathered under a label, averaged once, and told to all of them alike.

    open ──all awaited offered, or the time is over──▶ answered ──all have taken it──▶ forgotten
      └── the time is over, and too few offered ──▶ failed

An average has no anchor and no rounds: values are absolute, and a gathering is awaited by whoever called for it. The
state lives in the server only. When that is lost, workers offer again what they had offered; who has the answer
already offers the answer (it *settles* the gathering), so that those who have not get the same one. Who knew whom the
old server waited for tells the new one, which then waits for them too.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loscar_core.errors import LoscarError, MalformedError, NonFiniteError, RefusedError

Values = NDArray[Any]
"""float32 or float64, one-dimensional."""

DTYPES = ("float32", "float64")
LABELS_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Answer:
    """What a gathering came to.

    Attributes:
        values: the mean, of the offers' dtype.
        offered: the incarnations whose vectors are in it.
    """

    values: Values
    offered: tuple[bytes, ...]


def mean_of(vectors: Iterable[Values], count: int) -> Values:
    """Mean of `count` ≥ 1 vectors, summed in the order given, in float64; of their dtype.

    Raises:
        NonFiniteError: the mean is beyond that dtype.
    """
    each = iter(vectors)
    first = next(each)
    total = first.astype(np.float64)
    for vector in each:
        total += vector
    total /= count
    with np.errstate(over="ignore"):
        mean = total.astype(first.dtype)
    if not np.isfinite(mean).all():
        raise NonFiniteError(f"the mean of {count} vectors is beyond {first.dtype}")
    return mean


@dataclass(slots=True, eq=False)
class Gathering:
    """The vectors under one label.

    Attributes:
        label: what the workers call it.
        size, dtype: what each offers.
        awaited: incarnations that it waits for as long as they are members, or were told to be.
        told: those of them that an earlier server waited for: they may still be on their way here.
        due_s: when it waits no longer; once answered, when the answer is forgotten whoever has not taken it.
        wait_s: the time that it has.
        at_least: fewer offers than this are no average.
    """

    label: str
    size: int
    dtype: str
    awaited: set[bytes]
    told: set[bytes]
    due_s: float
    wait_s: float
    at_least: int
    answer: Answer | None = None
    error: LoscarError | None = None
    _arriving: Counter[bytes] = field(default_factory=Counter)
    _offers: dict[bytes, tuple[int, Values]] = field(default_factory=dict)
    _taken: set[bytes] = field(default_factory=set)

    @property
    def closed(self) -> bool:
        return self.answer is not None or self.error is not None

    @property
    def held_bytes(self) -> int:
        """What its offers, on their way or here, and its answer take, or will."""
        one = self.size * np.dtype(self.dtype).itemsize
        return one * (len(self._offers) + self._arriving.total() + (self.error is None))

    def wants(self, who: bytes) -> bool:
        """Whether this worker is to send its vector: it is not here, and it is not too late."""
        return not (self.closed or who in self._offers)

    def missing(self, present: Collection[bytes]) -> set[bytes]:
        """Who is still waited for."""
        return {w for w in self.awaited if (w in present or w in self.told) and w not in self._offers}

    def expect(self, who: bytes) -> None:
        """A worker begins to send its vector, perhaps beside an earlier call that is broken: room is kept for it."""
        self._arriving[who] += 1

    def arrived(self, who: bytes) -> None:
        """It sends no more, whether the vector is whole or not."""
        self._arriving[who] -= 1

    def add(self, who: bytes, slot: int, values: Values) -> None:
        """A worker's vector; only the first counts."""
        if not self.closed:
            self._offers.setdefault(who, (slot, values))

    def settle(self, answer: Answer, now: float) -> None:
        """What an earlier server made of it; the first word counts."""
        if not self.closed:
            self._close(answer, None, now)

    def look(self, present: Collection[bytes], now: float) -> bool:
        """Close it if nobody is waited for any more, or the time is over; whether it was closed now."""
        self.told -= set(present)
        if self.closed or (now < self.due_s and self.missing(present)):
            return False
        count = len(self._offers)
        if count < max(1, self.at_least):
            if now < self.due_s:
                return False  # too few are members: more may come
            short = f"the average {self.label!r}: {count} of at least {self.at_least} vectors came in {self.wait_s:g} s"
            self._close(None, RefusedError(short), now)
            return True
        in_order = sorted(self._offers.items(), key=lambda offer: (offer[1][0], offer[0]))
        try:
            mean = mean_of((values for _, (_, values) in in_order), count)
        except NonFiniteError as error:
            self._close(None, NonFiniteError(f"the average {self.label!r}: {error}"), now)
        else:
            self._close(Answer(mean, tuple(who for who, _ in in_order)), None, now)
        return True

    def _close(self, answer: Answer | None, error: LoscarError | None, now: float) -> None:
        self.answer, self.error = answer, error
        self.awaited |= self._offers.keys()
        self._offers.clear()
        self.due_s = now + self.wait_s

    def take(self, who: bytes) -> None:
        """A worker has the answer."""
        self._taken.add(who)

    def over(self, present: Collection[bytes], now: float) -> bool:
        """Whether nobody needs the answer any more."""
        return self.closed and (self.error is not None or now >= self.due_s or not self.without(present))

    def without(self, present: Collection[bytes]) -> set[bytes]:
        """Who has not taken the answer yet."""
        return {w for w in self.awaited if (w in present or w in self.told) and w not in self._taken}

    @property
    def offered(self) -> int:
        """Vectors that are here, or in the answer."""
        return len(self._offers if self.answer is None else self.answer.offered)


class Gatherings:
    """All gatherings of one server, by label.

    Args:
        limit_bytes: what vectors and answers may take in all.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._open: dict[str, Gathering] = {}
        self._over: deque[str] = deque(maxlen=LABELS_REMEMBERED)

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Gathering]:
        return iter(self._open.values())

    def __contains__(self, gathering: Gathering) -> bool:
        return self._open.get(gathering.label) is gathering

    @property
    def held_bytes(self) -> int:
        return sum(g.held_bytes for g in self._open.values())

    def enter(
        self,
        label: str,
        who: bytes,
        size: int,
        dtype: str,
        *,
        present: Collection[bytes],
        told: Collection[bytes],
        wait_s: float,
        at_least: int,
        now: float,
    ) -> Gathering:
        """The gathering that a worker calls for, opened if it is the first.

        Args:
            present: incarnations of the run's workers.
            told: whom an earlier server waited for, as far as the worker knows.

        Raises:
            MalformedError: the others offer vectors of another size or dtype.
            RefusedError: this average is over, or there is no room for the vector.
        """
        found = self._open.get(label)
        if found is None and label in self._over:
            raise RefusedError(
                f"the average {label!r} is over: it did not wait for this worker, or was asked for again"
            )
        if found is not None and (found.size, found.dtype) != (size, dtype):
            raise MalformedError(
                f"the average {label!r} is of {found.size} values of {found.dtype}, not {size} of {dtype}"
            )
        if found is None or found.wants(who):
            room = self._limit_bytes - self.held_bytes
            one = size * np.dtype(dtype).itemsize
            if one * (2 if found is None else 1) > room:  # its own vector, and once the answer
                raise RefusedError(
                    f"the average {label!r}: no room for {one} more bytes, of {self._limit_bytes} for all averages"
                )
        if found is None:
            found = Gathering(
                label, size, dtype, set(present) | set(told), set(told) - set(present), now + wait_s, wait_s, at_least
            )
            self._open[label] = found
        elif told:
            found.awaited |= set(told)
            found.told |= set(told) - set(present)
        return found

    def look(self, present: Collection[bytes], now: float) -> list[Gathering]:
        """Close what is due, forget what is over; those that were closed now."""
        closed = [g for g in self._open.values() if g.look(present, now)]
        for label in [g.label for g in self._open.values() if g.over(present, now)]:
            del self._open[label]
            self._over.append(label)
        return closed
