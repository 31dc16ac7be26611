"""Being brought to a state by value, and handing one over."""

from __future__ import annotations

import numpy as np

from loscar_core.config import RunConfig
from loscar_core.errors import MalformedError
from loscar_core.messages import CatchUp, Partial, Purpose, StateOffer, VectorChunk
from loscar_core.plan import RoundKind, missed_coordinates
from loscar_core.replica import Floats, Indices
from loscar_core.server_catchup import RECENT_SENT, STREAM_VALUES
from loscar_core.state import InclusionTable
from loscar_core.values import ValueType, encode_view, require_finite
from loscar_core.worker_effects import Emit, Initialise, ProgressWanted, Update, WorkerEffect
from loscar_core.worker_holdings import CatchingUp
from loscar_core.worker_ledger import Record
from loscar_core.worker_rounds import WorkerRounds


class WorkerCatchUp(WorkerRounds):
    """Vectors that arrive, vectors that are asked for, and what of this worker's own is in a new state."""

    def _interrupt(self) -> None:
        """What is being caught up with goes no further: what is there of a whole state is kept, to resume."""
        state, self._catching_up = self._catching_up, None
        if state is not None and state.indices is None and state.filled and state.patch is None:
            self._interrupted = state

    def _partial(self) -> Partial | None:
        state = self._interrupted
        if state is None:
            return None
        filled = min(state.filled, self.anchor.vector.size)
        return Partial(state.announcement.position, state.announcement.digest, filled)

    def _resume(self, message: CatchUp) -> None:
        before, dimension = self._interrupted, self.anchor.vector.size
        indices = missed_coordinates(self._configured().seed, dimension, message.plans)
        if not message.full or before is None or message.resume > min(before.filled, dimension) or indices is None:
            raise MalformedError(f"{message.resume} values are to be kept of a transfer that was not interrupted there")
        patch = indices[indices < message.resume]
        self._interrupted = None
        self._catching_up = CatchingUp(message, None, before.values, message.resume, patch if patch.size else None)

    def _catch_up(self, message: CatchUp) -> None:
        config = self._configured()
        self._interrupt()
        self._receiving = None
        self.plan = None
        self._refreshing = False
        if message.resume:
            self._resume(message)
            return
        self._interrupted = None
        self._buffers.clear()
        dimension = self.anchor.vector.size
        indices = None if message.full else missed_coordinates(config.seed, dimension, message.plans)
        if indices is None and not message.full:
            raise MalformedError("a partial catch-up over more coordinates than are sent in one go")
        size = dimension if indices is None else indices.size
        nothing = indices is not None and not message.plans
        values = np.empty(0 if nothing else size + self.anchor.statistics.size, np.float32)
        self._catching_up = CatchingUp(message, indices, values)
        if nothing:
            self._caught_up()

    def _vector_chunk(self, chunk: VectorChunk) -> None:
        if chunk.purpose is Purpose.PROGRESS:
            self._progress_chunk(chunk)
            return
        state = self._catching_up
        if state is None or chunk.purpose is not Purpose.CATCH_UP:
            raise MalformedError("values that were not announced")
        if chunk.total != (state.values.size if state.patch is None else state.patch.size):
            raise MalformedError(f"values of {chunk.total} that were not announced")
        values = _floats(chunk)
        if state.patch is not None:
            self._patch(state, chunk, values)
            return
        if chunk.offset != state.filled or values.size > state.values.size - state.filled:
            raise MalformedError(f"catch-up values at {chunk.offset}; {state.filled} was next")
        require_finite(values, "the catch-up")
        state.values[state.filled : state.filled + values.size] = values
        state.filled += values.size
        if state.filled == state.values.size:
            self._caught_up()

    def _patch(self, state: CatchingUp, chunk: VectorChunk, values: Floats) -> None:
        assert state.patch is not None
        if chunk.offset != state.patched or values.size > state.patch.size - state.patched:
            raise MalformedError(f"catch-up values at {chunk.offset} of a patch; {state.patched} was next")
        require_finite(values, "the catch-up")
        state.values[state.patch[state.patched : state.patched + values.size]] = values
        state.patched += values.size
        if state.patched == state.patch.size:
            state.patch = None

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
        elif indices is None and not self.initialised:
            old, new = anchor.vector, state.values[:size]
            anchor.vector[:] = new  # the next commits change it while the model has yet to take the values over
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
            if indices is None:
                taken: Floats | None = new
            else:
                taken = anchor.vector.copy() if new.size else None  # nothing is missing: it is this worker's own model
            self._out.append(Initialise(taken, anchor.statistics))
        else:
            full_cycle = size_of_cycle(self._configured(), anchor.vector.size)
            long_absence = told.position.round - before > full_cycle
            self._settle(indices, old, new, statistics, long_absence)
            if self._former_at_work:
                self._settle_former(told.base_round)
        self._say_ready()
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
        own = max((anchor.inclusion.of(i) for i in (self.incarnation, *self.formers)), key=lambda e: e.round)
        known = own.round > 0 or anchor.inclusion.knows(self.incarnation, 1)
        doubtful = not known and any(self._is_doubtful(r) for r in self.ledger.all())
        todo = self.ledger.resolve(own if known else None, anchor.position.round, anchor.lineage)
        settled = max((r.plan.round for r in waiting if r.decided), default=None)
        if new.size or settled is not None:
            moved = indices if new.size else np.empty(0, np.int64)
            self._out.append(Update(0, moved, old, new, None, statistics, settled, None, long_absence))
        if doubtful:
            self._give_up_own()
            return
        for record, subtract, add_back in todo:
            values = np.array(anchor.vector[record.where])
            for mask, give_back in ((subtract, False), (add_back, True)):
                sent = record.masked(mask)
                if sent is not None:
                    sent = -sent if give_back else sent
                    self._out.append(Update(0, record.indices, values, values, sent, None, None, None))
        for early in self.ledger.give_up_early(own if known else None, anchor.lineage):
            values = anchor.vector.copy()
            self._out.append(Update(0, None, values, values, -early, None, None, None))

    def _settle_former(self, base_round: int) -> None:
        """After its state was saved, the process that saved it may have lived on and contributed: then nobody knows
        what of the saved progress is in the consensus, and it is forgotten.

        Args:
            base_round: the last round that the saved state and the present one share.
        """
        anchor, ledger = self.anchor, self.ledger
        last = max(anchor.inclusion.of(i).round for i in self.formers)
        known = ledger.records.get(last)
        forgotten = not all(anchor.inclusion.knows(i, base_round + 1) for i in self.formers)
        if forgotten or (last > base_round and (known is None or anchor.lineage.epoch_of(last) not in known.epochs)):
            self._give_up_own()
        if self.incarnation in self._roster:
            self._former_at_work = False

    def _is_doubtful(self, record: Record) -> bool:
        """The state may hold it: the round is closed by somebody whose word this worker never had, and the table that
        would say has forgotten this worker."""
        anchor, number = self.anchor, record.plan.round
        epoch = anchor.lineage.epoch_of(number)
        if number > anchor.position.round or epoch in record.outcomes or epoch not in record.epochs:
            return False
        return not anchor.inclusion.knows(self.incarnation, number)

    def _give_up_own(self) -> None:
        """Nobody knows what of this worker's progress is in the consensus: it goes on from that."""
        ledger = self.ledger
        waiting = [record for record in ledger.all() if not record.decided]
        for record in waiting:
            ledger.decide(record, 0)
        ledger.records.clear()
        ledger.superseded.clear()
        ledger.early.clear()
        self._forget(None, max((record.plan.round for record in waiting), default=None))

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
            Emit(VectorChunk(Purpose.PROGRESS, start, delta.size, encode_view(piece, ValueType.FLOAT32)))
            for start in range(0, delta.size, STREAM_VALUES)
            for piece in [delta[start : start + STREAM_VALUES]]
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
            none = np.zeros(size, np.float32)
            self._out.append(Update(0, None, none, whole, None, None, None, None, progress=True))


def _floats(chunk: VectorChunk) -> Floats:
    if not chunk.values or len(chunk.values) % 4:
        raise MalformedError(f"a vector chunk of {len(chunk.values)} bytes")
    return np.frombuffer(chunk.values, "<f4")


def size_of_cycle(config: RunConfig, dimension: int) -> int:
    """Rounds in which every coordinate is sent once: 1/density."""
    return -(-dimension // config.count(dimension))
