"""What a worker holds of a run, and the little that every part of the engine needs.

The engine is one class in layers, each with one purpose; every layer may call those below it:

    WorkerEngine     streams and messages           worker_engine.py
    WorkerCatchUp    being brought to a state       worker_catchup.py
    WorkerRounds     taking part in rounds          worker_rounds.py
    WorkerHoldings   this module
"""

from __future__ import annotations

from dataclasses import dataclass

from loscar_core.buffers import Buffers
from loscar_core.config import RunConfig
from loscar_core.errors import MalformedError
from loscar_core.layout import Layout, Shard
from loscar_core.messages import CatchUp, Ready, Welcome
from loscar_core.plan import RoundPlan
from loscar_core.replica import Floats, Indices, Replica
from loscar_core.worker_effects import Emit, WorkerEffect
from loscar_core.worker_ledger import Ledger
from loscar_core.worker_receiving import Receiving

MESSAGE_BYTES = 1 << 18
"""Default size of a contribution's messages; the connection lowers it on slow links."""


@dataclass(slots=True)
class CatchingUp:
    """A catch-up while its values arrive."""

    announcement: CatchUp
    indices: Indices | None
    values: Floats
    filled: int = 0
    patch: Indices | None = None  # of a transfer that is resumed: what has changed of the values that are there
    patched: int = 0


class WorkerHoldings:
    """The anchor, the ledger and what is arriving: see `WorkerEngine` for the arguments."""

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
        shard: Shard = Shard(),
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.formers: tuple[bytes, ...] = ()
        """The incarnations whose saved states this worker goes on from, oldest first."""
        self.layout = layout
        self.run_id = run_id
        self.wanted_slot = slot
        self.observer = observer
        self.shard = shard
        self.anchor = Replica.initial(vector, statistics)
        self.ledger = Ledger()
        self.epoch = 0
        self.other_servers = True
        """There are further addresses, so that another server may be holding the run."""
        self.epoch_heard = 0
        """The latest that any server has spoken of; it may never have got a majority to go on with."""
        self.slot = -1
        self.welcome: Welcome | None = None
        self.config: RunConfig | None = None
        self.plan: RoundPlan | None = None
        self.elapsed_s = -1.0
        self._epoch_began_s = -1.0  # run time when the first round of `epoch` was opened here
        self.initialised = False
        self.held_back = False
        """Not to be waited for yet: see `let_count`."""
        self._ready_held = False
        self.connected = False
        self.message_bytes = MESSAGE_BYTES
        self.bytes_up = 0
        self.bytes_down = 0
        self._roster: list[bytes | None] = []
        self._own_slots: tuple[int, ...] = ()
        self._opening = 0
        self._receiving: Receiving | None = None
        self._catching_up: CatchingUp | None = None
        self._interrupted: CatchingUp | None = None
        self._diverged = False  # the last commit that could be compared left the chain
        self._refreshing = False  # nothing counts before the refresh that was asked for
        self._former_at_work = False  # the open round, or one that was missed, may be a former one's
        self._refresh_due = False  # the anchor cannot be trusted before a full copy has arrived
        self._progress: Floats | None = None
        self._progress_filled = 0
        self._out: list[WorkerEffect] = []
        self._buffers = Buffers()

    @property
    def _claimed_digest(self) -> int:
        """The anchor's digest; one that nobody shares while it waits for a refresh, which a new stream has to bring."""
        return self.anchor.digest ^ 0xFFFFFFFF if self._refresh_due else self.anchor.digest

    def _say_ready(self) -> None:
        if self.held_back:
            self._ready_held = True
        else:
            self._out.append(Emit(Ready(self.anchor.position)))

    def let_count(self) -> list[WorkerEffect]:
        """Until this is called, a worker that is held back is no member that rounds wait for."""
        self.held_back = False
        if self._ready_held and self.connected and self._catching_up is None:
            self._ready_held = False
            self._say_ready()
        return self._flush()

    def _configured(self) -> RunConfig:
        if self.config is None:
            raise MalformedError("the first message of a server must be a welcome")
        return self.config

    def _set_roster(self, roster: list[bytes | None]) -> None:
        own = (self.incarnation, *self.formers)
        self._roster = roster
        self._own_slots = tuple(slot for slot, holder in enumerate(roster) if holder in own)

    def _flush(self) -> list[WorkerEffect]:
        out, self._out = self._out, []
        return out
