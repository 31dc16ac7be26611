"""Which files over compose.yaml go together: docs/deploy.md says so, Compose reads each combination, and what it makes
of it fits together. Containers of the richer ones are started in test_overlays.py."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine import ROOT, Engine
from stack import Stack

pytestmark = pytest.mark.timeout(1800, method="signal")

OVERLAYS = ("tls", "links", "monitoring", "standby", "shards")
JOINTS = {frozenset(("tls", "standby")): "standby.tls", frozenset(("tls", "shards")): "shards.tls"}
APART = frozenset(("standby", "shards"))
SETTINGS = {"LOSCAR_TOKEN": "a-token", "LOSCAR_GRAFANA_PASSWORD": "a-password"}
STAND_IN = '#!/bin/sh\necho loscar "$@"\n'


def subsets() -> list[tuple[str, ...]]:
    found = [chosen for size in range(len(OVERLAYS) + 1) for chosen in combinations(OVERLAYS, size)]
    return [chosen for chosen in found if not APART < set(chosen) < set(OVERLAYS)]


def files(chosen: tuple[str, ...]) -> list[str]:
    """The overlays and what joins them, as docs/deploy.md has it."""
    return [*chosen, *(joint for pair, joint in JOINTS.items() if pair <= set(chosen))]


@pytest.fixture
def entry(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the images' entry point, with a stand-in for loscar that only says what it was called with."""
    program = tmp_path / "loscar"
    program.write_text(STAND_IN, encoding="ascii")
    program.chmod(0o755)

    def run(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        own = {key: value for key, value in os.environ.items() if not key.startswith("LOSCAR_")}
        return subprocess.run(
            ["sh", str(ROOT / "deploy/docker/entry.sh"), *shlex.split(command)],
            env={**own, **environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def resolved(engine: Engine, overlays: list[str]) -> dict[str, dict[str, Any]]:
    """The services as Compose reads them; none is started, so that there is nothing to take away."""
    done = Stack(engine, overlays, SETTINGS).compose("config", check=False)
    assert done.returncode == 0, done.stderr
    services: dict[str, dict[str, Any]] = yaml.safe_load(done.stdout)["services"]
    for service in services.values():
        command = service.get("command") or ""
        service["command"] = command if isinstance(command, str) else shlex.join(command)
    return services


def test_the_documented_table() -> None:
    """Every pair has its cell, and the cell says what is tested here."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    [head] = re.findall(r"^\| with \|(.*)\|$", page, re.MULTILINE)
    columns = re.findall(r"`([\w.]+)`", head)
    assert tuple(columns) == OVERLAYS
    cells = {}
    for row in OVERLAYS:
        [line] = re.findall(rf"^\| `{row}` \|((?:[^|\n]*\|){{{len(OVERLAYS)}}})$", page, re.MULTILINE)
        for column, cell in zip(columns, line.split("|")[:-1], strict=True):
            cells[row, column] = cell.strip()
    for row in OVERLAYS:
        for column in OVERLAYS:
            pair = frozenset((row, column))
            if row == column:
                expected = "–"
            elif pair == APART:
                expected = "no"
            else:
                expected = f"add `{JOINTS[pair]}`" if pair in JOINTS else "yes"
            assert cells[row, column] == expected, (row, column)


@pytest.mark.parametrize("chosen", subsets(), ids=lambda chosen: "+".join(chosen) or "none")
def test_a_combination_fits_together_or_is_refused_by_name(
    chosen: tuple[str, ...],
    engine: Engine,
    entry: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    services = resolved(engine, files(chosen))
    workers = {name: found for name, found in services.items() if name.startswith("worker")}
    assert len(workers) == 3
    if set(chosen) >= APART:
        for worker in workers.values():
            done = entry(worker["command"], worker["environment"])
            assert done.returncode == 3
            assert done.stderr == "loscar: compose.shards.yaml and compose.standby.yaml do not go together\n"
        return
    servers = {name: found for name, found in services.items() if found["command"].startswith("server ")}
    second = {"standby": "standby", "shards": "shard"}
    assert set(servers) == {"server", *(second[name] for name in second if name in chosen)}
    for server in servers.values():
        done = entry(server["command"], server["environment"])
        assert done.returncode == 0, done.stderr
        words = done.stdout.split()
        assert ("--tls-client-ca" in words) == ("tls" in chosen)
        assert ("--insecure" in words) == ("tls" not in chosen)
        assert ("LOSCAR_PROBE" in server["environment"]) == ("tls" in chosen), "for the health check"
        if "monitoring" in chosen:
            assert words[words.index("--metrics") + 1] == "0.0.0.0:9500"
        assert ("--shard" in words) == ("shards" in chosen)
        assert bool(server.get("ports")) == ("tls" in chosen and server is not servers.get("standby"))
    separator = ";" if "shards" in chosen else ","
    for worker in workers.values():
        done = entry(worker["command"], worker["environment"])
        assert done.returncode == 0, done.stderr
        words = done.stdout.splitlines()[-1].split()
        assert ("--tls-ca" in words) == ("tls" in chosen)
        assert ("--metrics" in words) == ("monitoring" in chosen)
        to = words[words.index("--server") + 1].split(separator)
        if "links" in chosen:
            assert to == [f"127.0.0.1:{50061 + i}" for i in range(len(servers))]
            behind = re.findall(r"^loscar link .* --to (\S+)$", done.stdout, re.MULTILINE)
        else:
            behind = to
        assert behind == [f"{name}:50051" for name in sorted(servers, key=lambda name: name != "server")]
    if "monitoring" in chosen:
        scraped = yaml.safe_load((ROOT / "deploy/monitoring/prometheus.yml").read_text(encoding="utf-8"))
        names = {name for job in scraped["scrape_configs"] for name in job["dns_sd_configs"][0]["names"]}
        assert {*servers, *workers} <= names


@pytest.mark.parametrize("kind", ["shards", "standby"])
def test_tls_without_its_second_file_is_refused_by_name(
    kind: str, engine: Engine, entry: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The second server would be without TLS, and its workers would never get there."""
    worker = resolved(engine, ["tls", kind])["worker"]
    done = entry(worker["command"], worker["environment"])
    assert done.returncode == 3
    assert done.stderr == f"loscar: compose.tls.yaml and compose.{kind}.yaml need compose.{kind}.tls.yaml too\n"
