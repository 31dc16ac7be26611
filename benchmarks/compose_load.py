"""The compose stack over slow and lossy links: what rounds cost, and what a training reaches.

For links of 0, 50 and 200 ms round trip, and of 50 ms where one packet in a hundred is lost, each worker behind an
emulated link of its own (`deploy/compose.links.yaml`): `loscar loadtest` with eight synthetic workers against the
server's container, and then a real training, the task `digits` on three workers with 0.6, 0.3 and 0.15 of a core. Lost
packets are dropped by netfilter between the containers, below TCP; delays are the emulator's, above it. Where no
packets can be dropped, all connections of a worker are reset every ten seconds instead. Targets: a consensus accuracy
of 0.9, and no worker that waits for more than 5 % of its time.

    make loadtest                       about five minutes, and the images; needs root and a container engine
    make loadtest ARGS="--resets"       resets in place of loss
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import _bench
import numpy as np
from engine import Engine, NoEngine, call, sweep, wait_until
from figures import result_table
from stack import Stack, packet_rules

NAME = "compose_load"
ACCURACY, IDLE = 0.9, 0.05
SYNTHETIC, DIMENSION, DENSITY = 8, 1_000_000, 0.01
WORKERS = 3
LIMIT_S = 900.0
"""For all cases; the images are built before."""
TRAINING_S = 300.0
EVENTS = "/var/lib/loscar/checkpoints/events.jsonl"
PERCENTILES = (50, 95, 99)
AWAY = ("stream-closed", "lease-expired")
EVALUATE = (
    "loscar fetch --server server:50051 --out /tmp/model.safetensors >&2 && "
    "loscar evaluate /tmp/model.safetensors --task digits --json"
)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of link.

    Attributes:
        label: for people.
        link: for the emulator.
        loss: share of the packets between containers that are dropped.
    """

    label: str
    link: str
    loss: float = 0.0


PLAIN = (Case("0 ms", "none"), Case("50 ms", "rtt=50ms"), Case("200 ms", "rtt=200ms"))
LOSSY = Case("50 ms, 1 % of packets lost", "rtt=50ms", 0.01)
RESET = Case("50 ms, reset every 10 s", ",".join(["rtt=50ms", *(f"reset@{t}s" for t in range(10, 300, 10))]))


@contextlib.contextmanager
def lossy(stack: Stack, case: Case) -> Iterator[None]:
    """While this is open, packets between the stack's containers are lost as the case says."""
    if not case.loss:
        yield
        return
    network = json.loads(call("docker", "network", "inspect", f"{stack.project}_run").stdout)[0]
    subnet = network["IPAM"]["Config"][0]["Subnet"]
    chance = ("-m", "statistic", "--mode", "random", "--probability", str(case.loss))
    with packet_rules(("-s", subnet, "-d", subnet, *chance, "-j", "DROP")):
        yield


def can_lose_packets() -> bool:
    """Whether netfilter on this machine drops packets by chance; tried with a rule that no packet meets."""
    rule = ("-s", "127.0.0.2", "-d", "127.0.0.3", "-m", "statistic", "--mode", "random", "--probability", "0.01")
    try:
        with packet_rules((*rule, "-j", "DROP")):
            return True
    except (AssertionError, OSError):
        return False


@contextlib.contextmanager
def stack_with(engine: Engine, **settings: str) -> Iterator[Stack]:
    stack = Stack(engine, ("links",), settings)
    try:
        yield stack
    finally:
        stack.close()


def load(engine: Engine, case: Case, rounds: int) -> dict[str, Any]:
    """`loscar loadtest` in a worker's container, against the server's."""
    flags = f"--workers {SYNTHETIC} --density {DENSITY} --final-round none"
    with stack_with(engine, LOSCAR_ROUNDS="1000000", LOSCAR_SERVER_ARGS=flags) as stack:
        stack.up("server")
        stack.status_when(lambda s: True, "the server answers")
        with lossy(stack, case):
            done = stack.compose(
                "run", "--rm", "-T", "--no-deps", "worker", "loadtest", "--server", "server:50051", "--json",
                "--workers", str(SYNTHETIC), "--params", str(DIMENSION), "--density", str(DENSITY),
                "--rounds", str(rounds), "--link", case.link, "--no-reference",
            )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {key: found[key] for key in ("rounds", "seconds", "round_ms", "payload_bytes_per_s")}


def train(engine: Engine, case: Case, rounds: int) -> dict[str, Any]:
    """A real training; its workers are told apart by their limits."""
    links = dict.fromkeys(("LOSCAR_LINK", "LOSCAR_LINK_SLOW", "LOSCAR_LINK_SLOWER"), case.link)
    cpus = {"LOSCAR_CPUS": "0.6", "LOSCAR_CPUS_SLOW": "0.3", "LOSCAR_CPUS_SLOWER": "0.15"}
    flags = f"--workers {WORKERS} --events {EVENTS}"
    with stack_with(
        engine, LOSCAR_ROUNDS=str(rounds), LOSCAR_LINGER="10m", LOSCAR_SERVER_ARGS=flags, **links, **cpus
    ) as stack:
        stack.up()
        last: dict[str, Any] = {}

        def over() -> dict[str, Any] | None:
            status = stack.status()
            if status is None:
                return None
            if len(status["members"]) == WORKERS and status["phase"] == "running":
                last.update(status)
            return status if status["phase"] == "finished" else None

        with lossy(stack, case):
            end = wait_until(over, f"{rounds} rounds over {case.label}", TRAINING_S)
        written = stack.execute(stack.container("server"), "cat", EVENTS).stdout
        tested = stack.compose("run", "--rm", "-T", "--no-deps", "--entrypoint", "sh", "worker", "-c", EVALUATE)
    events = [json.loads(line) for line in written.splitlines()]
    times = [1e3 * event["seconds"] for event in events if event["event"] == "round"]
    reports = [member["report"] for member in last["members"]]
    return {
        "rounds": end["round"],
        "seconds": end["elapsed_s"],
        "round_ms": {f"p{p}": round(float(np.percentile(times, p)), 1) for p in PERCENTILES},
        "payload_bytes_per_s": round((end["bytes_in"] + end["bytes_out"]) / end["elapsed_s"]),
        "idle_shares": [round(r["idle_s"] / max(r["run_s"], 1e-9), 4) for r in reports],
        "steps": [r["steps"] for r in reports],
        "lost_connections": sum(e["event"] == "gone" and e["reason"] in AWAY for e in events),
        "accuracy": json.loads(tested.stdout.splitlines()[-1])["accuracy"],
    }


def row(case: Case, loaded: dict[str, Any], trained: dict[str, Any]) -> list[str]:
    def times(found: dict[str, float]) -> str:
        return " / ".join(f"{value:.0f}" for value in found.values())

    return [
        case.label,
        times(loaded["round_ms"]),
        f"{loaded['payload_bytes_per_s'] / 1e6:.2f}",
        times(trained["round_ms"]),
        f"{trained['payload_bytes_per_s'] / 1e3:.1f}",
        f"{max(trained['idle_shares']):.1%}",
        f"{trained['accuracy']:.3f}",
    ]


HEADINGS = [
    "link",
    f"load test, {SYNTHETIC} workers: round ms p50/p95/p99",
    "goodput, MB/s",
    f"training, {WORKERS} workers: round ms p50/p95/p99",
    "goodput, kB/s",
    "idle at most",
    "accuracy",
]


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="rounds of each load test (default 40)")
    parser.add_argument("--training-rounds", type=int, default=40, help="rounds of each training (default 40)")
    parser.add_argument("--resets", action="store_true", help="reset connections in place of losing packets")
    arguments = parser.parse_args()
    try:
        engine = Engine.find()
        sweep()
        engine.build()
    except NoEngine as missing:
        sys.exit(f"no load test of containers here: {missing}")
    resets = arguments.resets or not can_lose_packets()
    started = time.monotonic()
    runs, rows = [], []
    for case in (*PLAIN, RESET if resets else LOSSY):
        if time.monotonic() > started + LIMIT_S:
            sys.exit(f"not done within {LIMIT_S:g} s: {case.label} was next")
        loaded = load(engine, case, arguments.rounds)
        trained = train(engine, case, arguments.training_rounds)
        print(case.label, loaded, trained, file=sys.stderr, flush=True)
        runs.append({**asdict(case), "load": loaded, "training": trained})
        rows.append(row(case, loaded, trained))
    accuracy = min(run["training"]["accuracy"] for run in runs)
    idle = max(max(run["training"]["idle_shares"]) for run in runs)
    result = {
        "targets": {"accuracy": ACCURACY, "idle": IDLE},
        "accuracy_min": accuracy,
        "idle_max": idle,
        "synthetic": {"workers": SYNTHETIC, "coordinates": DIMENSION, "density": DENSITY},
        "wall_seconds": round(time.monotonic() - started, 1),
        "met": accuracy >= ACCURACY and idle <= IDLE,
        "runs": runs,
        "table": {"headings": HEADINGS, "rows": rows},
    }
    status = _bench.finish(NAME, arguments, result, _bench.table(HEADINGS, rows))
    if arguments.out is None:
        (_bench.RESULTS / f"{NAME}.md").write_text(result_table(NAME) + "\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
