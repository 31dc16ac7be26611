"""Several booked workers in this process, trained by turns, and addresses that can be shut."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import wait_until

import loscar_worker as loscar
import loscar_worker.joining
from loscar_core.config import FinalRound, RunConfig
from loscar_deploy.audit import Audit, audit
from loscar_deploy.books import BookedSession, close_books, keep_books
from loscar_deploy.chaos_worker import DATA
from loscar_deploy.link import LinkProxy
from loscar_deploy.link_spec import LinkSpec
from loscar_wire.transport import parse_address
from loscar_worker.tasks.models import mlp

CONFIG = RunConfig(seed=7, density=0.2, local_steps=2, final_round=FinalRound.NONE)
"""What servers for a crew are started with, see `Crew.flags`."""


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Crew:
    """Workers of one run, whose books are balanced at the end; the run must have been started by `flags`.

    Args:
        folder: for the books, and the servers' events.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sessions: dict[str, BookedSession] = {}
        self.resting: set[str] = set()
        """Who does not train for the time being."""
        self._models: dict[str, torch.nn.Module] = {}
        self._rng = np.random.default_rng(0)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(CONFIG.seed)
            self._model = mlp((64, 64, 10))
        self.initial = torch.cat([p.detach().reshape(-1) for p in self._model.parameters()]).numpy().copy()
        # For a worker that is a process of its own.
        np.savez(folder / DATA, inputs=np.zeros((64, 64), np.float32), targets=np.arange(64) % 10)

    @property
    def flags(self) -> list[str]:
        """For `loscar server`."""
        flags = ["--run-id", "crew", "--seed", str(CONFIG.seed), "--density", str(CONFIG.density)]
        flags += ["--local-steps", str(CONFIG.local_steps), "--final-round", CONFIG.final_round.value]
        return [*flags, "--events", str(self.folder / "events.jsonl")]

    def join(self, servers: dict[str, str], **options: Any) -> None:
        """Workers by name, each with its servers; returns when all have joined."""

        def one(name: str) -> BookedSession:
            model = self._models[name] = mlp((64, 64, 10))
            model.load_state_dict(self._model.state_dict())
            session = loscar.join(servers[name], model, name=name, **options)
            assert isinstance(session, BookedSession)
            return session

        with ThreadPoolExecutor(len(servers)) as pool:
            self.sessions |= dict(zip(servers, pool.map(one, servers), strict=True))

    def step(self) -> None:
        """A local step for everybody who does not rest."""
        for name in self.sessions.keys() - self.resting:
            session = self.sessions[name]
            if session.finished:
                continue
            before = session.live()
            with torch.no_grad():
                for p in self._models[name].parameters():
                    p.add_(torch.from_numpy(self._rng.normal(0, 0.01, tuple(p.shape)).astype(np.float32)))
            session.walked += session.live() - before
            session.step()
        time.sleep(0.002)

    def train_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Step until the condition holds."""

        def once() -> Any:
            self.step()
            return condition()

        return wait_until(once, what)

    def audited(self, others: Iterable[str] = ()) -> Audit:
        """Train until the run is over, and balance the books; `others` are workers that were processes."""
        self.resting = set()
        self.train_until(lambda: all(s.finished for s in self.sessions.values()), "the run ends")
        for session in self.sessions.values():
            session.close()
            close_books(session, self.folder)
        return audit(self.folder, [*self.sessions, *others], CONFIG, self.initial)

    def close(self) -> None:
        for session in self.sessions.values():
            session.close()


@contextmanager
def crew_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    """A crew whose sessions keep books, which are all closed at the end."""
    for name in ("WorkerEngine", "Session"):
        monkeypatch.setattr(loscar_worker.joining, name, getattr(loscar_worker.joining, name))  # put back at the end
    keep_books(folder)
    crew = Crew(folder)
    try:
        yield crew
    finally:
        crew.close()


class Gate:
    """An address that leads to a server while it is open; shut, connections to it are refused.

    Args:
        target: the server's address.
        link: what it is like.
    """

    def __init__(self, target: str, link: str = "none") -> None:
        self.address = free_address()
        self._target = parse_address(target, "target")
        self._link = LinkSpec.parse(link)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._proxy: LinkProxy | None = None
        self.open()

    def open(self) -> None:
        proxy = self._proxy = LinkProxy(*self._target, self._link)
        host, port = parse_address(self.address, "gate")
        asyncio.run_coroutine_threadsafe(proxy.start(host, port), self._loop).result(10)

    def shut(self) -> None:
        """What is under way is lost."""
        if self._proxy is not None:
            asyncio.run_coroutine_threadsafe(self._proxy.close(), self._loop).result(10)
            self._proxy = None

    def close(self) -> None:
        self.shut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
