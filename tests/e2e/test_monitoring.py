"""The monitoring overlay's files on a real Prometheus that scrapes a real run with a fault in it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import DEADLINE_S, Process, Processes, Server, wait_until
from raw import RawStream

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
BOARD = MONITORING / "grafana" / "boards" / "loscar.json"
OVERLAY = MONITORING.parent / "compose.monitoring.yaml"
INTERVAL = "20s"

pytestmark = pytest.mark.timeout(240)


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    """A running one, asked over HTTP."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, path: str, **arguments: str) -> Any:
        """`data` of an answer; None when nobody answers."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
                found = json.load(answer)
        except ConnectionError:
            return None
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it is starting
                return None
            raise AssertionError(f"{arguments}: {error.read().decode()}") from None
        except urllib.error.URLError:
            return None
        assert found["status"] == "success", found
        return found["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples that a panel's query gives now."""
        found = self.ask("query", query=expression.replace("$__rate_interval", INTERVAL))
        result: list[dict[str, Any]] = found["result"]
        return result


@pytest.fixture
def prometheus(tmp_path: Path, processes: Processes) -> Iterator[tuple[Prometheus, Server, Process]]:
    """With a server and two workers, which it finds as static targets instead of by the names of containers.

    Skipped without a `prometheus` on this machine."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus here (Debian: apt-get install prometheus)")
    metrics = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    flags = ["--workers", "2", "--local-steps", "5", "--overlap-steps", "auto", "--density", "0.1", "--lease", "2s"]
    server = processes.server(*flags, "--metrics", metrics[0])
    train = ["--task", "digits", "--server", server.address, "--step-time", "5ms"]
    workers = [
        processes.loscar("worker", *train, "--name", f"w{i}", "--metrics", address)
        for i, address in enumerate(metrics[1:])
    ]
    for worker in workers:
        worker.says("metrics at http://")
    targets = iter((metrics[:1], metrics[1:]))
    text, count = re.subn(
        r"dns_sd_configs:\n(?: {6,}.*\n)+",
        lambda _: f"static_configs:\n      - targets: {json.dumps(next(targets))}\n",
        (MONITORING / "prometheus.yml").read_text(encoding="utf-8"),
    )
    assert count == 2
    text = text.replace("scrape_interval: 5s", "scrape_interval: 1s").replace("timeout: 4s", "timeout: 1s")
    config = tmp_path / "prometheus.yml"
    config.write_text(text, encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        running = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        asked = Prometheus(address)
        wait_until(lambda: asked.ask("targets") is not None, "Prometheus answers")
        yield asked, server, workers[0]
    finally:
        running.terminate()
        running.wait(DEADLINE_S)


def test_every_query_of_the_board_finds_something_in_a_real_run(
    prometheus: tuple[Prometheus, Server, Process],
) -> None:
    """Once a worker was killed, so that contributions were missed, and a stranger was refused."""
    asked, server, victim = prometheus
    up = "sum(up) == 3 and sum(loscar_server_rounds_total) > 20 and on () count(loscar_worker_info) == 2"
    wait_until(lambda: asked.query(up), "all three are scraped and rounds go on")
    # Whatever happens only sometimes is looked for while the run is as it was, or afterwards.
    queries = {(panel["title"], target["expr"]): False for panel in panels() for target in panel["targets"]}
    assert len(queries) >= 25

    def all_found() -> bool:
        for key, found in queries.items():
            queries[key] = found or bool(asked.query(key[1]))
        return all(queries.values())

    all_found()
    victim.signal(signal.SIGKILL)
    victim.wait()
    with grpc.insecure_channel(server.address) as channel, RawStream(channel) as stream:
        stream.send(b"\xff")
        stream.half_close()
        assert stream.status()[0] is grpc.StatusCode.INVALID_ARGUMENT
    try:
        wait_until(all_found, "every query finds something")
    except AssertionError:
        missing = [key for key, found in queries.items() if not found]
        raise AssertionError(f"found nothing: {missing}") from None
    [phase] = asked.query("loscar_server_phase == 1")
    assert phase["metric"]["phase"] == "running"
    by_worker = next(e for t, e in queries if t == "Steps a second, by worker")
    assert {sample["metric"]["worker"] for sample in asked.query(by_worker)} >= {"w1"}


def test_the_board_can_be_read(tmp_path: Path) -> None:
    """Panels have titles, units and places of their own, and only metrics that docs/metrics.md describes."""
    described = set(
        re.findall(r"`((?:loscar|process)_\w+)`", (MONITORING.parents[1] / "docs" / "metrics.md").read_text("utf-8"))
    )
    places = set()
    for panel in panels():
        assert panel["title"]
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & places, panel["title"]
        assert all(x < 24 for x, _ in cells)
        places |= cells
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            used = set(re.findall(r"\b(?:loscar|process)_\w+", target["expr"]))
            assert used
            assert {re.sub(r"_bucket$", "", name) for name in used} <= described, target["expr"]


def test_prometheus_takes_the_overlay_s_configuration() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool here (Debian: apt-get install prometheus)")
    done = subprocess.run(
        ["promtool", "check", "config", str(MONITORING / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_overlay_asks_for_the_ports_that_are_scraped() -> None:
    overlay = OVERLAY.read_text(encoding="utf-8")
    config = (MONITORING / "prometheus.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"--metrics 0\.0\.0\.0:(\d+)", overlay)) == set(re.findall(r"port: (\d+)", config))
    services = set(re.findall(r"^  ([\w-]+):$", overlay, re.MULTILINE))
    assert {"worker", "worker-slow", "worker-slower"} <= services
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    source = (MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text(encoding="utf-8")
    used = {t["datasource"]["uid"] for panel in board["panels"] for t in panel["targets"]}
    assert used == set(re.findall(r"uid: (\S+)", source))
