"""Messages that ride along: for workers that can read them, and only for those."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from processes import Processes, Server
from raw import HandWorker, RawStream, engine_of

from loscar_core.messages import JOINED


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    processes = Processes(tmp_path)
    try:
        yield processes.server("--workers", "2", "--density", "0.5", "--selection", "random", "--rounds", "50")
    finally:
        processes.kill_all()


def test_a_commit_rides_along_with_its_answer_for_whoever_can_read_that(server: Server) -> None:
    def live(worker: HandWorker) -> list[int]:
        digests = []
        for value in range(1, 7):
            outcome = worker.round(float(value))
            assert outcome.members == 2
            np.testing.assert_allclose(outcome.change, value, rtol=1e-5)
            digests.append(worker.engine.anchor.digest)
        return digests

    with (
        grpc.insecure_channel(server.address) as channel,
        RawStream(channel) as first,
        RawStream(channel) as second,
        ThreadPoolExecutor(2) as threads,
    ):
        able, plain = HandWorker(first, engine_of("able", 64), [JOINED]), HandWorker(second, engine_of("plain", 64))
        one, other = threads.map(live, [able, plain])
        assert one == other
        assert len(set(one)) == 6
        assert max(first.together) > 1
        assert set(second.together) == {1}
