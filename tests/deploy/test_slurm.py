"""The Slurm script, run by bash as Slurm would: its variables, its signals, a stand-in for scontrol, real processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Process, Processes, descendants, wait_until
from safetensors.numpy import load_file

SCRIPT = Path(__file__).resolve().parent.parent.parent / "deploy" / "slurm" / "loscar.sbatch"
SUPPORT = Path(__file__).resolve().parent.parent / "support"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine"),
    pytest.mark.timeout(300),  # several processes one after the other, each of which imports torch
]


class Cluster:
    """A job array on this machine: its shared folder, and what was asked of scontrol."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.shared = folder / "shared"
        self.shared.mkdir()
        (self.shared / "token").write_text("a long random text\n", encoding="utf-8")
        self._requeued = folder / "requeued"
        self._processes = processes
        programs = folder / "bin"
        programs.mkdir()
        self._program(programs / "loscar", f'exec {sys.executable} -m loscar_deploy "$@"')
        self._program(programs / "scontrol", f'echo "$@" >>{self._requeued}')
        self._environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_ARRAY_JOB_ID": "77",
            "SLURM_JOB_NAME": "tiny",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURMD_NODENAME": "127.0.0.1",
            "LOSCAR_DIR": str(self.shared),
            "LOSCAR_LISTEN": "127.0.0.1:0",
            "LOSCAR_TASK": "tiny_task:Tiny",
            "LOSCAR_SERVER_ARGS": "--start-grace 0s --linger 0s --checkpoint-every 1s --rounds 1000000000",
            "LOSCAR_WORKER_ARGS": "--step-time 5ms --state-every 1s --server-timeout 3s --connect-timeout 3s",
        }

    @staticmethod
    def _program(path: Path, line: str) -> None:
        path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        path.chmod(0o755)

    def element(self, index: int, **environment: str) -> Process:
        own = {**self._environment, "SLURM_ARRAY_TASK_ID": str(index), **environment}
        return self._processes._start(Process, ["bash", str(SCRIPT)], SUPPORT, own)

    @property
    def requeued(self) -> list[str]:
        return self._requeued.read_text(encoding="utf-8").splitlines() if self._requeued.exists() else []

    @property
    def server_log(self) -> str:
        path = self.shared / "server.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.fixture
def cluster(tmp_path: Path, processes: Processes) -> Cluster:
    return Cluster(tmp_path, processes)


def times(process: Process, text: str, count: int) -> Callable[[], bool]:
    def found() -> bool:
        assert process.popen.poll() is None, f"ended early:\n{process.err}"
        return process.err.count(text) >= count

    return found


def test_elements_train_come_back_from_the_queue_and_end_together(cluster: Cluster) -> None:
    first, second = cluster.element(0), cluster.element(1)
    for element in (first, second):
        wait_until(times(element, "joined run", 1), "both train")
    assert wait_until(lambda: "run on at" in cluster.server_log, "the run has started")

    # The time limit is near for an element that has only a worker.
    second.signal(signal.SIGUSR1)
    assert second.wait() == 0, second.err
    assert cluster.requeued == ["requeue 77_1"]
    assert (cluster.shared / "states" / "worker-1.state").is_file()
    second = cluster.element(1)
    wait_until(times(second, "goes on from", 1), "it goes on from its state")

    # That with the server is pre-empted: every process of it gets SIGTERM. The run goes on where the server comes back.
    was = (cluster.shared / "server").read_text(encoding="utf-8")
    wait_until(lambda: list((cluster.shared / "checkpoints").glob("*.safetensors")), "a checkpoint")
    os.killpg(first.pid, signal.SIGTERM)
    assert first.wait() == 0, first.err
    assert cluster.requeued == ["requeue 77_1"], "Slurm itself puts a pre-empted job back"
    assert not (cluster.shared / "finished").exists()
    first = cluster.element(0)
    wait_until(times(first, "goes on from", 1), "the other element's worker goes on as well")
    assert (cluster.shared / "server").read_text(encoding="utf-8") != was
    wait_until(times(second, "joined run", 2), "the worker finds the server at its new address")
    assert "looking again" in second.err
    assert "resuming run" in cluster.server_log
    assert cluster.server_log.count("pausing the run") == 1
    assert cluster.server_log.count("which is saved") == 1
    assert "ending the run" not in cluster.server_log

    first.signal(signal.SIGUSR2)
    assert first.wait() == 0, first.err
    assert second.wait() == 0, second.err
    assert cluster.server_log.count("ending the run; once more to stop") == 1
    assert (cluster.shared / "finished").exists()
    models = [load_file(cluster.shared / "models" / f"worker-{index}.safetensors") for index in (0, 1)]
    assert models[0]
    assert all((models[1][name] == values).all() for name, values in models[0].items())

    # Whoever is started now has nothing to do.
    late = cluster.element(1)
    assert late.wait() == 0
    assert "is over" in late.err
    assert len(cluster.requeued) == 1


def test_a_crashed_server_is_started_again_by_its_element(cluster: Cluster) -> None:
    element = cluster.element(0)
    wait_until(times(element, "joined run", 1), "it trains")
    wait_until(lambda: list((cluster.shared / "checkpoints").glob("*.safetensors")), "a checkpoint")
    [server] = [child for child in descendants(element.pid) if "server" in child.cmdline()]
    server.kill()
    wait_until(times(element, "goes on from", 1), "server and worker are back")
    assert "resuming run" in cluster.server_log
    # The time limit is near: the server does not end the run either.
    element.signal(signal.SIGUSR1)
    assert element.wait() == 0, element.err
    assert cluster.requeued == ["requeue 77_0"]
    assert cluster.server_log.count("which is saved") == 1
    assert "ending the run" not in cluster.server_log
    assert not (cluster.shared / "finished").exists()


def test_a_server_that_is_there_already_is_taken(cluster: Cluster, processes: Processes) -> None:
    server = processes.server("--start-grace", "0s", "--run-id", "tiny", "--token", "a long random text")
    element = cluster.element(0, LOSCAR_SERVER=server.address)
    wait_until(times(element, "joined run", 1), "it trains")
    assert not (cluster.shared / "server").exists()
    element.signal(signal.SIGTERM)
    assert element.wait() == 0, element.err


@pytest.mark.parametrize(
    ("environment", "status", "cause"),
    [
        pytest.param({"LOSCAR_SERVER_ARGS": "--density 7"}, 3, "the server did not start (exit 3)", id="server"),
        pytest.param({"LOSCAR_TASK": "none", "LOSCAR_SERVER": "127.0.0.1:9"}, 8, "no task", id="worker"),
        pytest.param({"SLURM_ARRAY_TASK_ID": ""}, 1, "sbatch --array=0-3", id="no array"),
    ],
)
def test_what_is_wrong_ends_the_element(cluster: Cluster, environment: dict[str, str], status: int, cause: str) -> None:
    element = cluster.element(0, **environment)
    assert element.wait() == status, element.err
    assert cause in element.err
    assert cluster.requeued == []


def test_the_signal_before_the_time_limit_is_one_that_the_script_handles() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    [(name, seconds)] = re.findall(r"^#SBATCH --signal=B:(\w+)@(\d+)$", text, re.MULTILINE)
    [handled] = re.findall(r"^for signal in (.*); do$", text, re.MULTILINE)
    assert name in handled.split()
    assert int(seconds) >= 60, "a large state takes its time"
    assert "#SBATCH --requeue\n" in text
    # Directives are read until the first command only.
    first = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in text.splitlines()[first:])
