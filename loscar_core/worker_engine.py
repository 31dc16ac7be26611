"""The worker's half of the protocol as a state machine: messages in, messages and updates for the model out.

It holds the anchor (a replica of the consensus), the open round's buffers and the ledger of its own
contributions. It knows neither sockets, threads, clocks nor torch: the connection feeds it messages and sends what
it emits; the session applies its updates to the live model between two steps and hands it snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loscar_core.config import PROTOCOL_VERSION, FinalRound, RunConfig
from loscar_core.errors import (
    MalformedError,
    NonFiniteError,
    ProtocolError,
    ReplicaDivergedError,
    WrongRoundError,
)
from loscar_core.layout import Layout
from loscar_core.messages import (
    Answer,
    CatchUp,
    Commit,
    Contribution,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    OpenRound,
    Purpose,
    Ready,
    Refresh,
    SendState,
    ServerMessage,
    SlotTaken,
    StateOffer,
    VectorChunk,
    Welcome,
    WorkerMessage,
    WorkerReport,
)
from loscar_core.plan import (
    HISTORY_ROUNDS,
    HistoryEntry,
    Part,
    RoundKind,
    RoundPlan,
    missed_coordinates,
    parts_of,
    slices,
)
from loscar_core.replica import Floats, Indices, Replica
from loscar_core.selection import SelectionKind
from loscar_core.server_catchup import RECENT_SENT, STREAM_VALUES
from loscar_core.state import InclusionTable, Position, bits
from loscar_core.values import ValueType, decode, decode_into, encode, require_finite, value_count
from loscar_core.worker_ledger import Ledger, Record

MESSAGE_BYTES = 1 << 18
"""Default size of a contribution's messages; the connection lowers it on slow links."""


@dataclass(frozen=True, slots=True)
class Emit:
    """Send this to the server."""

    message: WorkerMessage


@dataclass(frozen=True, slots=True)
class Initialise:
    """Before training: the model takes over the anchor as it is (parameters, statistics)."""

    vector: Floats
    statistics: Floats


@dataclass(frozen=True, slots=True)
class RoundOpen:
    """A round's selection is ready: a snapshot may be taken, unless one was taken for it before.

    Attributes:
        plan: of the round.
        indices: its coordinates, K int64 ascending.
        contributed: this worker's contribution to it exists already.
        elapsed_s: run time when the server opened it, as far as known here.
        opening: number of this announcement, to be handed back with the snapshot that follows it.
    """

    plan: RoundPlan
    indices: Indices
    contributed: bool
    elapsed_s: float
    opening: int = 0


@dataclass(frozen=True, slots=True)
class Update:
    """What the anchor did, to be done to the live model at a step boundary, in order.

    Attributes:
        round: of the answer; 0 for a catch-up.
        indices: the coordinates, or None for all of them.
        anchor: their values before, float32.
        new_anchor: and after.
        sent: what of this worker's contributions is in the difference, or None.
        statistics: values to assign, or None.
        settles: round of this worker's snapshot that is hereby answered or given back, or None.
        plan: of the answered round, or None for a catch-up.
        long_absence: more rounds were missed than it takes to send every coordinate once.
    """

    round: int
    indices: Indices | None
    anchor: Floats
    new_anchor: Floats
    sent: Floats | None
    statistics: Floats | None
    settles: int | None
    plan: RoundPlan | None
    long_absence: bool = False


@dataclass(frozen=True, slots=True)
class ProgressWanted:
    """A newcomer wants this worker's unsent progress: call `progress` with the live vector."""


@dataclass(frozen=True, slots=True)
class RunEnded:
    """No round follows the updates emitted so far.

    Attributes:
        vector, statistics: the consensus, when the run ends with it (also for whoever missed the final round);
            else None and the model stays as it is.
    """

    vector: Floats | None
    statistics: Floats | None


@dataclass(frozen=True, slots=True)
class Dismissed:
    """The server ended the stream."""

    goodbye: Goodbye


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """A heartbeat came back; the stamp is what was sent."""

    stamp_ns: int


WorkerEffect = Emit | Initialise | RoundOpen | Update | ProgressWanted | RunEnded | Dismissed | RoundTrip


@dataclass(slots=True)
class _Receiving:
    """The open round's answer while it arrives."""

    plan: RoundPlan
    indices: Indices
    checksum: int
    parts: tuple[Part, ...]
    delta: Floats
    statistics: Floats
    filled: list[int]
    included: list[bytes]


@dataclass(slots=True)
class _CatchingUp:
    """A catch-up while its values arrive."""

    announcement: CatchUp
    indices: Indices | None
    values: Floats
    filled: int = 0


class WorkerEngine:
    """One worker (or observer) of one run.

    Args:
        name: the worker's name.
        incarnation: 16 random bytes, new with every process.
        layout: the model's.
        vector: its parameters, d float32; kept as the anchor and changed in place.
        statistics: its statistics, float32.
        run_id: 16 bytes, or empty to take whichever run the server holds.
        slot: wanted slot, or None.
        observer: receive only.
    """

    def __init__(
        self,
        name: str,
        incarnation: bytes,
        layout: Layout,
        vector: Floats,
        statistics: Floats,
        *,
        run_id: bytes = b"",
        slot: int | None = None,
        observer: bool = False,
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.layout = layout
        self.run_id = run_id
        self.wanted_slot = slot
        self.observer = observer
        self.anchor = Replica.initial(vector, statistics)
        self.ledger = Ledger()
        self.epoch = 0
        self.slot = -1
        self.welcome: Welcome | None = None
        self.config: RunConfig | None = None
        self.plan: RoundPlan | None = None
        self.elapsed_s = -1.0
        self.initialised = False
        self.connected = False
        self.message_bytes = MESSAGE_BYTES
        self.bytes_up = 0
        self.bytes_down = 0
        self._roster: list[bytes | None] = []
        self._own_slots: tuple[int, ...] = ()
        self._opening = 0
        self._receiving: _Receiving | None = None
        self._catching_up: _CatchingUp | None = None
        self._diverged = False  # the last commit that could be compared left the chain
        self._refreshing = False  # nothing counts before the refresh that was asked for
        self._refresh_due = False  # the anchor cannot be trusted before a full copy has arrived
        self._progress: Floats | None = None
        self._progress_filled = 0
        self._out: list[WorkerEffect] = []

    # --- the connection -------------------------------------------------------------------------------------

    def hello(self) -> Hello:
        """First message of a new stream; what the old one left unfinished is dropped."""
        self.connected = True
        self.plan = None
        self._receiving = None
        self._catching_up = None
        self._progress = None
        anchor = self.anchor
        return Hello(
            protocol_version=PROTOCOL_VERSION,
            run_id=self.run_id,
            name=self.name,
            incarnation=self.incarnation,
            slot=self.slot if self.slot >= 0 else self.wanted_slot,
            observer=self.observer,
            layout=self.layout,
            vector_checksum=anchor.digest,
            epoch=self.epoch,
            members=anchor.members,
            position=anchor.position if self.initialised else Position(),
            digest=self._claimed_digest,
            lineage=anchor.lineage,
            recent=anchor.history.last(RECENT_SENT),
        )

    @property
    def _claimed_digest(self) -> int:
        """The anchor's digest; one that nobody shares while it waits for a refresh, which a new stream has to bring."""
        return self.anchor.digest ^ 0xFFFFFFFF if self._refresh_due else self.anchor.digest

    def disconnected(self) -> None:
        """The stream broke. The worker trains on; its contribution in flight will be sent again."""
        self.connected = False
        self.plan = None
        self._refreshing = False
        self._receiving = None
        self._catching_up = None
        self._progress = None

    def heartbeat(self, stamp_ns: int, report: WorkerReport) -> Heartbeat:
        return Heartbeat(stamp_ns, self.anchor.position.round, report)

    def received(self, message: ServerMessage) -> list[WorkerEffect]:
        """A message from the server.

        Raises:
            ProtocolError: the server broke the protocol's rules.
            WrongRoundError: it is stale: this worker has met a later epoch.
            ReplicaDivergedError: the anchor left the digest chain twice in a row.
        """
        if self._refreshing and isinstance(message, (Answer, Commit, OpenRound)):
            return self._flush()  # on top of a replica that is given up
        match message:
            case Answer():
                self._answer(message)
            case Commit():
                self._commit(message)
            case VectorChunk():
                self._vector_chunk(message)
            case OpenRound():
                self._open(message.plan, message.elapsed_s)
            case HeartbeatReply():
                self._out.append(RoundTrip(message.stamp_ns))
            case SlotTaken():
                self._slot_taken(message)
            case Welcome():
                self._welcome(message)
            case CatchUp():
                self._catch_up(message)
            case SendState():
                self._send_state(message.purpose)
            case Goodbye():
                self._out.append(Dismissed(message))
        return self._flush()

    def _welcome(self, welcome: Welcome) -> None:
        if welcome.epoch < self.epoch and not welcome.recovering:
            raise WrongRoundError(f"the server is in epoch {welcome.epoch}; this worker has met {self.epoch}")
        if self.run_id and welcome.run_id != self.run_id:
            raise ProtocolError("the server answered for another run")
        self.run_id = welcome.run_id
        self.welcome = welcome
        self.slot = welcome.slot
        self._set_roster([i or None for i in welcome.roster])
        if not welcome.recovering:
            self.epoch = welcome.epoch
        if not (welcome.recovering and self.initialised):
            # A server that has lost its memory is told the run's configuration and time, it does not tell them.
            self.config = welcome.config
            self.elapsed_s = welcome.elapsed_s

    def _set_roster(self, roster: list[bytes | None]) -> None:
        self._roster = roster
        self._own_slots = tuple(slot for slot, holder in enumerate(roster) if holder == self.incarnation)

    def _configured(self) -> RunConfig:
        if self.config is None:
            raise MalformedError("the first message of a server must be a welcome")
        return self.config

    def _slot_taken(self, message: SlotTaken) -> None:
        if not 0 <= message.slot < 1 << 20:
            raise MalformedError(f"slot {message.slot}")
        roster = list(self._roster)  # a new list: committed rounds keep theirs
        roster += [None] * (message.slot + 1 - len(roster))
        roster[message.slot] = message.incarnation or None
        self._set_roster(roster)

    def _send_state(self, purpose: Purpose) -> None:
        """Hand the anchor over: as the initial model, or to a server that lost its state."""
        anchor = self.anchor
        if purpose is Purpose.PROGRESS:
            self._out.append(ProgressWanted())
            return
        if purpose is Purpose.ANCHOR:
            config = self._configured()
            self._out.append(
                Emit(
                    StateOffer(
                        position=anchor.position,
                        digest=self._claimed_digest,
                        lineage=anchor.lineage,
                        inclusion=anchor.inclusion.entries(),
                        recent=anchor.history.last(RECENT_SENT),
                        members=anchor.members,
                        config=config,
                        elapsed_s=max(self.elapsed_s, 0.0),
                    )
                )
            )
        total = anchor.vector.size + anchor.statistics.size
        for start in range(0, total, STREAM_VALUES):
            values = anchor.slice_by_value(None, start, min(start + STREAM_VALUES, total))
            payload = values.astype("<f4", copy=False).tobytes()
            self._out.append(Emit(VectorChunk(purpose, start, total, payload)))

    def progress(self, values: Floats) -> list[WorkerEffect]:
        """Send x − a to whoever asked for it; `values` is x, d float32, with every update so far merged."""
        delta = values - self.anchor.vector
        require_finite(delta, "the model's progress")
        return [
            Emit(VectorChunk(Purpose.PROGRESS, start, delta.size, delta[start : start + STREAM_VALUES].tobytes()))
            for start in range(0, delta.size, STREAM_VALUES)
        ]

    def _progress_chunk(self, chunk: VectorChunk) -> None:
        """A live worker's unsent progress: a newcomer starts where that worker is, not at the older consensus."""
        size = self.anchor.vector.size
        values = _floats(chunk)
        if chunk.offset == 0:
            self._progress = np.zeros(size, np.float32)
            self._progress_filled = 0
        if (
            self._progress is None
            or chunk.total != size
            or chunk.offset != self._progress_filled
            or values.size > size - chunk.offset
        ):
            raise MalformedError(f"a live worker's progress at {chunk.offset}; {self._progress_filled} was next")
        require_finite(values, "a live worker's progress")
        self._progress[chunk.offset : chunk.offset + values.size] = values
        self._progress_filled += values.size
        if self._progress_filled == size:
            whole, self._progress = self._progress, None
            self._out.append(Update(0, None, np.zeros(size, np.float32), whole, None, None, None, None))

    # --- catching up ----------------------------------------------------------------------------------------

    def _catch_up(self, message: CatchUp) -> None:
        config = self._configured()
        self._receiving = None
        self.plan = None
        self._refreshing = False
        dimension = self.anchor.vector.size
        indices = None if message.full else missed_coordinates(config.seed, dimension, message.plans)
        if indices is None and not message.full:
            raise MalformedError("a partial catch-up over more coordinates than are sent in one go")
        size = dimension if indices is None else indices.size
        nothing = indices is not None and not message.plans
        values = np.empty(0 if nothing else size + self.anchor.statistics.size, np.float32)
        self._catching_up = _CatchingUp(message, indices, values)
        if nothing:
            self._caught_up()

    def _vector_chunk(self, chunk: VectorChunk) -> None:
        if chunk.purpose is Purpose.PROGRESS:
            self._progress_chunk(chunk)
            return
        state = self._catching_up
        if state is None or chunk.purpose is not Purpose.CATCH_UP or chunk.total != state.values.size:
            raise MalformedError("values that were not announced")
        values = _floats(chunk)
        if chunk.offset != state.filled or values.size > state.values.size - state.filled:
            raise MalformedError(f"catch-up values at {chunk.offset}; {state.filled} was next")
        require_finite(values, "the catch-up")
        state.values[state.filled : state.filled + values.size] = values
        state.filled += values.size
        if state.filled == state.values.size:
            self._caught_up()

    def _caught_up(self) -> None:
        """The values are whole: move the anchor, settle the ledger, tell the model and the server."""
        state, anchor = self._catching_up, self.anchor
        assert state is not None
        self._catching_up = None
        told, indices = state.announcement, state.indices
        if indices is None or told.digest == self._claimed_digest:
            self._refresh_due = False
        size = anchor.vector.size if indices is None else indices.size
        statistics = state.values[size:].copy() if state.values.size else None
        before = anchor.position.round
        if state.values.size == 0:
            old = new = np.empty(0, np.float32)
        elif indices is None:
            old, new = anchor.vector, state.values[:size]
            anchor.vector = new.copy()  # the next commits change it while the update still waits
        else:
            old, new = anchor.vector.take(indices), state.values[:size]
            anchor.vector[indices] = new
        if statistics is not None:
            anchor.statistics = statistics
        anchor.position, anchor.digest, anchor.lineage = told.position, told.digest, told.lineage
        anchor.inclusion = InclusionTable(told.inclusion)
        anchor.members = told.members
        anchor.history.clear()
        for entry in told.recent:
            anchor.history.append(entry)
        if not self.initialised:
            self.initialised = True
            self._out.append(Initialise(anchor.vector.copy(), anchor.statistics))
        else:
            full_cycle = size_of_cycle(self._configured(), anchor.vector.size)
            long_absence = told.position.round - before > full_cycle
            self._settle(indices, old, new, statistics, long_absence)
        self._out.append(Emit(Ready(anchor.position)))
        if self._receiving is not None:
            self._announce(self._receiving)
        elif self.plan is not None and self.plan.kind is RoundKind.END:
            self._end()

    def _settle(
        self, indices: Indices | None, old: Floats, new: Floats, statistics: Floats | None, long_absence: bool
    ) -> None:
        """Move the model with the anchor; then subtract, or add back, what of this worker's contributions the
        caught-up state has or no longer has."""
        anchor = self.anchor
        waiting = [r for r in self.ledger.all() if not r.decided]
        todo = self.ledger.resolve(anchor.inclusion.of(self.incarnation), anchor.position.round, anchor.lineage)
        settled = max((r.plan.round for r in waiting if r.decided), default=None)
        if new.size or settled is not None:
            moved = indices if new.size else np.empty(0, np.int64)
            self._out.append(Update(0, moved, old, new, None, statistics, settled, None, long_absence))
        for record, subtract, add_back in todo:
            values = anchor.vector.take(record.indices)
            for mask, give_back in ((subtract, False), (add_back, True)):
                sent = record.masked(mask)
                if sent is not None:
                    sent = -sent if give_back else sent
                    self._out.append(Update(0, record.indices, values, values, sent, None, None, None))

    # --- rounds ---------------------------------------------------------------------------------------------

    def _open(self, plan: RoundPlan, elapsed_s: float) -> None:
        config = self._configured()
        self.plan = plan
        self.elapsed_s = elapsed_s
        self._receiving = None
        if self.ledger.opened(plan):
            # The round was planned anew after a recovery: what was taken for it goes out later.
            empty = np.empty(0, np.float32)
            self._out.append(Update(0, np.empty(0, np.int64), empty, empty, None, None, plan.round, None))
        if plan.kind is RoundKind.END:
            if self._catching_up is None:
                self._end()
            return
        dimension = self.anchor.vector.size
        if plan.count > dimension:
            raise MalformedError(f"round {plan.round} selects {plan.count} of {dimension} coordinates")
        indices = plan.indices(config.seed, dimension)
        parts = parts_of(indices.size, self.anchor.statistics.size)
        self._receiving = _Receiving(
            plan,
            indices,
            plan.checksum(config.seed, dimension),
            parts,
            np.empty(indices.size, np.float32),
            np.empty(self.anchor.statistics.size, np.float32),
            [0] * len(parts),
            [b""] * len(parts),
        )
        if self._catching_up is None:
            self._announce(self._receiving)

    def _end(self) -> None:
        keep = self._configured().final_round is not FinalRound.DENSE
        self._out.append(RunEnded(*(None, None) if keep else (self.anchor.vector, self.anchor.statistics)))

    def _announce(self, receiving: _Receiving) -> None:
        """The open round can be taken part in; what was contributed to it on another stream is sent again."""
        record = self.ledger.in_flight(receiving.plan.round)
        if record is not None:
            record.messages = tuple(replace(m, epoch=self.epoch) for m in record.messages)
            record.epochs.add(self.epoch)
            self._out.extend(Emit(m) for m in record.messages)
        self._opening += 1
        opened = RoundOpen(receiving.plan, receiving.indices, record is not None, self.elapsed_s, self._opening)
        self._out.append(opened)

    def snapshot(
        self,
        round_: int,
        values: Floats,
        statistics: Floats,
        local_steps: int,
        overlap_steps: int,
        opening: int | None = None,
    ) -> list[WorkerEffect] | None:
        """Contribute to the open round.

        Args:
            round_: the round whose `RoundOpen` the snapshot follows.
            values: x[S], K float32, taken after that `RoundOpen` with every update merged that came before it.
            statistics: the model's statistics, float32.
            local_steps, overlap_steps: see `Contribution`.
            opening: of that `RoundOpen`. A caller that takes the values in another thread has to give it: the same
                round may have been announced again meanwhile, on top of another state.

        Returns:
            The messages, or None when the round is not open any more (its update is on the way, or the
            connection broke): the progress stays in x − a.

        Raises:
            NonFiniteError: the model holds NaN or infinity.
        """
        receiving = self._receiving
        if receiving is None or receiving.plan.round != round_ or self._catching_up is not None:
            return None
        if opening is not None and opening != self._opening:
            return None
        if round_ in self.ledger.records:
            return []  # taken already, and never again: what was sent then is resent as it was
        plan, parts = receiving.plan, receiving.parts
        delta = values - self.anchor.gather(plan, receiving.indices, 0, receiving.indices.size)
        try:
            require_finite(delta, "the model's progress")
            require_finite(statistics, "the model's statistics")
        except NonFiniteError as error:
            raise NonFiniteError(f"round {round_}: {error}; nothing was sent") from None
        sent = delta if plan.value_type is ValueType.FLOAT32 else np.empty_like(delta)
        messages = []
        for part in parts:
            source = statistics if part.statistics else delta
            kind = ValueType.FLOAT32 if part.statistics else plan.value_type
            for offset, length in slices(part, self.message_bytes // kind.itemsize):
                at = slice(part.start + offset, part.start + offset + length)
                payload = encode(source[at], kind)
                if not part.statistics and sent is not delta:
                    sent[at] = decode(payload, kind, length)
                first = part.index == 0 and offset == 0
                messages.append(
                    Contribution(
                        self.epoch,
                        round_,
                        part.index,
                        offset,
                        payload,
                        receiving.checksum,
                        local_steps if first else 0,
                        overlap_steps if first else 0,
                    )
                )
        self.bytes_up += sum(len(m.values) for m in messages)
        self.ledger.add(Record(plan, receiving.indices, sent, parts, tuple(messages), epochs={self.epoch}))
        return [Emit(m) for m in messages]

    def _answer(self, answer: Answer) -> None:
        receiving = self._receiving
        if answer.coding is not None or receiving is None or answer.round != receiving.plan.round:
            raise MalformedError(f"an answer to round {answer.round}, which is not open")
        if not 0 <= answer.part < len(receiving.parts):
            raise MalformedError(f"an answer to part {answer.part} of {len(receiving.parts)}")
        part = receiving.parts[answer.part]
        kind = ValueType.FLOAT32 if part.statistics else receiving.plan.value_type
        filled = receiving.filled[part.index]
        count = value_count(kind, len(answer.values))
        if answer.offset != filled or not 0 < count <= part.size - filled:
            raise MalformedError(f"part {part.index}: {count} values at {answer.offset}; {filled} was next")
        target = receiving.statistics if part.statistics else receiving.delta
        start = part.start + filled
        decode_into(answer.values, kind, target[start : start + count])
        if filled == 0:
            receiving.included[part.index] = answer.included
        receiving.filled[part.index] = filled + count
        self.bytes_down += len(answer.values)

    def _commit(self, commit: Commit) -> None:
        receiving = self._receiving
        if receiving is None or commit.round != receiving.plan.round:
            raise MalformedError(f"a commit of round {commit.round}, which is not open")
        if any(f != p.size for f, p in zip(receiving.filled, receiving.parts, strict=True)):
            raise MalformedError(f"round {commit.round} is committed before all of it was answered")
        if self._catching_up is not None:
            self._commit_while_catching_up(self._catching_up, receiving, commit)
        else:
            self._commit_in_order(receiving, commit)
        if self._receiving is receiving:
            self._receiving = None
            self._open(commit.plan, commit.elapsed_ms / 1000)

    def _commit_in_order(self, receiving: _Receiving, commit: Commit) -> None:
        plan, indices, anchor = receiving.plan, receiving.indices, self.anchor
        old = anchor.gather(plan, indices, 0, indices.size)
        new = receiving.delta
        np.add(old, receiving.delta, out=new)
        statistics = receiving.statistics if receiving.statistics.size else None
        digest = anchor.next_digest(new, statistics)
        if digest != commit.digest:
            if self._diverged and not self._refresh_due:
                raise ReplicaDivergedError(
                    f"the replica left the digest chain again at round {commit.round}: "
                    f"{digest:08x} where the server has {commit.digest:08x}"
                )
            self._receiving = None
            self.plan = None
            if not self._refresh_due:
                self._out.append(Emit(Refresh(commit.round)))
            self._diverged = self._refreshing = self._refresh_due = True
            return
        self._diverged = False
        if plan.selection is SelectionKind.ALL:
            old = old.copy()  # it was a view of what the commit overwrites
        anchor.commit(
            self.epoch,
            plan,
            indices,
            new,
            statistics,
            digest,
            receiving.included,
            self._roster,
            commit.members,
        )
        record = self.ledger.in_flight(plan.round)
        mask, sent = 0, None
        if record is not None:
            mask = self._own_mask(receiving.included)
            self.ledger.decide(record, mask, self.epoch)
            sent = record.masked(mask)
        if 2 * self._included_in(receiving) > commit.members:
            self.ledger.forget_before(plan.round)
        settles = plan.round if record is not None else None
        self._out.append(Update(plan.round, _all_or(plan, indices), old, new, sent, statistics, settles, plan))
        if mask != (1 << len(receiving.parts)) - 1 and not self.observer:
            self._out.append(Emit(Ready(anchor.position)))  # it may have been given up on: wait for it again

    def _commit_while_catching_up(self, state: _CatchingUp, receiving: _Receiving, commit: Commit) -> None:
        """A round that was committed while the whole vector is streamed: patch what has arrived.

        What has not arrived yet will hold the round already, so it may be patched too. The digest cannot be
        checked before everything is there.
        """
        if state.indices is not None:
            raise MalformedError("a commit in the middle of a partial catch-up")
        plan, indices = receiving.plan, receiving.indices
        with np.errstate(all="ignore"):  # values that have not arrived are arbitrary
            if plan.selection is SelectionKind.ALL:
                state.values[: indices.size] += receiving.delta
            else:
                state.values[indices] += receiving.delta
        if receiving.statistics.size:
            state.values[-receiving.statistics.size :] = receiving.statistics
        told = state.announcement
        table = InclusionTable(told.inclusion)
        table.record(plan.round, receiving.included, self._roster)
        position = Position(self.epoch, plan.round)
        state.announcement = replace(
            told,
            position=position,
            digest=commit.digest,
            lineage=told.lineage.closed(position),
            inclusion=table.entries(),
            recent=(*told.recent, HistoryEntry(position, plan, commit.digest))[-HISTORY_ROUNDS:],
            members=commit.members,
        )

    def _own_mask(self, included: Sequence[bytes]) -> int:
        """Which parts of a round hold this worker's contribution. The roster decides, not the present slot: that may
        have been another worker's when the round opened, and this worker's may have been another."""
        mask = 0
        for slot in self._own_slots:
            byte, bit = divmod(slot, 8)
            for index, bitmap in enumerate(included):
                if byte < len(bitmap) and bitmap[byte] >> bit & 1:
                    mask |= 1 << index
        return mask

    def _included_in(self, receiving: _Receiving) -> int:
        return min(len(bits(b)) for b in receiving.included)

    def _flush(self) -> list[WorkerEffect]:
        out, self._out = self._out, []
        return out


def _floats(chunk: VectorChunk) -> Floats:
    if not chunk.values or len(chunk.values) % 4:
        raise MalformedError(f"a vector chunk of {len(chunk.values)} bytes")
    return np.frombuffer(chunk.values, "<f4")


def _all_or(plan: RoundPlan, indices: Indices) -> Indices | None:
    return None if plan.selection is SelectionKind.ALL else indices


def size_of_cycle(config: RunConfig, dimension: int) -> int:
    """Rounds in which every coordinate is sent once: 1/density."""
    return -(-dimension // config.count(dimension))
