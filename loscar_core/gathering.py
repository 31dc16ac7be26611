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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loscar_core.errors import LoscarError, MalformedError, NonFiniteError, RefusedError

Values = NDArray[Any]
"""float32 or float64, one-dimensional."""

DTYPES = ("float32", "float64")
LABELS_REMEMBERED = 4096
MOST_GATHERINGS = 256
ABANDONED_S = 60.0
"""A gathering at which nobody has called for so long is forgotten."""

_SLICE = 1 << 18


@dataclass(frozen=True, slots=True)
class Answer:
    """What a gathering came to.

    Attributes:
        values: the mean, of the offers' dtype.
        offered: the incarnations whose vectors are in it.
    """

    values: Values
    offered: tuple[bytes, ...]


def mean_of(vectors: Sequence[Values]) -> Values:
    """Mean of vectors, at least one, summed in the order given, in float64; of their dtype.

    Raises:
        NonFiniteError: the mean is beyond that dtype.
    """
    mean = np.empty_like(vectors[0])
    for start in range(0, mean.size, _SLICE):
        at = slice(start, start + _SLICE)
        total = vectors[0][at].astype(np.float64)
        for vector in vectors[1:]:
            total += vector[at]
        total /= len(vectors)
        with np.errstate(over="ignore"):
            mean[at] = total
        if not np.isfinite(mean[at]).all():
            raise NonFiniteError(f"the mean of {len(vectors)} vectors is beyond {mean.dtype}")
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
        calls: calls that are at it now.
        idle_since_s: since when there are none.
    """

    label: str
    size: int
    dtype: str
    awaited: set[bytes]
    told: set[bytes]
    due_s: float
    wait_s: float
    at_least: int
    calls: int = 0
    idle_since_s: float = 0.0
    answer: Answer | None = None
    error: LoscarError | None = None
    _frozen: bool = False
    _arriving: Counter[bytes] = field(default_factory=Counter)
    _offers: dict[bytes, tuple[int, Values]] = field(default_factory=dict)
    _taken: set[bytes] = field(default_factory=set)

    @property
    def closed(self) -> bool:
        return self.answer is not None or self.error is not None

    @property
    def offered(self) -> int:
        """Vectors that are here, or in the answer."""
        return len(self._offers if self.answer is None else self.answer.offered)

    @property
    def held_bytes(self) -> int:
        """What its offers, on their way or here, and its answer take, or will."""
        one = self.size * np.dtype(self.dtype).itemsize
        return one * (len(self._offers) + self._arriving.total() + (self.error is None))

    def wants(self, who: bytes) -> bool:
        """Whether this worker is to send its vector: it is not here, and it is not too late."""
        return not (self.closed or self._frozen or who in self._offers)

    def has_had(self, who: bytes) -> bool:
        """Whether this worker has taken the answer."""
        return who in self._taken

    def missing(self, present: Collection[bytes]) -> set[bytes]:
        """Who is still waited for."""
        return {w for w in self.awaited if (w in present or w in self.told) and w not in self._offers}

    def without(self, present: Collection[bytes]) -> set[bytes]:
        """Who has not taken the answer yet."""
        return {w for w in self.awaited if (w in present or w in self.told) and w not in self._taken}

    # --- vectors --------------------------------------------------------------------------------------------

    def expect(self, who: bytes) -> None:
        """A worker begins to send its vector, perhaps beside an earlier call that is broken: room is kept for it."""
        self._arriving[who] += 1

    def arrived(self, who: bytes) -> None:
        """It sends no more, whether the vector is whole or not."""
        self._arriving[who] -= 1

    def add(self, who: bytes, slot: int, values: Values) -> None:
        """A worker's vector; only the first counts."""
        if self.wants(who):
            self._offers[who] = (slot, values)

    def settle(self, answer: Answer, now: float) -> None:
        """What an earlier server made of it; the first word counts."""
        self.conclude(answer, now)

    # --- the answer -----------------------------------------------------------------------------------------

    def freeze(self, present: Collection[bytes], now: float) -> bool:
        """Whether it is time: nobody is waited for any more, or the time is over. Then no vector is taken any more, and
        `average` and `conclude` are to follow; true once only."""
        self.told -= set(present)
        if self.closed or self._frozen:
            return False
        if now < self.due_s and (self.missing(present) or len(self._offers) < max(1, self.at_least)):
            return False
        self._frozen = True
        return True

    def average(self) -> Answer | LoscarError:
        """What the vectors come to; a frozen gathering's may be computed in another thread."""
        offers = dict(self._offers)  # it may be settled meanwhile
        count = len(offers)
        if count < max(1, self.at_least):
            asked = f"{count} of at least {max(1, self.at_least)} vectors came in {self.wait_s:g} s"
            return RefusedError(f"the average {self.label!r}: {asked}")
        in_order = sorted(offers.items(), key=lambda offer: (offer[1][0], offer[0]))
        try:
            mean = mean_of([values for _, (_, values) in in_order])
        except NonFiniteError as error:
            return NonFiniteError(f"the average {self.label!r}: {error}")
        except MemoryError:
            return RefusedError(f"the average {self.label!r}: the server has no memory for it")
        return Answer(mean, tuple(who for who, _ in in_order))

    def conclude(self, outcome: Answer | LoscarError, now: float) -> None:
        """This is what it came to, unless it has been settled meanwhile."""
        if self.closed:
            return
        if isinstance(outcome, Answer):
            self.answer = outcome
        else:
            self.error = outcome
        self.awaited |= self._offers.keys()
        self._offers.clear()
        self.due_s = now + self.wait_s

    def take(self, who: bytes) -> None:
        """A worker has the answer."""
        self._taken.add(who)

    def over(self, present: Collection[bytes], now: float) -> bool:
        """Whether nobody needs the answer any more."""
        if self.closed and (self.error is not None or now >= self.due_s or not self.without(present)):
            return True
        return self.calls == 0 and now >= self.idle_since_s + ABANDONED_S


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
        settled: bool = False,
        wait_s: float,
        at_least: int,
        now: float,
    ) -> Gathering:
        """The gathering that a worker calls for, opened if it is the first. What `wants` says then holds for this call:
        room is kept for the vector until `arrived`. `leave` is to follow.

        Args:
            present: incarnations of the run's workers.
            told: whom an earlier server waited for, as far as the worker knows.
            settled: it has the answer, of an earlier server.

        Raises:
            MalformedError: the others offer vectors of another size or dtype.
            RefusedError: this average is over, or this worker has had it, or there is no room for the vector.
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
        if found is not None and not settled and found.has_had(who):
            raise RefusedError(f"this worker has had the average {label!r} already: another one needs another label")
        if found is None and len(self._open) >= MOST_GATHERINGS:
            raise RefusedError(f"the average {label!r}: {MOST_GATHERINGS} others are under way already")
        wanted = found is None or found.wants(who)
        if wanted:
            room = self._limit_bytes - self.held_bytes
            one = size * np.dtype(dtype).itemsize
            if one * (2 if found is None else 1) > room:  # its own vector, and once the answer
                if found is not None:
                    found.awaited.discard(who)
                raise RefusedError(
                    f"the average {label!r}: no room for {one} more bytes, of {self._limit_bytes} for all averages"
                )
        strangers = set(told) - set(present)
        if found is None:
            awaited = set(present) | strangers
            found = Gathering(label, size, dtype, awaited, strangers, now + wait_s, wait_s, at_least)
            self._open[label] = found
        else:
            found.told |= strangers - found.awaited  # who was awaited here and has gone is not waited for again
            found.awaited |= strangers
        found.calls += 1
        if wanted:
            found.expect(who)
        return found

    def leave(self, gathering: Gathering, now: float) -> None:
        """A call that entered is over."""
        gathering.calls -= 1
        gathering.idle_since_s = now

    def look(self, present: Collection[bytes], now: float) -> list[Gathering]:
        """Forget what is over; those for whose answer it is time now, which are frozen."""
        ready = [g for g in self._open.values() if g.freeze(present, now)]
        for label in [g.label for g in self._open.values() if g.over(present, now)]:
            self.forget(self._open[label])
        return ready

    def forget(self, gathering: Gathering) -> None:
        """Its label is not to be used again; abandoned ones may be."""
        del self._open[gathering.label]
        if gathering.closed:
            self._over.append(gathering.label)
