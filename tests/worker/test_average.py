"""One-off averages between sessions, against real servers: what everybody gets, and what servers' deaths change."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from crew import Crew, Gate, crew_in
from processes import DEADLINE_S, Processes, Server, status_of, wait_until
from torch import Tensor

from loscar_core.errors import (
    ConfigError,
    InterruptedRunError,
    LoscarError,
    MalformedError,
    NonFiniteError,
    RefusedError,
    SessionFailedError,
)
from loscar_wire.averages import AverageCall, encode_call, encode_values
from loscar_wire.transport import AVERAGE

pytestmark = pytest.mark.timeout(120)
NAMES = ("w0", "w1", "w2")


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    with crew_in(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    found = ThreadPoolExecutor(8)
    yield found
    found.shutdown(wait=False, cancel_futures=True)  # who waits for an average is freed by the session's end


def joined(processes: Processes, crew: Crew, *flags: str, names: Sequence[str] = NAMES) -> Server:
    server = processes.server(*crew.flags, "--workers", str(len(names)), *flags)
    crew.join(dict.fromkeys(names, server.address))
    return server


def together(crew: Crew, pool: ThreadPoolExecutor, tensors: dict[str, Tensor], **options: object) -> list[Tensor]:
    """What each worker gets when all of them call at once."""
    calls = [pool.submit(crew.sessions[name].average, tensor, **options) for name, tensor in tensors.items()]  # type: ignore[arg-type]
    return [call.result(DEADLINE_S) for call in calls]


def offered(server: Server, count: int) -> Callable[[], bool]:
    return lambda: [a.offered for a in status_of(server.address).averages] == [count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_everybody_gets_the_mean_in_the_tensors_own_form(
    processes: Processes, crew: Crew, pool: ThreadPoolExecutor, dtype: torch.dtype
) -> None:
    """More than one message's worth of values; the second call without a label is another average."""
    joined(processes, crew)
    for shape in ((3, 200_001), ()):
        given = {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name in NAMES}
        before = {name: tensor.clone() for name, tensor in given.items()}
        got = together(crew, pool, given)
        mean = torch.stack([t.double() for t in given.values()]).mean(0).to(dtype)
        for result in got:
            assert (result.shape, result.dtype) == (mean.shape, dtype)
            torch.testing.assert_close(result, mean)
            assert torch.equal(result, got[0])
        assert all(torch.equal(given[name], before[name]) for name in NAMES)


def test_rounds_go_on_afterwards_and_the_books_balance(
    processes: Processes, crew: Crew, pool: ThreadPoolExecutor
) -> None:
    server = joined(processes, crew)
    crew.train_until(lambda: status_of(server.address).round >= 3, "rounds go on")
    [first, *others] = together(crew, pool, {name: torch.full((5,), float(i)) for i, name in enumerate(NAMES)})
    assert torch.equal(first, torch.ones(5))
    assert all(torch.equal(first, other) for other in others)
    wait_until(lambda: not status_of(server.address).averages, "the average is forgotten")
    goal = status_of(server.address).round + 3
    crew.train_until(lambda: status_of(server.address).round >= goal, "rounds go on")
    server.signal(signal.SIGTERM)
    found = crew.audited()
    assert found.failures == []
    assert server.wait() == 0
    assert "Traceback" not in server.err


def test_it_is_still_possible_when_the_run_is_over(processes: Processes, crew: Crew, pool: ThreadPoolExecutor) -> None:
    joined(processes, crew, "--rounds", "2")
    crew.train_until(lambda: all(s.finished for s in crew.sessions.values()), "the run ends")
    got = together(crew, pool, {name: torch.tensor(float(i)) for i, name in enumerate(NAMES)})
    assert [float(x) for x in got] == [1.0] * 3


def test_a_worker_that_leaves_is_not_waited_for(processes: Processes, crew: Crew, pool: ThreadPoolExecutor) -> None:
    server = joined(processes, crew)
    calls = [pool.submit(crew.sessions[name].average, torch.tensor(v)) for name, v in (("w0", 1.0), ("w1", 2.0))]
    wait_until(offered(server, 2), "two vectors are there")
    crew.sessions.pop("w2").close()
    assert [float(call.result(DEADLINE_S)) for call in calls] == [1.5, 1.5]


def test_who_does_not_come_in_time_gets_the_others_average(
    processes: Processes, crew: Crew, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    server = joined(processes, crew)
    on_time = {name: torch.tensor(v) for name, v in (("w0", 1.0), ("w1", 2.0))}
    assert [float(x) for x in together(crew, pool, on_time, label="early", timeout_s=4.0)] == [1.5, 1.5]
    assert float(crew.sessions["w2"].average(torch.tensor(100.0), "early")) == 1.5
    assert "average 'early': 2 others were averaged before this worker came" in caplog.text
    with pytest.raises(RefusedError, match=r"'many': 1 of at least 3 vectors came in 0\.5 s"):
        crew.sessions["w0"].average(torch.tensor(1.0), "many", timeout_s=0.5, at_least=3)
    with pytest.raises(RefusedError, match="'many' is over"):
        crew.sessions["w1"].average(torch.tensor(1.0), "many")
    assert "Traceback" not in server.err


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGTERM]], ids=["killed", "told twice"])
def test_a_server_that_ends_while_vectors_are_gathered_changes_nothing(
    processes: Processes, crew: Crew, pool: ThreadPoolExecutor, signals: list[signal.Signals]
) -> None:
    """Two have offered and wait when it goes; its successor, without a disk, waits for the third as well."""
    first = joined(processes, crew)
    crew.train_until(lambda: status_of(first.address).round >= 2, "rounds go on")
    values = {"w0": 1.0, "w1": 2.0, "w2": 6.0}
    calls = [pool.submit(crew.sessions[name].average, torch.tensor(values[name])) for name in ("w0", "w1")]
    wait_until(offered(first, 2), "two vectors are there")
    first.signal(signals[0])
    if len(signals) > 1:
        first.says("once more to stop at once")
        first.signal(signals[1])
    first.wait()
    assert not any(call.done() for call in calls)
    second = processes.server(*crew.flags, listen=first.address)
    wait_until(offered(second, 2), "both have offered again")
    assert not any(call.done() for call in calls)
    last = crew.sessions["w2"].average(torch.tensor(values["w2"]))
    assert [float(call.result(DEADLINE_S)) for call in calls] == [3.0, 3.0]
    assert float(last) == 3.0
    assert "Traceback" not in second.err


def test_who_missed_the_answer_of_a_server_that_died_gets_it_from_the_others(
    processes: Processes, crew: Crew, pool: ThreadPoolExecutor
) -> None:
    """The third is cut off after it has offered, the others get the answer, and the server dies: the next one cannot
    compute the mean again, since those who have it keep their own vectors no more. The answer is theirs to change."""
    first = processes.server(*crew.flags, "--workers", "3")
    gate = Gate(first.address)
    try:
        crew.join({"w0": first.address, "w1": first.address, "w2": gate.address})
        crew.train_until(lambda: status_of(first.address).round >= 2, "rounds go on")
        values = {name: torch.randn(1000) for name in NAMES}
        cut_off = pool.submit(crew.sessions["w2"].average, values["w2"])
        wait_until(offered(first, 1), "its vector is there")
        gate.shut()
        got = together(crew, pool, {name: values[name] for name in ("w0", "w1")})
        assert torch.equal(got[0], got[1])
        torch.testing.assert_close(got[0], torch.stack(list(values.values())).mean(0))
        got[1].mul_(2.0)  # the caller's own: what the others are told does not change with it
        [left] = status_of(first.address).averages
        assert (left.offered, left.missing, left.answered) == (3, 1, True)
        assert not cut_off.done()
        first.signal(signal.SIGKILL)
        first.wait()
        second = processes.server(*crew.flags, listen=first.address)
        gate.open()
        assert torch.equal(cut_off.result(DEADLINE_S), got[0])
        wait_until(lambda: not status_of(second.address).averages, "the average is forgotten")
    finally:
        gate.close()


def test_what_makes_no_sense_is_refused_before_anything_is_sent(processes: Processes, crew: Crew) -> None:
    server = joined(processes, crew, names=("w0",))
    session = crew.sessions["w0"]
    for error, message, call in (
        (ConfigError, "only floating ones", lambda: session.average(torch.arange(3))),
        (NonFiniteError, "NaN or infinity", lambda: session.average(torch.tensor([1.0, float("nan")]))),
        (ConfigError, "out of range", lambda: session.average(torch.ones(1), timeout_s=0.0)),
        (ConfigError, "out of range", lambda: session.average(torch.ones(1), at_least=0)),
        (ConfigError, "out of range", lambda: session.average(torch.ones(1), at_least=1 << 31)),
        (ConfigError, "1 to 200 printable", lambda: session.average(torch.ones(1), "a\n")),
        (ConfigError, "up to 86400 s", lambda: session.average(torch.ones(1), timeout_s=1e6)),
    ):
        with pytest.raises(error, match=message):
            call()
    assert session.average(torch.empty(0, 3)).shape == (0, 3)
    assert not status_of(server.address).refused
    session.close()
    with pytest.raises(SessionFailedError, match="after the session was closed"):
        session.average(torch.ones(1))


def test_another_size_is_refused_and_the_others_have_theirs(
    processes: Processes, crew: Crew, pool: ThreadPoolExecutor
) -> None:
    server = joined(processes, crew)
    calls = [pool.submit(crew.sessions[name].average, torch.ones(3)) for name in ("w0", "w1")]
    wait_until(offered(server, 2), "two vectors are there")
    with pytest.raises(MalformedError, match="'#1' is of 3 values of float32, not 4 of float32"):
        crew.sessions["w2"].average(torch.ones(4))
    assert torch.equal(crew.sessions["w2"].average(torch.full((3,), 4.0), "#1"), torch.full((3,), 2.0))
    assert all(torch.equal(call.result(DEADLINE_S), torch.full((3,), 2.0)) for call in calls)


def test_a_server_without_room_says_so(processes: Processes, crew: Crew) -> None:
    joined(processes, crew, "--max-average-bytes", "1000", names=("w0",))
    session = crew.sessions["w0"]
    assert torch.equal(session.average(torch.ones(125)), torch.ones(125))
    with pytest.raises(RefusedError, match="no room for 504 more bytes, of 1000 for all averages"):
        session.average(torch.ones(126))


def test_a_session_that_ends_does_not_leave_its_caller_waiting(
    processes: Processes, crew: Crew, pool: ThreadPoolExecutor
) -> None:
    server = joined(processes, crew)
    coming: Future[Tensor] = pool.submit(crew.sessions["w0"].average, torch.ones(1))
    wait_until(offered(server, 1), "its vector is there")
    crew.join({"w0": server.address})  # a newer worker takes over the name
    with pytest.raises(LoscarError):
        coming.result(DEADLINE_S)


def test_a_call_that_fails_counts_so_that_the_next_ones_go_together(
    processes: Processes, crew: Crew, pool: ThreadPoolExecutor
) -> None:
    joined(processes, crew, names=("w0", "w1"))
    with pytest.raises(NonFiniteError):
        crew.sessions["w0"].average(torch.tensor(float("inf")))
    assert float(crew.sessions["w1"].average(torch.tensor(7.0), timeout_s=0.5)) == 7.0
    got = together(crew, pool, {"w0": torch.tensor(1.0), "w1": torch.tensor(3.0)})
    assert [float(x) for x in got] == [2.0, 2.0]


@pytest.mark.parametrize("how", ["interrupt", "close"])
def test_who_waits_is_freed_by_its_own_session(
    processes: Processes, crew: Crew, pool: ThreadPoolExecutor, how: str
) -> None:
    server = joined(processes, crew)
    coming = pool.submit(crew.sessions["w0"].average, torch.ones(1))
    wait_until(offered(server, 1), "its vector is there")
    getattr(crew.sessions["w0"], how)()
    with pytest.raises(InterruptedRunError if how == "interrupt" else SessionFailedError):
        coming.result(DEADLINE_S)


def test_a_label_is_not_used_twice(processes: Processes, crew: Crew, pool: ThreadPoolExecutor) -> None:
    server = joined(processes, crew)
    on_time = {name: torch.tensor(v) for name, v in (("w0", 1.0), ("w1", 2.0))}
    together(crew, pool, on_time, label="epoch", timeout_s=4.0)
    wait_until(lambda: [a.missing for a in status_of(server.address).averages] == [1], "two have taken it")
    with pytest.raises(RefusedError, match="has had the average 'epoch' already"):
        crew.sessions["w0"].average(torch.tensor(5.0), "epoch")


# --- bad calls ----------------------------------------------------------------------------------------------


def said(server: Server, *messages: bytes) -> str:
    """How a call with these messages ends."""
    with grpc.insecure_channel(server.address) as channel:
        stream = channel.stream_stream(AVERAGE)(iter(messages), timeout=DEADLINE_S)
        try:
            for _ in stream:
                pass
        except grpc.RpcError:
            pass
        return str(stream.details())


def test_calls_that_break_the_rules_are_refused_by_name_and_hold_nothing(processes: Processes, crew: Crew) -> None:
    server = joined(processes, crew, "--max-average-bytes", "1e6")
    engine = crew.sessions["w0"].engine

    def call(**changes: object) -> bytes:
        fields: dict[str, object] = {"label": "x", "size": 4, "dtype": "float32", "wait_s": 30.0}
        return encode_call(AverageCall(engine.run_id, engine.incarnation, **(fields | changes)))  # type: ignore[arg-type]

    values = encode_values(np.ones(4, np.float32).tobytes())
    wrong_run = AverageCall(b"?" * 16, engine.incarnation, "x", 4, "float32", 30.0)
    stranger = AverageCall(engine.run_id, b"?" * 16, "x", 4, "float32", 30.0)
    for messages, reason in (
        ((b"\xff",), "MalformedError: not an AverageRequest"),
        ((), "MalformedError: a call for an average ended in the middle"),
        ((values,), "MalformedError: a call for an average begins with what it is"),
        ((b"",), "MalformedError: an empty request for an average"),
        ((encode_call(wrong_run),), "WrongRunError: an average in run 3f3f"),
        ((encode_call(stranger),), "ConnectError: an average is for workers of a run"),
        ((call(label=""),), "MalformedError: a label of an average"),
        ((call(size=0),), "MalformedError: an average of no values"),
        ((call(size=1 << 60),), "RefusedError: the average 'x': no room"),
        ((call(dtype="int8"),), "MalformedError: an average of 'int8'"),
        ((call(wait_s=float("nan")),), "MalformedError: an average that waits nan s"),
        ((call(awaited=(b"short",)),), "MalformedError: incarnations of 16 bytes each, and 5 bytes more"),
        ((call(), call()), "MalformedError: the average 'x': 16 more bytes of values expected"),
        ((call(), encode_values(b"")), "MalformedError: the average 'x': 16 more bytes of values expected"),
        ((call(), encode_values(bytes(17))), "MalformedError: the average 'x': 16 more bytes of values expected"),
        ((call(), encode_values(bytes(8))), "MalformedError: a call for an average ended in the middle"),
        ((call(), encode_values(np.full(4, np.nan, np.float32).tobytes())), "NonFiniteError: the average 'x': NaN"),
        ((call(settled=(b"?" * 16,)), encode_values(bytes(8))), "MalformedError: a call for an average ended"),
    ):
        assert said(server, *messages).startswith(reason), (messages, said(server, *messages))
    assert status_of(server.address).refused["MalformedError"] == 14
    assert [(a.offered, a.missing) for a in status_of(server.address).averages] == [(0, 3)]
    crew.close()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "Traceback" not in server.err
