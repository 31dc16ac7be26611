"""A container engine, the project's images, and stacks of containers that no test can leave behind."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent.parent
SERVER_IMAGE = "loscar-server:test"
WORKER_IMAGE = "loscar-worker:test"
SCRIPTS = "LOSCAR_ENGINE_SCRIPTS"
"""A folder with start-engine.sh, which starts an engine, and nfq_delay.py, which delays packets."""
BASE = "LOSCAR_BASE_IMAGE"
"""Builds the images on this one instead of on the Dockerfiles' default."""
COMMAND_S = 120.0
DEADLINE_S = 120.0
BUILD_S = 900.0
LOOK_S = 5.0

T = TypeVar("T")


class NoEngine(Exception):
    """There is no container engine; the text says what is missing."""


def call(
    *command: str, limit_s: float = COMMAND_S, environment: Mapping[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. Raises AssertionError with its output when it fails and `check` is set."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def wait_until(condition: Callable[[], T | None], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Poll until the condition gives something true, which is returned."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.2)


# --- the engine and the images ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Engine:
    """A container engine that answers.

    Attributes:
        compose: the command of Compose, v2 or 1.29.
        base: the image to build on, or None for the Dockerfiles' default.
        delays: the program that delays packets, or None.
    """

    compose: tuple[str, ...]
    base: str | None
    delays: Path | None

    @classmethod
    def find(cls) -> Engine:
        """The engine that is there, or the one that the scripts start. Raises NoEngine."""
        scripts = Path(os.environ[SCRIPTS]).resolve() if os.environ.get(SCRIPTS) else None
        compose = cls._ready()
        if compose is None:
            if scripts is None or not (scripts / "start-engine.sh").is_file():
                raise NoEngine(f"no container engine with Compose answers, and {SCRIPTS} names no folder to start one")
            started = call(str(scripts / "start-engine.sh"), limit_s=BUILD_S, check=False)
            if started.returncode != 0:
                said = (started.stdout + started.stderr).strip().splitlines() or ["it said nothing"]
                raise NoEngine(f"start-engine.sh ended with {started.returncode}: {said[-1]}")
            compose = cls._ready()
        if compose is None:
            raise NoEngine("the engine was started, but it does not answer")
        if os.geteuid() != 0:
            raise NoEngine("these tests kill containers' processes and drop packets: they need root")
        delays = None if scripts is None else scripts / "nfq_delay.py"
        return cls(compose, os.environ.get(BASE) or None, delays if delays is not None and delays.is_file() else None)

    @staticmethod
    def _ready() -> tuple[str, ...] | None:
        if shutil.which("docker") is None or call("docker", "info", check=False).returncode != 0:
            return None
        if call("docker", "compose", "version", check=False).returncode == 0:
            return ("docker", "compose")
        return ("docker-compose",) if shutil.which("docker-compose") else None

    def build(self) -> None:
        """Both images, with packages from where this machine's pip takes them."""
        with package_sources() as sources:
            arguments = [] if self.base is None else [f"BASE_IMAGE={self.base}"]
            arguments += [f"{name}={value}" for name, value in sources.items()]
            for file, tag in (("server", SERVER_IMAGE), ("worker", WORKER_IMAGE)):
                options = [word for argument in arguments for word in ("--build-arg", argument)]
                if file == "worker" and sources:
                    options += ["--build-arg", "TORCH_INDEX_URL="]
                dockerfile = f"deploy/docker/{file}.Dockerfile"
                call(
                    "docker", "build", "--network", "host", *options, "-f", dockerfile, "-t", tag, ".", limit_s=BUILD_S
                )


@contextlib.contextmanager
def package_sources() -> Iterator[dict[str, str]]:
    """This machine's settings of pip as build arguments; folders are served on the loopback while this is open."""
    listed = call(sys.executable, "-m", "pip", "config", "list").stdout
    settings = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = value.strip("'\"")
    with contextlib.ExitStack() as stack:

        def reachable(location: str) -> str:
            path = Path(location.removeprefix("file://"))
            if not path.is_absolute():
                return location
            return f"{stack.enter_context(served(path.parent))}/{path.name}/"

        found = {}
        for key in ("index-url", "extra-index-url", "find-links"):
            if settings.get(key):
                found[f"PIP_{key.upper().replace('-', '_')}"] = " ".join(map(reachable, settings[key].split()))
        yield found


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder's files over HTTP on the loopback; gives the address.

    The port follows from the folder, since another one would be another build to the engine.
    """
    handler = functools.partial(_Quiet, directory=str(folder))
    try:
        listening = ThreadingHTTPServer(("127.0.0.1", 20_000 + zlib.crc32(bytes(folder)) % 10_000), handler)
    except OSError:
        listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with listening as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


# --- containers ---------------------------------------------------------------------------------------------


def run(image: str, *command: str, options: Sequence[str] = (), limit_s: float = COMMAND_S) -> tuple[int, str]:
    """A container that ends by itself: its exit status, and what it wrote."""
    name = f"loscartest-{os.getpid()}-{next(_numbers)}"
    secured = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--name", name)
    try:
        done = call("docker", "run", "--rm", *secured, *options, image, *command, limit_s=limit_s, check=False)
    finally:
        call("docker", "rm", "-f", "-v", name, check=False)
    return done.returncode, done.stdout + done.stderr


def _count() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number


_numbers = _count()


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

    def __init__(self, container: str) -> None:
        line = "exec loscar status --watch --json ${LOSCAR_PROBE:-}"
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


@dataclass(slots=True)
class Stack:
    """The containers of one Compose project.

    Args:
        engine: what runs them.
        overlays: names of the files over compose.yaml, such as "tls".
        settings: what the files read from the environment.
    """

    engine: Engine
    overlays: Sequence[str] = ()
    settings: dict[str, str] = field(default_factory=dict)
    project: str = field(default_factory=lambda: f"loscartest{os.getpid()}x{next(_numbers)}")
    _watches: dict[str, Watch] = field(default_factory=dict)

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
        for watch in self._watches.values():
            watch.close()
        for container in self.containers():
            call("docker", "rm", "-f", "-v", container, check=False)
        self.compose("down", "-v", "--remove-orphans", "-t", "1", check=False)
        for kind in ("container", "network", "volume"):
            listed = call("docker", kind, "ls", "-q", "--filter", f"label=com.docker.compose.project={self.project}")
            assert not listed.stdout.split(), f"a {kind} of {self.project} is left"

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

    def execute(self, container: str, *command: str) -> subprocess.CompletedProcess[str]:
        return call("docker", "exec", container, *command, check=False)

    def status(self, service: str = "server") -> dict[str, Any] | None:
        """What `loscar status` says in a server's container from now on, or None while it does not answer."""
        container = self.container(service)
        watch = self._watches.get(container)
        if watch is None or watch.over:
            if watch is not None:
                watch.close()
            watch = self._watches[container] = Watch(container)
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
    """Rules at the head of the engine's chain for what containers send each other, while this is open."""
    added = []
    try:
        for rule in rules:
            call("iptables", "-w", "-I", "DOCKER-USER", *rule)
            added.append(rule)
        yield
    finally:
        for rule in added:
            call("iptables", "-w", "-D", "DOCKER-USER", *rule, check=False)
