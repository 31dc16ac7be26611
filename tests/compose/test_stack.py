"""A run in containers, from the base file, to which things happen; the last test ends it.

All of them share one stack: a server and three workers, each of which may use half as much of a core as the one before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine import call, new_name, wait_until
from stack import Stack, address_of, inspect, kill_process, member, name_of, packet_rules

pytestmark = pytest.mark.timeout(1500, method="signal")

SERVICES = ("worker", "worker-slow", "worker-slower")
DELAY_MS = 50
QUEUE = 1000 + os.getpid() % 60_000
"""Of packets that wait for a program; one that a killed process has left holds another."""


@pytest.fixture(scope="module")
def stack(stacks: Callable[..., Stack]) -> Stack:
    made = stacks(
        LOSCAR_ROUNDS="100000",
        LOSCAR_STATE_EVERY="2s",
        LOSCAR_CHECKPOINT_EVERY="5s",
        LOSCAR_SERVER_ARGS="--lease 6s --start-grace 1s",
        LOSCAR_TOKEN="a-token",
        # Together they leave room on two cores, or it would not be the limits that tell the workers apart.
        LOSCAR_CPUS="0.6",
        LOSCAR_CPUS_SLOW="0.3",
        LOSCAR_CPUS_SLOWER="0.15",
    )
    made.up()
    everybody(made)
    return made


def everybody(stack: Stack) -> dict[str, Any]:
    """Wait until the three workers are members that take part."""
    names = [name_of(stack.container(service)) for service in SERVICES]

    def there(status: dict[str, Any]) -> bool:
        found = [member(status, name) for name in names]
        return len(status["members"]) == 3 and all(m is not None and m["contributed"] > 0 for m in found)

    return stack.status_when(there, "three workers take part")


def contributes_again(stack: Stack, name: str) -> None:
    """Wait until a worker has contributed to a round that began from now on."""
    start = stack.status_when(lambda s: True, "the server answers")["round"]
    stack.status_when(
        lambda s: (m := member(s, name)) is not None and m["contributed"] > 0 and m["merged_round"] > start + 1,
        f"{name} contributes again",
    )


def test_containers_are_confined_and_healthy(stack: Stack) -> None:
    for service in ("server", *SERVICES):
        container = stack.container(service)
        found = inspect(container)
        assert found["HostConfig"]["ReadonlyRootfs"]
        assert not found["HostConfig"]["PortBindings"]
        assert stack.execute(container, "id", "-u").stdout.strip() == "10001"
        assert stack.execute(container, "touch", "/opt/loscar/x").returncode != 0
        role = service.partition("-")[0]
        assert stack.execute(container, "loscar-health", role).returncode == 0
        # A container has no terminal: every line is JSON, and says whose it is.
        lines = [json.loads(line) for line in call("docker", "logs", container).stderr.splitlines()]
        assert {line["role"] for line in lines} == {role}
        assert {line["worker"] for line in lines} == {None if role == "server" else name_of(container)}
        assert len({line["run_id"] for line in lines} - {None}) == 1
    worker = stack.container("worker")
    asked = stack.execute(worker, "sh", "-c", "LOSCAR_NAME=somebody-else loscar-health worker")
    assert asked.returncode == 1, "whoever is no member was called healthy"
    asked = stack.execute(worker, "sh", "-c", "LOSCAR_TOKEN=wrong loscar status --server server:50051")
    assert asked.returncode == 11, asked.stderr
    server = stack.container("server")
    wait_until(lambda: inspect(server)["State"]["Health"]["Status"] == "healthy", "the engine finds the server healthy")


def test_unequal_limits_give_unequal_steps_and_nobody_idles(stack: Stack) -> None:
    names = [name_of(stack.container(service)) for service in SERVICES]

    def steps(status: dict[str, Any]) -> list[int]:
        return [(member(status, name) or {"report": {"steps": 0}})["report"]["steps"] for name in names]

    before = everybody(stack)

    def unequal(status: dict[str, Any]) -> bool:
        most, half, quarter = (new - old for new, old in zip(steps(status), steps(before), strict=True))
        return status["round"] >= before["round"] + 15 and most > half > quarter > 0 and most > 1.5 * quarter

    fastest = stack.container("worker")
    assert [inspect(stack.container(service))["HostConfig"]["NanoCpus"] for service in SERVICES] == [6e8, 3e8, 1.5e8]
    periods, throttled = throttling(stack, fastest)
    try:
        after = stack.status_when(unequal, "unequal numbers of steps")
    except AssertionError:
        all_periods, all_throttled = throttling(stack, fastest)
        if all_throttled - throttled < (all_periods - periods) / 2:
            pytest.skip("this machine is too busy for the limits to matter: the fastest worker does not reach its own")
        raise
    for name in names:
        found = member(after, name)
        assert found is not None
        assert found["report"]["idle_s"] < 0.05 * found["report"]["run_s"]


def throttling(stack: Stack, container: str) -> tuple[int, int]:
    """In how many periods the container ran, and in how many of them it was stopped at its limit."""
    text = stack.execute(container, "sh", "-c", "cd /sys/fs/cgroup; cat cpu/cpu.stat || cat cpu.stat").stdout
    found = dict(line.split() for line in text.splitlines())
    return int(found["nr_periods"]), int(found["nr_throttled"])


def test_a_killed_worker_is_started_again_and_goes_on(stack: Stack) -> None:
    container = stack.container("worker-slow")
    name = name_of(container)
    wait_until(lambda: f"states/{name}.state" in _listed(stack), "its state is saved")
    restarts = inspect(container)["RestartCount"]
    kill_process(container)
    wait_until(lambda: inspect(container)["RestartCount"] > restarts, "the engine starts it again")
    wait_until(lambda: "goes on from" in stack.logs(container), "it resumes")
    assert name_of(container) == name
    contributes_again(stack, name)
    status = everybody(stack)
    assert "stream-closed" in {d["reason"] for d in status["departures"] if d["name"] == name}


def _listed(stack: Stack) -> str:
    return stack.execute(stack.container("worker"), "sh", "-c", "cd /var/lib/loscar && ls -d states/*").stdout


def test_scaling_up_and_down(stack: Stack) -> None:
    everybody(stack)
    first = set(stack.containers("worker"))
    stack.up("--no-recreate", "--scale", "worker=2")
    [second] = set(stack.containers("worker")) - first
    name = name_of(second)
    stack.status_when(lambda s: (m := member(s, name)) is not None and m["contributed"] > 0, "a fourth takes part")
    stack.up("--no-recreate", "--scale", "worker=1")
    assert set(stack.containers("worker")) == first
    status = everybody(stack)
    assert [d["reason"] for d in status["departures"] if d["name"] == name][-1:] == ["left"]
    stack.rounds_go_on()


def test_a_partition_of_ten_seconds(stack: Stack) -> None:
    server, worker = stack.container("server"), stack.container("worker")
    name = name_of(worker)
    before = everybody(stack)
    here, there = address_of(worker), address_of(server)
    with packet_rules(("-s", here, "-d", there, "-j", "DROP"), ("-s", there, "-d", here, "-j", "DROP")):
        stack.status_when(lambda s: s["elapsed_s"] >= before["elapsed_s"] + 10, "ten seconds of the run")
        cut = stack.status_when(lambda s: member(s, name) is None, "it is missed")
        assert [d["reason"] for d in cut["departures"] if d["name"] == name][-1:] == ["lease-expired"]
        stack.rounds_go_on(rounds=2)
    contributes_again(stack, name)
    assert inspect(worker)["RestartCount"] == 0, "it was another process that came back"


@contextlib.contextmanager
def held_back(stack: Stack, container: str) -> Iterator[None]:
    """Packets that leave the container are held for 50 ms by a program outside of the containers."""
    delays = stack.engine.delays
    if delays is None:
        pytest.skip("no program that delays packets is beside the project")
    program = subprocess.Popen(
        [sys.executable, str(delays), str(QUEUE), str(DELAY_MS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        assert program.stderr is not None
        if not program.stdout.readline().startswith("queue"):
            pytest.skip(f"this kernel hands no packets to programs: {program.stderr.read().strip()[-200:]}")
        rule = ("-s", address_of(container), "-j", "NFQUEUE", "--queue-num", str(QUEUE), "--queue-bypass")
        with packet_rules(rule):
            yield
    finally:
        program.kill()
        program.communicate()


def answered_in_ms(stack: Stack, container: str) -> int:
    """How long the server takes to answer there, with the way."""
    asked = stack.execute(container, "loscar", "doctor", "--server", "server:50051", "--json")
    [answer] = [f["text"] for f in json.loads(asked.stdout) if f["check"] == "server"]
    took = re.search(r"answered in (\d+) ms", answer)
    assert took is not None, answer
    return int(took[1])


def test_a_delay_below_tcp(stack: Stack) -> None:
    container = stack.container("worker-slow")
    name = name_of(container)
    everybody(stack)
    with held_back(stack, container):
        assert answered_in_ms(stack, container) >= DELAY_MS
        contributes_again(stack, name)


def test_two_networks_that_are_50_ms_apart(stack: Stack) -> None:
    """As between two hosts: a worker that shares no network with the others reaches the server over another one."""
    container, server = stack.container("worker-slow"), stack.container("server")
    name, far = name_of(container), new_name()
    everybody(stack)
    [near] = inspect(container)["NetworkSettings"]["Networks"]
    call("docker", "network", "create", far)
    try:
        call("docker", "network", "connect", "--alias", "server", far, server)
        call("docker", "network", "connect", far, container)
        call("docker", "network", "disconnect", near, container)
        with held_back(stack, container):
            contributes_again(stack, name)
            assert answered_in_ms(stack, container) >= DELAY_MS
            assert address_of(stack.container("worker")) != address_of(container)
    finally:
        call("docker", "network", "connect", near, container, check=False)
        for moved in (container, server):
            call("docker", "network", "disconnect", "--force", far, moved, check=False)
        call("docker", "network", "rm", far, check=False)
    contributes_again(stack, name)
    everybody(stack)


def test_a_killed_server_is_started_again_and_the_run_goes_on(stack: Stack) -> None:
    before = everybody(stack)
    server = stack.container("server")
    wait_until(lambda: "state-" in stack.execute(server, "ls", "/var/lib/loscar/checkpoints").stdout, "a checkpoint")
    restarts = inspect(server)["RestartCount"]
    kill_process(server)
    after = stack.status_when(lambda s: s["epoch"] > before["epoch"] and s["phase"] == "running", "a new epoch")
    assert inspect(server)["RestartCount"] > restarts
    assert after["run_id"] == before["run_id"]
    assert after["round"] >= before["round"], "the run was begun anew"
    everybody(stack)
    stack.rounds_go_on()
    assert "resuming run" in stack.logs(server)
    assert all(inspect(stack.container(service))["State"]["Running"] for service in SERVICES)


def test_a_server_that_is_restarted_or_replaced_keeps_its_run(stack: Stack) -> None:
    """By the engine, and by Compose as with a new image: in another container, perhaps at another address."""
    before = everybody(stack)
    first = stack.container("server")
    call("docker", "restart", "-t", "40", first)
    after = stack.status_when(lambda s: s["epoch"] > before["epoch"] and s["phase"] == "running", "a new epoch")
    assert after["round"] >= before["round"], "the run was begun anew"
    log = stack.logs(first)
    assert "pausing the run" in log
    assert "ending the run" not in log
    assert ", which is saved" in log
    everybody(stack)
    stack.compose("up", "-d", "--no-build", "--no-deps", "--force-recreate", "-t", "40", "server")
    assert stack.container("server") != first
    again = stack.status_when(lambda s: s["epoch"] > after["epoch"] and s["phase"] == "running", "another epoch")
    assert (again["run_id"], again["round"] >= after["round"]) == (before["run_id"], True)
    everybody(stack)
    stack.rounds_go_on()
    assert all(inspect(stack.container(service))["State"]["Running"] for service in SERVICES)


def test_a_running_server_gives_its_model(stack: Stack) -> None:
    """To whoever is on its network and has the token; here to a process in its own container, which needs no torch."""
    server, fetched = stack.container("server"), "/tmp/model.safetensors"
    done = stack.execute(server, "loscar", "fetch", "--out", fetched, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["phase"], told["round"] > 0) == ("running", True)
    sizes = "import sys; from safetensors.numpy import load_file; "
    sizes += "print(sum(values.nbytes for values in load_file(sys.argv[1]).values()))"
    done = stack.execute(server, "python3", "-c", sizes, fetched)
    assert int(done.stdout) == told["bytes"] > 0, done.stderr


def test_ending_the_run_leaves_the_model_in_the_volume(stack: Stack) -> None:
    """SIGINT ends the run in order: every container exits with 0, and none is started again."""
    stack.status_when(lambda s: s["round"] >= 40, "enough of training")
    server, workers = stack.container("server"), [stack.container(service) for service in SERVICES]
    names = [name_of(worker) for worker in workers]
    call("docker", "kill", "-s", "INT", server)
    assert [stack.ended(container) for container in (server, *workers)] == [0, 0, 0, 0]
    assert "stopped before the run's end" not in stack.logs(server)
    models = ", ".join(repr(f"/var/lib/loscar/models/{name}.safetensors") for name in names)
    check = f"import numpy as np; from safetensors.numpy import load_file; a, *others = map(load_file, ({models})); "
    check += "assert all(np.array_equal(a[k], b[k]) for b in others for k in a)"
    code = 'set -e; python3 -c "$1" >&2; loscar evaluate --task digits --json "$2"'
    done = stack.compose(
        "run", "--rm", "-T", "--no-deps", "--entrypoint", "sh", "worker",
        "-c", code, "sh", check, f"/var/lib/loscar/models/{names[0]}.safetensors",
    )  # fmt: skip
    assert json.loads(done.stdout)["accuracy"] >= 0.9
