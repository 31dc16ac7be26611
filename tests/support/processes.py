"""Real processes in tests: started, watched by condition, and gone when the test is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil

from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.transport import STATUS

DEADLINE_S = 45.0
"""How long anything may take; far more than it does, so that a loaded machine does not fail a test."""


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until the condition gives something true, which is returned."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.02)


def descendants(pid: int) -> list[psutil.Process]:
    """A process's children, theirs, and so on; kept as objects, so that a pid that is used again is not mistaken."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Process:
    """One started process with its output in files."""

    def __init__(self, arguments: Sequence[str], log: Path, cwd: Path | None, environment: dict[str, str]) -> None:
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        self.arguments = list(arguments)
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.popen = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """The exit code; the test fails when there is none in time."""
        try:
            return self.popen.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {deadline_s:g} s: {self.arguments[1:]}\n{self.out}\n{self.err}"
            ) from None

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def says(self, text: str, deadline_s: float = DEADLINE_S) -> None:
        """Wait until the text is in its output."""

        def found() -> bool:
            if text in self.out or text in self.err:
                return True
            assert self.popen.poll() is None, f"ended without saying {text!r}:\n{self.out}\n{self.err}"
            return False

        wait_until(found, f"{text!r} from {self.arguments[1:]}; it said\n{self.out}\n{self.err}", deadline_s)


class Server(Process):
    """A `loscar server`; `address` once it listens."""

    address = ""

    def wait_listening(self) -> None:
        def line() -> dict[str, Any] | None:
            assert self.popen.poll() is None, f"the server ended:\n{self.err}"
            return json.loads(self.out) if self.out.endswith("\n") else None

        told: dict[str, Any] = wait_until(line, "the server listens")
        self.address = told["listening"]
        self.run_id = told["run_id"]


P = TypeVar("P", bound=Process)


class Processes:
    """Starts processes, each with log files of its own under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Process] = []
        folder.mkdir(parents=True, exist_ok=True)

    def python(self, *arguments: str, cwd: Path | None = None, **environment: str) -> Process:
        return self._start(Process, [sys.executable, *arguments], cwd, environment)

    def loscar(self, *arguments: str, cwd: Path | None = None, **environment: str) -> Process:
        """`loscar ARGUMENTS`."""
        return self._start(Process, [sys.executable, "-m", "loscar_deploy", *arguments], cwd, environment)

    def server(
        self,
        *flags: str,
        listen: str = "127.0.0.1:0",
        wait: bool = True,
        program: Sequence[str] = ("-m", "loscar_deploy"),
    ) -> Server:
        """A `loscar server` on a free port; `program` is what runs the command line."""
        arguments = ["server", "--listen", listen, "--json", *flags]
        server = self._start(Server, [sys.executable, *program, *arguments], None, {})
        if wait:
            server.wait_listening()
        return server

    def _start(self, kind: type[P], arguments: Sequence[str], cwd: Path | None, environment: dict[str, str]) -> P:
        own = {k: v for k, v in os.environ.items() if k not in ("LOSCAR_TOKEN", "LOSCAR_DATA_DIR")}
        own.update(PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1", **environment)
        process = kind(arguments, self._folder / f"{len(self._started)}", cwd, own)
        self._started.append(process)
        return process

    def kill_all(self) -> None:
        """Every process that was started here, and what they have started."""
        everything = []
        for process in self._started:
            everything += descendants(process.pid)
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()
        for child in everything:
            if alive(child):
                child.kill()


def status_of(address: str) -> pb.StatusReply:
    """What `loscar status` asks for, over a blocking channel."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(STATUS, pb.StatusRequest.SerializeToString, pb.StatusReply.FromString)
        reply: pb.StatusReply = call(pb.StatusRequest(), timeout=DEADLINE_S)
        return reply
