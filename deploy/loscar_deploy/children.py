"""Child processes that cannot outlive their parent, nor be left behind by it.

Each child gets a session of its own (so that Ctrl+C reaches only the parent, which then ends the run in order) and
a pipe as standard input that the parent never writes to: when the parent is gone, however it went, the pipe closes
and the child ends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from loscar_deploy.logs import VARIABLE

TERMINATE_S = 10.0


@dataclass
class Child:
    """One process and where its messages go."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    @property
    def returncode(self) -> int | None:
        return self.process.returncode

    def last_words(self) -> str:
        """The last line that the child said about an error, or its last line."""
        with contextlib.suppress(OSError):
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            said = [line for line in lines if line.startswith("loscar: ")]
            if said or lines:
                return (said or lines)[-1].removeprefix("loscar: ")
        return "it said nothing"


class Children:
    """All children of one run."""

    def __init__(self) -> None:
        self.all: list[Child] = []

    async def start(
        self,
        name: str,
        arguments: list[str],
        log: Path,
        *,
        read_stdout: bool = False,
        module: str = "loscar_deploy",
    ) -> Child:
        """Start `python -m module ARGUMENTS`, by default `loscar`.

        Standard error (and output, unless it is read) goes to the log.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
        environment[VARIABLE] = "text"  # their last words become a part of what this command says
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                *arguments,
                "--exit-with-parent",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE if read_stdout else file,
                stderr=file,
                start_new_session=True,
                env=environment,
            )
        child = Child(name, process, log)
        self.all.append(child)
        return child

    async def stop_all(self) -> None:
        """Terminate whoever is left; kill who does not go. No process is left behind."""
        left = [c for c in self.all if c.returncode is None]
        for child in left:
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
        if not left:
            return
        waits = {asyncio.create_task(c.process.wait()) for c in left}
        _, pending = await asyncio.wait(waits, timeout=TERMINATE_S)
        if pending:
            self.kill_all()
            await asyncio.wait(pending)

    def kill_all(self) -> None:
        """End every child at once."""
        for child in self.all:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()


def exit_with_parent() -> None:
    """In a child: end when standard input closes, politely at first."""

    def watch() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        # A second signal forces whoever is still busy draining.
        threading.Event().wait(TERMINATE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
