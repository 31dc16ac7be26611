"""`loscar worker --state`: a worker that is pre-empted or killed comes back as itself, and no step counts twice."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Process, Processes, Server, status_of, wait_until
from safetensors.numpy import load_file
from steady_task import STEP, Steady, checksum

import loscar_worker as loscar
from loscar_core.errors import ConfigError, WrongModelError, WrongRunError
from loscar_worker.state_file import StateSaver, load_state
from loscar_worker.tasks import load_task
from loscar_worker.tasks.partition import Batches, partition

SUPPORT = Path(__file__).resolve().parent.parent / "support"
FLAGS = ["--workers", "1", "--density", "0.5", "--local-steps", "2", "--lease", "10m", "--run-id", "preempted"]


class Life:
    """A worker that is started again and again with the same command line."""

    def __init__(self, processes: Processes, folder: Path, listen: str, *flags: str) -> None:
        self.state, self.model, self.result = (folder / n for n in ("worker.state", "model.safetensors", "result.json"))
        self._trace = folder / "trace"
        self._processes = processes
        self._flags = ["--task", "steady_task:Steady", "--name", "w", "--server", listen, "--step-time", "3ms"]
        self._flags += ["--state", str(self.state), "--save-model", str(self.model), "--result", str(self.result)]
        self._flags += flags

    def start(self, *flags: str) -> Process:
        return self._processes.loscar("worker", *self._flags, *flags, cwd=SUPPORT, TRACE=str(self._trace))

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Every step that any of its processes has taken."""
        if not self._trace.exists():
            return []
        return [json.loads(line) for line in self._trace.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def wait_for_steps(self, count: int) -> None:
        wait_until(lambda: len(self.steps) >= count, f"{count} steps")

    def counted(self) -> set[float]:
        """How many steps are in the model that it left with: what is found in its coordinates."""
        return {float(v) / STEP for a in load_file(self.model).values() for v in a.reshape(-1)}


@pytest.fixture
def listen() -> str:
    """An address that one server after the other can listen on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def batches() -> Iterator[int]:
    """The checksums of the batches of a worker that is never interrupted."""
    task = Steady()
    indices = partition(task.labels(), "iid", None, 0, 0)
    return (checksum(b) for b in Batches(task.train, indices, task.batch_size, seed=0, slot=0))


def finish(server: Server, worker: Process) -> None:
    """The run ends with its final round."""
    server.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.err
    assert server.wait() == 0, server.err


def test_a_worker_that_is_pre_empted_goes_on_where_it_was(processes: Processes, tmp_path: Path, listen: str) -> None:
    """Told to leave twice; while it is away the second time, the server is killed, so that its file is all there is."""
    server = processes.server(*FLAGS, listen=listen)
    life = Life(processes, tmp_path, listen)
    for number, steps in enumerate((40, 80), start=1):
        worker = life.start()
        life.wait_for_steps(steps)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0, worker.err
        assert len({s["pid"] for s in life.steps}) == number
    position = status_of(listen).round
    assert position > 0
    server.signal(signal.SIGKILL)
    server.wait()

    again = processes.server(*FLAGS, "--recover-after", "30s", listen=listen)
    done = len(life.steps)
    worker = life.start()
    life.wait_for_steps(done + 40)
    assert f"w goes on from {life.state} after {done} steps" in worker.err
    finish(again, worker)
    steps = life.steps
    assert [s["count"] for s in steps] == list(range(1, len(steps) + 1)), "the optimizer's state"
    assert [s["batch"] for s in steps] == list(itertools.islice(batches(), len(steps))), "the data's position"
    assert life.counted() == {len(steps)}
    result = json.loads(life.result.read_text())
    assert result["steps"] == len(steps)
    counts = result["contributions"]
    assert counts["sent"] == counts["included"] + counts["returned"]
    assert counts["outstanding"] == 0
    assert f"adopting 1:{position}" in again.err or f"adopting 1:{position - 1}" in again.err


def test_who_gives_up_on_its_server_has_saved_all_it_did(processes: Processes, tmp_path: Path, listen: str) -> None:
    server = processes.server(*FLAGS, listen=listen)
    life = Life(processes, tmp_path, listen, "--server-timeout", "500ms")
    worker = life.start()
    life.wait_for_steps(40)
    server.signal(signal.SIGKILL)
    assert worker.wait() == 19, worker.err
    done = len(life.steps)
    again = processes.server(*FLAGS, "--recover-after", "30s", listen=listen)
    worker = life.start()
    life.wait_for_steps(done + 10)
    finish(again, worker)
    assert life.counted() == {len(life.steps)}


def test_a_worker_that_is_killed_comes_back_and_no_step_counts_twice(
    processes: Processes, tmp_path: Path, listen: str
) -> None:
    """It had been saved, and had contributed since: the file alone would have it send the same steps again."""
    server = processes.server(*FLAGS, "--linger", "0s", listen=listen)
    life = Life(processes, tmp_path, listen)
    worker = life.start("--state-every", "50ms")
    kept = tmp_path / "kept"
    wait_until(life.state.exists, "its state is saved")
    shutil.copy(life.state, kept)  # the file is replaced whole, so a copy of it is whole too
    since = status_of(listen).round
    wait_until(lambda: status_of(listen).round > since + 3, "it contributes more")
    worker.signal(signal.SIGKILL)
    worker.wait()
    shutil.copy(kept, life.state)  # as if the last saves had not come
    saved = load_state(kept)
    assert saved is not None
    done = len(life.steps)
    assert done > saved["session"]["steps"]

    second = life.start("--state-every", "10m")
    life.wait_for_steps(done + 20)
    second.signal(signal.SIGKILL)
    second.wait()
    again = load_state(life.state)
    assert again is not None
    assert again["session"]["steps"] == saved["session"]["steps"]
    assert len(json.loads(again["session"]["worker"])["formers"]) == 1, "what it came back from is not used again"
    third = life.start("--state-every", "10m")  # from what the second one saved when it came back
    life.wait_for_steps(len(life.steps) + 20)
    finish(server, third)
    for worker in (second, third):
        assert "w goes on from the consensus: what it had not sent may be counted already" in worker.err
    steps = life.steps
    first = steps[done]
    assert first["count"] == saved["session"]["steps"] + 1, "the optimizer's state"
    assert first["batch"] == list(itertools.islice(batches(), first["count"]))[-1], "the data's position"
    last = [s for s in steps if s["pid"] == third.pid]
    assert last[0] == first | {"pid": third.pid}, "nothing was saved in between"
    assert max(life.counted()) <= len(steps), "no step is in twice"
    assert min(life.counted()) > len(last), "what its former lives had sent is in"
    assert "refused" not in server.err


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def test_a_damaged_or_foreign_state_is_refused_with_a_reason(processes: Processes, tmp_path: Path, listen: str) -> None:
    server = processes.server(*FLAGS, listen=listen)
    task = load_task("tiny_task:Tiny")
    model = task.make_model(0)
    optimizer = task.make_optimizer(model)
    batches = Batches(task.train, partition(task.labels(), "iid", None, 0, 0), 8, seed=0)
    path = tmp_path / "worker.state"
    with loscar.join(listen, model, name="w") as session:
        StateSaver(path, 60.0, session, optimizer, batches).save()
    assert not list(tmp_path.glob("*.part"))
    data, whole = path.read_bytes(), load_state(path)
    assert whole is not None
    rng = random.Random(0)

    def refused(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            found = load_state(path)
        except ConfigError as error:
            return "is no worker's state, or damaged: without it, a new worker joins" in str(error)
        assert same(found, whole)
        return False

    assert all(refused(data[: rng.randrange(len(data))]) for _ in range(100))
    assert all(refused(content) for content in (b"", b"hello", bytes(5000)))
    # What passes are names and padding of the archive, which are no part of the state.
    assert sum(refused(flip(data, rng.randrange(len(data)))) for _ in range(200)) > 50

    state = whole["session"]
    with pytest.raises(ConfigError, match="state is not what"):
        loscar.join(listen, model, state=whole)
    with pytest.raises(WrongRunError, match="the saved state is of run"):
        loscar.join(listen, model, state=state, run_id=b"x" * 16)
    with pytest.raises(WrongModelError):
        loscar.join(listen, load_task("tiny_task:Other").make_model(0), state=state)
    server.signal(signal.SIGKILL)
    server.wait()
    processes.server(*FLAGS[:-1], "a later one", listen=listen)
    with pytest.raises(WrongRunError, match="this server holds run"):
        loscar.join(listen, model, state=state)


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return bool(a == b)
