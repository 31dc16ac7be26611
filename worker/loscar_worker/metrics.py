"""A worker's figures for Prometheus, collected when they are asked for.

Counters are read off the session, which keeps them anyway. Times and steps of rounds need to be counted as they
happen: the training thread adds to tallies that it alone writes, without a lock, and a scrape copies them. So a
scrape may be one event behind in a sum; it never holds a step up.

Imported when `--metrics` is given only: prometheus_client belongs to the extra `loscar[metrics]`. In a training loop of
your own:

    metrics = WorkerMetrics()
    with loscar_worker.join("host:50051", model, on_round=metrics.merged) as session:
        metrics.joined(session)
        prometheus_client.REGISTRY.register(metrics)

and `metrics.stepped(seconds)` after each step, if its time is wanted.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from importlib import metadata

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from loscar_worker.round_record import RoundRecord
from loscar_worker.session import Session

STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
MERGE_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Tally:
    """A histogram with one writer and no lock.

    Args:
        bounds: upper bounds of the buckets, ascending; one more takes the rest.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def note(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """What was noted so far; for any thread."""
        counts, buckets, below = list(self._counts), [], 0
        for bound, count in zip((*self._bounds, math.inf), counts, strict=True):
            below += count
            buckets.append(("+Inf" if math.isinf(bound) else str(float(bound)), below))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._sum)


class WorkerMetrics(Collector):
    """What one worker tells Prometheus; docs/metrics.md describes each metric.

    The series are the same from the first scrape on, before the worker has joined too, apart from the round trip's
    time, which is there once it was measured.
    """

    def __init__(self) -> None:
        self._session: Session | None = None
        self._step_seconds = Tally(STEP_SECONDS)
        self._merge_seconds = Tally(MERGE_SECONDS)
        self._overlap_steps = Tally(STEPS)
        self._local_steps = Tally(STEPS)
        self._version = metadata.version("loscar")
        self.stepped = self._step_seconds.note
        """Called by the training thread with every step's seconds."""

    # --- for the training thread ----------------------------------------------------------------------------

    def joined(self, session: Session) -> None:
        """Whose figures these are."""
        self._session = session

    def merged(self, record: RoundRecord) -> None:
        """A round was merged."""
        self._merge_seconds.note(record.merge_s)
        if record.snapshot_s is not None:
            self._overlap_steps.note(record.overlap_steps)
            self._local_steps.note(record.local_steps)

    # --- for scrapes ----------------------------------------------------------------------------------------

    def describe(self) -> Iterator[Metric]:
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        yield from self._about_training()
        yield from self._about_rounds()
        yield from self._about_connection()

    def _about_training(self) -> Iterator[Metric]:
        session = self._session
        steps, idle_s, service_s, run_s, idle = (
            (0, 0.0, 0.0, 0.0, 0.0)
            if session is None
            else (session.steps, session.idle_s, session.service_s, session.run_s, session.idle_fraction)
        )
        yield CounterMetricFamily("loscar_worker_steps", "Optimizer steps taken.", steps)
        yield self._step_seconds.family(
            "loscar_worker_step_seconds", "Time of an optimizer step, averaging and waits apart."
        )
        yield CounterMetricFamily(
            "loscar_worker_idle_seconds",
            "Time in which training waited for the service, the final round apart.",
            idle_s,
        )
        yield CounterMetricFamily(
            "loscar_worker_service_seconds", "Time that averaging took of the training thread, waits apart.", service_s
        )
        yield GaugeMetricFamily("loscar_worker_run_seconds", "Run time: seconds since the run's first round.", run_s)
        yield GaugeMetricFamily(
            "loscar_worker_idle_ratio", "Share of this worker's own run time in which training waited.", idle
        )

    def _about_rounds(self) -> Iterator[Metric]:
        session = self._session
        outcomes = {"sent": 0, "included": 0, "returned": 0, "outstanding": 0}
        round_ = epoch = sent = received = 0
        if session is not None:
            engine = session.engine
            outcomes = session.contributions
            position = engine.anchor.position
            round_, epoch = position.round, position.epoch
            sent, received = session.bytes_up, session.bytes_down
        yield GaugeMetricFamily("loscar_worker_round", "Last round that this worker has committed.", round_)
        yield GaugeMetricFamily("loscar_worker_epoch", "Server epoch that closed it.", epoch)
        yield self._merge_seconds.family(
            "loscar_worker_merge_seconds", "Time that a round's merge took of the training thread."
        )
        yield self._overlap_steps.family(
            "loscar_worker_overlap_steps", "Steps from a contribution's snapshot to the merge of its round."
        )
        yield self._local_steps.family(
            "loscar_worker_local_steps", "Steps from the previous merge to a contribution's snapshot."
        )
        yield CounterMetricFamily(
            "loscar_worker_contributions_sent", "Contributions taken from the model for a round.", outcomes["sent"]
        )
        ledger = GaugeMetricFamily(
            "loscar_worker_contributions",
            "Contributions by what became of them; a recovery can turn one outcome into another.",
            labels=["outcome"],
        )
        for outcome in ("included", "returned", "outstanding"):
            ledger.add_metric([outcome], outcomes[outcome])
        yield ledger
        yield CounterMetricFamily(
            "loscar_worker_sent_payload_bytes", "Encoded values of contributions, without framing.", sent
        )
        yield CounterMetricFamily(
            "loscar_worker_received_payload_bytes", "Encoded values of averages, without framing.", received
        )

    def _about_connection(self) -> Iterator[Metric]:
        session = self._session
        connected = int(session is not None and session.connected)
        yield GaugeMetricFamily("loscar_worker_connected", "1 while there is a stream to a server, else 0.", connected)
        yield CounterMetricFamily(
            "loscar_worker_reconnects",
            "Times that a lost connection came back.",
            0 if session is None else session.reconnects,
        )
        yield GaugeMetricFamily(
            "loscar_worker_round_trip_seconds",
            "Last heartbeat's time to the server and back.",
            None if session is None else session.round_trip_s,
        )
        names = {"run_id": "", "worker": ""} if session is None else {"run_id": session.run_id, "worker": session.name}
        info = {"version": self._version, **names}
        yield InfoMetricFamily("loscar_worker", "Which worker of which run this is; empty before it has joined.", info)
