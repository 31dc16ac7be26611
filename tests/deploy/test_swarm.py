"""The stack file for a swarm: read by Compose, running what compose.yaml runs, with nothing that a swarm ignores."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from loscar_deploy import options
from loscar_deploy.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent.parent
STACK = ROOT / "deploy" / "stack.yaml"
COMPOSE = ROOT / "deploy" / "compose.yaml"
DOCKER = ROOT / "deploy" / "docker"
# What `docker stack deploy` leaves out with a warning or refuses, and what it reads under another name.
IGNORED = {"build", "depends_on", "restart", "security_opt", "tmpfs", "cpus", "container_name", "links", "network_mode"}


def loaded(path: Path) -> dict[str, Any]:
    """A file with the defaults of its variables put in."""
    text = path.read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+(?::?-([^}]*))?\}", lambda match: match[1] or "", text))
    return found


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    return loaded(STACK)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return loaded(COMPOSE)


def variables(path: Path) -> dict[str, set[str]]:
    """The variables of a file and their defaults."""
    found: dict[str, set[str]] = {}
    for name, default in re.findall(r"\$\{(\w+)([^}]*)\}", path.read_text(encoding="utf-8")):
        found.setdefault(name, set()).add(default)
    return found


def test_compose_reads_it(stack: dict[str, Any]) -> None:
    """Compose checks a file of version 3 against the schema that `docker stack deploy` has."""
    if shutil.which("docker-compose"):
        command = ["docker-compose"]
    elif shutil.which("docker"):
        command = ["docker", "compose"]
        if subprocess.run([*command, "version"], capture_output=True, timeout=60, check=False).returncode:
            pytest.skip("no Compose on this machine")
    else:
        pytest.skip("no Compose on this machine")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LOSCAR_", "COMPOSE_"))}
    done = subprocess.run(
        [*command, "-f", str(STACK), "config"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)
    assert read["services"].keys() == stack["services"].keys()
    assert read["services"]["worker"]["deploy"]["replicas"] == 1


def test_it_runs_what_compose_runs(stack: dict[str, Any], compose: dict[str, Any]) -> None:
    assert stack["services"].keys() == compose["services"].keys()
    for name, service in stack["services"].items():
        other = compose["services"][name]
        assert service["command"] == other["command"]
        assert service["image"] == other["image"]
        for key in ("read_only", "cap_drop", "stop_grace_period", "networks"):
            assert service[key] == other[key]
        named = [volume for volume in service["volumes"] if isinstance(volume, str)]
        assert named == other["volumes"]
        assert [volume["target"] for volume in service["volumes"] if volume not in named] == other["tmpfs"]
        if name != "server":
            assert float(service["deploy"]["resources"]["limits"]["cpus"]) == float(other["cpus"])
        # The environment but for the token, which is a secret here.
        secured = {"LOSCAR_SECURITY", "LOSCAR_TOKEN"}
        assert {key: value for key, value in service["environment"].items() if key not in secured} == {
            key: value for key, value in other["environment"].items() if key not in secured
        }
    assert stack["volumes"].keys() == compose["volumes"].keys()
    shared = variables(STACK).keys() & variables(COMPOSE).keys()
    assert len(shared) > 10
    assert {name: variables(STACK)[name] for name in shared} == {name: variables(COMPOSE)[name] for name in shared}


def test_nothing_is_left_to_a_swarm_to_ignore(stack: dict[str, Any]) -> None:
    for name, service in stack["services"].items():
        assert not IGNORED & service.keys(), name
        policy = service["deploy"]["restart_policy"]
        assert policy["condition"] == "on-failure"
        assert int(policy["max_attempts"]) > 0
        assert service["healthcheck"] == {"disable": True}, "a swarm ends who is not healthy"
    assert stack["networks"]["run"] == {"driver": "overlay", "driver_opts": {"encrypted": ""}}


def test_names_of_workers_are_unique_and_stay(stack: dict[str, Any]) -> None:
    names = [service["hostname"] for name, service in stack["services"].items() if name != "server"]
    assert len(names) == len(set(names)) == 3
    assert all(name.endswith("-{{.Task.Slot}}") for name in names)


def test_the_token_is_a_secret_of_the_swarm(stack: dict[str, Any]) -> None:
    assert stack["secrets"] == {"token": {"external": True, "name": "loscar-token"}}
    for service in stack["services"].values():
        assert [secret["source"] for secret in service["secrets"]] == ["token"]
        assert service["secrets"][0]["mode"] == 0o400
        assert "--token-file /run/secrets/token" in service["environment"]["LOSCAR_SECURITY"]
    assert "LOSCAR_TOKEN" not in variables(STACK)


def test_command_lines_are_accepted(stack: dict[str, Any], tmp_path: Path) -> None:
    """As the images' entry point completes them."""
    shutil.copy(DOCKER / "entry.sh", tmp_path / "loscar-entry")
    (tmp_path / "loscar").write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n', encoding="utf-8")
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    for name, service in stack["services"].items():
        dockerfile = (DOCKER / f"{service['image'].removeprefix('loscar-')}.Dockerfile").read_text(encoding="utf-8")
        [entry] = re.findall(r"^ENTRYPOINT (\[.*\])$", dockerfile, re.MULTILINE)
        assert json.loads(entry) == ["loscar-entry"]
        done = subprocess.run(
            ["loscar-entry", *shlex.split(service["command"])],
            env={**service["environment"], "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        words = done.stdout.split("\0")[:-1]
        args = build_parser().parse_args(words)
        assert words[0] == name.partition("-")[0]
        assert args.token_file == Path("/run/secrets/token")
        if words[0] == "server":
            options.run_config(args)
            options.server_limits(args, None)
            assert (args.resume, args.pause_on) == (True, "term"), "or a server that is updated ends the run"
        else:
            assert args.server == "server:50051"
