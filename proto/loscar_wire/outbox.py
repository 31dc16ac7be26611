"""What one side of a stream has yet to say: a queue with a writer.

Exactly one task writes and one reads: a second write in flight is an error in gRPC's asyncio, and if both sides
only wrote, both would hang. Heartbeats and their replies overtake data, so that a long message does not look like a
dead link.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from loscar_core.errors import LoscarError


class Outbox:
    """Encoded messages on their way to the other side.

    Bounded by who fills it: the server's machine stops answering a member whose outbox has not been empty for some
    rounds, and a worker has at most one contribution under way.
    """

    def __init__(self) -> None:
        self._urgent: deque[bytes] = deque()
        self._data: deque[tuple[int | None, bytes]] = deque()
        self._wake = asyncio.Event()
        self.queued_bytes = 0
        self.closing = False
        self.error: LoscarError | None = None

    def put(self, payload: bytes, *, urgent: bool = False, round_: int | None = None) -> None:
        """Queue a message; `round_` says what it is worth nothing without, see `discard`."""
        if self.closing:
            return
        if urgent:
            self._urgent.append(payload)
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
        """Nothing more will be queued. An error ends the stream at once, otherwise what is queued goes first."""
        if self.closing:
            return
        self.closing = True
        self.error = error
        if error is not None:
            self._urgent.clear()
            self._data.clear()
        self._wake.set()

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
            if self._urgent or self._data:
                payload = self._urgent.popleft() if self._urgent else self._data.popleft()[1]
                await write(payload)
                self.queued_bytes -= len(payload)
                written(len(payload))
                if not self._urgent and not self._data and not self.closing:
                    drained()
            elif self.closing:
                return
            else:
                self._wake.clear()
                await self._wake.wait()
