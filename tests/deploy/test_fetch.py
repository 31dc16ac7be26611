"""`loscar fetch`: a model from real servers, and every reason for which there is none."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from processes import Process, Processes, Server, status_of, wait_until
from safetensors import safe_open
from safetensors.numpy import load_file

SUPPORT = Path(__file__).resolve().parent.parent / "support"
TASK = "tiny_task:Normalised"

pytestmark = pytest.mark.timeout(180)


def train(processes: Processes, server: Server, *flags: str) -> Process:
    return processes.loscar(
        "worker", "--server", server.address, "--task", TASK, "--step-time", "2ms", *flags, cwd=SUPPORT
    )


def fetch(processes: Processes, *arguments: str) -> Process:
    done = processes.loscar("fetch", *arguments)
    done.wait()
    return done


def test_a_running_server_gives_its_model(processes: Processes, tmp_path: Path) -> None:
    """To whoever has the token, and each time that of the last committed round."""
    flags = ["--start-grace", "0s", "--density", "0.3", "--local-steps", "2", "--token", "t", "--linger", "1h"]
    server = processes.server(*flags)
    train(processes, server, "--token", "t").says("joined run")
    refused = fetch(processes, "--server", server.address, "--out", str(tmp_path / "no"))
    assert refused.wait() == 11, refused.err
    assert not (tmp_path / "no").exists()

    options = ("--server", server.address, "--token", "t", "--json", "--out")
    rounds = []
    for name in ("first.safetensors", "second.safetensors"):
        goal = rounds[-1] if rounds else 0

        def further(goal: int = goal) -> bool:
            found = processes.loscar("status", "--server", server.address, "--token", "t", "--json")
            assert found.wait() == 0, found.err
            return int(json.loads(found.out)["round"]) > goal

        wait_until(further, "another round")
        done = fetch(processes, *options, str(tmp_path / name))
        assert done.wait() == 0, done.err
        told = json.loads(done.out)
        assert (told["run_id"], told["phase"], told["epoch"]) == (server.run_id, "running", 1)
        assert told["file"] == str(tmp_path / name)
        with safe_open(tmp_path / name, framework="numpy") as file:
            said = file.metadata()
        assert said == {"format": "loscar", "run": server.run_id, "epoch": "1", "round": str(told["round"])}
        rounds.append(told["round"])
    assert rounds[0] < rounds[1]
    first, second = (load_file(tmp_path / f"{n}.safetensors") for n in ("first", "second"))
    assert "1.running_mean" in first, "its statistics are a part of a model"
    assert any((first[name] != second[name]).any() for name in first)

    done = fetch(processes, "--server", server.address, "--token", "t", "--out", str(tmp_path / "text"))
    assert done.out.startswith(f"{tmp_path / 'text'}: ")
    assert f"of run {server.run_id} at 1:" in done.out


def test_what_a_run_has_left_is_evaluated(processes: Processes, tmp_path: Path) -> None:
    """The default file, of a server whose run is over; it is what the worker has left with, and a model of the task."""
    flags = ["--start-grace", "0s", "--density", "0.3", "--local-steps", "2", "--rounds", "4", "--linger", "1h"]
    server = processes.server(*flags)
    ends = tmp_path / "ends.safetensors"
    worker = train(processes, server, "--save-model", str(ends))
    assert worker.wait() == 0, worker.err
    assert status_of(server.address).phase == "finished"
    done = processes.loscar("fetch", "--server", server.address, "--json", cwd=tmp_path)
    assert done.wait() == 0, done.err
    assert json.loads(done.out)["phase"] == "finished"
    fetched, left = load_file(tmp_path / "model.safetensors"), load_file(ends)
    assert fetched.keys() == left.keys()
    assert all((fetched[name] == left[name]).all() for name in left)
    assert json.loads(done.out)["bytes"] == sum(values.nbytes for values in fetched.values())
    tested = processes.loscar("evaluate", str(tmp_path / "model.safetensors"), "--task", TASK, "--json", cwd=SUPPORT)
    assert tested.wait() == 0, tested.err
    assert 0 <= json.loads(tested.out)["accuracy"] <= 1


def test_a_server_without_a_model_is_named(processes: Processes, tmp_path: Path) -> None:
    server = processes.server()
    done = fetch(processes, "--server", server.address, "--out", str(tmp_path / "m"))
    assert done.wait() == 22
    assert "this server has no model yet" in done.err
    assert "Traceback" not in done.err
    server.signal(signal.SIGKILL)
    server.wait()
    done = fetch(processes, "--server", server.address, "--out", str(tmp_path / "m"))
    assert done.wait() == 4, done.err
    assert not list(tmp_path.glob("m*"))


@pytest.mark.parametrize(
    ("out", "cause"),
    [
        pytest.param("none/m.safetensors", "there is no folder", id="no folder"),
        pytest.param(".", "it is a folder", id="a folder"),
        pytest.param("/proc/m.safetensors", "--out /proc/m.safetensors cannot be written", id="no place for files"),
    ],
)
def test_a_file_that_cannot_be_written_is_named(processes: Processes, tmp_path: Path, out: str, cause: str) -> None:
    """Before anybody is asked, where that can be known."""
    server = processes.server("--start-grace", "0s", "--local-steps", "2")
    worker = train(processes, server)
    worker.says("joined run")
    wait_until(lambda: status_of(server.address).round > 0, "a round")
    done = processes.loscar("fetch", "--server", server.address, "--out", out, cwd=tmp_path)
    assert done.wait() in (3, 21), done.err
    assert cause in done.err
    assert "Traceback" not in done.err


def test_a_full_disk_leaves_nothing(processes: Processes, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this machine")
    server = processes.server("--start-grace", "0s", "--local-steps", "2")
    train(processes, server).says("joined run")
    wait_until(lambda: status_of(server.address).round > 0, "a round")
    os.symlink(full, tmp_path / "model.part")
    done = fetch(processes, "--server", server.address, "--out", str(tmp_path / "model.safetensors"))
    assert done.wait() == 21
    assert "cannot be written: No space left on device" in done.err
    assert not os.path.lexists(tmp_path / "model.part")
    assert not (tmp_path / "model.safetensors").exists()
