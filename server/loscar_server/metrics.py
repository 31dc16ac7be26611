"""A server's figures for Prometheus: what its machine knows when it is asked, and counts of what has happened.

A scrape comes on another thread, looks at the machine on the event loop that owns it, and gets one consistent picture.
Every label has a fixed set of values and no series is any member's own, so the number of series is the same from the
first scrape to the last, whoever joins. A single member's figures are in `Status`, and at its own `--metrics`.

Imported when `--metrics` is given only: prometheus_client belongs to the extra `loscar[metrics]`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from importlib import metadata

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from loscar_core import effects as fx
from loscar_core import errors
from loscar_core.config import PROTOCOL_VERSION
from loscar_core.messages import Reason
from loscar_core.plan import RoundKind
from loscar_core.server_members import Member, MemberState
from loscar_core.server_round import ServerRound
from loscar_core.server_state import Phase
from loscar_core.state import bits
from loscar_server.service import ParameterService

ROUND_SECONDS = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5),
    *(10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
OVERLAP_STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
COMMITTED = [kind.name.lower() for kind in RoundKind if kind is not RoundKind.END]
STATES = [state for state in MemberState if state is not MemberState.GONE]
WHOLE = "whole"
LATE = "late"
_ERRORS: tuple[type[errors.LoscarError], ...] = (
    errors.LoscarError,
    errors.ConfigError,
    errors.AuthenticationError,
    errors.ProtocolError,
    errors.VersionMismatchError,
    errors.WrongRunError,
    errors.WrongModelError,
    errors.WrongRoundError,
    errors.WrongSelectionError,
    errors.MalformedError,
    errors.NonFiniteError,
    errors.RefusedError,
    errors.SupersededError,
    errors.ServerLostError,
)
KINDS = [error.__name__ for error in _ERRORS]
"""What a server refuses peers for; `LoscarError` stands for anything else too."""

REASONS = [LATE, *(reason.value for reason in Reason)]
OUTCOMES = {"included": [WHOLE], "partial": REASONS, "missed": REASONS, "refused": KINDS}
"""Of contributions: the reasons that each outcome can have."""

LOOK_S = 5.0
"""How long the event loop may take to answer a scrape."""


class ServerMetrics(Collector):
    """What one server tells Prometheus; docs/metrics.md describes each metric."""

    def __init__(self) -> None:
        self._service: ParameterService | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._version = metadata.version("loscar")
        self._rounds = Counter("loscar_server_rounds", "Rounds committed by this process.", ["kind"], registry=None)
        self._round_seconds = Histogram(
            "loscar_server_round_seconds",
            "Time from a round's opening to its commit.",
            buckets=ROUND_SECONDS,
            registry=None,
        )
        self._contributions = Counter(
            "loscar_server_contributions",
            "Contributions that committed rounds waited for, by what became of them.",
            ["outcome", "reason"],
            registry=None,
        )
        self._overlap_steps = Histogram(
            "loscar_server_overlap_steps",
            "Staleness: steps that a contributor trained between its previous snapshot and its merge.",
            buckets=OVERLAP_STEPS,
            registry=None,
        )
        for kind in COMMITTED:
            self._rounds.labels(kind)
        for outcome, reasons in OUTCOMES.items():
            for reason in reasons:
                self._contributions.labels(outcome, reason)
        self._opened_s: float | None = None
        self._round: ServerRound | None = None  # the open one
        self._gone: dict[int, tuple[str, str]] = {}  # slot -> outcome and reason, of its members that have gone
        self._missed: dict[int, int] = {}  # stream -> rounds that were closed without it
        self._refused = ""  # kind of the last refusal

    def watch(self, service: ParameterService, loop: asyncio.AbstractEventLoop) -> None:
        """Whose figures these are, and the loop that they belong to."""
        self._service, self._loop = service, loop

    # --- what happens (on the loop) -------------------------------------------------------------------------

    def note(self, effect: fx.ServerEffect) -> None:
        """Count an effect of the machine; all of them, in order."""
        match effect:
            case fx.Refused(_, error):
                self._refused = kind_of(type(error).__name__)
            case fx.MemberGone(d):
                # The machine says right before who is refused, and why.
                self._begun_anew()
                if self._round is not None and d.slot in self._round.slots:
                    refused = d.reason is Reason.REFUSED
                    self._gone[d.slot] = ("refused", self._refused) if refused else ("missed", d.reason.value)
            case fx.RunStarted():
                self._opened()
            case fx.RoundCommitted():
                self._rounds.labels(effect.plan.kind.name.lower()).inc()
                self._round_seconds.observe(effect.seconds)
                self._count_contributions(effect)
                self._opened()
            case fx.RunFinished():
                self._opened_s = None
            case _:
                pass

    def _opened(self) -> None:
        self._round = None if self._service is None else self._service.machine.round
        self._opened_s = None if self._round is None else time.monotonic()
        self._gone.clear()

    def _begun_anew(self) -> None:
        """All members of a round may go before anything of it has come: then it is begun anew with others."""
        now = None if self._service is None else self._service.machine.round
        was = self._round
        if now is not None and was is not None and now is not was and now.plan.round == was.plan.round:
            self._opened()

    def _count_contributions(self, committed: fx.RoundCommitted) -> None:
        """Each of the round's n contributions has one outcome: they add up to n."""
        members = [] if self._service is None else list(self._service.machine.members.by_peer.values())
        late = {m.slot for m in members if m.missed > self._missed.get(m.peer, 0)}
        self._missed = {m.peer: m.missed for m in members if m.missed}
        whole = set(committed.included)
        partial = {slot for part in committed.bitmaps for slot in bits(part)} - whole
        for m in members:
            if m.slot in whole:
                self._overlap_steps.observe(m.overlap_steps)
        self._contributions.labels("included", WHOLE).inc(len(whole))
        gone = self._gone.keys() - whole - late
        if len(whole | late) == committed.members:
            gone = set()  # they went before the round was begun anew
        for slot in (late | gone) - whole:
            outcome, reason = ("missed", LATE) if slot in late else self._gone[slot]
            if slot in partial:
                outcome, reason = "partial", Reason.REFUSED.value if outcome == "refused" else reason
            self._contributions.labels(outcome, reason).inc()

    # --- scrapes (on a thread of the endpoint's) ------------------------------------------------------------

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def collect(self) -> Iterable[Metric]:
        """All metrics as of one moment.

        Raises:
            TimeoutError: the event loop did not answer.
            RuntimeError: it has ended.
        """
        if self._loop is None:
            return self._families()
        answer: Future[list[Metric]] = Future()

        def look() -> None:
            try:
                answer.set_result(self._families())
            except Exception as error:
                answer.set_exception(error)

        self._loop.call_soon_threadsafe(look)
        return answer.result(LOOK_S)

    def _families(self) -> list[Metric]:
        self._begun_anew()
        counted = (self._rounds, self._round_seconds, self._contributions, self._overlap_steps)
        found = [family for metric in counted for family in metric.collect()]
        for family in found:  # when each began to count is what nobody asks
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        return [*found, *self._about_run(), *self._about_members(), *self._about_traffic()]

    def _about_run(self) -> Iterator[Metric]:
        machine = None if self._service is None else self._service.machine
        state = None if machine is None else machine.replica
        run_s = dimension = count = 0.0
        if machine is not None:
            run_s = max(0.0, machine.elapsed_s(time.monotonic()))
            dimension = machine.layout.dimension if machine.layout else 0
            count = machine.round.plan.count if machine.round else 0
        info = {
            "version": self._version,
            "protocol_version": str(PROTOCOL_VERSION),
            "run_id": "" if machine is None else machine.run_id.hex(),
        }
        yield InfoMetricFamily("loscar_server", "Which run this server holds.", info)
        phases = GaugeMetricFamily("loscar_server_phase", "1 for the phase that the run is in.", labels=["phase"])
        for phase in Phase:
            phases.add_metric([phase.value], int(machine is not None and machine.phase is phase))
        yield phases
        epoch, round_ = 0 if machine is None else machine.epoch, 0 if state is None else state.position.round
        yield GaugeMetricFamily("loscar_server_epoch", "Epoch of this server process.", epoch)
        yield GaugeMetricFamily("loscar_server_round", "Last committed round of the run.", round_)
        yield GaugeMetricFamily("loscar_server_run_seconds", "Run time, over all server processes.", run_s)
        open_s = 0.0 if self._opened_s is None else time.monotonic() - self._opened_s
        yield GaugeMetricFamily(
            "loscar_server_round_open_seconds", "For how long the open round has been open; 0 without one.", open_s
        )
        yield GaugeMetricFamily("loscar_server_model_coordinates", "Size of the model.", dimension)
        yield GaugeMetricFamily(
            "loscar_server_round_coordinates", "Coordinates that the open round carries; 0 without one.", count
        )
        share = count / dimension if dimension else 0.0
        yield GaugeMetricFamily("loscar_server_density_ratio", "Share of the model that it carries.", share)

    def _about_members(self) -> Iterator[Metric]:
        machine = None if self._service is None else self._service.machine
        everybody: list[Member] = [] if machine is None else list(machine.members.by_peer.values())
        workers = [m for m in everybody if not m.observer]
        states = GaugeMetricFamily("loscar_server_members", "Workers of the run by state.", labels=["state"])
        for state in STATES:
            states.add_metric([state.value], sum(m.state is state for m in workers))
        yield states
        yield GaugeMetricFamily("loscar_server_observers", "Members that do not train.", len(everybody) - len(workers))
        active = [m for m in workers if m.state is MemberState.ACTIVE]
        deadline_s = 0.0 if machine is None else max((m.deadline_s(machine.limits) for m in active), default=0.0)
        yield GaugeMetricFamily(
            "loscar_server_deadline_seconds", "How long one active worker can hold up a usual round.", deadline_s
        )
        reports = [m.report for m in workers]
        losses = [r.loss for r in reports if r.loss is not None]
        run_s = sum(r.run_s for r in reports)
        yield GaugeMetricFamily(
            "loscar_server_reported_loss",
            "Mean of the present workers' smoothed training losses; NaN before the first.",
            sum(losses) / len(losses) if losses else math.nan,
        )
        yield GaugeMetricFamily(
            "loscar_server_reported_steps", "Optimizer steps of the present workers.", sum(r.steps for r in reports)
        )
        yield GaugeMetricFamily(
            "loscar_server_reported_idle_ratio",
            "Share of run time in which the present workers waited for the service.",
            sum(r.idle_s for r in reports) / run_s if run_s > 0 else 0.0,
        )
        departures = CounterMetricFamily("loscar_server_departures", "Members that went.", labels=["reason"])
        counts = {} if machine is None else machine.members.departure_counts
        for reason in Reason:
            departures.add_metric([reason.value], counts.get(reason, 0))
        yield departures

    def _about_traffic(self) -> Iterator[Metric]:
        service = self._service
        received, sent = (0, 0) if service is None else (service.bytes_in, service.bytes_out)
        yield CounterMetricFamily(
            "loscar_server_received_bytes", "Messages of members' streams, without HTTP/2 and TLS.", received
        )
        yield CounterMetricFamily(
            "loscar_server_sent_bytes", "Messages to members' streams, without HTTP/2 and TLS.", sent
        )
        refusals = CounterMetricFamily("loscar_server_refusals", "Streams and calls refused.", labels=["kind"])
        kinds = dict.fromkeys(KINDS, 0)
        for name, count in () if service is None else service.refusals.by_kind().items():
            kinds[kind_of(name)] += count
        for name, count in kinds.items():
            refusals.add_metric([name], count)
        yield refusals


def kind_of(name: str) -> str:
    """An error's class as a label."""
    return name if name in KINDS else errors.LoscarError.__name__
