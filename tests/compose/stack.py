"""Containers, and stacks of them, that no test can leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine import COMMAND_S, DEADLINE_S, ROOT, SERVER_IMAGE, WORKER_IMAGE, Engine, call, new_name, wait_until

LOOK_S = 5.0


def run(image: str, *command: str, options: Sequence[str] = (), limit_s: float = COMMAND_S) -> tuple[int, str]:
    """A container that ends by itself: its exit status, and what it wrote."""
    name = new_name()
    secured = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--name", name)
    try:
        done = call("docker", "run", "--rm", *secured, *options, image, *command, limit_s=limit_s, check=False)
    finally:
        call("docker", "rm", "-f", "-v", name, check=False)
    return done.returncode, done.stdout + done.stderr


def inspect(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call("docker", "inspect", container).stdout)[0]
    return found


def kill_process(container: str) -> None:
    """SIGKILL to a container's first process: unlike `docker kill`, a death after which the restart policy acts."""
    os.kill(int(inspect(container)["State"]["Pid"]), signal.SIGKILL)


def name_of(container: str) -> str:
    """What a worker in this container is called in the run."""
    return str(inspect(container)["Config"]["Hostname"])


def address_of(container: str) -> str:
    [network] = inspect(container)["NetworkSettings"]["Networks"].values()
    return str(network["IPAddress"])


class Watch:
    """`loscar status --watch` in a server's container, which costs a process once and not for every look."""

    def __init__(self, container: str, options: str = "") -> None:
        line = f"exec loscar status --watch --json ${{LOSCAR_PROBE:-}} {options}"
        self._process = subprocess.Popen(
            ("docker", "exec", container, "sh", "-c", line),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    @property
    def over(self) -> bool:
        return not self._reader.is_alive()

    def next(self) -> dict[str, Any] | None:
        """The next status that comes, within a bounded time; None when there is none."""
        while not self._lines.empty():
            self._lines.get()
        try:
            found: dict[str, Any] = json.loads(self._lines.get(timeout=LOOK_S))
        except queue.Empty:
            return None
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Watched:
    """Something with a server's container in it, whose status can be waited for."""

    probe = ""
    """Options of a client of the server."""

    def __init__(self) -> None:
        self._watches: dict[str, Watch] = {}

    def running(self, service: str) -> str | None:
        """The container of a service, or None while there is none."""
        raise NotImplementedError

    def logs(self) -> str:
        """The end of what all containers have said."""
        raise NotImplementedError

    def stop_watching(self) -> None:
        for watch in self._watches.values():
            watch.close()

    def status(self, service: str = "server") -> dict[str, Any] | None:
        """What `loscar status` says in a server's container from now on, or None while it does not answer."""
        container = self.running(service)
        if container is None:
            return None
        watch = self._watches.get(container)
        if watch is None or watch.over:
            if watch is not None:
                watch.close()
            watch = self._watches[container] = Watch(container, self.probe)
        return watch.next()

    def status_when(
        self,
        condition: Callable[[dict[str, Any]], object],
        what: str,
        service: str = "server",
        deadline_s: float = DEADLINE_S,
    ) -> dict[str, Any]:
        """Wait for a status that fulfils the condition; the logs are in the error when there is none."""

        def found() -> dict[str, Any] | None:
            status = self.status(service)
            return status if status is not None and condition(status) else None

        try:
            return wait_until(found, what, deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.status(service)}\n{self.logs()}") from None

    def rounds_go_on(self, service: str = "server", rounds: int = 5) -> dict[str, Any]:
        goal = self.status_when(lambda s: True, "the server answers", service)["round"] + rounds
        return self.status_when(lambda s: s["round"] >= goal, f"round {goal}", service)


@dataclass
class Stack(Watched):
    """The containers of one Compose project.

    Args:
        engine: what runs them.
        overlays: names of the files over compose.yaml, such as "tls".
        settings: what the files read from the environment.
    """

    engine: Engine
    overlays: Sequence[str] = ()
    settings: dict[str, str] = field(default_factory=dict)
    project: str = field(default_factory=lambda: new_name())

    def __post_init__(self) -> None:
        super().__init__()

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        files = ["compose.yaml", *(f"compose.{name}.yaml" for name in self.overlays)]
        words = [word for name in files for word in ("-f", str(ROOT / "deploy" / name))]
        # No settings of whoever runs the tests.
        own = {key: "" for key in os.environ if key.startswith(("LOSCAR_", "COMPOSE_"))}
        images = {"LOSCAR_SERVER_IMAGE": SERVER_IMAGE, "LOSCAR_WORKER_IMAGE": WORKER_IMAGE}
        environment = {**own, **images, **self.settings}
        command = (*self.engine.compose, "-p", self.project, *words, *arguments)
        return call(*command, limit_s=2 * COMMAND_S, environment=environment, check=check)

    def up(self, *arguments: str) -> None:
        self.compose("up", "-d", "--no-build", *arguments)

    def close(self) -> None:
        """Take everything away: containers, networks, volumes."""
        self.stop_watching()
        for kind, remove in (("container", ("rm", "-f", "-v")), ("network", ("rm",)), ("volume", ("rm", "-f"))):
            for found in self._listed(kind):
                call("docker", kind, *remove, found, check=False)
        for kind in ("container", "network", "volume"):
            assert not self._listed(kind), f"a {kind} of {self.project} is left"

    def _listed(self, kind: str) -> list[str]:
        options = ("-a",) if kind == "container" else ()
        label = f"label=com.docker.compose.project={self.project}"
        return call("docker", kind, "ls", "-q", *options, "--filter", label).stdout.split()

    def containers(self, service: str | None = None) -> list[str]:
        """Ids, of stopped ones too, the oldest first."""
        labels = [f"label=com.docker.compose.project={self.project}"]
        if service is not None:
            labels.append(f"label=com.docker.compose.service={service}")
        filters = [word for label in labels for word in ("--filter", label)]
        return call("docker", "ps", "-aq", "--no-trunc", *filters).stdout.split()[::-1]

    def container(self, service: str) -> str:
        [found] = self.containers(service)
        return found

    def running(self, service: str) -> str | None:
        return self.container(service)

    def execute(self, container: str, *command: str) -> subprocess.CompletedProcess[str]:
        return call("docker", "exec", container, *command, check=False)

    def logs(self, container: str | None = None) -> str:
        if container is None:
            return self.compose("logs", "--no-color", "--tail", "40", check=False).stdout
        done = call("docker", "logs", container)
        return done.stdout + done.stderr

    def ended(self, container: str, deadline_s: float = DEADLINE_S) -> int:
        """Wait until a container has ended for good; its exit status."""

        def over() -> dict[str, Any] | None:
            state: dict[str, Any] = inspect(container)["State"]
            return state if state["Status"] == "exited" else None

        state = wait_until(over, f"{container[:12]} ends", deadline_s)
        return int(state["ExitCode"])


def member(status: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return next((m for m in status["members"] if m["name"] == name), None)


@contextlib.contextmanager
def packet_rules(*rules: Sequence[str]) -> Iterator[None]:
    """Rules at the head of the engine's chain for what containers send each other, while this is open.

    Each carries a name as a comment, by which `sweep` finds those that a killed process has left.
    """
    added = []
    owner = ("-m", "comment", "--comment", new_name())
    try:
        for rule in rules:
            call("iptables", "-w", "-I", "DOCKER-USER", *owner, *rule)
            added.append((*owner, *rule))
        yield
    finally:
        for rule in added:
            call("iptables", "-w", "-D", "DOCKER-USER", *rule, check=False)
