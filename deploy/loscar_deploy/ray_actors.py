"""The side of a run on Ray that is on the nodes: an actor that owns one process, the same as on any other machine.

The process is `loscar server` or `loscar worker`. When the actor is gone, however it went, a pipe closes and the
process is killed (`ray_child`): neither a killed actor nor a dead node leaves one behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO

from loscar_core.errors import ConfigError, ConnectError
from loscar_deploy.client import Client, FetchedModel
from loscar_wire.transport import ClientSecurity, format_address

LOG = "log"
TERMINATE_S = 10.0
PIECE_BYTES = 1 << 20
"""Most that one poll brings of one file."""


@dataclass(frozen=True, slots=True)
class Order:
    """What an actor is to start.

    Attributes:
        arguments: loscar's command line.
        run: the run's id, which names the folder for files of its processes on this node.
        token: the run's; handed on in the environment, which is nobody else's to read. Not in the `repr`.
        threads: compute threads.
        files: file names for options that take one, in a folder that is this process's alone.
        kept: the same in a folder that is there again for the next process of this name on this node.
        serves: it is a server; say where it listens.
        address: (host, port) where the server of this run listened before; on the same host it does again.
    """

    arguments: tuple[str, ...]
    run: str
    token: str = field(repr=False)
    threads: int = 1
    files: tuple[tuple[str, str], ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    serves: bool = False
    address: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor is, and which life of it this is."""

    incarnation: str
    host: str
    node: str
    version: str


@dataclass(frozen=True, slots=True)
class Report:
    """How the process is.

    Attributes:
        incarnation: the actor's.
        code: the exit code of the process; None while it runs, or when none has been started.
        pieces: what its files hold beyond what the caller has; whole lines only while it runs.
    """

    incarnation: str
    code: int | None
    pieces: dict[str, bytes]


class ProcessActor:
    """Owns one process on the node where Ray has put it.

    Args:
        name: of the process, for Ray's own views.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._incarnation = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None
        self._base: Path | None = None
        self._folder: Path | None = None
        self._client: Client | None = None

    def __repr__(self) -> str:
        return f"loscar {self._name}"

    async def where(self) -> Place:
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Place(self._incarnation, ray.util.get_node_ip_address(), node, metadata.version("loscar"))

    async def start(self, order: Order) -> dict[str, str]:
        """Start the process; returns what a server says once it listens.

        Raises:
            ConfigError: the folder for its files belongs to somebody else.
            OSError: the operating system refuses.
        """
        await self.stop()  # an attempt whose answer got lost
        self._base = _private_folder(Path(tempfile.gettempdir()) / f"loscar-{order.run[:16]}-{self._name}")
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self._incarnation}-", dir=self._base))
        arguments = [sys.executable, "-m", "loscar_deploy.ray_child", *order.arguments]
        for option, name in order.files:
            arguments += [option, str(self._folder / name)]
        for option, name in order.kept:
            arguments += [option, str(self._base / name)]
        if order.serves:
            host = (await self.where()).host
            port = order.address[1] if order.address is not None and order.address[0] == host else 0
            arguments += ["--listen", format_address(host, port)]
        environment = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS=str(order.threads))
        environment["LOSCAR_TOKEN"] = order.token
        with (self._folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - asyncio's may need the main thread
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if order.serves else log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        if not order.serves:
            return {}
        assert self._process.stdout is not None
        told = await asyncio.to_thread(_first_line, self._process.stdout)
        if told:
            if self._client is not None:
                await self._client.close()
            self._client = Client(told["listening"], ClientSecurity(order.token))
        return told

    async def poll(self, taken: dict[str, int]) -> Report:
        """How the process is, and what its files hold beyond so many bytes."""
        code = None if self._process is None else self._process.poll()
        pieces = {}
        if self._folder is not None:
            for name, offset in taken.items():
                pieces[name] = _piece(self._folder / name, offset, whole_lines=code is None)
        return Report(self._incarnation, code, pieces)

    async def take(self, name: str) -> bytes | None:
        """A whole file of the process; None when it has not written it."""
        assert self._folder is not None
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / name).read_bytes()
        return None

    async def stop(self, *, by_force: bool = False) -> None:
        """End the process: in order, and by force after a while or at once."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        if by_force:
            process.kill()
        else:
            process.terminate()
        try:
            await asyncio.to_thread(process.wait, TERMINATE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    async def close(self, by_force: bool) -> None:
        """The same, and leave no files behind."""
        await self.stop(by_force=by_force)
        if self._client is not None:
            await self._client.close()
        if self._base is not None:
            shutil.rmtree(self._base, ignore_errors=True)

    # --- a server's -----------------------------------------------------------------------------------------

    async def status(self) -> bytes:
        """The server's status, as protobuf. Raises what `Client.status` raises."""
        return (await self._server().status()).SerializeToString()

    async def stop_run(self, why: str) -> None:
        """End the run after the open round."""
        await self._server().stop(why)

    async def model(self) -> FetchedModel:
        """The consensus."""
        return await self._server().fetch_model()

    def _server(self) -> Client:
        if self._client is None:
            raise ConnectError("the server is not there yet")
        return self._client


def _private_folder(path: Path) -> Path:
    """A folder that only this user sees, made unless it is there. Raises ConfigError for somebody else's."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to somebody else")
    return path


def _first_line(stream: IO[bytes]) -> dict[str, str]:
    """What a server says as JSON once it listens; nothing when it has ended before."""
    line = stream.readline()
    if not line:
        return {}
    told: dict[str, str] = json.loads(line)
    return told


def _piece(path: Path, offset: int, *, whole_lines: bool) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(PIECE_BYTES)
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1] if whole_lines else data
