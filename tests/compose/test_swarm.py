"""The stack file on a swarm of one node: it trains, and its server is killed, updated and ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import COMMAND_S, PROJECTS, ROOT, SERVER_IMAGE, WORKER_IMAGE, Engine, call, new_name, wait_until
from stack import Watched, inspect, kill_process, member

pytestmark = pytest.mark.timeout(1500, method="signal")

NAMES = ("worker-1", "worker-slow-1", "worker-slower-1")


class SwarmStack(Watched):
    """deploy/stack.yaml, deployed under a name of its own.

    Args:
        folder: for the token.
        settings: what the file reads from the environment.
    """

    probe = "--token-file /run/secrets/token"

    def __init__(self, folder: Path, **settings: str) -> None:
        super().__init__()
        self.name = new_name()
        token = folder / "token"
        token.write_text("a long random text\n", encoding="utf-8")
        call("docker", "secret", "create", self.name, str(token))
        own = {key: "" for key in os.environ if key.startswith("LOSCAR_")}
        images = {"LOSCAR_SERVER_IMAGE": SERVER_IMAGE, "LOSCAR_WORKER_IMAGE": WORKER_IMAGE}
        call(
            "docker", "stack", "deploy", "--resolve-image", "never", "--compose-file", str(ROOT / "deploy/stack.yaml"),
            self.name, environment={**own, **images, "LOSCAR_TOKEN_SECRET": self.name, **settings},
        )  # fmt: skip

    def running(self, service: str) -> str | None:
        return next(iter(self.containers(service, "running")), None)

    def containers(self, service: str, *states: str) -> list[str]:
        """Ids in these states, or in any; the newest first."""
        label = f"label=com.docker.swarm.service.name={self.name}_{service}"
        filters = [word for state in states for word in ("--filter", f"status={state}")]
        return call("docker", "ps", "-aq", "--no-trunc", "--filter", label, *filters).stdout.split()

    def logs(self) -> str:
        tasks = call("docker", "stack", "ps", "--no-trunc", self.name, check=False).stdout
        services = ("server", "worker", "worker-slow", "worker-slower")
        said = [
            call("docker", "service", "logs", "--tail", "30", f"{self.name}_{s}", check=False).stdout for s in services
        ]
        return "\n".join([tasks, *said])

    def close(self) -> None:
        """Take everything away, volumes too."""
        self.stop_watching()
        call("docker", "stack", "rm", self.name, check=False)
        label = f"label=com.docker.stack.namespace={self.name}"
        wait_until(lambda: not call("docker", "ps", "-aq", "--filter", label).stdout.split(), "all containers are gone")
        for kind in ("network", "volume"):

            def gone(kind: str = kind) -> bool:
                left = call("docker", kind, "ls", "-q", "--filter", label).stdout.split()
                for each in left:
                    call("docker", kind, "rm", each, check=False)
                return not left

            wait_until(gone, f"every {kind} is gone")
        call("docker", "secret", "rm", self.name, check=False)


@pytest.fixture(scope="module")
def swarm(engine: Engine) -> Iterator[None]:
    """The engine as the only node of a swarm. One that is in a swarm already, or has other things to do, is left alone:
    an engine that leaves a swarm cuts the containers off that it runs besides."""
    if call("docker", "ps", "-q").stdout.split():
        pytest.skip("other containers run on this engine, and would be cut off when it leaves the swarm")
    state = call("docker", "info", "--format", "{{.Swarm.LocalNodeState}}").stdout.strip()
    if state != "inactive":
        pytest.skip(f"the engine's swarm is {state}, and not these tests'")
    begun = call("docker", "swarm", "init", "--advertise-addr", "127.0.0.1", "--listen-addr", "127.0.0.1", check=False)
    if begun.returncode != 0:
        pytest.skip(f"this engine makes no swarm: {begun.stderr.strip()[-300:]}")
    try:
        node = call("docker", "info", "--format", "{{.Swarm.NodeID}}").stdout.strip()
        call("docker", "node", "update", "--label-add", f"{PROJECTS}={new_name()}", node)
        yield
    finally:
        call("docker", "swarm", "leave", "--force", check=False)


@pytest.fixture(scope="module")
def stack(swarm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwarmStack]:
    made = SwarmStack(
        tmp_path_factory.mktemp("swarm"),
        LOSCAR_ROUNDS="100000",
        LOSCAR_CHECKPOINT_EVERY="5s",
        LOSCAR_SERVER_ARGS="--lease 6s --start-grace 1s",
        LOSCAR_CPUS="0.6",
        LOSCAR_CPUS_SLOW="0.3",
        LOSCAR_CPUS_SLOWER="0.15",
    )
    try:
        yield made
    finally:
        made.close()


def everybody(stack: SwarmStack) -> dict[str, Any]:
    """Wait until the three workers, under the names of their places, take part."""

    def there(status: dict[str, Any]) -> bool:
        found = [member(status, name) for name in NAMES]
        return status["phase"] == "running" and all(m is not None and m["contributed"] > 0 for m in found)

    return stack.status_when(there, "three workers take part", deadline_s=2 * COMMAND_S)


def went_on(stack: SwarmStack, before: dict[str, Any]) -> None:
    after = stack.status_when(
        lambda s: s["epoch"] > before["epoch"] and s["phase"] == "running", "a new epoch", deadline_s=2 * COMMAND_S
    )
    assert after["run_id"] == before["run_id"]
    assert after["round"] >= before["round"], "the run was begun anew"
    everybody(stack)
    stack.rounds_go_on()


def test_it_trains(stack: SwarmStack) -> None:
    everybody(stack)
    stack.rounds_go_on()


def test_a_killed_server_task_is_rescheduled_and_the_run_goes_on(stack: SwarmStack) -> None:
    before = everybody(stack)
    first = stack.running("server")
    assert first is not None
    kill_process(first)
    went_on(stack, before)
    assert stack.running("server") not in (None, first), "a swarm starts another container in its place"


def test_an_updated_server_pauses_its_run(stack: SwarmStack) -> None:
    before = everybody(stack)
    first = stack.running("server")
    assert first is not None
    call("docker", "service", "update", "--force", "--detach", f"{stack.name}_server")
    wait_until(lambda: stack.running("server") not in (None, first), "another container")
    assert inspect(first)["State"]["ExitCode"] == 143
    log = call("docker", "logs", first)
    assert ", which is saved" in log.stdout + log.stderr
    went_on(stack, before)


def test_sigint_ends_the_run_and_nobody_is_started_again(stack: SwarmStack) -> None:
    everybody(stack)
    server = stack.running("server")
    assert server is not None
    call("docker", "kill", "-s", "INT", server)
    services = ("server", "worker", "worker-slow", "worker-slower")
    wait_until(
        lambda: not any(stack.containers(s, "running", "created", "restarting") for s in services), "all have ended"
    )
    newest = [stack.containers(service)[0] for service in services]
    assert [inspect(each)["State"]["ExitCode"] for each in newest] == [0, 0, 0, 0]
