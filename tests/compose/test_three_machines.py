"""The walk through three unlike machines in docs/deploy.md: its commands as they stand there, on network namespaces."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import ROOT, WORKER_IMAGE, Engine, call, new_name, wait_until
from machines import BEHIND, OPEN, Machines
from safetensors.numpy import load_file

pytestmark = pytest.mark.timeout(1500, method="signal")

HOST = f"{OPEN}.1"
SECTION = "## Three unlike machines, step by step"
NAMES = {"old", "home", "box"}
OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
"""No vector instructions beyond SSE for PyTorch and what it computes with."""
PATIENCE_S = 300.0


def blocks() -> list[tuple[str, list[str]]]:
    """(machine, commands in one line each) of the section's console blocks."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    section = page[page.index(f"{SECTION}\n") :].split("\n## ", 1)[0]
    found = []
    for body in re.findall(r"^```console\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        head, *lines = re.sub(r" *\\\n *", " ", body).splitlines()
        assert head.startswith("# on "), head
        assert all(line.startswith("$ ") for line in lines)
        found.append((head.removeprefix("# on "), [line[2:] for line in lines]))
    return found


class Walk:
    """Goes through the blocks; what stays in the background is kept by the name of its machine."""

    def __init__(self, machines: Machines, container: str) -> None:
        self._machines, self._container = machines, container
        self._programs = machines.folder / "bin"
        self._programs.mkdir()
        # Files go from one machine's folder to another's; nobody needs sudo who is root already.
        self._stand_in("scp", f'for last; do :; done\nexec cp "${{@:1:$#-1}}" "{machines.folder}/${{last%:}}/"')
        self._stand_in("sudo", 'exec "$@"')
        self.background: dict[str, subprocess.Popen[str]] = {}

    def _stand_in(self, name: str, text: str) -> None:
        program = self._programs / name
        program.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        program.chmod(0o755)

    def environment(self, name: str) -> dict[str, str]:
        path = [str(self._programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        own = {key: "" for key in os.environ if key.startswith("LOSCAR_")}
        return {**own, "PATH": ":".join(path), "OMP_NUM_THREADS": "1", **(OLD if name == "old" else {})}

    def log(self, name: str) -> str:
        return (self._machines.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def do(self, name: str, line: str) -> str:
        """One command; what it said, unless it stays in the background."""
        line = line.replace("HOST", HOST).replace("loscar-box", self._container)
        line = line.replace(" loscar-worker ", f" {WORKER_IMAGE} ")
        if line.endswith(" &"):
            log = self._machines.folder / f"{name}.log"
            self.background[name] = self._machines.start(name, line[:-2], self.environment(name), log)
            return ""
        done = self._machines.run(name, line, self.environment(name))
        assert done.returncode == 0, f"{name}: {line}\n{done.stdout}\n{done.stderr}\n{self._logs()}"
        return done.stdout

    def healthy(self) -> bool:
        """Whether the container finds itself in the run, as the engine asks it."""
        return call("docker", "exec", self._container, "loscar-health", "worker", check=False).returncode == 0

    def _logs(self) -> str:
        return "\n".join(f"--- {name}\n{self.log(name)}" for name in self.background)

    def status(self) -> dict[str, Any] | None:
        """What a worker's machine is told about the run."""
        keys = "--token-file token --tls-ca ca.pem --tls-cert old.pem --tls-key old-key.pem"
        line = f"loscar status --json --server {HOST}:50051 {keys}"
        done = self._machines.run("old", line, self.environment("old"))
        for name, process in self.background.items():
            assert process.poll() is None, f"{name} has ended:\n{self.log(name)}"
        found: dict[str, Any] | None = json.loads(done.stdout) if done.returncode == 0 else None
        return found


@pytest.fixture
def walk(engine: Engine, tmp_path: Path) -> Iterator[tuple[Walk, Machines]]:
    container = new_name()
    tmp_path.chmod(0o755)
    with Machines(tmp_path, ("hub", "old"), "home", ("box",)) as machines:
        try:
            yield Walk(machines, container), machines
        finally:
            call("docker", "rm", "-f", "-v", container, check=False)


def test_the_commands_of_the_page(walk: tuple[Walk, Machines]) -> None:
    steps, machines = walk
    to_do = blocks()
    assert [name for name, _ in to_do] == ["hub", "old", "home", "box", "home", "box"]
    said: dict[str, list[str]] = {}

    def block() -> None:
        name, lines = to_do.pop(0)
        said.setdefault(name, []).extend(steps.do(name, line) for line in lines)

    block()  # hub
    server = steps.background["hub"]
    wait_until(
        lambda: "listening on" in steps.log("hub") or server.poll() is not None, "the server listens", PATIENCE_S
    )
    assert server.poll() is None, steps.log("hub")
    for _ in range(3):  # old, home and box
        block()
    key = machines.folder / "hub" / "pki" / "ca-key.pem"
    assert key.stat().st_mode & 0o077 == 0
    assert not list(machines.folder.glob("[!h]*/ca-key.pem"))

    def everybody() -> dict[str, Any] | None:
        status = steps.status()
        active = {m["name"] for m in status["members"] if m["contributed"] > 2} if status is not None else set()
        return status if active == NAMES else None

    wait_until(everybody, "three machines take part", PATIENCE_S)
    assert machines.translated() > 0, "home's connection did not go through the router"
    reach = f"import socket; socket.create_connection(('{BEHIND}.2', 22), 5)"
    asked = machines.run("hub", f'{sys.executable} -c "{reach}"', {})
    assert "unreachable" in asked.stderr, "the server could have connected to home"

    def trained() -> bool:
        status = steps.status()
        return (
            status is not None and status["round"] >= 40 and sum(m["report"]["steps"] for m in status["members"]) > 9000
        )

    wait_until(trained, "some rounds of some steps", PATIENCE_S)
    assert steps.healthy()
    block()  # look, fetch and evaluate at home
    status_text, _, evaluated = said["home"][-3:]
    assert all(name in status_text for name in NAMES)
    assert (machines.folder / "home" / "model.safetensors").is_file()
    accuracy = re.search(r"accuracy (0\.\d+|1\.0+)", evaluated)
    assert accuracy is not None, evaluated
    assert float(accuracy[1]) > 0.8

    server.send_signal(signal.SIGINT)
    block()  # the container has ended
    assert said["box"][-2].strip() == "0"
    for name in ("hub", "old", "home"):
        process = steps.background[name]
        wait_until(lambda process=process: process.poll() is not None, f"{name} ends", PATIENCE_S)
        assert process.returncode == 0, steps.log(name)
    old, home = (load_file(machines.folder / name / f"{name}.safetensors") for name in ("old", "home"))
    assert old.keys() == home.keys()
    assert all(np.array_equal(old[key], home[key]) for key in old), "they ended with different models"
