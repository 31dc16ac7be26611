"""What a run is on the server, and the little that every part of the machine needs.

The machine is one class in layers, each with one purpose; every layer may call those below it:

    ServerMachine   events, joining, messages        server_machine.py
    Lifecycle       start, recovery, ends            server_lifecycle.py
    Rounds          one round after the other        server_sequence.py
    Followers       bringing members to the state    server_followers.py
    RunState        this module

"""

from __future__ import annotations

from enum import StrEnum

from loscar_core.config import RunConfig, ServerLimits, require_fit
from loscar_core.effects import RunFinished, Send, ServerEffect
from loscar_core.layout import Layout
from loscar_core.messages import Purpose, ServerMessage, Welcome
from loscar_core.replica import Floats, Replica
from loscar_core.robust import NormBound
from loscar_core.saved_state import SavedState
from loscar_core.server_catchup import StateTransfer
from loscar_core.server_members import Member, MemberTable
from loscar_core.server_recovery import Claim, Point
from loscar_core.server_round import ANSWER_BYTES, ServerRound
from loscar_core.state import Lineage, Position


class Phase(StrEnum):
    WAITING = "waiting"
    RECOVERING = "recovering"
    TRANSFERRING = "transferring"
    READYING = "readying"
    RUNNING = "running"
    FINISHED = "finished"


class RunState:
    """One run on one server process: see `ServerMachine` for the arguments.

    Raises:
        ConfigError: the run is none for these limits.
    """

    def __init__(
        self, config: RunConfig, limits: ServerLimits, run_id: bytes, now: float, checkpoint: SavedState | None = None
    ) -> None:
        for each in (config, *([] if checkpoint is None else [checkpoint.config])):
            require_fit(each, limits)
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
        self.answer_bytes = ANSWER_BYTES
        """Size of the messages of an answer; who knows the links may change it at any time."""
        self.roster: list[bytes | None] = []
        self._slot_changes: dict[int, bytes] = {}
        self._norm_bound = None if limits.norm_bound is None else NormBound(limits.norm_bound)
        self._spare: Floats | None = None
        self._claims: dict[int, Claim] = {}
        self._relays: dict[int, tuple[int, int]] = {}  # donor's stream -> (newcomer's, values relayed)
        self._epochs_heard = 0
        self._transfer: StateTransfer | None = None
        self._provisional_until = now
        """Until then the run here gives way to workers that hold another one: see `Lifecycle._is_rival`."""
        self._sure = False  # several workers, a majority, vouch for the state that is being transferred
        self._considered: set[Point] = set()  # what workers held when a state was chosen
        self._begun = False  # the run here was begun by this process
        self._begun_in_vain: set[Point] = set()  # what was closed of such a run before it was given up
        self._said_too_few = False
        self._stretch = 1.0  # size of the open round in units of a usual one
        self._deadline: float | None = None  # no deadline of the open round comes before it; None: not known
        self._awaited: Member | None = None  # who was found to hold the open round up
        self._values_sent = 0  # by each worker since the last dense round
        self._welcomed: set[bytes] = set()  # incarnations that know of the epoch which was opened last
        self._vanished: set[str] = set()  # names whose streams broke or fell silent, and that are not back
        self._counted: list[str] = []  # names of the members of the open round
        self._counted_last: list[str] = []  # and of the last committed one
        self._rivals: dict[bytes, float] = {}  # who holds another state, and when it came
        self._said_ahead: dict[str, float] = {}  # who knows of a later epoch, and since when, while nobody is here
        self._sent_on: set[bytes] = set()  # incarnations that were asked to look elsewhere first
        self._elapsed_before = 0.0
        self._t0: float | None = None
        self._ended_at: float | None = None
        self._round_opened = now
        self._recovering_since = now
        self._last_join = now
        self._now = now
        self._out: list[ServerEffect] = []
        self._checkpoint = checkpoint
        self._resumed = checkpoint is not None
        if checkpoint is not None:
            self.run_id = checkpoint.run_id
            self.layout = checkpoint.layout
            self.epoch = checkpoint.epoch + 1
            self._epochs_heard = checkpoint.epoch
            self.phase = Phase.RECOVERING

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

    @property
    def _stateless(self) -> bool:
        """No round is closed here: a worker that has closed one knows better."""
        return self.phase is not Phase.FINISHED and (self.replica is None or self.replica.position.round == 0)

    @property
    def _adopting(self) -> bool:
        """A worker's anchor is on its way here."""
        return self._transfer is not None and self._transfer.purpose is Purpose.ANCHOR

    @property
    def _recovered(self) -> bool:
        return self.replica is not None and self.replica.position.round > 0

    def _welcome(self, member: Member) -> None:
        state = self.replica
        if self.phase is Phase.READYING:
            self._welcomed.add(member.incarnation)
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

    def _finish(self, why: str) -> None:
        self.phase = Phase.FINISHED
        self._ended_at = self._now
        self._out.append(RunFinished(why))

    def _send(self, member: Member, message: ServerMessage) -> None:
        self._out.append(Send((member.peer,), message))

    def _flush(self) -> list[ServerEffect]:
        out, self._out = self._out, []
        return out
