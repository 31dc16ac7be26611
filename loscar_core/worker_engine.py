"""The worker's half of the protocol as a state machine: messages in, messages and updates for the model out.

It holds the anchor (a replica of the consensus), the open round's buffers and the ledger of its own
contributions. It knows neither sockets, threads, clocks nor torch: the connection feeds it messages and sends what
it emits; the session applies its updates to the live model between two steps and hands it snapshots.
"""

from __future__ import annotations

from loscar_core.config import PROTOCOL_VERSION
from loscar_core.errors import MalformedError, ProtocolError, WrongRoundError, WrongRunError
from loscar_core.messages import (
    OTHER_SERVERS,
    Answer,
    CatchUp,
    Commit,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    OpenRound,
    RosterChange,
    SendState,
    ServerMessage,
    VectorChunk,
    Welcome,
    WorkerReport,
)
from loscar_core.server_catchup import RECENT_SENT
from loscar_core.state import MAX_SLOTS, Position
from loscar_core.worker_catchup import WorkerCatchUp
from loscar_core.worker_effects import Dismissed, RoundTrip, WorkerEffect


class WorkerEngine(WorkerCatchUp):
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
        shard: which of the servers that share the model it connects to.
    """

    # --- the connection -------------------------------------------------------------------------------------

    def hello(self) -> Hello:
        """First message of a new stream; what the old one left unfinished is dropped."""
        self.connected = True
        self.plan = None
        self._receiving = None
        self._interrupt()
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
            epoch=max(self.epoch, self.epoch_heard),
            members=anchor.members,
            position=anchor.position if self.initialised else Position(),
            digest=self._claimed_digest,
            lineage=anchor.lineage,
            recent=anchor.history.last(RECENT_SENT),
            capabilities=(OTHER_SERVERS,) if self.other_servers else (),
            partial=self._partial(),
            shard=self.shard,
        )

    def disconnected(self) -> None:
        """The stream broke. The worker trains on; its contribution in flight will be sent again."""
        self.connected = False
        self.plan = None
        self._refreshing = False
        self._receiving = None
        self._interrupt()
        self._progress = None
        self._buffers.clear()

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
            case RosterChange():
                self._roster_changed(message)
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
            raise WrongRoundError(f"the server is in epoch {welcome.epoch}; this worker has been in {self.epoch}")
        if self.run_id and welcome.run_id != self.run_id:
            raise ProtocolError("the server answered for another run")
        if welcome.config.shard != self.shard:  # a server that knows nothing of shards lets everybody in
            raise WrongRunError(f"the server is shard {welcome.config.shard} of the run, not {self.shard}")
        self.run_id = welcome.run_id
        self.welcome = welcome
        self.slot = welcome.slot
        self.epoch_heard = max(self.epoch_heard, welcome.epoch)
        self._set_roster([i or None for i in welcome.roster])
        if not (welcome.recovering and self.initialised):
            # A server that has lost its memory is told the run's configuration and time, it does not tell them.
            self.config = welcome.config
            self.elapsed_s = welcome.elapsed_s

    def _roster_changed(self, change: RosterChange) -> None:
        roster = list(self._roster)  # a new list: committed rounds keep theirs
        for slot, incarnation in ((s.slot, s.incarnation) for s in change.slots):
            if not 0 <= slot < MAX_SLOTS:
                raise MalformedError(f"slot {slot}")
            roster += [None] * (slot + 1 - len(roster))
            roster[slot] = incarnation or None
            if incarnation == self.incarnation and self._catching_up is None:
                self._former_at_work = False  # the round that opens is this incarnation's
        self._set_roster(roster)
