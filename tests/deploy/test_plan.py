"""`loscar plan`: its arithmetic against brute force, the protocol's code, measured disagreement and a virtual clock.

And what the command prints and refuses.
"""

from __future__ import annotations

import json
import re
import shlex
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loscar_core.config import ServerLimits
from loscar_core.errors import ConfigError
from loscar_core.messages import Contribution, Heartbeat, WorkerReport
from loscar_core.plan import RoundKind, RoundPlan, parts_of, slices
from loscar_core.replica import Replica
from loscar_core.selection import SelectionKind, selection_size
from loscar_core.server_round import ANSWER_BYTES, ServerRound
from loscar_core.values import ValueType, encode, payload_size
from loscar_deploy import options
from loscar_deploy.cli import build_parser, main
from loscar_deploy.link_spec import DirectionSpec, LinkSpec
from loscar_deploy.plan import DENSITIES, HIDDEN, Plan, Question, evaluate, make_plan
from loscar_deploy.plan_costs import REPORT, Round, framed, heartbeat_bytes
from loscar_deploy.plan_timing import Pace, Parts, Seat, arrivals, timing
from loscar_wire.mapping import encode_worker_message
from loscar_worker.tasks import load_task

ROOT = Path(__file__).parents[2]
MODEL = ["plan", "--params", "124e6", "--step-time", "350ms", "--link", "4g", "--workers", "8"]
SLOW = LinkSpec.parse("rtt=60ms,rate=400kbit")


def question(**changes: Any) -> Question:
    return replace(Question(1_000_000, (Seat(0.05, SLOW, 4),)), **changes)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# --- the time that a round takes ----------------------------------------------------------------------------

links = st.builds(
    LinkSpec,
    *[st.builds(DirectionSpec, st.floats(0, 2), st.floats(0, 0.1), st.none() | st.floats(1e3, 1e8))] * 2,
)
seats_of = st.lists(st.builds(Seat, st.floats(1e-3, 1), links, st.integers(1, 3)), min_size=1, max_size=4)
parts_in = st.lists(
    st.builds(Parts, st.integers(1, 9), st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1, max_size=3
)


@given(seats_of, parts_in, st.data())
@settings(deadline=None, derandomize=True)
def test_arrivals_are_those_of_sending_part_by_part(seats: list[Seat], parts: list[Parts], data: st.DataObject) -> None:
    starts = [data.draw(st.floats(0, 5)) for _ in seats]

    def seconds(size: int, direction: DirectionSpec) -> float:
        return size / direction.rate_bytes_per_s if direction.rate_bytes_per_s else 0.0

    sent, answered = list(starts), [0.0] * len(seats)
    for group in parts:
        for _ in range(group.count):
            sent = [t + seconds(group.up, s.link.up) for t, s in zip(sent, seats, strict=True)]
            there = max(t + s.link.up.delay_s + s.link.up.jitter_s for t, s in zip(sent, seats, strict=True))
            answered = [max(t, there) + seconds(group.down, s.link.down) for t, s in zip(answered, seats, strict=True)]
    expected = [t + s.link.down.delay_s + s.link.down.jitter_s + 0.25 for t, s in zip(answered, seats, strict=True)]
    assert arrivals(starts, seats, parts, 0.25) == pytest.approx(expected)


@given(seats_of, parts_in, st.floats(1.01, 100), st.integers(1, 20))
@settings(deadline=None, derandomize=True)
def test_a_faster_link_makes_blocking_rounds_shorter_and_training_wait_less(
    seats: list[Seat], parts: list[Parts], faster: float, local: int
) -> None:
    def quick(direction: DirectionSpec) -> DirectionSpec:
        rate = direction.rate_bytes_per_s
        return direction if rate is None else replace(direction, rate_bytes_per_s=rate * faster)

    better = [replace(s, link=replace(s.link, up=quick(s.link.up), down=quick(s.link.down))) for s in seats]
    before, after = (timing(s, parts, Pace(local, 0.0, 0), 0.0) for s in (seats, better))
    assert after.round_s <= before.round_s * (1 + 1e-9)
    for old, new in zip(before.seats, after.seats, strict=True):
        assert new.idle <= old.idle + 1e-9


@given(seats_of, parts_in, st.integers(1, 20))
@settings(deadline=None, derandomize=True)
def test_who_merges_when_the_answer_is_there_never_waits(seats: list[Seat], parts: list[Parts], local: int) -> None:
    found = timing(seats, parts, Pace(local, 0.0, None), 0.0)
    assert [s.idle for s in found.seats] == [0.0] * len(seats)
    assert all(s.overlap_steps >= 1 and max(s.up, s.down) <= 1 + 1e-9 for s in found.seats)


def test_a_round_by_hand() -> None:
    """1000 bytes each way at 1000 and 2000 bytes a second, 0.1 s each way: 1.7 s in flight, 17 steps of 0.1 s."""
    link = LinkSpec(DirectionSpec(0.1, 0.0, 1000.0), DirectionSpec(0.1, 0.0, 2000.0))
    seats, parts = [Seat(0.1, link)], [Parts(1, 1000, 1000)]
    overlapped = timing(seats, parts, Pace(3, 0.0, None), 0.0)
    assert overlapped.flight_s == pytest.approx(1.7)
    assert overlapped.round_s == pytest.approx(2.0)
    assert (overlapped.seats[0].overlap_steps, overlapped.seats[0].idle) == (17, 0)
    assert (overlapped.seats[0].up, overlapped.seats[0].down) == (pytest.approx(0.5), pytest.approx(0.25))
    blocking = timing(seats, parts, Pace(3, 0.0, 0), 0.0)
    assert blocking.seats[0].idle == pytest.approx(1.7 / 2.0)
    fixed = timing(seats, parts, Pace(3, 0.0, 10), 0.0)
    assert fixed.seats[0].idle == pytest.approx(0.7 / 2.0)
    assert timing(seats, parts, Pace(None, 0.25, 0), 0.0).seats[0].local_steps == 3


# --- bytes and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_type", list(ValueType))
@pytest.mark.parametrize(
    ("selection", "count"),
    [(SelectionKind.SWEEP, 70_001), (SelectionKind.RANDOM, 333), (SelectionKind.BLOCK, 640), (SelectionKind.ALL, 1)],
)
def test_payload_is_that_of_the_protocols_parts(selection: SelectionKind, count: int, value_type: ValueType) -> None:
    """The mean of whole sweeps; statistics as float32."""
    dimension, statistics = 640_000, 300_000
    carried = Round(dimension, statistics, count, selection, value_type, 3)
    rounds = round(carried.rounds_per_coordinate) if selection is SelectionKind.SWEEP else 1
    sizes = []
    for number in range(1, rounds + 1):
        selected = selection_size(
            selection, 0, number, dimension, dimension if carried.selected == dimension else count
        )
        sizes.append(
            sum(
                payload_size(ValueType.FLOAT32 if p.statistics else value_type, p.size)
                for p in parts_of(selected, statistics)
            )
        )
    assert carried.payload == pytest.approx(sum(sizes) / rounds, abs=4)
    up, down = carried.bytes_each_way()
    extra = 64 * sum(p.count for p in carried.parts()) + 200
    assert carried.payload < up <= 1.01 * carried.payload + extra
    assert carried.payload < down <= 1.01 * carried.payload + extra


@pytest.mark.parametrize("value_type", [ValueType.FLOAT32, ValueType.INT8])
def test_the_servers_memory_is_what_a_round_allocates(value_type: ValueType) -> None:
    """With all contributions waiting for the one in the lowest slot, which is the worst case."""
    dimension, workers, count = 2_000_000, 5, 500_000
    plan = RoundPlan(1, RoundKind.TRAIN, SelectionKind.SWEEP, count, value_type)
    payloads = {
        size: encode(np.ones(size, np.float32), value_type)
        for p in parts_of(plan.size(0, dimension))
        for _, size in slices(p, ANSWER_BYTES // value_type.itemsize)
    }
    tracemalloc.start()
    try:
        replica = Replica.initial(np.zeros(dimension, np.float32), np.empty(0, np.float32))
        fetched = replica.vector.copy()  # as for `FetchModel`
        residual = None if value_type is ValueType.FLOAT32 else np.zeros(dimension, np.float32)
        slots = {i: bytes([i]) * 16 for i in range(workers)}
        opened = ServerRound(plan, 0, replica, residual, slots, ServerLimits())
        for slot in reversed(range(workers)):
            for part in opened.parts:
                for offset, size in slices(part, ANSWER_BYTES // value_type.itemsize):
                    values = bytes(bytearray(payloads[size]))
                    opened.add(slot, Contribution(1, 1, part.index, offset, values, opened.checksum))
        answers = [opened.close(part.index) for part in opened.parts]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(answers) == len(opened.parts)
    assert fetched.size == dimension
    carried = Round(dimension, 0, count, SelectionKind.SWEEP, value_type, workers)
    assert 0.7 * carried.server_memory() < peak <= 1.05 * carried.server_memory()


# --- disagreement -------------------------------------------------------------------------------------------


def test_the_disagreement_is_what_was_measured() -> None:
    """The formula against the simulations of benchmarks/claim_disagreement.py: η = 0.1, σ = 1."""
    results = json.loads((ROOT / "benchmarks" / "results" / "claim_disagreement.json").read_text(encoding="utf-8"))
    runs = [r for r in results["runs"] if r["merge"] == "delay-corrected"]
    assert {r["selection"] for r in runs} == {"random", "sweep"}
    for run in runs:
        carried = Round(
            12_000, 0, round(run["density"] * 12_000), SelectionKind(run["selection"]), ValueType.FLOAT32, 8
        )
        expected = 0.1**2 * carried.noise_steps(run["local_steps"], run["overlap_steps"])
        assert expected == pytest.approx(run["theory"])
        assert np.mean(run["measured"]) == pytest.approx(expected, rel=0.05)


@given(
    st.integers(2, 50),
    st.sampled_from([SelectionKind.SWEEP, SelectionKind.RANDOM]),
    st.integers(1, 100),
    st.integers(0, 100),
    st.sampled_from(DENSITIES[:-1]),
)
@settings(deadline=None, derandomize=True)
def test_disagreement_grows_with_steps_and_workers_and_shrinks_with_density(
    workers: int, selection: SelectionKind, local: int, overlap: int, density: float
) -> None:
    def noise(workers: int, local: int, overlap: int, density: float) -> float:
        count = round(density * 10**6)
        return Round(10**6, 0, count, selection, ValueType.FLOAT32, workers).noise_steps(local, overlap)

    here = noise(workers, local, overlap, density)
    assert noise(workers, local, overlap + 1, density) > here
    assert noise(workers, local + 1, overlap, density) >= here
    assert noise(workers + 1, local, overlap, density) >= here
    assert noise(workers, local, overlap, density / 2) > here


# --- the choice ---------------------------------------------------------------------------------------------


def test_no_setting_that_is_tried_disagrees_less() -> None:
    asked = question()
    chosen, best = make_plan(asked)
    assert chosen in best
    assert [p.round.value_type for p in best] == [ValueType.FLOAT32, ValueType.BFLOAT16, ValueType.INT8]
    share = max(max(s.up, s.down) for s in chosen.timing.seats)
    assert share <= asked.link_share
    assert chosen.hidden
    tried: list[Plan] = []
    for density in DENSITIES:
        for local in (1, 2, 4, 8, 16, 32, 64, 128):
            plan = evaluate(asked, density, chosen.round.value_type, Pace(local, 0.0, None))
            if max(max(s.up, s.down) for s in plan.timing.seats) <= asked.link_share:
                tried.append(plan)
    assert len(tried) > 20
    assert all(chosen.most_noise_steps <= p.most_noise_steps * (1 + 1e-9) for p in tried)


def test_a_narrower_type_is_taken_only_where_it_makes_a_difference() -> None:
    fast, slow = LinkSpec.parse("rtt=1s,rate=1gbit"), LinkSpec.parse("rtt=1ms,rate=1mbit")
    for link, taken in ((fast, ValueType.FLOAT32), (slow, ValueType.INT8)):
        chosen, best = make_plan(question(seats=(Seat(0.05, link, 4),)))
        assert chosen.round.value_type is taken
        assert chosen.most_noise_steps <= 1.1 * min(p.most_noise_steps for p in best)


def test_what_is_decided_is_kept() -> None:
    asked = question(density=0.03, value_type=ValueType.FLOAT16, local_steps=7, selection=SelectionKind.RANDOM)
    chosen, best = make_plan(asked)
    assert best == (chosen,)
    assert (chosen.density, chosen.pace.local_steps, chosen.pace.overlap_steps) == (0.03, 7, None)
    assert (chosen.round.value_type, chosen.round.selected) == (ValueType.FLOAT16, 30_000)
    blocking, _ = make_plan(replace(asked, overlap_steps=0))
    assert blocking.idle > HIDDEN
    assert not blocking.hidden
    by_time, _ = make_plan(question(interval_s=0.33))
    assert (by_time.pace.local_steps, by_time.pace.interval_s) == (None, 0.33)
    dense, _ = make_plan(question(selection=SelectionKind.ALL))
    assert dense.round.selected == 1_000_000


def test_a_pinned_overlap_is_planned_to_be_hidden_where_it_can_be() -> None:
    chosen, _ = make_plan(question(overlap_steps=40))
    assert chosen.hidden
    assert chosen.overlap_steps == 40
    impossible, _ = make_plan(question(overlap_steps=1))
    assert not impossible.hidden


def test_unequal_workers_go_by_the_clock() -> None:
    seats = (Seat(0.05, SLOW, 2), Seat(0.2, SLOW))
    chosen, _ = make_plan(question(seats=seats))
    assert chosen.pace.local_steps is None
    fast, slow = chosen.timing.seats
    assert fast.overlap_steps > 2 * slow.overlap_steps
    weighted = (2 * fast.overlap_steps + slow.overlap_steps) / 3
    assert chosen.overlap_steps == pytest.approx(weighted)


def test_limits_are_kept() -> None:
    free, _ = make_plan(question())
    short, _ = make_plan(question(max_overlap=10))
    assert short.overlap_steps <= 10 < free.overlap_steps
    budget = sum(free.bytes_per_day) / 3
    frugal, _ = make_plan(question(max_daily_bytes=budget))
    assert sum(frugal.bytes_per_day) <= budget
    assert frugal.most_noise_steps > free.most_noise_steps
    loose, _ = make_plan(question(max_noise_steps=3 * free.most_noise_steps, link_share=0.3))
    assert loose.most_noise_steps <= 3 * free.most_noise_steps
    assert sum(loose.bytes_per_day) < sum(free.bytes_per_day)


@pytest.mark.parametrize(
    ("limit", "unit"),
    [
        ({"max_overlap": 0}, "0 steps in flight: the least is"),
        ({"max_daily_bytes": 1e6}, "1e+06 bytes a day: the least is"),
        ({"max_noise_steps": 1.5}, "1.5 steps' noise of disagreement: the least is"),
    ],
)
def test_limits_that_nothing_keeps_are_named(limit: dict[str, Any], unit: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(unit)):
        make_plan(question(**limit))


def test_a_long_final_round_gets_the_time_that_it_takes() -> None:
    small, _ = make_plan(question(seats=(Seat(0.05, LinkSpec.parse("wan"), 4),)))
    assert small.round_cap_s is None
    large, _ = make_plan(question(dimension=100_000_000, seats=(Seat(0.05, LinkSpec.parse("4g"), 4),)))
    assert large.final_s > 4e8 / 1e6  # 400 MB at 1 MB/s up
    assert large.round_cap_s is not None
    assert large.round_cap_s > large.final_s


# --- against the protocol under a virtual clock -------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        ["--workers", "2", "--link", "rtt=60ms,rate=400kbit"],
        ["--workers", "3", "--link", "rtt=60ms,rate=400kbit", "--overlap-steps", "0", "--local-steps", "10"],
        ["--workers", "2", "--link", "rtt=200ms,up=300kbit,down=1mbit", "--overlap-steps", "6", "--density", "0.5"],
        ["--workers", "3", "--link", "rtt=60ms,rate=400kbit;rtt=600ms,rate=1mbit;none", "--slowdown", "1,2,3.3"],
        ["--workers", "2", "--link", "satellite,rate=64kbit", "--selection", "block", "--max-staleness", "40"],
    ],
    ids=["planned", "blocking", "fixed", "unequal", "block"],
)
def test_a_simulated_run_is_as_planned(setting: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    model = load_task("digits").make_model(0)
    size = sum(p.numel() for p in model.parameters())
    plan = planned(capsys, "plan", "--task", "digits", "--params", str(size), "--step-time", "20ms", *setting)
    command = ["simulate", *shlex.split(plan["commands"]["try"])[2:]]
    assert main([*command, "--rounds", "20", "--final-round", "none", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)
    days = run["virtual_seconds"] / 86_400
    expected = days * plan["worker_payload_bytes_per_day"]
    for sent in (*run["bytes_up"], *run["bytes_down"]):
        assert sent == pytest.approx(expected, rel=0.1)
    for way in ("up", "down"):
        wire = run[f"bytes_wire_{way}"]
        if way == "up":
            wire[0] -= plan["start_bytes"]  # the first worker hands over the initial model, which the others have
        for sent in wire:
            assert sent == pytest.approx(days * plan[f"worker_bytes_{way}_per_day"], rel=0.1)
    for measured, idle in zip(run["idle_fraction"], plan["idle_fraction"], strict=True):
        assert measured == pytest.approx(idle, rel=0.1, abs=0.01)
    for steps, local, overlap in zip(
        run["steps"], plan["local_steps_expected"], plan["overlap_steps_expected"], strict=True
    ):
        assert steps / run["rounds"] == pytest.approx(local + overlap, rel=0.1)


# --- the command --------------------------------------------------------------------------------------------


def test_the_printed_commands_have_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *MODEL, "--server", "train.example.org:50051", "--task", "my_task:make")
    lines = plan["commands"]
    server = build_parser().parse_args(shlex.split(lines["server"])[1:])
    attempt = build_parser().parse_args(shlex.split(lines["try"])[1:])
    for args in (server, attempt):
        config = options.run_config(args)
        assert config.density == plan["density"]
        assert config.value_type.value == plan["wire_dtype"]
        assert config.selection.value == plan["selection"]
        assert config.local_steps == plan["local_steps"]
        assert config.overlap_steps is None
        assert options.server_limits(args, 8).round_cap_s == plan["round_cap_seconds"]
    assert (server.listen, server.workers) == ("0.0.0.0:50051", "8")
    assert (attempt.link, attempt.step_time, attempt.slowdown) == ("4g", "350ms", "1")
    workers = [build_parser().parse_args(shlex.split(line)[1:]) for line in lines["workers"]]
    assert [w.slot for w in workers] == [str(i) for i in range(8)]
    for worker in workers:
        assert (worker.server, worker.task, worker.workers) == ("train.example.org:50051", "my_task:make", "8")


def test_a_heartbeat_is_counted_with_all_that_it_may_tell() -> None:
    for name, value in asdict(REPORT).items():
        nothing = {name: None if WorkerReport.__dataclass_fields__[name].default is None else 0}
        less = len(encode_worker_message(Heartbeat(1 << 55, 1000, replace(REPORT, **nothing))))
        assert framed(less) < heartbeat_bytes()[0], f"{name} is {value}, which takes nothing"


def test_a_fleet_costs_the_server_what_its_workers_send(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *MODEL, "--lr", "0.1", "--noise", "0.02")
    assert plan["server_bytes_in_per_day"] == 8 * plan["worker_bytes_up_per_day"]
    assert plan["server_bytes_out_per_day"] == 8 * plan["worker_bytes_down_per_day"]
    assert plan["disagreement_variance"] == pytest.approx(plan["disagreement_noise_steps"] * 0.002**2)
    per_day = plan["round_wire_bytes_up"] * 86_400 / plan["round_seconds"]
    assert 0 < plan["worker_bytes_up_per_day"] - per_day < 1e7  # heartbeats
    assert len(plan["idle_fraction"]) == len(plan["overlap_steps_expected"]) == 8
    assert plan["steps_per_coordinate"] == pytest.approx(
        plan["rounds_per_coordinate"] * (plan["local_steps_expected"][0] + plan["overlap_steps_expected"][0])
    )


WRONG = [
    (["--params", "0"], "--params '0' is below 1"),
    (["--params", "big"], "--params 'big' is not a whole number"),
    (["--step-time", "0ms"], "--step-time '0ms' is no time at all"),
    (["--step-time", "5"], "--step-time '5' is not a duration"),
    (["--link", "5g"], "link: unknown item '5g'"),
    (["--link", "4g;wan"], "2 specs given"),
    (["--workers", "0"], "--workers '0' is below 1"),
    (["--slowdown", "1,2"], "--slowdown '1,2' has 2 values for 8 workers"),
    (["--density", "1.5"], "--density 1.5 is above 1"),
    (["--density", "0"], "--density '0' is not above 0"),
    (["--density", "nan"], "--density 'nan' is not a finite number"),
    (["--selection", "topk"], "--selection topk cannot be planned: use sweep"),
    (["--selection", "some"], "--selection 'some' is not one of"),
    (["--selection", "all", "--density", "0.5"], "--density 0.5 with --selection all"),
    (["--wire-dtype", "int4"], "--wire-dtype 'int4' is not one of float32"),
    (["--local-steps", "auto"], "--local-steps 'auto' is not a whole number"),
    (["--local-steps", "3", "--sync-interval", "1s"], "--local-steps and --sync-interval: give one of them"),
    (["--local-steps", "0", "--overlap-steps", "0"], "would average without ever training"),
    (["--overlap-steps", "some"], "--overlap-steps 'some' is neither a number of steps nor auto"),
    (["--link-share", "1.2"], "--link-share 1.2 is above 1"),
    (["--max-traffic", "-1"], "--max-traffic '-1' is not above 0"),
    (["--max-staleness", "0"], "no setting that was tried keeps to 0 steps in flight"),
    (["--lr", "0.1"], "--lr and --noise belong together"),
    (["--server", "nowhere"], "--server"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_wrong_values_are_one_line(wrong: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MODEL, *wrong]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert text in printed.err
    assert "Traceback" not in printed.err


def test_the_pages_example_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n\$ (loscar plan [^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for command, shown in blocks:
        assert main(shlex.split(command)[1:]) == 0
        printed = [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()]
        assert printed == shown.strip().splitlines()
