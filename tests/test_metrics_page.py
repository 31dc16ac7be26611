"""docs/metrics.md against the code: every metric with its type and labels, and every query."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, ProcessCollector

from loscar_core.errors import LoscarError
from loscar_deploy.logs import EXTRA, JsonLines
from loscar_server.metrics import OUTCOMES, ServerMetrics
from loscar_worker.metrics import WorkerMetrics

PAGE = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (counter|gauge|histogram) \|(.*?)\|(.+)\|$", re.MULTILINE)
SUFFIX = {"counter": "_total", "info": "_info"}
SAMPLES = {"histogram": ("_bucket", "_count", "_sum")}

Described = dict[str, tuple[str, tuple[str, ...]]]


def documented() -> Described:
    """Exposed name -> type and labels, from the page's tables."""
    rows = ROW.findall(PAGE)
    assert len({name for name, *_ in rows}) == len(rows), "a metric is described twice"
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}


def exposed(families: Iterable[Metric]) -> Described:
    """The same from the code."""
    found = {}
    for family in families:
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        kind = "gauge" if family.type == "info" else family.type
        found[family.name + SUFFIX.get(family.type, "")] = (kind, tuple(sorted(labels)))
    return found


def all_families() -> list[Metric]:
    process = ProcessCollector(registry=CollectorRegistry())
    return [*ServerMetrics().collect(), *WorkerMetrics().collect(), *process.collect()]


def test_the_page_has_every_metric_and_no_other() -> None:
    described = {name: (kind, tuple(sorted(labels))) for name, (kind, labels) in documented().items()}
    assert described == exposed(all_families())


def test_both_sides_have_their_own_names() -> None:
    for prefix, collector in (("loscar_server_", ServerMetrics()), ("loscar_worker_", WorkerMetrics())):
        names = list(exposed(collector.collect()))
        assert len(names) > 15
        assert all(name.startswith(prefix) for name in names)


def test_what_is_mentioned_exists() -> None:
    """Names in queries and in the text are those of samples."""
    kinds = exposed(all_families())
    samples = {name + suffix for name, (kind, _) in kinds.items() for suffix in ("", *SAMPLES.get(kind, ()))}
    mentioned = set(re.findall(r"\b(?:loscar_(?:server|worker)|process)_[a-z_]+\b", PAGE)) - {"loscar_server_reported_"}
    assert mentioned <= samples
    queries = re.findall(r"^\| .+ \| `(.*loscar_.*)` \|$", PAGE, re.MULTILINE)
    assert len(queries) > 5
    for query in queries:
        for name, selector in re.findall(r"(loscar_\w+)(?:\{(.*?)\})?", query):
            labels = set(re.findall(r"(\w+)!?=", selector))
            base = re.sub(r"_(bucket|count|sum)$", "", name)
            assert labels <= set((kinds.get(name) or kinds[base])[1]), query


def test_the_outcomes_are_those_of_the_code() -> None:
    section = PAGE.partition("### Contributions by outcome and reason")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(OUTCOMES)


def test_the_fields_of_a_log_line_are_those_of_the_code() -> None:
    section = PAGE.partition("## Logs")[2]
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", section, re.MULTILINE)
    fields = {field for cell in cells for field in re.findall(r"`(\w+)`", cell)}
    always = {"time", "level", "logger", "message", *JsonLines().context}
    assert fields == always | set(EXTRA) | {"exception"}
    assert all(hasattr(LoscarError, name) for name in EXTRA)
