"""One round after the other: opening, summing, closing part by part, committing."""

from __future__ import annotations

import math

from loscar_core.effects import RoundCommitted, Send
from loscar_core.errors import WrongRoundError
from loscar_core.messages import Commit, Contribution, OpenRound, Partial, RosterChange, SlotTaken
from loscar_core.plan import RoundKind, RoundPlan, consolidation, end_plan, plan_round
from loscar_core.selection import SelectionKind
from loscar_core.server_catchup import MIN_SLICE_VALUES
from loscar_core.server_explicit import round_of
from loscar_core.server_followers import Followers
from loscar_core.server_members import Member, MemberState
from loscar_core.server_round import ServerRound
from loscar_core.server_state import Phase


class Rounds(Followers):
    """The open round and the next one; `ServerRound` holds the sums."""

    def _contribution(self, member: Member, message: Contribution) -> None:
        if member.observer:
            raise WrongRoundError("contributions are not expected from an observer")
        if message.epoch > max(self.epoch, self._epochs_heard):
            raise WrongRoundError(f"contribution to epoch {message.epoch}; this server is in {self.epoch}")
        if self.replica is None and self._epochs_heard == 0:
            raise WrongRoundError(f"contribution to round {message.round} before the run has begun")
        if self.replica is None or message.epoch < self.epoch or message.round <= self.replica.position.round:
            return  # late: the progress is still with the worker and goes out with a later round
        current = self.round
        if current is None or self.phase is not Phase.RUNNING:
            raise WrongRoundError(f"contribution to round {message.round} while none is open")
        if current.slots.get(member.slot) != member.incarnation:
            return  # not counted in this round: it was not active when the round opened
        if message.part == 0 and message.offset == 0:
            member.local_steps, member.overlap_steps = message.local_steps, message.overlap_steps
        if current.add(member.slot, message):
            if current.contributed(member.slot):
                member.note_cycle(self._now - self._round_opened)
                member.contributed += 1
            self._advance(message.part)

    def _next_plan(self, round_: int, *, final_done: bool) -> RoundPlan:
        assert self.replica is not None
        if final_done:
            return end_plan(round_)
        duration = self.config.duration_s
        if self.stop_reason is None and duration is not None and self.elapsed_s(self._now) >= duration:
            self.stop_reason = "the duration is over"
        if self.stop_reason is None and self.config.rounds is not None and round_ > self.config.rounds:
            self.stop_reason = "all rounds are done"
        dimension = self.replica.vector.size
        plan = plan_round(self.config, dimension, round_, stopping=self.stop_reason is not None)
        if plan.kind is RoundKind.TRAIN and plan.count < dimension and self._may_consolidate(dimension):
            return consolidation(plan, dimension)
        return plan

    def _may_consolidate(self, dimension: int) -> bool:
        """A dense round takes no more than its share, and nobody so long that the round would close without it."""
        share = self.limits.consolidation_share
        if share == 0 or self.config.dependent or share * (self._values_sent + dimension) < dimension:
            return False
        stretch = dimension / self.config.count(dimension)
        slowest_s = max((m.cycle_s for m in self.members.active()), default=0.0)
        return stretch * slowest_s <= self.limits.round_cap_s

    def _open(self, plan: RoundPlan) -> None:
        assert self.replica is not None
        if plan.kind is RoundKind.END:
            self.round = None
            self._finish(self.stop_reason or "the run is over")
            return
        if self._slot_changes:
            self.roster = list(self.roster)
            for slot, incarnation in self._slot_changes.items():
                self.roster[slot] = incarnation
            # To everybody: who is not following now will be, and is not told the roster again then.
            change = RosterChange(tuple(SlotTaken(*taken) for taken in self._slot_changes.items()))
            self._out.append(Send(tuple(self.members.by_peer), change))
            self._slot_changes = {}
        for member in self._available():
            member.state = MemberState.ACTIVE
        slots = {m.slot: m.incarnation for m in self.members.active()}
        self._counted = [m.name for m in self.members.active()]
        self.round = round_of(
            plan, self.config.seed, self.replica, self.residual, slots, self.limits, self._norm_bound, self._spare
        )
        self._spare = None
        self._round_opened = self._now
        self._stretch = plan.count / self.config.count(self.replica.vector.size)
        self._deadline = self._awaited = None

    def _announce(self, plan: RoundPlan) -> None:
        peers = tuple(m.peer for m in self.members.by_peer.values() if m.following)
        self._out.append(Send(peers, OpenRound(plan, self.elapsed_s(self._now))))

    def _available(self) -> list[Member]:
        """Members that the next round can wait for."""
        return [m for m in self.members.workers() if m.ready and m.following and m.stream is None]

    def _present(self) -> list[Member]:
        """Members of the open round that are still there and active."""
        assert self.round is not None
        slots = self.round.slots
        return [m for m in self.members.active() if slots.get(m.slot) == m.incarnation]

    def _due(self, member: Member) -> float:
        """When the open round stops waiting for a member."""
        return self._round_opened + member.deadline_s(self.limits, self._stretch)

    def _next_deadline(self) -> float | None:
        """When the first of the open round's members stops holding it up; at times too early, never too late.

        They are not all looked at for every message: there can be thousands.
        """
        if self.round is None:
            return None
        if self._deadline is None or self._deadline <= self._now:
            whole = self.round.whole()
            due = [self._due(m) for m in self._present() if m.slot not in whole]
            self._deadline = min((t for t in due if t > self._now), default=math.inf)
        return self._deadline if self._deadline < math.inf else None

    def _still_awaited(self, member: Member | None, part: int) -> bool:
        """A part cannot close because of this member."""
        return (
            member is not None
            and self.round is not None
            and member.state is MemberState.ACTIVE
            and self.round.slots.get(member.slot) == member.incarnation
            and not self.round.has(member.slot, part)
            and self._now < self._due(member)
        )

    def _advance(self, part: int | None = None) -> None:
        """Close what can be closed; commit and open the next round when all of it is.

        A part closes when every active member of the round is in it, apart from those past their deadline,
        and at least half of the active ones are. When all members of a round have gone, it waits for the first that
        is ready: to begin anew with whoever is there or, when some of it has been received, to close the rest.
        """
        if part is not None and self._still_awaited(self._awaited, part):
            return
        while self.phase is Phase.RUNNING and self.round is not None:
            current = self.round
            present = self._present()
            if not present:
                if not self._available():
                    if self.stop_reason is not None and not self.members.workers():
                        self._finish(self.stop_reason)
                    return
                if current.untouched:
                    # What they have sent for it did not count: they are asked to send it again.
                    self._open(current.plan)
                    self.round.reopened = True
                    self._announce(current.plan)
                    continue
            quorum = (len(present) + 1) // 2
            awaited = {m.slot: m for m in present if self._now < self._due(m)}
            for index in current.open_parts() if part is None else [part]:
                have = current.contributors(index)
                missing = awaited.keys() - have
                if missing:
                    # Whoever is likely to be the last: all are looked at again when it has come.
                    self._awaited = max((awaited[s] for s in missing), key=lambda m: (self._due(m), m.cycle_s, m.slot))
                elif len(have) >= quorum:
                    answers = current.close(index, self.answer_bytes)
                    peers = tuple(m.peer for m in self.members.by_peer.values() if m.following)
                    self._out.extend(Send(peers, answer) for answer in answers)
            if not current.complete:
                return
            self._commit(current)
            part = None

    def _commit(self, current: ServerRound) -> None:
        assert self.replica is not None
        state, plan = self.replica, current.plan
        before, roster, bitmaps = state.digest, self.roster, current.bitmaps()
        digest = state.next_digest(plan, current.where, current.new_values, current.new_statistics)
        state.commit(
            self.epoch,
            plan,
            current.where,
            current.new_values,
            current.new_statistics,
            digest,
            bitmaps,
            roster,
            current.members,
        )
        self._spare = current.new_values  # they are in the state now
        if self.residual is not None and current.new_residual is not None:
            self.residual[current.where] = current.new_residual
        whole = current.whole()
        for member in self._present():
            if member.slot not in whole:
                member.state = MemberState.SUSPENDED
                member.ready = False
                member.missed += 1
                # At least so long: or a worker that has become slower would miss every round from now on.
                member.note_cycle(self._now - self._round_opened)
        dense = plan.selection is SelectionKind.ALL
        self._values_sent = 0 if dense else self._values_sent + plan.count
        next_plan = self._next_plan(plan.round + 1, final_done=plan.kind is RoundKind.FINAL)
        elapsed = self.elapsed_s(self._now)
        commit = Commit(plan.round, current.members, digest, next_plan, round(elapsed * 1000))
        following = [m for m in self.members.by_peer.values() if m.following]
        self._out.append(Send(tuple(m.peer for m in following), commit))
        for member in following:
            member.sent_round = plan.round
            member.behind += 1
            if member.behind > self.limits.max_backlog_rounds:
                member.following = False  # its outbox never empties: values instead of answers, once it does
                member.ready = False
                if member.stream is not None:
                    # It was not even sent the whole vector: it will be, in pieces that take less of its time, so that
                    # what is queued behind one of them is not too much.
                    member.slice_values = max(MIN_SLICE_VALUES, member.stream.slice_values // 4)
                    filled = min(member.stream.offset, state.vector.size)
                    member.partial = Partial(state.position, digest, filled)
                    member.sent_round = 0
                    member.stream = None
                if member.state is MemberState.ACTIVE:
                    member.state = MemberState.SUSPENDED
        seconds = self._now - self._round_opened
        self._out.append(
            RoundCommitted(
                state.position,
                plan,
                seconds,
                elapsed,
                current.members,
                tuple(sorted(whole)),
                next_plan,
                digest,
                before,
                tuple(bitmaps),
                roster,
            )
        )
        self._counted_last = self._counted
        self._vanished.intersection_update(self._counted_last)
        self._sent_on.clear()
        self._open(next_plan)
