"""What one side of a stream has yet to say: a queue with a writer.

Exactly one task writes and one reads: a second write in flight is an error in gRPC's asyncio, and if both sides
only wrote, both would hang. Heartbeats and their replies overtake data, so that a long message does not look like a
dead link.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from loscar_core.errors import LoscarError

MIN_MESSAGE_BYTES = 16 << 10
MAX_MESSAGE_BYTES = 1 << 20
MESSAGE_S = 0.25
"""A message takes at most this long at the measured rate, so that a heartbeat never waits longer for its turn."""

MAX_URGENT = 64
"""Heartbeats, or replies to them, that may wait; where more do, the oldest are worth nothing any more."""

SMALL_BYTES = 4 << 10
JOINED_BYTES = 128 << 10
"""What is no larger than the one rides along with the message before it, where the other side can tell them apart and
all of it is no larger than the other: that copy, which is one receiver's own, costs less than a message of its own."""

_RATE_WINDOW_S = 0.05
_RATE_WEIGHT = 0.3


class RateMeter:
    """The rate at which the network takes messages, from how long they take while others wait.

    A short burst only fills buffers and says nothing; what counts is time spent in writes that were held back.
    """

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._bytes = 0
        self._seconds = 0.0

    def note(self, size: int, seconds: float) -> None:
        """A message of `size` bytes took so long to be handed over."""
        self._bytes += size
        self._seconds += seconds
        if self._seconds >= _RATE_WINDOW_S:
            rate = self._bytes / self._seconds
            old = self.bytes_per_s
            self.bytes_per_s = rate if old is None else old + _RATE_WEIGHT * (rate - old)
            self._bytes, self._seconds = 0, 0.0

    def message_bytes(self, default: int) -> int:
        """How large a message may be; `default` while nothing is known."""
        if self.bytes_per_s is None:
            return default
        return max(MIN_MESSAGE_BYTES, min(MAX_MESSAGE_BYTES, int(self.bytes_per_s * MESSAGE_S)))


class Later:
    """A message that is encoded when its turn comes, so that it takes no memory of its own before.

    Args:
        size: about how many bytes it will have.
        encode: gives them.
    """

    __slots__ = ("_size", "encode")

    def __init__(self, size: int, encode: Callable[[], bytes]) -> None:
        self._size = size
        self.encode = encode

    def __len__(self) -> int:
        return self._size


class Outbox:
    """Encoded messages on their way to the other side.

    Bounded by who fills it: the server's machine stops answering a member whose outbox has not been empty for some
    rounds, and a worker has at most one contribution under way.

    Attributes:
        join: makes one message of several, for those who can read that.
    """

    def __init__(self) -> None:
        self._urgent: deque[bytes] = deque()
        self._data: deque[tuple[int | None, bytes | Later]] = deque()
        self._bulk: deque[bytes | Later] = deque()
        self._wake = asyncio.Event()
        self.queued_bytes = 0
        self._writing = 0  # of them, in the message that is being written
        self.busy_since: float | None = None
        """When the write that is under way began, on the monotonic clock."""
        self.rate = RateMeter()
        self.closing = False
        self.error: LoscarError | None = None
        self.join: Callable[[bytes, Sequence[bytes]], bytes] | None = None

    def put(
        self, payload: bytes | Later, *, urgent: bool = False, round_: int | None = None, bulk: bool = False
    ) -> None:
        """Queue a message.

        Args:
            urgent: it overtakes everything that is not.
            round_: what it is worth nothing without, see `discard`.
            bulk: everything that is not overtakes it.
        """
        if self.closing:
            return
        if urgent and isinstance(payload, bytes):
            if len(self._urgent) == MAX_URGENT:
                self.queued_bytes -= len(self._urgent.popleft())
            self._urgent.append(payload)
        elif bulk:
            self._bulk.append(payload)
        else:
            self._data.append((round_, payload))
        self.queued_bytes += len(payload)
        self._wake.set()

    def discard(self, round_: int) -> None:
        """Drop what still waits for a round that is over: on a slow link it would hold up the next one."""
        kept = deque(item for item in self._data if item[0] is None or item[0] > round_)
        dropped = len(self._data) - len(kept)
        if dropped:
            self.queued_bytes -= sum(len(p) for r, p in self._data if r is not None and r <= round_)
            self._data = kept

    def close(self, error: LoscarError | None) -> None:
        """Nothing more will be queued. An error ends the stream at once, otherwise what is queued goes first, apart
        from what is bulk."""
        if self.closing:
            return
        self.closing = True
        self.error = error
        self.queued_bytes -= sum(map(len, self._bulk))
        self._bulk.clear()
        if error is not None:
            self._urgent.clear()
            self._data.clear()
            self.queued_bytes = 0
        self._wake.set()

    def _next(self) -> bytes:
        queued = self._pop()
        self._writing = len(queued)
        payload = queued if isinstance(queued, bytes) else queued.encode()
        if self.join is None:
            return payload
        others = []
        while self._data and isinstance(small := self._data[0][1], bytes) and len(small) <= SMALL_BYTES:
            if self._writing + len(small) > JOINED_BYTES:
                break
            others.append(small)
            self._data.popleft()
            self._writing += len(small)
        return self.join(payload, others) if others else payload

    def _pop(self) -> bytes | Later:
        if self._urgent:
            return self._urgent.popleft()
        return self._data.popleft()[1] if self._data else self._bulk.popleft()

    async def write_all(
        self, write: Callable[[bytes], Awaitable[Any]], written: Callable[[int], None], drained: Callable[[], None]
    ) -> None:
        """Write until the outbox is closed and empty.

        Args:
            write: hands one message to gRPC; awaiting it is the back-pressure.
            written: told the size of each message that was handed over.
            drained: called whenever the outbox has become empty.
        """
        while True:
            if self._urgent or self._data or self._bulk:
                payload = self._next()
                started = self.busy_since = time.monotonic()
                await write(payload)
                self.busy_since = None
                self.rate.note(len(payload), time.monotonic() - started)
                self.queued_bytes -= self._writing
                written(len(payload))
                del payload  # or it would be kept until the next one, for each receiver its own
                if not self._urgent and not self._data and not self._bulk and not self.closing:
                    drained()
            elif self.closing:
                return
            else:
                self._wake.clear()
                await self._wake.wait()
