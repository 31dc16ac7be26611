"""What the images hold, and how their containers end."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engine import ROOT, SCRIPTS, SERVER_IMAGE, WORKER_IMAGE, Engine, call, new_name, wait_until
from stack import Stack, inspect, run

pytestmark = pytest.mark.timeout(1800, method="signal")

MOST_OVER_BASE = 250_000_000
VERSIONS = """
import json
from importlib.metadata import distributions
print(json.dumps({found.name: found.version for found in distributions()}))
"""


@pytest.fixture(scope="module", autouse=True)
def built(engine: Engine) -> None:
    """The images are there; the first test waits for them."""


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("image", [SERVER_IMAGE, WORKER_IMAGE])
def test_packages_are_those_of_the_constraints(image: str) -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if "==" in line:
            name, _, version = line.partition("==")
            pinned[normalised(name)] = version
    status, text = run(image, "-c", VERSIONS, options=("--entrypoint", "/opt/loscar/bin/python"))
    assert status == 0, text
    found = {normalised(name): version.partition("+")[0] for name, version in json.loads(text).items()}
    del found["loscar"]
    found.pop("setuptools", None)  # what pip freezes leaves it out
    assert found
    assert {name: pinned.get(name) for name in found} == found
    assert ("torch" in found) == (image == WORKER_IMAGE)


def test_the_server_is_small() -> None:
    """Measured as the layers over the base image, which are those that this project's Dockerfile has added."""
    layers = call(
        "docker", "history", "--no-trunc", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", SERVER_IMAGE
    )
    sizes = []
    for line in layers.stdout.splitlines():
        size, _, made_by = line.partition("\t")
        sizes.append(int(size))
        if "useradd" in made_by:
            break
    else:
        pytest.fail("the first layer over the base was not found")
    assert 10_000_000 < sum(sizes) <= MOST_OVER_BASE


def test_no_user_with_rights() -> None:
    for image in (SERVER_IMAGE, WORKER_IMAGE):
        assert inspect(image)["Config"]["User"] == "10001:10001"
        assert inspect(image)["Config"]["Healthcheck"]["Test"][0] == "CMD"


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "options", "command", "status", "cause"),
    [
        pytest.param(
            SERVER_IMAGE, (), "server --listen 0.0.0.0:50051 --token t --tls-cert /none.pem --tls-key /none-key.pem",
            3, "/none-key.pem: No such file or directory", id="no certificate",
        ),
        pytest.param(
            SERVER_IMAGE, (), "server --listen 0.0.0.0:50051",
            3, "0.0.0.0 can be reached from outside", id="no security",
        ),
        pytest.param(
            SERVER_IMAGE, ("--tmpfs", "/mnt:ro"), "server --checkpoints /mnt/checkpoints",
            3, "checkpoints in /mnt/checkpoints: Read-only file system", id="volume of checkpoints",
        ),
        pytest.param(
            WORKER_IMAGE, ("-e", "LOSCAR_STATE_DIR=/srv"), "worker", 3, "/srv", id="volume of states"
        ),
        pytest.param(
            WORKER_IMAGE, ("-e", "LOSCAR_SERVERS=127.0.0.1:9"), "worker --connect-timeout 2s",
            4, "no server at 127.0.0.1:9 within 2 s", id="no server",
        ),
        pytest.param(
            WORKER_IMAGE, (), "worker --tls-ca /none.pem", 3, "--tls-ca /none.pem: No such file", id="no authority"
        ),
        pytest.param(
            WORKER_IMAGE, ("-e", "LOSCAR_OVERLAY_SHARDS=yes", "-e", "LOSCAR_OVERLAY_STANDBY=yes"), "worker",
            3, "compose.shards.yaml and compose.standby.yaml do not go together", id="overlays apart",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_ends_the_container(
    image: str, options: tuple[str, ...], command: str, status: int, cause: str
) -> None:
    found, text = run(image, *command.split(), options=options)
    assert found == status, text
    assert len([line for line in text.splitlines() if cause in line]) == 1, text
    assert "Traceback" not in text


def test_the_load_test_of_containers_needs_an_engine_and_says_so(tmp_path: Path) -> None:
    done = call(
        sys.executable, "-P", "benchmarks/compose_load.py", "--out", str(tmp_path / "result.json"), check=False,
        environment={"PYTHONPATH": "tests/compose:benchmarks", "DOCKER_HOST": f"unix://{tmp_path}/none", SCRIPTS: ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("no load test of containers here: no container engine with Compose answers")
    assert not list(tmp_path.iterdir())


def test_who_fails_each_time_is_not_started_for_ever(stacks: Callable[..., Stack]) -> None:
    stack = stacks(LOSCAR_DENSITY="7", LOSCAR_RESTARTS="1")
    stack.up("server")
    server = stack.container("server")
    wait_until(lambda: inspect(server)["RestartCount"] == 1, "it is tried once more")
    assert stack.ended(server) == 3
    assert stack.logs(server).count("--density 7 is outside (0, 1]") == 2
    assert inspect(server)["RestartCount"] == 1


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [SERVER_IMAGE, WORKER_IMAGE])
def test_a_container_can_be_stopped_while_it_starts(image: str) -> None:
    """Process 1 gets only those signals that it has a handler for; that is there before the slow imports."""
    container = call("docker", "run", "-d", "--name", new_name(), image).stdout.strip()
    try:
        wait_until(lambda: catches_sigterm(int(inspect(container)["State"]["Pid"])), "it can be told to end")
        call("docker", "stop", "-t", "30", container)
        assert inspect(container)["State"]["ExitCode"] in (0, 130, 143)
    finally:
        call("docker", "rm", "-f", "-v", container)


def catches_sigterm(pid: int) -> bool:
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert caught is not None
    return bool(int(caught[1], 16) & 1 << signal.SIGTERM - 1)
