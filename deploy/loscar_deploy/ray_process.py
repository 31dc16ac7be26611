"""The side of a run on Ray that is with the driver: a process on some node, as if it were a child of this one.

Each has an actor that owns it. Ray places the actor, and starts it again elsewhere when it is lost; what is seen here
is a new incarnation of it, which is then told to start the process again. How often is Ray's to count.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loscar_core.errors import PortInUseError
from loscar_deploy.children import Child, Children
from loscar_deploy.ray_actors import LOG, Order, Place, ProcessActor, Report
from loscar_deploy.ray_options import Resources

POLL_S = 0.25
CALL_S = 10.0
STOP_S = 20.0
FORCE_S = 3.0
START_S = 90.0
FINAL = frozenset({0, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17})
"""Exit codes that another attempt does not change, as for a service."""


class ActorGoneError(Exception):
    """Ray does not start the actor again, or could not start it at all."""


class ActorAwayError(Exception):
    """The actor does not answer: it is being started again, waits for a node, or is cut off."""


class RemoteProcess(Child):
    """One process of the run.

    Args:
        name: in the run.
        resources: what its actor takes.
        restarts: how many times Ray starts it again.
        log: where its log is gathered.
        say: tells the user.

    Attributes:
        order: what is started, once set.
        appended: where to gather files of the process as they grow, by their names there.
        fetched: where to put files of the process when it has ended.
        on_start: called with what it said once it had been started; the first time too.
    """

    process: Any  # itself: waited for in the same way

    def __init__(self, name: str, resources: Resources, restarts: int, log: Path, say: Callable[[str], None]) -> None:
        import ray

        super().__init__(name, self, log)  # type: ignore[arg-type]
        self.resources = resources
        self.order: Order | None = None
        self.appended: dict[str, Path] = {LOG: log}
        self.fetched: dict[str, Path] = {}
        self.on_start: Callable[[dict[str, str]], None] = lambda told: None
        self._restarts = restarts
        self._say = say
        self._ended = asyncio.Event()
        self._code: int | None = None
        self._words: str | None = None
        self._last: int | None = None
        self._place: Place | None = None
        self._running = False
        self._outdated = False
        self._taken: dict[str, int] = {}
        self._away = False
        self._lives = 1
        actor: Any = ray.remote(ProcessActor)
        self._actor = actor.options(
            max_restarts=restarts, max_task_retries=0, scheduling_strategy="SPREAD", **resources.for_ray()
        ).remote(name)

    # --- as a child -----------------------------------------------------------------------------------------

    @property
    def returncode(self) -> int | None:
        """Of the process that is not started again; None before."""
        return self._code

    async def wait(self) -> int:
        await self._ended.wait()
        assert self._code is not None
        return self._code

    def last_words(self) -> str:
        """Why it ended, or the last error in its log, or its last line."""
        if self._words is not None:
            return self._words
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        messages = [_message(line) for line in lines]
        errors = [text for text, is_error in messages if is_error]
        return (errors or [text for text, _ in messages] or ["it said nothing"])[-1]

    def replace(self, order: Order) -> None:
        """Have the process end in order, and another one started in its place."""
        self.order, self._outdated = order, True

    def kill(self) -> None:
        """End the actor, and with it the process, at once."""
        import ray

        with contextlib.suppress(Exception):  # it may be gone already, or the cluster
            ray.kill(self._actor)

    async def close(self, *, by_force: bool) -> None:
        """End the process, in order or at once, and the actor with it; its files on the node too."""
        with contextlib.suppress(Exception):  # the actor's end is the process's, whatever came of this
            await self.call("close", by_force, timeout_s=FORCE_S if by_force else STOP_S)
        self.kill()

    async def call(self, method: str, *arguments: Any, timeout_s: float = CALL_S) -> Any:
        """Call a method of the actor.

        Raises:
            ActorGoneError: it is no more.
            ActorAwayError: no answer now, perhaps later.
            Exception: what the method raises.
        """
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RaySystemError

        try:
            answer = asyncio.wrap_future(getattr(self._actor, method).remote(*arguments).future())
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be waiting
            return await asyncio.wait_for(asyncio.shield(answer), timeout_s)
        except ActorUnavailableError:
            raise ActorAwayError("its actor does not answer") from None
        except ActorDiedError as error:
            raise ActorGoneError(_short(error)) from None
        except (RayActorError, RaySystemError, ConnectionError) as error:
            raise ActorAwayError(_short(error)) from None
        except TimeoutError:
            raise ActorAwayError(f"no answer for {timeout_s:g} s") from None

    # --- looking after it -----------------------------------------------------------------------------------

    async def placed(self, timeout_s: float) -> Place:
        """Where it is, once Ray has found a node for it. Raises as `call`."""
        self._place = place = await self.call("where", timeout_s=timeout_s)
        assert isinstance(place, Place)
        return place

    async def tend(self) -> None:
        """Start the process whenever it should run and does not, and gather what it writes, until it has ended."""
        try:
            while not self._ended.is_set():
                try:
                    await self._look()
                except ActorAwayError as error:
                    if not self._away:
                        self._away = True
                        self._say(f"{self.name} is lost ({error}): Ray is to start it again")
                except ActorGoneError as error:
                    if self._last is None:
                        self._words = str(error)
                    self._give_up(-9 if self._last is None else self._last)
                await asyncio.sleep(POLL_S)
        except Exception as error:
            self._words = _short(getattr(error, "cause", None) or error)
            self._end(1)

    async def _look(self) -> None:
        report: Report = await self.call("poll", self._taken)
        if self._place is None or report.incarnation != self._place.incarnation:
            self._running = False
            await self.placed(CALL_S)
            self._lives += 1
        if not self._running:
            await self._start()
            return
        got = self._gather(report)
        if report.code is None:
            if self._outdated:
                await self.call("stop", timeout_s=STOP_S)
        elif got:
            pass  # there may be more
        elif self._outdated:
            await self._start()
        else:
            await self._process_ended(report.code)

    async def _start(self) -> None:
        order = self.order
        if order is None:
            return
        assert self._place is not None
        self._taken, self._outdated = dict.fromkeys(self.appended, 0), False
        told = await self.call("start", order, timeout_s=START_S)
        self._running, self._last = True, None
        if self._away:
            self._say(f"{self.name} is started again on {self._place.host}")
            self._away = False
        if told or not order.serves:  # a server that has not come to listen ends, and says why in its log
            self.on_start(told)

    def _gather(self, report: Report) -> bool:
        """Append what is new of the process's files; whether there was anything."""
        for name, data in report.pieces.items():
            if data:
                self._taken[name] += len(data)
                with self.appended[name].open("ab") as file:
                    file.write(data)
        return any(report.pieces.values())

    async def _process_ended(self, code: int) -> None:
        import ray

        if code not in FINAL and self._lives <= self._restarts:
            self._last, self._away = code, True
            self._say(f"{self.name} ended with {code} ({self.last_words()}): Ray is to start it again")
            self._running = False
            if code == PortInUseError.exit_code and self.order is not None:
                self.order = dataclasses.replace(self.order, address=None)
            ray.kill(self._actor, no_restart=False)  # which Ray counts as one of its restarts
            return
        for name, path in self.fetched.items():
            data = await self.call("take", name, timeout_s=START_S)
            if data is not None:
                path.write_bytes(data)
        if code in FINAL:
            self._end(code)
        else:
            self._give_up(code)

    def _give_up(self, code: int) -> None:
        self._say(f"{self.name} is not started again: Ray has done so {self._restarts} times, as --restarts allows")
        self._end(code)

    def _end(self, code: int) -> None:
        self._code = code
        self._ended.set()


class Actors(Children):
    """All processes of one run on a cluster."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: list[RemoteProcess] = []
        self._forced = False
        self._closing: set[asyncio.Task[None]] = set()
        self._tending: list[asyncio.Task[None]] = []

    def add(self, process: RemoteProcess) -> RemoteProcess:
        self.remote.append(process)
        return process

    def tend(self, process: RemoteProcess) -> None:
        """Look after it from now on."""
        self._tending.append(asyncio.create_task(process.tend(), name=process.name))

    async def stop_all(self) -> None:
        """End every process in order and every actor. Nothing is left on the nodes, unless they are out of reach."""
        for task in self._tending:
            task.cancel()
        await asyncio.gather(*self._tending, return_exceptions=True)
        await asyncio.gather(*(process.close(by_force=self._forced) for process in self.remote))
        await asyncio.gather(*self._closing)

    def kill_all(self) -> None:
        """End every actor and process at once; `stop_all` waits for it."""
        self._forced = True
        self._closing |= {asyncio.create_task(process.close(by_force=True)) for process in self.remote}


def _message(line: str) -> tuple[str, bool]:
    """(what a line of a JSON log says, whether it is the error that ended the process)."""
    with contextlib.suppress(json.JSONDecodeError):
        record = json.loads(line)
        if isinstance(record, dict) and "message" in record:
            return str(record["message"]), "exit_code" in record
    return line.removeprefix("loscar: "), line.startswith("loscar: ")


def _short(error: Exception) -> str:
    """The line that matters of what Ray says, which can be many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "creation task" in lines[0]:
        return lines[-1].rstrip(".")  # the end of a traceback
    return next((line for line in lines if " because " in line), lines[0]).rstrip(".")
