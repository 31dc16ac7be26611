"""The outbox: order, what overtakes, what is dropped, and the size of messages on slow links."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from loscar_core.errors import MalformedError
from loscar_wire.outbox import (
    JOINED_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_URGENT,
    MIN_MESSAGE_BYTES,
    SMALL_BYTES,
    Later,
    Outbox,
    RateMeter,
)


def _written(fill: Callable[[Outbox], None], *, close: bool = True) -> list[bytes]:
    """What an outbox writes that was filled before its writer ran."""

    async def run() -> list[bytes]:
        outbox, out = Outbox(), []

        async def write(payload: bytes) -> None:
            out.append(payload)

        fill(outbox)
        if close:
            outbox.close(None)
        await asyncio.wait_for(outbox.write_all(write, lambda _: None, lambda: None), 5)
        assert outbox.queued_bytes == 0
        return out

    return asyncio.run(run())


def test_heartbeats_overtake_data_and_nothing_else_changes_place() -> None:
    def fill(outbox: Outbox) -> None:
        outbox.put(b"a", round_=1)
        outbox.put(b"b")
        outbox.put(b"!", urgent=True)

    assert _written(fill) == [b"!", b"a", b"b"]


def test_a_round_that_is_over_takes_its_messages_with_it() -> None:
    def fill(outbox: Outbox) -> None:
        for round_ in (3, 4, 5):
            outbox.put(b"%d" % round_, round_=round_)
        outbox.put(b"ready")
        outbox.discard(4)

    assert _written(fill) == [b"5", b"ready"]


def test_an_error_drops_what_is_queued_and_what_comes_later() -> None:
    def fill(outbox: Outbox) -> None:
        outbox.put(b"a")
        outbox.close(MalformedError("no"))
        outbox.put(b"b")

    assert _written(fill, close=False) == []


def test_drained_is_told_when_the_last_message_is_handed_over() -> None:
    async def run() -> list[str]:
        outbox, seen = Outbox(), []
        written = asyncio.Event()

        async def write(payload: bytes) -> None:
            seen.append(payload.decode())

        def drained() -> None:
            seen.append("drained")
            written.set()

        writer: Awaitable[None] = asyncio.ensure_future(outbox.write_all(write, lambda _: None, drained))
        outbox.put(b"a")
        outbox.put(b"b")
        await asyncio.wait_for(written.wait(), 5)
        outbox.close(None)
        await asyncio.wait_for(writer, 5)
        return seen

    assert asyncio.run(run()) == ["a", "b", "drained"]


def test_messages_fit_the_measured_rate() -> None:
    meter = RateMeter()
    assert meter.message_bytes(1 << 18) == 1 << 18
    meter.note(1 << 18, 0.001)  # a burst into empty buffers says nothing
    assert meter.bytes_per_s is None
    for _ in range(60):
        meter.note(100_000, 1.0)
    assert meter.message_bytes(1 << 18) in range(24_500, 25_600)
    for _ in range(60):
        meter.note(100, 1.0)
    assert meter.message_bytes(1 << 18) == MIN_MESSAGE_BYTES
    for _ in range(60):
        meter.note(1 << 30, 0.1)
    assert meter.message_bytes(1 << 18) == MAX_MESSAGE_BYTES


def test_heartbeats_that_nobody_takes_do_not_pile_up() -> None:
    held = []

    def fill(outbox: Outbox) -> None:
        outbox.put(b"data")
        for i in range(10_000):
            outbox.put(b"%08d" % i, urgent=True)
        held.append(outbox.queued_bytes)

    written = _written(fill)
    assert written == [b"%08d" % i for i in range(10_000 - MAX_URGENT, 10_000)] + [b"data"]
    assert held == [8 * MAX_URGENT + 4]


def test_everything_overtakes_what_is_bulk() -> None:
    def fill(outbox: Outbox) -> None:
        for number in range(3):
            outbox.put(b"bulk %d" % number, bulk=True)
        outbox.put(b"data")
        outbox.put(b"beat", urgent=True)

    async def run() -> list[bytes]:
        outbox, out, empty = Outbox(), [], asyncio.Event()

        async def write(payload: bytes) -> None:
            out.append(payload)

        fill(outbox)
        writing = asyncio.create_task(outbox.write_all(write, lambda _: None, empty.set))
        await asyncio.wait_for(empty.wait(), 5)
        writing.cancel()
        return out

    assert asyncio.run(run()) == [b"beat", b"data", b"bulk 0", b"bulk 1", b"bulk 2"]
    assert _written(fill) == [b"beat", b"data"], "who leaves does not wait for it"


def test_a_write_says_since_when_it_is_under_way() -> None:
    async def run() -> None:
        outbox, taken = Outbox(), asyncio.Event()
        before = time.monotonic()

        async def write(_: bytes) -> None:
            taken.set()
            await asyncio.Event().wait()

        outbox.put(b"x")
        assert outbox.busy_since is None
        writing = asyncio.create_task(outbox.write_all(write, lambda _: None, lambda: None))
        await taken.wait()
        assert outbox.busy_since is not None
        assert before <= outbox.busy_since <= time.monotonic()
        writing.cancel()

    asyncio.run(run())


def test_what_is_encoded_later_is_encoded_when_its_turn_comes() -> None:
    async def scenario() -> None:
        outbox = Outbox()
        made: list[str] = []
        started, let_go = asyncio.Event(), asyncio.Event()
        written: list[bytes] = []

        def later(name: str) -> Later:
            def encode() -> bytes:
                made.append(name)
                return name.encode() * 3

            return Later(2, encode)

        async def write(payload: bytes) -> None:
            written.append(payload)
            started.set()
            await let_go.wait()

        for number, name in enumerate("abc"):
            outbox.put(later(name), round_=number)
        outbox.put(later("d"), bulk=True)
        assert outbox.queued_bytes == 8
        task = asyncio.create_task(outbox.write_all(write, lambda _: None, lambda: None))
        await started.wait()
        assert made == ["a"]
        outbox.discard(1)
        assert outbox.queued_bytes == 6  # "a" is under way
        outbox.put(b"now", urgent=True)
        outbox.close(None)
        let_go.set()
        await task
        assert written == [b"aaa", b"now", b"ccc"]
        assert made == ["a", "c"]
        assert outbox.queued_bytes == 0

    asyncio.run(scenario())


def _join(first: bytes, others: Sequence[bytes]) -> bytes:
    return b"+".join((first, *others))


def test_small_messages_ride_along_with_the_one_before_them() -> None:
    large = b"x" * (SMALL_BYTES + 1)

    def fill(outbox: Outbox) -> None:
        outbox.join = _join
        outbox.put(large)
        outbox.put(b"a")
        outbox.put(b"b", round_=1)
        outbox.put(large)
        outbox.put(Later(1, lambda: b"later"))
        outbox.put(b"c")

    assert _written(fill) == [large + b"+a+b", large, b"later+c"]


def test_what_is_large_goes_out_as_it_is_shared_by_all() -> None:
    large = bytes(JOINED_BYTES)

    def fill(outbox: Outbox) -> None:
        outbox.join = _join
        outbox.put(large)
        for _ in range(50):
            outbox.put(bytes(SMALL_BYTES))

    first, *others = _written(fill)
    assert first is large
    assert len(others) == 2, "31 and 19 of them at a time"
    assert all(len(other) <= JOINED_BYTES + 50 for other in others)


def test_a_heartbeat_takes_small_messages_with_it_in_their_order() -> None:
    def fill(outbox: Outbox) -> None:
        outbox.join = _join
        outbox.put(b"a")
        outbox.put(b"!", urgent=True)
        outbox.put(b"b")

    assert _written(fill) == [b"!+a+b"]
