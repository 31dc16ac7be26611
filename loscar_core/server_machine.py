"""The server's half of the protocol as a state machine: events and the time in, effects out.

    waiting ──all there──▶ transferring ──model──▶ readying ──all ready──▶ running ──▶ finished
       └── somebody holds a position ──▶ recovering ──majority──▶ transferring

It holds the consensus, the members and the open round; it knows neither sockets nor clocks. The transport calls
`received`, `disconnected`, `drained` and `tick`, and carries out the effects in order.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

import numpy as np

from loscar_core.config import PROTOCOL_VERSION, RunConfig, ServerLimits
from loscar_core.effects import (
    Close,
    MemberGone,
    MemberJoined,
    Notice,
    RoundCommitted,
    RunFinished,
    RunStarted,
    Send,
    ServerEffect,
    SteppedDown,
)
from loscar_core.errors import (
    LoscarError,
    MalformedError,
    RefusedError,
    SupersededError,
    VersionMismatchError,
    WrongModelError,
    WrongRoundError,
    WrongRunError,
)
from loscar_core.layout import Layout, require_same
from loscar_core.messages import (
    Commit,
    Contribution,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Leave,
    OpenRound,
    Purpose,
    Ready,
    Reason,
    Refresh,
    SendState,
    ServerMessage,
    SlotTaken,
    StateOffer,
    StopRun,
    VectorChunk,
    Welcome,
    WorkerMessage,
)
from loscar_core.plan import RoundKind, RoundPlan, end_plan, plan_round
from loscar_core.replica import Floats, Replica
from loscar_core.robust import NormBound
from loscar_core.saved_state import SavedState
from loscar_core.server_catchup import StateTransfer, next_slice, plan_catch_up
from loscar_core.server_members import Member, MemberState, MemberTable
from loscar_core.server_recovery import Claim, choose
from loscar_core.server_round import ServerRound
from loscar_core.state import INCARNATION_BYTES, Lineage, Position
from loscar_core.values import ValueType, require_finite


class Phase(StrEnum):
    WAITING = "waiting"
    RECOVERING = "recovering"
    TRANSFERRING = "transferring"
    READYING = "readying"
    RUNNING = "running"
    FINISHED = "finished"


class ServerMachine:
    """One run on one server process.

    Args:
        config: the run's configuration; a recovered state brings its own.
        limits: this server's patience.
        run_id: 16 bytes.
        now: server clock in seconds, monotonic.
        checkpoint: a state of this run to go on from, unless a majority of workers holds a later one. Its
            configuration counts, apart from when the run ends.
    """

    def __init__(
        self, config: RunConfig, limits: ServerLimits, run_id: bytes, now: float, checkpoint: SavedState | None = None
    ) -> None:
        self.config = config
        self.limits = limits
        self.run_id = run_id
        self.epoch = 1
        self.phase = Phase.WAITING
        self.layout: Layout | None = None
        self.replica: Replica | None = None
        self.residual: Floats | None = None
        self.round: ServerRound | None = None
        self.members = MemberTable(limits)
        self.refused: dict[str, int] = {}
        self.stop_reason: str | None = None
        self.retired: str | None = None
        """Why this process answers nobody any more, if so."""
        self.roster: list[bytes | None] = []
        self._slot_changes: dict[int, bytes] = {}
        self._norm_bound = None if limits.norm_bound is None else NormBound(limits.norm_bound)
        self._claims: dict[int, Claim] = {}
        self._relays: dict[int, tuple[int, int]] = {}  # donor's stream -> (newcomer's, values relayed)
        self._epochs_heard = 0
        self._transfer: StateTransfer | None = None
        self._elapsed_before = 0.0
        self._t0: float | None = None
        self._ended_at: float | None = None
        self._round_opened = now
        self._recovering_since = now
        self._last_join = now
        self._now = now
        self._out: list[ServerEffect] = []
        self._checkpoint = checkpoint
        if checkpoint is not None:
            self.run_id = checkpoint.run_id
            self.layout = checkpoint.layout
            self.epoch = checkpoint.epoch + 1
            self._epochs_heard = checkpoint.epoch
            self.phase = Phase.RECOVERING

    # --- events ---------------------------------------------------------------------------------------------

    def received(self, peer: int, message: WorkerMessage, now: float) -> list[ServerEffect]:
        """A message has arrived on a stream. Broken rules end that stream and touch nothing else."""
        self._now = now
        member = self.members.by_peer.get(peer)
        try:
            if isinstance(message, Hello):
                if member is not None:
                    raise MalformedError("a second hello on one stream")
                self._hello(peer, message)
            elif member is None:
                raise MalformedError("the first message of a stream must be a hello")
            else:
                member.heard_s = now
                self._dispatch(member, message)
        except LoscarError as error:
            self._refuse(peer, error)
        return self._flush()

    def refuse(self, peer: int, error: LoscarError, now: float) -> list[ServerEffect]:
        """End a stream that broke a rule; also for messages that the transport could not even decode."""
        self._now = now
        self._refuse(peer, error)
        return self._flush()

    def _refuse(self, peer: int, error: LoscarError) -> None:
        key = type(error).__name__
        self.refused[key] = self.refused.get(key, 0) + 1
        self._out.append(Close(peer, error=error))
        member = self.members.by_peer.get(peer)
        if member is not None:
            self._remove(member, Reason.REFUSED, str(error))

    def disconnected(self, peer: int, now: float) -> list[ServerEffect]:
        """A stream has ended without a goodbye."""
        self._now = now
        member = self.members.by_peer.get(peer)
        if member is not None:
            self._remove(member, Reason.STREAM_CLOSED, "the connection broke")
        return self._flush()

    def drained(self, peer: int, now: float) -> list[ServerEffect]:
        """Everything queued for a stream has been handed to the network: it can take more."""
        self._now = now
        member = self.members.by_peer.get(peer)
        if member is not None and self.replica is not None:
            member.behind = 0
            if member.stream is not None:
                self._stream_on(member)
            elif not member.following:
                # It was cut off from the answers because it could not keep up; its replica holds sent_round.
                lineage = self.replica.lineage.truncated(member.sent_round)
                self._catch_up(member, lineage, member.sent_round or None)
        return self._flush()

    def tick(self, now: float) -> list[ServerEffect]:
        """Time has passed: leases, deadlines, start and recovery waits."""
        self._now = now
        for member in list(self.members.by_peer.values()):
            if member.state is not MemberState.GONE and now >= member.heard_s + self.limits.lease_s:
                self._dismiss(member, Reason.LEASE_EXPIRED, f"nothing heard for {self.limits.lease_s:g} s")
        if self.phase is Phase.RECOVERING:
            self._try_adopt()
        self._try_start()
        self._advance()
        return self._flush()

    def next_wakeup(self) -> float | None:
        """When `tick` is due next, on the server clock; None when nothing is pending."""
        times = [self.members.next_lease_end()]
        if self.phase is Phase.RUNNING:
            times += [t for t in self._deadlines() if t > self._now]
        elif self.phase in (Phase.WAITING, Phase.READYING) and len(self.members):
            waits = (self._start_grace_s(), max(self.limits.start_grace_s, self.limits.lease_s))
            times += [t for t in (self._last_join + wait for wait in waits) if t > self._now]
        elif self.phase is Phase.RECOVERING:
            times += [t for t in [self._last_join + self.limits.start_grace_s] if t > self._now]
            times += [t for t in [self._recovering_since + self.limits.recover_after_s] if t > self._now]
        return min((t for t in times if t is not None), default=None)

    def request_stop(self, why: str, now: float) -> list[ServerEffect]:
        """End the run after the open round, with the final round that the configuration asks for."""
        self._now = now
        self._stop(why)
        return self._flush()

    def shut_down(self, now: float) -> list[ServerEffect]:
        """The process is ending: say so to everybody, so that they look for the next one at once."""
        self._now = now
        self.retired = "the server is shutting down"
        self.round = None  # nothing is closed any more just because members are sent away
        for member in list(self.members.by_peer.values()):
            self._dismiss(member, Reason.SERVER_STOPPED, self.retired)
        return self._flush()

    def saved_state(self, now: float) -> SavedState | None:
        """A copy of the run's state for a checkpoint; None while there is none."""
        if self.replica is None or self.layout is None:
            return None
        residual = None if self.residual is None else self.residual.copy()
        return SavedState(
            self.run_id,
            self.epoch,
            self.config,
            self.layout,
            self.replica.copy(),
            residual,
            max(0.0, self.elapsed_s(now)),
        )

    def elapsed_s(self, now: float) -> float:
        """Run time: seconds since t = 0, over all server processes; -1 before."""
        if self._t0 is None:
            return self._elapsed_before if self._elapsed_before > 0 else -1.0
        until = now if self._ended_at is None else self._ended_at
        return self._elapsed_before + until - self._t0

    # --- joining --------------------------------------------------------------------------------------------

    def _hello(self, peer: int, hello: Hello) -> None:
        self._check_identity(hello)
        self._check_layout(hello)
        self.members.check(hello, self._now)
        self._check_epoch(hello)
        self._supersede(hello)
        if self.layout is None and not hello.observer:
            self._set_layout(hello.layout)
        member = self.members.add(peer, hello, self._now)
        self._epochs_heard = max(self._epochs_heard, hello.epoch, hello.position.epoch)
        self._last_join = self._now
        if self._checkpoint is not None and len(self.members) == 1:
            self._recovering_since = self._now
        if not member.observer:
            self._take_slot(member)
        self._out.append(MemberJoined(member.name, member.slot, member.observer))
        if hello.position.epoch > 0 and not member.observer and self._stateless:
            self._claims[peer] = Claim.of(peer, hello)
            if hello.position.round > 0 and self.phase is not Phase.RECOVERING and not self._adopting:
                self._recover()
        self._welcome(member)
        if self.replica is not None:
            self._catch_up_from_hello(member)
        elif self.phase is Phase.RECOVERING:
            self._try_adopt()
        elif self.phase is Phase.FINISHED:
            self._dismiss(member, Reason.FINISHED, "the run was ended before it began")
        self._try_start()

    @property
    def _stateless(self) -> bool:
        """No round is closed here: a worker that has closed one knows better."""
        return self.phase is not Phase.FINISHED and (self.replica is None or self.replica.position.round == 0)

    @property
    def _holders(self) -> list[int]:
        """Streams of workers that have closed a round of this run."""
        return [peer for peer, claim in self._claims.items() if claim.position.round > 0]

    @property
    def _adopting(self) -> bool:
        """A worker's anchor is on its way here."""
        return self._transfer is not None and self._transfer.purpose is Purpose.ANCHOR

    def _recover(self) -> None:
        """A worker holds a state of this run: whatever was begun here without it is given up."""
        self._out.append(Notice("workers hold a state of this run: recovering it"))
        if self.replica is not None:
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

    def _check_identity(self, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            raise VersionMismatchError(
                f"the worker speaks protocol {hello.protocol_version}, this server {PROTOCOL_VERSION}"
            )
        if hello.run_id and hello.run_id != self.run_id:
            raise WrongRunError(f"this server holds run {self.run_id.hex()}, not {hello.run_id.hex()}")
        if len(hello.incarnation) != INCARNATION_BYTES:
            raise MalformedError(f"an incarnation of {len(hello.incarnation)} bytes")
        if not 0 < len(hello.name) <= 200 or not hello.name.isprintable():
            raise MalformedError("a worker's name must be 1 to 200 printable characters")

    def _check_layout(self, hello: Hello) -> None:
        if self.layout is not None:
            require_same(self.layout, hello.layout)
            return
        size = hello.layout.dimension + hello.layout.statistics_size
        if size > self.limits.max_dimension:
            raise RefusedError(f"{size} coordinates; this server takes at most {self.limits.max_dimension}")
        self.config.count(hello.layout.dimension)

    def _set_layout(self, layout: Layout) -> None:
        """The first worker says what the model is; observers that came before it must agree."""
        for member in list(self.members.by_peer.values()):
            try:
                require_same(layout, member.hello.layout)
            except WrongModelError as error:
                self._refuse(member.peer, error)
        self.layout = layout  # after them: who leaves while nobody trains takes the model along

    def _check_epoch(self, hello: Hello) -> None:
        """A worker that has met a later epoch: this server is the stale one, unless others say otherwise."""
        if self.retired is not None:
            raise WrongRoundError(self.retired)
        if hello.epoch <= self.epoch or self._stateless:
            return
        text = f"{hello.name} has met epoch {hello.epoch}; this server is in {self.epoch}"
        if not self.members.workers():
            self.retired = text
            self._out.append(SteppedDown(text))
        raise WrongRoundError(text)

    def _supersede(self, hello: Hello) -> None:
        present = self.members.named(hello.name)
        if present is None:
            return
        if present.incarnation == hello.incarnation:
            # The worker noticed the broken connection before we did.
            self._dismiss(present, Reason.STREAM_CLOSED, "joined again on another connection")
            return
        text = f"a newer worker named {hello.name!r} has taken over"
        self._remove(present, Reason.SUPERSEDED, text)
        self._out.append(Close(present.peer, error=SupersededError(text)))

    def _take_slot(self, member: Member) -> None:
        if member.slot >= len(self.roster):
            self.roster = self.roster + [None] * (member.slot + 1 - len(self.roster))
        self._slot_changes.pop(member.slot, None)
        if self.roster[member.slot] != member.incarnation:
            # Announced when the next round opens: the open one's bitmaps speak of whoever held the slot before.
            self._slot_changes[member.slot] = member.incarnation

    def _welcome(self, member: Member) -> None:
        state = self.replica
        waiting = 0
        if self.phase is Phase.WAITING and self.limits.workers is not None:
            waiting = max(0, self.limits.workers - len(self.members.workers()))
        self._send(
            member,
            Welcome(
                run_id=self.run_id,
                epoch=self.epoch,
                slot=member.slot,
                config=self.config,
                heartbeat_s=self.limits.heartbeat_s,
                lease_s=self.limits.lease_s,
                position=state.position if state else Position(self.epoch, 0),
                digest=state.digest if state else 0,
                lineage=state.lineage if state else Lineage(),
                roster=tuple(i or b"" for i in self.roster),
                elapsed_s=self.elapsed_s(self._now),
                waiting_for=waiting,
                recovering=state is None
                and (self.phase is Phase.RECOVERING or self._adopting or member.hello.epoch > self.epoch),
            ),
        )

    # --- the start, and recovery ----------------------------------------------------------------------------

    def _try_start(self) -> None:
        workers = self.members.workers()
        if not workers or self.retired is not None:
            return
        if self.phase is Phase.WAITING and self._enough(len(workers)):
            # One that has been given the run's initial model before, if there is one.
            self._ask_for_state(min(workers, key=lambda m: (-m.hello.epoch, m.slot)), Purpose.INITIAL_MODEL)
        elif self.phase is Phase.READYING:
            ready = sum(m.ready for m in workers)
            overdue = self._now >= self._last_join + max(self.limits.start_grace_s, self.limits.lease_s)
            if (ready == len(workers) and self._enough(ready)) or (self._recovered and overdue and ready):
                self._start()

    @property
    def _recovered(self) -> bool:
        return self.replica is not None and self.replica.position.round > 0

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

    def _ask_for_state(self, donor: Member, purpose: Purpose) -> None:
        assert self.layout is not None
        self.phase = Phase.TRANSFERRING
        self._transfer = StateTransfer(donor.peer, self.layout.dimension, self.layout.statistics_size, purpose)
        self._send(donor, SendState(purpose))

    def _try_adopt(self) -> None:
        if self.retired is not None:
            return
        waited = self._now >= self._recovering_since + self.limits.recover_after_s
        choice = choose(list(self._claims.values()), waited=waited)
        saved = self._checkpoint
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
                self._take_over(saved.replica, saved.config, saved.elapsed_s)
                if self.residual is not None and saved.residual is not None:
                    self.residual[:] = saved.residual
            return
        if choice is None:
            return
        majority = "" if choice.by_majority else ", which is no majority"
        self._out.append(Notice(f"adopting {choice.position}: {choice.vouchers} workers vouch for it{majority}"))
        self._ask_for_state(self.members.by_peer[choice.peer], Purpose.ANCHOR)

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
            self._take_over(transfer.replica(), offer.config, max(offer.elapsed_s, 0.0))

    def _take_over(self, state: Replica, config: RunConfig | None, elapsed_s: float) -> None:
        """Make a state the run's: the initial one (without a configuration of its own), or a recovered one."""
        self.replica = state
        before, self.epoch = self.epoch, max(self._epochs_heard, state.position.epoch) + 1
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

    def _announce(self, plan: RoundPlan) -> None:
        peers = tuple(m.peer for m in self.members.by_peer.values() if m.following)
        self._out.append(Send(peers, OpenRound(plan, self.elapsed_s(self._now))))

    # --- catching up ----------------------------------------------------------------------------------------

    def _catch_up_from_hello(self, member: Member) -> None:
        hello, state = member.hello, self.replica
        assert state is not None
        if hello.position.round == 0:
            # A fresh worker that holds the initial model already lacks nothing while no round is closed.
            same = state.position.round == 0 and hello.vector_checksum == state.digest and not member.observer
            self._catch_up(member, Lineage(), 0 if same else None)
            return
        held = hello.position.round
        shared = state.lineage.last_common_round(state.position.round, hello.lineage, held)
        if held > state.position.round and not shared and not member.observer:
            # Taking it back would throw its run away for one that has hardly begun.
            raise WrongRoundError(
                f"{member.name} holds round {held} of this run, which was begun anew here and is in round "
                f"{state.position.round}: restart this server to recover the older state"
            )
        known = state.digest_at(hello.position)
        if known is not None and known != hello.digest:
            self._out.append(Notice(f"{member.name}: its replica differs at {hello.position}: sending all of it"))
            self._catch_up(member, hello.lineage, None)
        else:
            digests = {e.position: e.digest for e in hello.recent} | {hello.position: hello.digest}
            self._catch_up(member, hello.lineage, held, tuple(e.plan for e in hello.recent), digests)

    def _catch_up(
        self,
        member: Member,
        lineage: Lineage,
        round_: int | None,
        recent: tuple[RoundPlan, ...] = (),
        digests: dict[Position, int] | None = None,
    ) -> None:
        assert self.replica is not None
        announcement, stream = plan_catch_up(self.replica, self.config.seed, lineage, round_, recent, digests)
        member.stream = stream
        member.following = True
        member.ready = False
        member.behind = 0
        member.sent_round = self.replica.position.round
        self._send(member, announcement)
        if stream is not None and stream.indices is not None:
            while member.stream is not None:
                self._stream_on(member)  # a partial catch-up leaves no room for a commit in between
        if self.phase is Phase.FINISHED:
            self._send(member, OpenRound(end_plan(member.sent_round + 1), self.elapsed_s(self._now)))
        elif self.phase is Phase.RUNNING and self.round is not None:
            self._send(member, OpenRound(self.round.plan, self.elapsed_s(self._now)))
            for answer in self.round.closed_answers():
                self._send(member, answer)
        if member.stream is not None:
            self._stream_on(member)

    def _stream_on(self, member: Member) -> None:
        assert member.stream is not None
        assert self.replica is not None
        self._send(member, next_slice(self.replica, member.stream))
        if member.stream.offset == member.stream.total:
            member.stream = None

    # --- messages of members --------------------------------------------------------------------------------

    def _dispatch(self, member: Member, message: WorkerMessage) -> None:
        match message:
            case Contribution():
                self._contribution(member, message)
            case Heartbeat():
                member.merged_round = message.round
                member.report = message.report
                self._send(member, HeartbeatReply(message.stamp_ns))
            case VectorChunk():
                self._vector_chunk(member, message)
            case Ready():
                self._ready(member, message.position)
            case Refresh():
                if self.replica is not None:
                    self._out.append(Notice(f"{member.name}: its replica diverged at round {message.round}"))
                    self._catch_up(member, Lineage(), None)
            case StateOffer():
                self._state_offer(member, message)
            case StopRun():
                self._stop(message.why)
            case Leave():
                self._dismiss(member, message.reason, message.detail)
            case _:
                raise MalformedError(f"a worker does not send {type(message).__name__}")

    def _state_offer(self, member: Member, offer: StateOffer) -> None:
        transfer = self._transfer
        if transfer is None or transfer.peer != member.peer:
            return  # no longer wanted
        claim = self._claims.get(member.peer)
        if transfer.purpose is not Purpose.ANCHOR or transfer.offer is not None or claim is None:
            raise MalformedError("a state that was not asked for")
        if (offer.position, offer.digest) != (claim.position, claim.digest):
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
        transfer.offer = offer

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
                member.cycles_s.append(self._now - self._round_opened)
                member.contributed += 1
            self._advance(message.part)

    def _ready(self, member: Member, position: Position) -> None:
        if member.observer or member.stream is not None or not member.following:
            return
        if self.replica is None or not _passed(self.replica, position):
            return  # of a state that was given up meanwhile: it says so again when it has caught up
        member.ready = True
        self._clone(member)
        current = self.round
        if current is not None and current.slots.get(member.slot) == member.incarnation:
            member.state = MemberState.ACTIVE  # back within the round that it belonged to
        if self.phase is Phase.READYING:
            self._try_start()
        else:
            self._advance()

    def _clone(self, member: Member) -> None:
        """Give a newcomer a live worker's unsent progress.

        At low density the consensus is far behind the live models: a newcomer that starts from it would drag the
        average back. Without a donor it starts from the consensus all the same.
        """
        state = self.replica
        if member.cloned or state is None or self.phase is not Phase.RUNNING or self.round is None:
            return
        member.cloned = True
        sparse = self.config.count(state.vector.size) < self.limits.clone_below * state.vector.size
        if member.hello.position.round > 0 or state.position.round == 0 or not sparse:
            return
        donors = [m for m in self.members.active() if m.peer not in self._relays and m is not member]
        if donors:
            donor = max(donors, key=lambda m: (m.contributed, -m.slot))
            self._relays[donor.peer] = (member.peer, 0)
            self._out.append(Notice(f"{member.name} starts where {donor.name} is"))
            self._send(donor, SendState(Purpose.PROGRESS))

    def _relay(self, donor: Member, chunk: VectorChunk) -> None:
        if self.replica is None or donor.peer not in self._relays:
            return  # no longer wanted
        peer, relayed = self._relays[donor.peer]
        newcomer = self.members.by_peer.get(peer)
        size = self.replica.vector.size
        count = len(chunk.values) // 4
        if chunk.total != size or chunk.offset != relayed or len(chunk.values) % 4 or not 0 < count <= size - relayed:
            raise MalformedError(f"a chunk of progress at {chunk.offset} of {chunk.total}; {relayed} was next")
        require_finite(np.frombuffer(chunk.values, "<f4"), "a worker's progress")
        if newcomer is not None:  # it may have left: then the rest goes nowhere
            self._send(newcomer, chunk)
        if relayed + count == size:
            del self._relays[donor.peer]
        else:
            self._relays[donor.peer] = (peer, relayed + count)

    # --- rounds ---------------------------------------------------------------------------------------------

    def _next_plan(self, round_: int, *, final_done: bool) -> RoundPlan:
        assert self.replica is not None
        if final_done:
            return end_plan(round_)
        duration = self.config.duration_s
        if self.stop_reason is None and duration is not None and self.elapsed_s(self._now) >= duration:
            self.stop_reason = "the duration is over"
        if self.stop_reason is None and self.config.rounds is not None and round_ > self.config.rounds:
            self.stop_reason = "all rounds are done"
        return plan_round(self.config, self.replica.vector.size, round_, stopping=self.stop_reason is not None)

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
                self._out.append(Send(tuple(self.members.by_peer), SlotTaken(slot, incarnation)))
            self._slot_changes = {}
        for member in self._available():
            member.state = MemberState.ACTIVE
        slots = {m.slot: m.incarnation for m in self.members.active()}
        self.round = ServerRound(
            plan, self.config.seed, self.replica, self.residual, slots, self.limits, self._norm_bound
        )
        self._round_opened = self._now

    def _available(self) -> list[Member]:
        """Members that the next round can wait for."""
        return [m for m in self.members.workers() if m.ready and m.following and m.stream is None]

    def _present(self) -> list[Member]:
        """Members of the open round that are still there and active."""
        assert self.round is not None
        slots = self.round.slots
        return [m for m in self.members.active() if slots.get(m.slot) == m.incarnation]

    def _deadlines(self) -> list[float]:
        if self.round is None:
            return []
        return [
            self._round_opened + m.deadline_s(self.limits)
            for m in self._present()
            if not self.round.contributed(m.slot)
        ]

    def _advance(self, part: int | None = None) -> None:
        """Close what can be closed; commit and open the next round when all of it is.

        A part closes when every active member of the round is in it, apart from those past their deadline,
        and at least half of the active ones are. When all members of a round have gone, it waits for the first that
        is ready: to begin anew with whoever is there or, when some of it has been received, to close the rest.
        """
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
            # The same sum as in _deadlines (and so for all waits): a wake-up at that moment must find it passed.
            awaited = [m.slot for m in present if self._now < self._round_opened + m.deadline_s(self.limits)]
            for index in current.open_parts() if part is None else [part]:
                have = set(current.contributors(index))
                if len(have) >= quorum and have.issuperset(awaited):
                    answers = current.close(index)
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
        digest = state.next_digest(current.new_values, current.new_statistics)
        state.commit(
            self.epoch,
            plan,
            current.indices,
            current.new_values,
            current.new_statistics,
            digest,
            bitmaps,
            roster,
            current.members,
        )
        if self.residual is not None and current.new_residual is not None:
            self.residual[current.indices] = current.new_residual
        whole = tuple(s for s in sorted(current.slots) if current.contributed(s))
        for member in self._present():
            if member.slot not in whole:
                member.state = MemberState.SUSPENDED
                member.ready = False
                member.missed += 1
                # At least so long: or a worker that has become slower would miss every round from now on.
                member.cycles_s.append(self._now - self._round_opened)
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
                    member.sent_round = 0  # it was not even sent the whole vector: it will be, from the start
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
                whole,
                next_plan,
                digest,
                before,
                tuple(bitmaps),
                roster,
            )
        )
        self._open(next_plan)

    # --- endings --------------------------------------------------------------------------------------------

    def _stop(self, why: str) -> None:
        if self.stop_reason is None:
            self.stop_reason = why
            self._out.append(Notice(f"ending the run: {why}"))
        recovering = self.phase is Phase.RECOVERING or self._adopting or self._recovered
        if self.phase not in (Phase.RUNNING, Phase.FINISHED):
            if recovering and self.members.workers():
                return  # they hold a run: it is recovered first, and then ends as it should
            self._finish(why)
            self._transfer = None
            for member in list(self.members.by_peer.values()):
                if self.replica is None:
                    self._dismiss(member, Reason.FINISHED, why)
                elif member.following:
                    self._send(member, OpenRound(end_plan(self.replica.position.round + 1), self.elapsed_s(self._now)))
        self._advance()

    def _finish(self, why: str) -> None:
        self.phase = Phase.FINISHED
        self._ended_at = self._now
        self._out.append(RunFinished(why))

    def _remove(self, member: Member, reason: Reason, detail: str) -> None:
        """Forget a member; the open round does not wait for it any more."""
        self.members.remove(member, reason, detail, self._now)
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

    def _send(self, member: Member, message: ServerMessage) -> None:
        self._out.append(Send((member.peer,), message))

    def _flush(self) -> list[ServerEffect]:
        out, self._out = self._out, []
        return out


def _holds(state: Replica, position: Position, digest: int) -> bool:
    """Whether a state goes on from a point that somebody holds, or is it; the longest past is judged by its epoch."""
    known = state.digest_at(position)
    if known is not None:
        return known == digest
    return position.round < state.position.round and state.lineage.epoch_of(position.round) == position.epoch


def _passed(state: Replica, position: Position) -> bool:
    """Whether a state has been at a position."""
    if position.round == 0:
        return state.position.round > 0 or state.position == position
    return position.round <= state.position.round and state.lineage.epoch_of(position.round) == position.epoch
