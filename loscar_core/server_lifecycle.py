"""How a run starts, is recovered, loses members, and ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loscar_core.config import RunConfig, require_fit
from loscar_core.effects import Close, MemberGone, Notice, Refused, RunStarted
from loscar_core.errors import ConfigError, LoscarError, MalformedError, RefusedError
from loscar_core.messages import (
    OTHER_SERVERS,
    Goodbye,
    Hello,
    OpenRound,
    Purpose,
    Reason,
    SendState,
    StateOffer,
    VectorChunk,
)
from loscar_core.plan import HISTORY_ROUNDS, RoundKind, RoundPlan, end_plan
from loscar_core.replica import Replica
from loscar_core.server_catchup import StateTransfer
from loscar_core.server_members import Member, MemberState
from loscar_core.server_recovery import Choice, Claim, behind, choose
from loscar_core.server_sequence import Rounds
from loscar_core.server_state import Phase
from loscar_core.state import YOUNG_S, Position
from loscar_core.values import ValueType

PROVISIONAL_S = 0.8 * YOUNG_S
"""The longest time for which a state that no majority vouches for gives way to another one."""


class Lifecycle(Rounds):
    """Everything that moves a run from one phase to another."""

    # --- the start ------------------------------------------------------------------------------------------

    def _try_start(self) -> None:
        workers = self.members.workers()
        if not workers or self.retired is not None:
            return
        if self.phase is Phase.WAITING and self._enough(len(workers)):
            # One that has been given the run's initial model before, if there is one.
            donor = min(workers, key=lambda m: (-m.hello.position.epoch, m.slot))
            self._ask_for_state(donor, Purpose.INITIAL_MODEL)
        elif self.phase is Phase.READYING:
            ready = sum(m.ready for m in workers)
            overdue = self._now >= self._last_join + max(self.limits.start_grace_s, self.limits.lease_s)
            if self._recovered and ready < self._majority:
                return
            if (ready == len(workers) and self._enough(ready)) or (self._recovered and overdue and ready):
                self._start()

    def _enough(self, present: int) -> bool:
        if self.limits.workers is not None and present >= self.limits.workers:
            return True
        if self.limits.workers is not None and not self._recovered:
            return False
        return self._now >= self._last_join + self._start_grace_s()

    def _start_grace_s(self) -> float:
        """How long to wait for others after the last join. Where a worker has met this run before, others may hold
        a state of it: they are given more time before the run is begun anew."""
        met_before = self.phase is Phase.WAITING and self._epochs_heard > 0
        return max(self.limits.start_grace_s, self.limits.recover_after_s if met_before else 0.0)

    @property
    def _any_will_do(self) -> bool:
        """Who restarts the run's own server with its disk, or ends the run, or asks not to wait for a majority, means
        it; and workers that know of no other server cannot have been cut off from it. Otherwise fewer may be the ones
        who were cut off, while the run goes on at another server."""
        meant = self._resumed or self.stop_reason is not None or self.limits.recover_after_s == 0
        return meant or not any(OTHER_SERVERS in m.hello.capabilities for m in self.members.workers())

    @property
    def _majority(self) -> int:
        """How many workers it takes to go on with the state that is held here."""
        assert self.replica is not None
        return 1 if self._any_will_do else self.replica.members // 2 + 1

    def _ask_for_state(self, donor: Member, purpose: Purpose) -> None:
        assert self.layout is not None
        self.phase = Phase.TRANSFERRING
        self._transfer = StateTransfer(donor.peer, self.layout.dimension, self.layout.statistics_size, purpose)
        self._send(donor, SendState(purpose))

    def _vector_chunk(self, member: Member, chunk: VectorChunk) -> None:
        if chunk.purpose is Purpose.PROGRESS:
            self._relay(member, chunk)
            return
        transfer = self._transfer
        if transfer is None or transfer.peer != member.peer:
            return  # no longer wanted: another donor was chosen meanwhile
        if not transfer.add(chunk):
            return
        offer = transfer.offer
        if offer is None:
            self._take_over(transfer.replica(), None, 0.0)
        else:
            self._take_over(transfer.replica(), offer.config, max(offer.elapsed_s, 0.0), sure=self._sure)

    def _take_over(self, state: Replica, config: RunConfig | None, elapsed_s: float, *, sure: bool = False) -> None:
        """Make a state the run's: the initial one (without a configuration of its own), or a recovered one.

        Args:
            sure: several workers, a majority, vouch for it.
        """
        self.replica = state
        self._provisional_until = self._now + (0.0 if sure else min(self.limits.recover_after_s, PROVISIONAL_S))
        before, self.epoch = self.epoch, max(self._epochs_heard, state.position.epoch) + 1
        self._welcomed.clear()
        self._begun = config is None
        if config is None:
            state.position = Position(self.epoch, 0)
        else:
            own = self.config
            self.config = replace(config, rounds=own.rounds, duration_s=own.duration_s, max_steps=own.max_steps)
            self._elapsed_before = elapsed_s
        self._transfer = None
        self._checkpoint = None
        self._claims.clear()
        if self.config.value_type is not ValueType.FLOAT32:
            self.residual = np.zeros(self.replica.vector.size, np.float32)
        self.phase = Phase.READYING
        self._last_join = self._now
        for each in list(self.members.by_peer.values()):
            if config is not None or self.epoch != before:
                self._welcome(each)
            try:
                self._catch_up_from_hello(each)
            except LoscarError as error:
                self._refuse(each.peer, error)

    def _start(self) -> None:
        assert self.replica is not None
        self._t0 = self._now
        self.phase = Phase.RUNNING
        last = self.replica.history.last(1)
        final_done = any(e.plan.kind is RoundKind.FINAL for e in last)
        plan = self._next_plan(self.replica.position.round + 1, final_done=final_done)
        self._out.append(RunStarted(self.replica.position, len(self.members.workers()), self._elapsed_before))
        self._open(plan)
        self._announce(plan)

    def _open(self, plan: RoundPlan) -> None:
        if self._perhaps_cut_off and plan.kind is not RoundKind.END:
            self._look_elsewhere_first()
        super()._open(plan)

    @property
    def _perhaps_cut_off(self) -> bool:
        """More than half of the last round's members have vanished, or some who were sent to look for them have not
        come back: perhaps it is this server that was cut off, and the run goes on elsewhere."""
        if self.stop_reason is not None or len(self._counted_last) < 2:
            return False
        lost = self._vanished.intersection(self._counted_last)
        here = {m.incarnation for m in self.members.workers()}
        return 2 * len(lost) > len(self._counted_last) or not self._sent_on <= here

    def _look_elsewhere_first(self) -> None:
        """Before the run goes on here, those who are left try the other addresses, once: where there are none, or
        nothing is found at them, they are back at once."""
        self.round = None  # nothing is closed just because they are sent away
        for member in self.members.workers():
            if member.incarnation not in self._sent_on:
                self._sent_on.add(member.incarnation)
                self._dismiss(member, Reason.CUT_OFF, "most of the others were lost: look for them elsewhere first")

    # --- recovery -------------------------------------------------------------------------------------------

    @property
    def _holders(self) -> list[int]:
        """Streams of workers that have closed a round of this run."""
        return [peer for peer, claim in self._claims.items() if claim.position.round > 0]

    def _recover(self) -> None:
        """A worker holds a state of this run: whatever was begun here without it is given up."""
        self._out.append(Notice("workers hold a state of this run: recovering it"))
        self._said_too_few = False
        if self.replica is not None:
            if self._begun:
                self._begun_in_vain.update((e.position, e.digest) for e in self.replica.history.last(HISTORY_ROUNDS))
            self._epochs_heard = max(self._epochs_heard, self.epoch)
            for member in self.members.by_peer.values():
                member.state, member.ready = MemberState.JOINING, False
                member.following, member.stream = False, None
                if member.hello.position.epoch > 0 and not member.observer:
                    self._claims[member.peer] = Claim.of(member.peer, member.hello)
        self.phase = Phase.RECOVERING
        self._recovering_since = self._now
        self._transfer = self.replica = self.residual = self.round = None
        self._relays.clear()
        self._t0 = None
        self._elapsed_before = 0.0

    def _is_rival(self, hello: Hello) -> bool:
        """Whether a worker holds another state than those from which the one here was chosen, and it is not too late.

        It is not before the first round; and for a while after it, when no majority of several workers vouched for
        the state: a fresh worker that was first at a restarted server has begun a run, say, or it went on from an old
        checkpoint, or from what a lone worker held, and now come those who hold the run that it was before.
        """
        state = self.replica
        young = self.phase is Phase.READYING or (self.phase is Phase.RUNNING and self._now < self._provisional_until)
        if state is None or state.position.round == 0 or not young or self.stop_reason is not None:
            return False
        if hello.observer or hello.position.round == 0 or (hello.position, hello.digest) in self._considered:
            return False
        if not has_passed(state, hello.position):
            return True
        # Two processes may have called themselves by the same number.
        known = [(state.digest_at(position), digest) for position, digest in Claim.of(0, hello).chain]
        return any(ours is not None for ours, _ in known) and all(ours != theirs for ours, theirs in known)

    def _give_way(self) -> None:
        """Start over with recovering; who took part here is asked again what it holds."""
        self._recover()
        for member in list(self.members.by_peer.values()):
            self._dismiss(member, Reason.STEPPED_DOWN, "another state of this run has turned up")
        self._claims.clear()

    def _try_adopt(self) -> None:
        if self.retired is not None:
            return
        waited = self._now >= self._recovering_since + self.limits.recover_after_s
        saved = self._checkpoint
        self._considered = {(c.position, c.digest) for c in self._claims.values()}
        present = len(self.members.workers())
        claims = behind(list(self._claims.values()), self._begun_in_vain)
        choice = choose(claims, waited=waited, present=None if self._any_will_do else present)
        if waited and choice is None and self._holders and saved is None:
            if not self._said_too_few:
                self._said_too_few = True
                what = f"{present} workers are here, which is no majority of the run's"
                self._out.append(Notice(f"{what}: the others may be at another server; waiting for more of them"))
            self._recovering_since = self._now
            for member in self.members.workers():
                if OTHER_SERVERS in member.hello.capabilities:
                    self._dismiss(member, Reason.CUT_OFF, "too few are here: look for the others elsewhere")
            return
        if saved is None and waited and choice is None:
            self.phase = Phase.WAITING  # nobody came back who holds the state
            if self.stop_reason is not None:
                self._stop(self.stop_reason)
            return
        if saved is not None and (choice is None or _holds(saved.replica, choice.position, choice.digest)):
            # With nobody's claim to compare with, the checkpoint counts once everybody is there.
            fresh = not self._holders and len(self.members) > 0 and self._enough(len(self.members.workers()))
            if choice is not None or fresh or (waited and len(self.members) > 0):
                self._out.append(Notice(f"going on from the checkpoint at {saved.replica.position}"))
                self._take_over(saved.replica, saved.config, saved.elapsed_s, sure=_is_sure(choice))
                if self.residual is not None and saved.residual is not None:
                    self.residual[:] = saved.residual
            return
        if choice is None:
            return
        majority = "" if choice.by_majority else ", which is no majority"
        self._out.append(Notice(f"adopting {choice.position}: {choice.vouchers} workers vouch for it{majority}"))
        self._sure = _is_sure(choice)
        self._ask_for_state(self.members.by_peer[choice.peer], Purpose.ANCHOR)

    def _state_offer(self, member: Member, offer: StateOffer) -> None:
        transfer = self._transfer
        if transfer is None or transfer.peer != member.peer:
            return  # no longer wanted
        claim = self._claims.get(member.peer)
        if transfer.purpose is not Purpose.ANCHOR or transfer.offer is not None or claim is None:
            raise MalformedError("a state that was not asked for")
        if (offer.position, offer.digest, max(1, offer.members)) != (claim.position, claim.digest, claim.members):
            raise MalformedError(f"a state at {offer.position} where {claim.position} was claimed")
        spans = offer.lineage.spans
        if not spans or spans[-1][0] != offer.position.epoch or spans[-1][1] > offer.position.round:
            raise MalformedError(f"a state at {offer.position} with the lineage {spans}")
        if any(e.position.round > offer.position.round for e in offer.recent) or any(
            entry.round > offer.position.round for entry in offer.inclusion.values()
        ):
            raise MalformedError(f"a state at {offer.position} that speaks of later rounds")
        assert self.layout is not None
        offer.config.count(self.layout.dimension)
        try:
            require_fit(offer.config, self.limits)
        except ConfigError as error:  # this server's mistake: it must not cost the run the worker that holds it
            raise RefusedError(f"this server cannot hold the run: {error}") from None
        transfer.offer = offer

    # --- endings --------------------------------------------------------------------------------------------

    def _stop(self, why: str) -> None:
        if self.stop_reason is None:
            self.stop_reason = why
            self._out.append(Notice(f"ending the run: {why}"))
        recovering = self.phase is Phase.RECOVERING or self._adopting or self._recovered
        if self.phase not in (Phase.RUNNING, Phase.FINISHED):
            if recovering and self.members.workers():
                # They hold a run: it is recovered first, by whoever is there, and then ends as it should.
                self._try_adopt() if self.phase is Phase.RECOVERING else self._try_start()
                return
            self._finish(why)
            self._transfer = None
            for member in list(self.members.by_peer.values()):
                if self.replica is None:
                    self._dismiss(member, Reason.FINISHED, why)
                elif member.following:
                    self._send(member, OpenRound(end_plan(self.replica.position.round + 1), self.elapsed_s(self._now)))
        self._advance()

    def _refuse(self, peer: int, error: LoscarError) -> None:
        key = type(error).__name__
        self.refused[key] = self.refused.get(key, 0) + 1
        self._out += [Refused(peer, error), Close(peer, error=error)]
        member = self.members.by_peer.get(peer)
        if member is not None:
            self._remove(member, Reason.REFUSED, str(error))

    def _remove(self, member: Member, reason: Reason, detail: str) -> None:
        """Forget a member; the open round does not wait for it any more."""
        self.members.remove(member, reason, detail, self._now)
        lost = reason in (Reason.STREAM_CLOSED, Reason.LEASE_EXPIRED)
        if lost and (member.name in self._counted or member.name in self._counted_last):
            self._vanished.add(member.name)
        if self._claims.pop(member.peer, None) is not None and not self._holders:
            self._recovering_since = self._now  # it may come back
        self._relays.pop(member.peer, None)
        if self.round is not None and self.round.slots.get(member.slot) == member.incarnation:
            self.round.forget_unfinished(member.slot)
        self._out.append(MemberGone(self.members.departures[-1]))
        if self._transfer is not None and self._transfer.peer == member.peer:
            recovering = self._adopting or self._checkpoint is not None
            self._transfer = None
            self.phase = Phase.RECOVERING if recovering else Phase.WAITING
            if recovering:
                self._try_adopt()
        if not self.members.workers() and self.phase is Phase.WAITING:
            self.layout = None  # nobody is left who could have meant that model
        if not self.members.workers() and self.stop_reason is not None:
            self._stop(self.stop_reason)
        self._try_start()
        self._advance()

    def _dismiss(self, member: Member, reason: Reason, detail: str) -> None:
        self._remove(member, reason, detail)
        self._out.append(Close(member.peer, goodbye=Goodbye(reason, detail)))


def has_passed(state: Replica, position: Position) -> bool:
    """Whether a state has been at a position, as far as numbers tell."""
    if position.round == 0:
        return state.position.round > 0 or state.position == position
    return position.round <= state.position.round and state.lineage.epoch_of(position.round) == position.epoch


def _is_sure(choice: Choice | None) -> bool:
    return choice is not None and choice.by_majority and choice.vouchers > 1


def _holds(state: Replica, position: Position, digest: int) -> bool:
    """Whether a state goes on from a point that somebody holds, or is it; the longest past is judged by its epoch."""
    known = state.digest_at(position)
    if known is not None:
        return known == digest
    return position.round < state.position.round and state.lineage.epoch_of(position.round) == position.epoch
