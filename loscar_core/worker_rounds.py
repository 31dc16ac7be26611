"""Taking part in rounds: announcing them, snapshots, answers, commits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loscar_core.config import FinalRound
from loscar_core.errors import MalformedError, NonFiniteError, ReplicaDivergedError
from loscar_core.messages import Answer, Commit, Contribution, Refresh
from loscar_core.plan import HISTORY_ROUNDS, HistoryEntry, RoundKind, RoundPlan
from loscar_core.replica import Floats, Indices, Where, as_indices
from loscar_core.selection import SelectionKind
from loscar_core.state import InclusionTable, Position, bits
from loscar_core.worker_effects import Emit, RoundOpen, RunEnded, Update, WorkerEffect
from loscar_core.worker_holdings import CatchingUp, WorkerHoldings
from loscar_core.worker_ledger import Record
from loscar_core.worker_receiving import Receiving, coding_of, receiving_of


class WorkerRounds(WorkerHoldings):
    """The open round, from its announcement to its commit."""

    def _open(self, plan: RoundPlan, elapsed_s: float) -> None:
        config = self._configured()
        state = self._catching_up.announcement if self._catching_up is not None else self.anchor
        if plan.round != state.position.round + 1:
            raise MalformedError(f"round {plan.round} is opened on top of {state.position}")
        if self.welcome is not None:
            # Not before: a server may have opened an epoch and never get a majority to go on with.
            if self.welcome.epoch > self.epoch:
                self._epoch_began_s = elapsed_s
            self.epoch = max(self.epoch, self.welcome.epoch)
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
        self._receiving = receiving_of(plan, config.seed, dimension, self.anchor.statistics.size, self._buffers)
        if self._catching_up is None:
            self._announce(self._receiving)

    def _end(self) -> None:
        self._buffers.clear()
        keep = self._configured().final_round is not FinalRound.DENSE
        self._out.append(RunEnded(*(None, None) if keep else (self.anchor.vector, self.anchor.statistics)))

    def _announce(self, receiving: Receiving) -> None:
        """The open round can be taken part in; what was contributed to it on another stream is sent again."""
        if self._former_at_work:
            return  # it is the former incarnation's, which may have contributed to it: the next one is ours
        record = self.ledger.in_flight(receiving.plan.round)
        if record is not None:
            record.messages = tuple(replace(m, epoch=self.epoch) for m in record.messages)
            record.epochs.add(self.epoch)
            self._out.extend(Emit(m) for m in record.messages)
        elif (later := self.ledger.in_flight_after(receiving.plan.round)) is not None:
            # It was taken back behind a round that it has contributed to: it does not wait for that one's answer.
            empty = np.empty(0, np.float32)
            self._out.append(Update(0, np.empty(0, np.int64), empty, empty, None, None, later, None))
        self._opening += 1
        opened = RoundOpen(receiving.plan, receiving.offered, record is not None, self.elapsed_s, self._opening)
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
            values: x at the `RoundOpen`'s coordinates, float32, taken after it, with every update merged that came
                before; the array is the engine's from now on.
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
        plan = receiving.plan
        delta = np.subtract(values, self.anchor.gather(plan, receiving.offered, 0, values.size), out=values)
        try:
            encoded = receiving.encode(delta, statistics, self.message_bytes)
        except NonFiniteError as error:
            raise NonFiniteError(f"round {round_}: {error}; nothing was sent") from None
        messages = []
        for part, piece in encoded.pieces:
            first = part == 0 and piece.offset == 0
            messages.append(
                Contribution(
                    self.epoch,
                    round_,
                    part,
                    piece.offset,
                    piece.values,
                    receiving.checksum,
                    local_steps if first else 0,
                    overlap_steps if first else 0,
                    piece.indices,
                    piece.base,
                    coding_of(plan, receiving.parts[part]),
                    piece.total,
                )
            )
        self.bytes_up += sum(len(m.values) + len(m.indices) for m in messages)
        record = Record(plan, encoded.where, encoded.sent, encoded.parts, tuple(messages), epochs={self.epoch})
        record.exhausted = encoded.exhausted
        self.ledger.add(record)
        return [Emit(m) for m in messages]

    def _answer(self, answer: Answer) -> None:
        receiving = self._receiving
        if receiving is None or answer.round != receiving.plan.round:
            raise MalformedError(f"an answer to round {answer.round}, which is not open")
        receiving.take(answer)
        self.bytes_down += len(answer.values) + len(answer.indices)

    def _commit(self, commit: Commit) -> None:
        receiving = self._receiving
        if receiving is None or commit.round != receiving.plan.round:
            raise MalformedError(f"a commit of round {commit.round}, which is not open")
        if not receiving.whole:
            raise MalformedError(f"round {commit.round} is committed before all of it was answered")
        if self._catching_up is not None:
            self._commit_while_catching_up(self._catching_up, receiving, commit)
        else:
            self._commit_in_order(receiving, commit)
        if self._receiving is receiving:
            self._receiving = None
            self._open(commit.plan, commit.elapsed_ms / 1000)

    def _commit_in_order(self, receiving: Receiving, commit: Commit) -> None:
        plan, where, anchor = receiving.plan, receiving.where, self.anchor
        new = receiving.delta
        old = anchor.gather(plan, where, 0, new.size)
        np.add(old, receiving.delta, out=new)
        statistics = receiving.statistics if receiving.statistics.size else None
        digest = anchor.next_digest(plan, where, new, statistics)
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
        record = self.ledger.in_flight(plan.round)
        mask, sent = self._own_mask(receiving.included), None
        if record is not None:
            sent = receiving.sent_of(record, mask)
        if isinstance(where, slice):
            kept = self._buffers.take(old.size)  # it is a view of what the commit overwrites
            kept[:] = old
            old = kept
        anchor.commit(
            self.epoch,
            plan,
            where,
            new,
            statistics,
            digest,
            receiving.included,
            self._roster,
            commit.members,
        )
        if record is not None:
            self.ledger.decide(record, mask, self.epoch)
        if 2 * self._included_in(receiving) > commit.members:
            dimension = anchor.vector.size
            self.ledger.forget(plan.round, anchor.lineage, self._epoch_began_s, self.elapsed_s, dimension)
        settles = plan.round if record is not None else None
        complete = mask == (1 << len(receiving.parts)) - 1
        whole = complete and record is not None
        update = Update(plan.round, _all_or(plan, where), old, new, sent, statistics, settles, plan, whole=whole)
        if whole and record is not None and plan.explicit:
            covers = slice(0, anchor.vector.size) if record.exhausted else record.where
            update = replace(update, covers=covers)
        self._out.append(update)
        if self._former_at_work:
            self._former_at_work = False
            if record is None and mask:
                self._forget(_all_or(plan, where))
        if not complete and not self.observer:
            self._say_ready()  # it may have been given up on: wait for it again

    def _forget(self, indices: Indices | None, settles: int | None = None) -> None:
        """The model gives up what it has beyond the anchor, on some coordinates or on all (None)."""
        vector = self.anchor.vector
        values = vector.copy() if indices is None else vector.take(indices)
        self._out.append(Update(0, indices, values, values, None, None, settles, None, forget=True))

    def _commit_while_catching_up(self, state: CatchingUp, receiving: Receiving, commit: Commit) -> None:
        """A round that was committed while the whole vector is streamed: patch what has arrived.

        What has not arrived yet will hold the round already, so it may be patched too. The digest cannot be
        checked before everything is there.
        """
        if state.indices is not None:
            raise MalformedError("a commit in the middle of a partial catch-up")
        plan, where = receiving.plan, receiving.where
        with np.errstate(all="ignore"):  # values that have not arrived are arbitrary
            state.values[where] += receiving.delta
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

    def _included_in(self, receiving: Receiving) -> int:
        return min(len(bits(b)) for b in receiving.included)


def _all_or(plan: RoundPlan, where: Where) -> Indices | None:
    return None if plan.selection is SelectionKind.ALL else as_indices(where)
