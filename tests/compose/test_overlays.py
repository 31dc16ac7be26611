"""The overlays, many at once: mutual TLS, emulated links, a standby or a second shard, figures for Prometheus."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from engine import SERVER_IMAGE, call, wait_until
from stack import Stack, inspect, kill_process, member, name_of

pytestmark = pytest.mark.timeout(1500, method="signal")

USER = 10001
OVERLAYS = ("tls", "links", "monitoring", "standby", "standby.tls")
SHARDED = ("tls", "links", "monitoring", "shards", "shards.tls")
LOOK = """
import socket, sys, urllib.request
for host in sorted({found[4][0] for found in socket.getaddrinfo(sys.argv[1], None, socket.AF_INET)}):
    print(urllib.request.urlopen(f"http://{host}:{sys.argv[2]}/metrics", timeout=60).read().decode())
"""
"""Prints the figures of every container of a service."""


@pytest.fixture(scope="module")
def pki(engine: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates as docs/deploy.md makes them."""
    folder = tmp_path_factory.mktemp("pki")
    hosts = "server,standby,shard,localhost,127.0.0.1"
    call(
        "docker", "run", "--rm", "--user", "0", "-v", f"{folder}:/pki", SERVER_IMAGE,
        "certs", "/pki", "--hosts", hosts, "--workers", "worker,probe",
    )  # fmt: skip
    for key in ("server", "worker", "probe"):
        os.chown(folder / f"{key}-key.pem", USER, -1)
    folder.chmod(0o755)
    return folder


def figures(stack: Stack, service: str, metric: str) -> list[float]:
    """A metric of every container of a service, on the port that deploy/monitoring/prometheus.yml asks. Prometheus and
    Grafana themselves are not started: their images are not the project's."""
    port = "9501" if service.startswith("worker") else "9500"
    found = stack.execute(stack.containers("worker")[0], "python3", "-c", LOOK, service, port)
    return [float(line.split()[1]) for line in found.stdout.splitlines() if line.startswith(f"{metric} ")]


def test_a_standby_takes_over_under_tls_and_over_links(stacks: Callable[..., Stack], pki: Path) -> None:
    stack = stacks(
        *OVERLAYS,
        LOSCAR_PKI=str(pki),
        LOSCAR_TOKEN="a-token",
        LOSCAR_PUBLISH="127.0.0.1:0",
        LOSCAR_GRAFANA_PASSWORD="a-password",
        LOSCAR_ROUNDS="100000",
        LOSCAR_LINK="rtt=20ms,rate=20mbit",
        LOSCAR_LINK_SLOW="rtt=60ms,rate=10mbit",
        LOSCAR_SERVER_ARGS="--lease 6s --start-grace 1s --recover-after 5s",
    )
    stack.up("server", "standby", "worker", "worker-slow")
    workers = [stack.container(service) for service in ("worker", "worker-slow")]
    names = [name_of(worker) for worker in workers]
    stack.status_when(
        lambda s: all((m := member(s, n)) is not None and m["contributed"] > 0 for n in names), "both take part"
    )
    assert "link listening on 127.0.0.1:50061, to server:50051" in stack.logs(workers[0])
    for service in ("server", "standby"):
        assert stack.execute(stack.container(service), "loscar-health", "server").returncode == 0
    assert stack.execute(workers[0], "loscar-health", "worker").returncode == 0
    assert figures(stack, "standby", "loscar_server_round") == [0]
    for service, metric in (("server", "loscar_server_round"), ("worker", "loscar_worker_steps_total")):
        assert [value > 0 for value in figures(stack, service, metric)] == [True]
    without = "loscar status --server server:50051 --tls-ca /etc/loscar/ca.pem"
    assert stack.execute(workers[0], *without.split()).returncode != 0, "without a certificate of its own"
    before = stack.rounds_go_on()
    call("docker", "kill", stack.container("server"))
    after = stack.status_when(lambda s: s["phase"] == "running" and s["epoch"] == 2, "the standby has it", "standby")
    assert after["run_id"] == before["run_id"]
    assert after["round"] >= before["round"]
    stack.rounds_go_on("standby")
    assert figures(stack, "standby", "loscar_server_round")[0] > 0
    assert stack.execute(workers[0], "loscar-health", "worker").returncode == 0
    standby = stack.container("standby")
    call("docker", "kill", "-s", "INT", standby)
    assert [stack.ended(container) for container in (standby, *workers)] == [0, 0, 0]


def test_a_model_over_two_servers(stacks: Callable[..., Stack], pki: Path) -> None:
    """Under TLS. One of them is killed and comes back, while the other one's rounds go on."""
    stack = stacks(
        *SHARDED,
        LOSCAR_PKI=str(pki),
        LOSCAR_TOKEN="a-token",
        LOSCAR_PUBLISH="127.0.0.1:0",
        LOSCAR_PUBLISH_SHARD="127.0.0.1:0",
        LOSCAR_GRAFANA_PASSWORD="a-password",
        LOSCAR_WORKERS="2",
        LOSCAR_ROUNDS="100000",
        LOSCAR_LINGER="1s",
        LOSCAR_LINK="rtt=20ms,rate=20mbit",
        LOSCAR_LINK_SLOW="rtt=60ms,rate=10mbit",
        LOSCAR_SERVER_ARGS="--lease 6s --start-grace 1s --recover-after 5s",
    )
    stack.up("server", "shard", "worker", "worker-slow")
    for service in ("server", "shard"):
        stack.rounds_go_on(service)
        stack.status_when(lambda s: len(s["members"]) == 2, "both are members", service)
        assert stack.execute(stack.container(service), "loscar-health", "server").returncode == 0
        assert figures(stack, service, "loscar_server_round")[0] > 0
    servers = "server:50051;shard:50051"
    fetch = f"loscar fetch --server '{servers}' $LOSCAR_SECURITY --out /tmp/model.safetensors --json"
    done = stack.execute(stack.container("worker"), "sh", "-c", fetch)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] > 0
    before = stack.status_when(lambda s: True, "the shard answers", "shard")
    assert before["dimension"] in (2405, 2406)
    kill_process(stack.container("shard"))
    stack.rounds_go_on()
    back = stack.status_when(lambda s: s["epoch"] > 1 and s["phase"] == "running", "the shard is back", "shard")
    assert back["run_id"] == before["run_id"]
    stack.rounds_go_on("shard")
    workers = [stack.container(service) for service in ("worker", "worker-slow")]
    assert stack.execute(workers[0], "loscar-health", "worker").returncode == 0
    call("docker", "kill", "-s", "INT", stack.container("server"))
    assert [stack.ended(c) for c in (stack.container("server"), stack.container("shard"), *workers)] == [0, 0, 0, 0]


def test_missing_settings_are_named(stacks: Callable[..., Stack], pki: Path, tmp_path: Path) -> None:
    done = stacks("tls").compose("config", check=False)
    assert done.returncode != 0
    assert "LOSCAR_TOKEN" in done.stderr
    stack = stacks("tls", LOSCAR_TOKEN="a-token", LOSCAR_PKI=str(tmp_path), LOSCAR_PUBLISH="127.0.0.1:0")
    done = stack.compose("up", "-d", "--no-build", "server", check=False)
    assert done.returncode != 0
    assert f"{tmp_path}/" in done.stderr
    assert ".pem" in done.stderr


def test_a_link_that_cannot_be_ends_the_container(stacks: Callable[..., Stack]) -> None:
    stack = stacks("links", LOSCAR_LINK="rtt=fast", LOSCAR_RESTARTS="1")
    stack.up("--no-deps", "worker")
    worker = stack.container("worker")
    wait_until(lambda: "rtt: 'fast' is not a number" in stack.logs(worker), "the cause is named")
    assert stack.ended(worker) == 3


def test_the_monitoring_overlay_wants_a_password(stacks: Callable[..., Stack]) -> None:
    done = stacks("monitoring").compose("config", check=False)
    assert done.returncode != 0
    assert "LOSCAR_GRAFANA_PASSWORD" in done.stderr


def test_a_second_server_on_one_volume_is_refused(stacks: Callable[..., Stack]) -> None:
    """As after `--scale server=2`: the first one keeps the folder, the second one ends and says why."""
    stack = stacks(LOSCAR_RESTARTS="1")
    stack.up("--scale", "server=2", "server")
    first, second = stack.containers("server")

    def ended() -> tuple[str, str] | None:
        for one, other in ((first, second), (second, first)):
            if inspect(one)["State"]["Status"] == "exited":
                return one, other
        return None

    refused, kept = wait_until(ended, "one of them has ended")
    assert inspect(refused)["State"]["ExitCode"] == 3
    assert "checkpoints in /var/lib/loscar/checkpoints: another server uses this folder" in stack.logs(refused)
    assert inspect(kept)["State"]["Running"]
    assert "another server uses" not in stack.logs(kept)
