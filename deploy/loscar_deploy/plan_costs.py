"""What a round costs: bytes on the wire, memory, and the disagreement that it leaves among the workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from loscar_core.messages import Answer, Commit, Contribution, Heartbeat, HeartbeatReply, WorkerReport
from loscar_core.plan import PART_POSITIONS, RoundKind, RoundPlan, slices
from loscar_core.plan import Part as PartOfRound
from loscar_core.selection import BLOCK_SIZE, SelectionKind, sweep_length
from loscar_core.server_round import ANSWER_BYTES
from loscar_core.values import ValueType, payload_size
from loscar_core.worker_holdings import MESSAGE_BYTES
from loscar_deploy.plan_timing import Parts
from loscar_wire.mapping import encode_server_message, encode_worker_message

HEARTBEAT_S = 2.0
"""The server's default, and the most that it asks for."""

_GRPC_PREFIX = 5
_HTTP2_HEADER = 9
_HTTP2_FRAME = 16384
_INDEX = 8
_INT8 = ValueType.INT8

# Seconds a selected value, both sides together: two selections, a sum, encoding, decoding. Of one core of a small
# machine, within a factor of two; the permutation behind the scattered selections is most of it.
_COMPUTING_S = {
    SelectionKind.SWEEP: 4e-7,
    SelectionKind.RANDOM: 4e-7,
    SelectionKind.BLOCK: 2e-7,
    SelectionKind.ALL: 2e-7,
}


@dataclass(frozen=True, slots=True)
class Round:
    """What one round carries.

    Attributes:
        dimension: d.
        statistics: further values, sent whole.
        count: K as it is configured.
        selection: how the coordinates are chosen.
        value_type: what a value is on the wire.
        workers: n.
    """

    dimension: int
    statistics: int
    count: int
    selection: SelectionKind
    value_type: ValueType
    workers: int

    @property
    def rounds_per_coordinate(self) -> float:
        """Rounds from one average of a coordinate to the next, the mean (of a sweep: its length)."""
        match self.selection:
            case SelectionKind.SWEEP:
                return sweep_length(self.dimension, self.count)
            case SelectionKind.ALL:
                return 1.0
            case _:
                return self.dimension / self.selected

    @property
    def selected(self) -> int:
        """Coordinates of one round (of a sweep the mean, rounded; its slices differ by one)."""
        match self.selection:
            case SelectionKind.SWEEP:
                return round(self.dimension / sweep_length(self.dimension, self.count))
            case SelectionKind.ALL:
                return self.dimension
            case SelectionKind.BLOCK:
                runs = max(1, (self.count + BLOCK_SIZE // 2) // BLOCK_SIZE)
                return min(self.dimension, runs * BLOCK_SIZE)
            case _:
                return self.count

    @property
    def payload(self) -> int:
        """Bytes of values each way, as `bytes_up` and `bytes_down` of a run count them."""
        return payload_size(self.value_type, self.selected) + 4 * self.statistics

    @property
    def computing_s(self) -> float:
        return _COMPUTING_S[self.selection] * self.selected

    def parts(self) -> tuple[Parts, ...]:
        """The round on the wire, like parts together."""
        return tuple(self._grouped())

    def _grouped(self) -> Iterator[Parts]:
        bitmap = bytes(-(-self.workers // 8))
        for total, kind in ((self.selected, self.value_type), (self.statistics, ValueType.FLOAT32)):
            full, rest = divmod(total, PART_POSITIONS)
            for count, size in ((full, PART_POSITIONS), (1, rest)):
                if count and size:
                    yield Parts(count, *_part_bytes(size, kind, bitmap))

    def bytes_each_way(self) -> tuple[int, int]:
        """Of one worker, up and down, without heartbeats."""
        parts = self.parts()
        commit = framed(len(encode_server_message(_COMMIT)))
        return sum(p.count * p.up for p in parts), sum(p.count * p.down for p in parts) + commit

    def noise_steps(self, local_steps: float, overlap_steps: float) -> float:
        """The disagreement to expect just after a merge, V* / (η²σ²): (1 − 1/n)·(Q + age·H), age = q/p, or q/2p for a
        sweep.

        Args:
            local_steps, overlap_steps: N and Q, means over the workers: the variance among workers that are
                independent is the mean of their own ones, so unequal workers need no formula of their own.
        """
        age = self.rounds_per_coordinate - 1
        if self.selection is SelectionKind.SWEEP:
            age /= 2
        return (1 - 1 / self.workers) * (overlap_steps + age * (local_steps + overlap_steps))

    def worker_memory(self) -> int:
        """Host memory of a worker at its peak beside its model, optimizer and libraries, in bytes, roughly.

        The anchor; a copy of the model while it joins; for the first two minutes of a server's life, the sum of what
        was sent; of a round the selection and what was sent (kept until the next round is decided, so twice), the
        values that arrive, the anchor's old ones and the model's.
        """
        size = self.dimension + self.statistics
        kept = (_INDEX + 4) * self.selected + self.payload
        buffers = 2 * kept + self.payload + 3 * 4 * self.selected + self._making
        return 2 * 4 * size + 4 * self.dimension + buffers

    def server_memory(self) -> int:
        """Memory of the server at its peak beside its libraries, in bytes, roughly.

        The consensus and a copy of it for those who fetch it, with narrow values what rounding left of each
        coordinate; of the round the selection, the new values, the encoded answers, and from every worker values that
        wait to be summed.
        """
        narrow = self.value_type is not ValueType.FLOAT32
        state = 2 * 4 * (self.dimension + self.statistics) + (4 * self.dimension if narrow else 0)
        values = 4 * (self.selected + self.statistics)
        buffers = _INDEX * self.selected + values * (2 if narrow else 1) + 2 * self.payload + self._making
        return state + buffers + self.workers * values

    @property
    def _making(self) -> int:
        """What making a selection takes for a moment, beside the selection."""
        scattered = self.selection in (SelectionKind.SWEEP, SelectionKind.RANDOM)
        return 19 * self.selected if scattered else 0


REPORT = WorkerReport(
    steps=10**6,
    loss=1.0,
    idle_s=1.0,
    run_s=1.0,
    sent=10**4,
    included=10**4,
    returned=1,
    bytes_up=10**9,
    bytes_down=10**9,
    round_trip_s=0.1,
)
"""A worker's figures, all of them there."""

_COMMIT = Commit(1000, 100, 0xFFFFFFFF, RoundPlan(1001, RoundKind.TRAIN, SelectionKind.SWEEP, 1 << 20, _INT8), 1 << 30)


def framed(size: int) -> int:
    """Bytes that a message of `size` bytes takes in an HTTP/2 stream."""
    size += _GRPC_PREFIX
    return size + _HTTP2_HEADER * -(-size // _HTTP2_FRAME)


def heartbeat_bytes() -> tuple[int, int]:
    """Of a heartbeat and its reply."""
    up = len(encode_worker_message(Heartbeat(1 << 55, 1000, REPORT)))
    return framed(up), framed(len(encode_server_message(HeartbeatReply(1 << 55))))


@cache
def _part_bytes(size: int, kind: ValueType, bitmap: bytes) -> tuple[int, int]:
    """One part of `size` values on the wire, up and down: real messages, encoded, with zeros for values."""
    part, up, down = PartOfRound(1, 0, size), 0, 0
    for offset, length in slices(part, MESSAGE_BYTES // kind.itemsize):
        values = bytes(payload_size(kind, length))
        up += framed(len(encode_worker_message(Contribution(1, 1000, 1, offset, values, 0xFFFFFFFF, 0, 0))))
    for offset, length in slices(part, ANSWER_BYTES // kind.itemsize):
        values = bytes(payload_size(kind, length))
        included = b"" if offset else bitmap
        down += framed(len(encode_server_message(Answer(1000, 1, offset, values, included))))
    return up, down
