"""What a worker tells Prometheus: tallies without locks, and figures read off the session."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry
from scraping import Scrape, check_conventions

from loscar_worker.metrics import STEPS, Tally, WorkerMetrics
from loscar_worker.round_record import RoundRecord

RECORD = RoundRecord(
    round=1,
    kind="train",
    steps=10,
    local_steps=5,
    overlap_steps=3,
    snapshot_s=1.0,
    answered_s=1.5,
    merged_s=1.6,
    merge_s=0.003,
    waited_s=0.0,
    waits=(),
    included=True,
    bytes_up=100,
    bytes_down=200,
)


def scrape(metrics: WorkerMetrics) -> Scrape:
    registry = CollectorRegistry()
    registry.register(metrics)
    return Scrape(text_string_to_metric_families(generate_latest(registry).decode()))


def session(**changes: Any) -> Any:
    """What the metrics look at of a session."""
    position = SimpleNamespace(round=7, epoch=2)
    engine = SimpleNamespace(anchor=SimpleNamespace(position=position))
    given: dict[str, Any] = {
        "name": 'w"0\\\n',
        "run_id": "ab" * 16,
        "steps": 40,
        "idle_s": 1.5,
        "service_s": 0.25,
        "run_s": 6.0,
        "idle_fraction": 0.25,
        "contributions": {"sent": 6, "included": 4, "returned": 1, "outstanding": 1},
        "reconnects": 2,
        "connected": True,
        "round_trip_s": 0.05,
        "bytes_up": 100,
        "bytes_down": 200,
        "engine": engine,
    }
    return SimpleNamespace(**given | changes)


def test_a_tally_counts_into_the_bucket_that_a_value_belongs_to() -> None:
    tally = Tally((1, 2, 5))
    for value in (0, 1, 1.5, 2, 5, 5.1, 1000):
        tally.note(value)
    samples = tally.family("x_steps", "X.").samples
    buckets = {s.labels["le"]: s.value for s in samples if s.name == "x_steps_bucket"}
    assert buckets == {"1.0": 2, "2.0": 4, "5.0": 5, "+Inf": 7}
    assert {s.name: s.value for s in samples if not s.labels} == {"x_steps_count": 7, "x_steps_sum": 1014.6}


def test_a_tally_is_whole_while_it_is_written() -> None:
    """A scrape in the middle sees as many in +Inf as it says there are, never fewer than before."""
    tally = Tally(tuple(range(1, 50)))
    done = threading.Event()

    def write() -> None:
        for i in range(100_000):
            tally.note(i % 60)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0.0
    try:
        while not done.is_set():
            values = {s.labels.get("le", s.name): s.value for s in tally.family("x_steps", "X.").samples}
            assert values["+Inf"] == values["x_steps_count"] >= seen
            seen = values["+Inf"]
    finally:
        writer.join()
    assert tally.family("x_steps", "X.").samples[-2].value == 100_000


def test_rounds_and_steps_are_tallied() -> None:
    metrics = WorkerMetrics()
    metrics.stepped(0.004)
    metrics.merged(RECORD)
    metrics.merged(dataclasses.replace(RECORD, snapshot_s=None, local_steps=0, overlap_steps=0, merge_s=0.001))
    found = scrape(metrics)
    assert found.value("loscar_worker_step_seconds_count") == 1
    assert found.value("loscar_worker_step_seconds_bucket", le="0.005") == 1
    assert found.value("loscar_worker_merge_seconds_count") == 2
    assert math.isclose(found.value("loscar_worker_merge_seconds_sum"), 0.004)
    # A round that this worker took no part in has neither N nor Q.
    assert found.value("loscar_worker_overlap_steps_count") == found.value("loscar_worker_local_steps_count") == 1
    assert found.value("loscar_worker_overlap_steps_sum") == 3
    assert found.value("loscar_worker_local_steps_sum") == 5


def test_a_session_is_read_when_it_is_asked_for() -> None:
    metrics = WorkerMetrics()
    metrics.joined(session())
    found = scrape(metrics)
    expected = {
        "steps_total": 40,
        "idle_seconds_total": 1.5,
        "service_seconds_total": 0.25,
        "run_seconds": 6,
        "idle_ratio": 0.25,
        "round": 7,
        "epoch": 2,
        "contributions_sent_total": 6,
        "sent_payload_bytes_total": 100,
        "received_payload_bytes_total": 200,
        "connected": 1,
        "reconnects_total": 2,
        "round_trip_seconds": 0.05,
    }
    assert {name: found.value(f"loscar_worker_{name}") for name in expected} == expected
    outcomes = {dict(k)["outcome"]: v for k, v in found.nonzero("loscar_worker_contributions").items()}
    assert outcomes == {"included": 4, "returned": 1, "outstanding": 1}
    assert found.labels("loscar_worker_info") | {"version": ""} == {
        "run_id": "ab" * 16,
        "worker": 'w"0\\\n',
        "version": "",
    }


def test_the_series_are_there_before_the_worker_has_joined() -> None:
    metrics = WorkerMetrics()
    before = scrape(metrics)
    check_conventions(before)
    assert before.labels("loscar_worker_info")["worker"] == ""
    metrics.joined(session(round_trip_s=None))
    metrics.merged(RECORD)
    after = scrape(metrics)
    check_conventions(after)
    assert {name for name, _ in after.series} == {name for name, _ in before.series}
    assert len(after.series) == len(before.series)
    metrics.joined(session())
    assert {name for name, _ in scrape(metrics).series - after.series} == {"loscar_worker_round_trip_seconds"}


def test_openmetrics_accepts_it() -> None:
    def families() -> Iterator[Any]:
        registry = CollectorRegistry()
        metrics = WorkerMetrics()
        metrics.joined(session())
        registry.register(metrics)
        return parse_openmetrics(generate_openmetrics(registry).decode())

    found = Scrape(families())
    check_conventions(found)
    assert found.value("loscar_worker_steps_total") == 40
    assert found.value("loscar_worker_overlap_steps_bucket", le=str(float(STEPS[-1]))) == 0
