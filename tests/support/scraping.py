"""Scrapes: what a metrics endpoint answers, parsed by Prometheus' own library, and the rules for names."""

from __future__ import annotations

import math
import re
import urllib.request
from collections.abc import Iterable

from processes import DEADLINE_S
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
NAME = re.compile(r"(loscar_server|loscar_worker|process)(_[a-z]+)*")
UNITS = ("seconds", "bytes", "ratio", "coordinates", "steps")
NOT_BASE = re.compile(r"milli|micro|nano|minutes|hours|percent|kilo|mega|_ms\b|_mb\b|_kb\b|_us\b")

Labels = tuple[tuple[str, str], ...]


class Scrape:
    """One answer of an endpoint.

    Attributes:
        families: by name, as the library has it: a counter's without `_total`.
        values: every sample, by its name and labels.
    """

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = {family.name: family for family in families}
        self.values: dict[tuple[str, Labels], float] = {}
        for family in self.families.values():
            for sample in family.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                assert key not in self.values, f"{key} is there twice"
                self.values[key] = sample.value

    def value(self, name: str, **labels: str) -> float:
        return self.values[name, tuple(sorted(labels.items()))]

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series of a name with these labels."""
        found = [v for (n, own), v in self.values.items() if n == name and labels.items() <= dict(own).items()]
        assert found, name
        return sum(found)

    def nonzero(self, name: str) -> dict[Labels, float]:
        """The series of a name that are not 0."""
        return {labels: value for (n, labels), value in self.values.items() if n == name and value}

    @property
    def series(self) -> set[tuple[str, Labels]]:
        return set(self.values)

    def labels(self, name: str) -> dict[str, str]:
        """Of the one series of this name."""
        [labels] = [dict(labels) for n, labels in self.values if n == name]
        return labels


def scrape(address: str, *, openmetrics: bool = False) -> Scrape:
    """What a process says at http://ADDRESS/metrics."""
    headers = {"Accept": OPENMETRICS} if openmetrics else {}
    request = urllib.request.Request(f"http://{address}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics" if openmetrics else "text/plain")
        text = answer.read().decode()
    return Scrape((parse_openmetrics if openmetrics else parse_text)(text))


def check_conventions(found: Scrape) -> None:
    """Prometheus' conventions for names, units and types."""
    for family in found.families.values():
        assert NAME.fullmatch(family.name), family.name
        assert not NOT_BASE.search(family.name), family.name
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket", "_created")), family.name
        assert family.documentation.endswith("."), family.name
        assert family.type in ("counter", "gauge", "histogram", "info"), family.name
        samples = {sample.name.removeprefix(family.name) for sample in family.samples}
        if family.type == "counter":
            assert samples == {"_total"}, family.name
            assert all(sample.value >= 0 for sample in family.samples), family.name
        elif family.type == "histogram":
            assert samples == {"_bucket", "_count", "_sum"}, family.name
            assert family.name.endswith(UNITS), family.name
            _check_buckets(found, family.name)
        else:
            assert samples <= {"", "_info"}, family.name


def _check_buckets(found: Scrape, name: str) -> None:
    buckets = [(float(dict(labels)["le"]), v) for (n, labels), v in found.values.items() if n == f"{name}_bucket"]
    assert [bound for bound, _ in buckets] == sorted({bound for bound, _ in buckets})
    assert [count for _, count in buckets] == sorted(count for _, count in buckets), "cumulative"
    assert buckets[-1] == (math.inf, found.value(f"{name}_count"))
