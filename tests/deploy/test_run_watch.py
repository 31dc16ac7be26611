"""What a run on this machine makes of its children's ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loscar_core.errors import DataMissingError, LoscarError, NonFiniteError, WorkerFailedError
from loscar_deploy.run import LocalRun
from loscar_deploy.run_folder import RunFolder
from loscar_deploy.table import Progress
from loscar_wire._generated import parameter_server_pb2 as pb


def watch(folder: Path, replies: list[pb.StatusReply], ends: dict[int, list[int]]) -> None:
    """Watch a run of two workers whose server gives these replies; `ends` are exit codes before each of them."""
    workers = [SimpleNamespace(name=f"w{i}", returncode=None, last_words=lambda: "its words") for i in (0, 1)]
    run: Any = LocalRun(SimpleNamespace(target_loss=None), RunFolder(folder), Progress(quiet=True))  # type: ignore[arg-type]
    run._server, run._workers = SimpleNamespace(name="server", returncode=None), workers
    asked = 0

    def end() -> None:
        for worker, code in zip(workers, ends.get(asked, [None, None]), strict=True):
            worker.returncode = worker.returncode if code is None else code

    class Client:
        async def status(self) -> pb.StatusReply:
            nonlocal asked
            reply = replies[asked]
            asked += 1
            end()
            return reply

    end()
    asyncio.run(run._watch(Client()))


def status(phase: str, elapsed_s: float) -> pb.StatusReply:
    return pb.StatusReply(phase=phase, elapsed_s=elapsed_s)


RUNNING, FINISHED, WAITING = status("running", 1.0), status("finished", 2.0), status("waiting", -1.0)


def test_workers_that_have_heard_of_the_end_first(tmp_path: Path) -> None:
    """Both are gone before the server is asked again: its answer says that the run is over."""
    watch(tmp_path, [RUNNING, FINISHED], {1: [0, 0]})


def test_one_that_dies_while_the_others_go_on(tmp_path: Path) -> None:
    watch(tmp_path, [RUNNING, RUNNING, FINISHED], {1: [1, None]})


@pytest.mark.parametrize(
    ("codes", "kind"),
    [([13, 13], NonFiniteError), ([13, -9], WorkerFailedError), ([0, 0], WorkerFailedError)],
)
def test_nobody_is_left(tmp_path: Path, codes: list[int], kind: type[LoscarError]) -> None:
    with pytest.raises(kind, match="no worker is left: w1 "):
        watch(tmp_path, [RUNNING, RUNNING], {1: codes})


def test_one_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="w0 ended with status 9: its words"):
        watch(tmp_path, [WAITING, WAITING], {1: [9, None]})


def test_one_that_fails_right_after_the_start(tmp_path: Path) -> None:
    """The run had started when it was asked for, however short that was before: the others go on."""
    watch(tmp_path, [WAITING, RUNNING, FINISHED], {1: [13, None]})
