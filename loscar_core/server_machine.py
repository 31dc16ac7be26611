"""The server's half of the protocol as a state machine: events and the time in, effects out.

    waiting ──all there──▶ transferring ──model──▶ readying ──all ready──▶ running ──▶ finished
       └── somebody holds a position ──▶ recovering ──majority──▶ transferring

It holds the consensus, the members and the open round; it knows neither sockets nor clocks. The transport calls
`received`, `disconnected`, `drained` and `tick`, and carries out the effects in order.
"""

from __future__ import annotations

from loscar_core.config import PROTOCOL_VERSION
from loscar_core.effects import Close, MemberJoined, Notice, ServerEffect, SteppedDown
from loscar_core.errors import (
    ConfigError,
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
    Contribution,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Leave,
    Ready,
    Reason,
    Refresh,
    StateOffer,
    StopRun,
    VectorChunk,
    WorkerMessage,
)
from loscar_core.server_lifecycle import Lifecycle, has_passed
from loscar_core.server_members import Member, MemberState
from loscar_core.server_recovery import Claim
from loscar_core.server_state import Phase
from loscar_core.state import INCARNATION_BYTES, Lineage, Position

MAX_EPOCH_LEAD = 1 << 32
"""Every server process opens one epoch: nobody is so many ahead. A false claim would leave no numbers to count on."""

MOST_SAYERS = 1 << 12


class ServerMachine(Lifecycle):
    """One run on one server process.

    Args:
        config: the run's configuration; a recovered state brings its own.
        limits: this server's patience.
        run_id: 16 bytes.
        now: server clock in seconds, monotonic.
        checkpoint: a state of this run to go on from, unless a majority of workers holds a later one. Its
            configuration counts, apart from when the run ends.
    """

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
            member.refreshed = False
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
            times.append(self._next_deadline())
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

    # --- joining --------------------------------------------------------------------------------------------

    def _hello(self, peer: int, hello: Hello) -> None:
        self._check_identity(hello)
        self._check_layout(hello)
        self.members.check(hello, self._now)
        self._check_epoch(hello)
        self._supersede(hello)
        if self._is_rival(hello):
            self._give_way()
        if self.layout is None and not hello.observer:
            self._set_layout(hello.layout)
        self._hear(hello)
        member = self.members.add(peer, hello, self._now)
        self._said_ahead.clear()
        self._vanished.discard(member.name)
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

    def _check_identity(self, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            raise VersionMismatchError(
                f"the worker speaks protocol {hello.protocol_version}, this server {PROTOCOL_VERSION}"
            )
        if hello.run_id and hello.run_id != self.run_id:
            raise WrongRunError(f"this server holds run {self.run_id.hex()}, not {hello.run_id.hex()}")
        if hello.shard != self.config.shard:
            ours, theirs = self.config.shard, hello.shard
            raise WrongRunError(f"this server is shard {ours} of the run; the worker takes it for shard {theirs}")
        if len(hello.incarnation) != INCARNATION_BYTES:
            raise MalformedError(f"an incarnation of {len(hello.incarnation)} bytes")
        if not 0 < len(hello.name) <= 200 or not hello.name.isprintable():
            raise ConfigError("a worker's name must be 1 to 200 printable characters")

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
        known, told = max(self.epoch, self._epochs_heard), max(hello.epoch, hello.position.epoch)
        if told > known + MAX_EPOCH_LEAD:
            raise WrongRoundError(f"{hello.name} speaks of epoch {told}, far beyond {known}, the last known here")
        if self._stateless:
            return
        if self._is_rival(hello):
            self._check_rivals(hello)
            return
        held, state, alone = hello.position, self.replica, not self.members.workers()
        if held.epoch > self.epoch:
            text = f"{hello.name} holds {held}; this server is in epoch {self.epoch}"
        elif hello.epoch > self.epoch and alone and self.phase is not Phase.FINISHED:
            # Nobody is left here, and somewhere else an epoch was opened, though perhaps no round of it.
            text = f"{hello.name} has heard of epoch {hello.epoch}; this server is in {self.epoch}"
        elif state is not None and held.epoch == self.epoch and held.round > state.position.round:
            # Another process has called itself by the same number: nobody can be ahead of this one.
            text = f"{hello.name} holds {held} of another server; this one is at {state.position}"
        else:
            return
        if alone and self._is_confirmed(hello):
            self.retired = text
            self._out.append(SteppedDown(text))
        raise WrongRoundError(text)

    def _check_rivals(self, hello: Hello) -> None:
        """One who holds another state does not drive away those who are here: there have to be as many of them.

        Raises:
            RefusedError: there are not; who is refused may come again.
        """
        since = self._now - self.limits.recover_after_s
        self._rivals = {i: t for i, t in self._rivals.items() if t >= since} | {hello.incarnation: self._now}
        present = len(self.members.workers())
        if len(self._rivals) < present:
            raise RefusedError(f"{hello.name} holds another state of this run than {present} workers here")
        self._rivals.clear()

    def _is_confirmed(self, hello: Hello) -> bool:
        """That the run goes on elsewhere is said by a majority of the last round's members, or by one for as long as
        a recovery waits; nobody is here meanwhile."""
        members = set(self._counted_last)
        if len(self._said_ahead) < MOST_SAYERS:
            self._said_ahead.setdefault(hello.name, self._now)
        if self._now >= self._said_ahead.get(hello.name, self._now) + self.limits.recover_after_s:
            return True
        return 2 * len(members & self._said_ahead.keys()) > len(members) or not members

    def _hear(self, hello: Hello) -> None:
        """The next epoch is above every one that anybody has heard of, and so is this one, until its first round."""
        self._epochs_heard = max(self._epochs_heard, hello.epoch, hello.position.epoch)
        if self.phase is Phase.READYING and hello.epoch >= self.epoch and hello.incarnation not in self._welcomed:
            self.epoch = self._epochs_heard + 1
            for member in self.members.by_peer.values():
                self._welcome(member)

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
                self._refresh(member, message.round)
            case StateOffer():
                self._state_offer(member, message)
            case StopRun():
                self._stop(message.why)
            case Leave():
                self._dismiss(member, message.reason, message.detail)
            case _:
                raise MalformedError(f"a worker does not send {type(message).__name__}")

    def _refresh(self, member: Member, round_: int) -> None:
        if self.replica is None:
            return
        if member.refreshed:
            # It has not even been handed over what it was sent the last time: everything once more when it has.
            member.following, member.stream, member.sent_round = False, None, 0
            return
        self._out.append(Notice(f"{member.name}: its replica diverged at round {round_}"))
        self._catch_up(member, Lineage(), None)
        member.refreshed = True

    def _ready(self, member: Member, position: Position) -> None:
        if member.observer or member.stream is not None or not member.following:
            return
        if self.replica is None or not has_passed(self.replica, position):
            return  # of a state that was given up meanwhile: it says so again when it has caught up
        member.ready = True
        self._clone(member)
        current = self.round
        if current is not None and current.slots.get(member.slot) == member.incarnation:
            member.state = MemberState.ACTIVE  # back within the round that it belonged to
            self._deadline = None
        if self.phase is Phase.READYING:
            self._try_start()
        else:
            self._advance()
