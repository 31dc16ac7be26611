"""A container engine, the project's images on it, and the names of what these tests put there."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
COMMAND_S = 240.0
DEADLINE_S = 300.0
"""Far longer than anything takes, so that a busy machine fails no test."""
BUILD_S = 900.0
PROJECTS = "loscartest"
"""How the names of all containers, networks and volumes of these tests begin; the process that made them follows."""
OWNER = f'{{{{index .Spec.Labels "{PROJECTS}"}}}}'
"""A label on the node of a swarm that these tests have made: what `new_name` gave."""
HOMES = ("/var/run/docker.pid", "dockerd"), ("/var/run/docker/containerd/containerd.pid", "containerd")
"""Where processes of an engine write their numbers, and what they are called."""
NOT_OURS = (
    "no space left on device",
    "no such host",
    "Temporary failure in name resolution",
    "Name or service not known",
    "Network is unreachable",
    "Connection refused",
    "Connection timed out",
    "Read timed out",
    "TLS handshake timeout",
    "i/o timeout",
    "pull access denied",
    "manifest unknown",
    "No such image",
)
"""In the output of a build that fails because of the machine, or of what it can reach."""

T = TypeVar("T")


class NoEngine(Exception):
    """There is no container engine that can be used; the text says what is missing."""


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
        if os.geteuid() != 0:
            raise NoEngine("these tests kill containers' processes and drop packets: they need root")
        scripts = Path(os.environ[SCRIPTS]).resolve() if os.environ.get(SCRIPTS) else None
        compose = cls._ready()
        if compose is None:
            if scripts is None or not (scripts / "start-engine.sh").is_file():
                raise NoEngine(f"no container engine with Compose answers, and {SCRIPTS} names no folder to start one")
            forget_ended()
            try:
                started = call(str(scripts / "start-engine.sh"), limit_s=BUILD_S, check=False)
            except subprocess.TimeoutExpired:
                raise NoEngine(f"start-engine.sh was not done within {BUILD_S:g} s") from None
            if started.returncode != 0:
                said = (started.stdout + started.stderr).strip().splitlines() or ["it said nothing"]
                raise NoEngine(f"start-engine.sh ended with {started.returncode}: {said[-1]}")
            compose = cls._ready()
        if compose is None:
            raise NoEngine("the engine was started, but it does not answer")
        delays = None if scripts is None else scripts / "nfq_delay.py"
        return cls(compose, os.environ.get(BASE) or None, delays if delays is not None and delays.is_file() else None)

    @staticmethod
    def _ready() -> tuple[str, ...] | None:
        try:
            if shutil.which("docker") is None or call("docker", "info", check=False).returncode != 0:
                return None
        except subprocess.TimeoutExpired:
            raise NoEngine(f"there is an engine, but it does not answer within {COMMAND_S:g} s") from None
        if call("docker", "compose", "version", check=False).returncode == 0:
            return ("docker", "compose")
        return ("docker-compose",) if shutil.which("docker-compose") else None

    def build(self) -> None:
        """Both images, with packages from where this machine's pip takes them.

        Raises:
            NoEngine: they cannot be built here, or the engine cannot run them.
            AssertionError: they cannot be built anywhere.
        """
        with package_sources() as sources:
            arguments = [] if self.base is None else [f"BASE_IMAGE={self.base}"]
            arguments += [f"{name}={value}" for name, value in sources.items()]
            for file, tag in (("server", SERVER_IMAGE), ("worker", WORKER_IMAGE)):
                options = [word for argument in arguments for word in ("--build-arg", argument)]
                if file == "worker" and sources:
                    options += ["--build-arg", "TORCH_INDEX_URL="]
                dockerfile = f"deploy/docker/{file}.Dockerfile"
                words = ("docker", "build", "--network", "host", *options, "-f", dockerfile, "-t", tag, ".")
                try:
                    call(*words, limit_s=BUILD_S)
                except subprocess.TimeoutExpired:
                    raise NoEngine(f"{dockerfile} was not built within {BUILD_S:g} s") from None
                except AssertionError as error:
                    reasons = [line for line in str(error).splitlines() if any(text in line for text in NOT_OURS)]
                    if reasons:
                        raise NoEngine(f"{dockerfile} cannot be built here: {reasons[-1].strip()}") from None
                    raise
        tried = call("docker", "run", "--rm", "--entrypoint", "true", SERVER_IMAGE, check=False)
        if tried.returncode != 0:
            raise NoEngine(f"the engine runs no containers: {tried.stderr.strip()[-300:]}")


def forget_ended() -> None:
    """Files in which engines that have ended wrote their process's number: it may be another process's by now, and the
    next engine would take that for the one before."""
    for path, name in HOMES:
        with contextlib.suppress(OSError, ValueError):
            number = int(Path(path).read_text(encoding="ascii"))
            if name_of_process(number) != name:
                Path(path).unlink()


def name_of_process(number: int) -> str | None:
    """What a process is called, or None when there is none."""
    try:
        return Path(f"/proc/{number}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def sweep() -> None:
    """Take away what earlier processes of these tests could not, because they were killed."""
    if is_forsaken(call("docker", "node", "inspect", "self", "--format", OWNER, check=False).stdout):
        call("docker", "swarm", "leave", "--force", check=False)
    for kind, name, remove in (
        ("container", "{{.Names}}", ("rm", "-f", "-v")),
        ("network", "{{.Name}}", ("rm",)),
        ("volume", "{{.Name}}", ("rm", "-f")),
    ):
        options = ("-a",) if kind == "container" else ()
        for found in call("docker", kind, "ls", *options, "--format", name, check=False).stdout.split():
            if is_forsaken(found):
                call("docker", kind, *remove, found, check=False)
    remove_forsaken_rules()
    for space in namespaces():
        if is_forsaken(space):
            remove_namespace(space)


def remove_forsaken_rules() -> None:
    """Rules for packets that name such a process: they would meet other containers with the same addresses."""
    if shutil.which("iptables") is None:
        return
    for line in call("iptables", "-w", "-S", "DOCKER-USER", check=False).stdout.splitlines():
        words = shlex.split(line)
        if "--comment" in words and is_forsaken(words[words.index("--comment") + 1]):
            call("iptables", "-w", "-D", *words[1:], check=False)


def namespaces() -> list[str]:
    """The network namespaces of this computer that have a name."""
    if shutil.which("ip") is None:
        return []
    return [line.split()[0] for line in call("ip", "netns", "list", check=False).stdout.splitlines() if line.strip()]


def remove_namespace(space: str) -> None:
    """With what still runs in it, which would keep it."""
    for number in call("ip", "netns", "pids", space, check=False).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)
    call("ip", "netns", "delete", space, check=False)


def is_forsaken(name: str) -> bool:
    """Whether a container or project is of these tests, and its process has ended."""
    found = re.match(rf"{PROJECTS}(\d+)x", name)
    if found is None or name.startswith(f"{PROJECTS}{os.getpid()}x{_SESSION}"):
        return False
    if int(found[1]) == os.getpid():
        return True  # of another process that had this one's number
    return not (name_of_process(int(found[1])) or "").startswith(("python", "pytest"))


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


_numbers = itertools.count(1)
_SESSION = secrets.token_hex(3)  # the same process number may have made others before the machine was started again


def new_name() -> str:
    """For a container or a project; `sweep` knows by it whose it is."""
    return f"{PROJECTS}{os.getpid()}x{_SESSION}n{next(_numbers)}"
