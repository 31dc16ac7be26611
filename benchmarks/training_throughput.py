"""Training throughput while rounds run without a pause, against the same training without any synchronisation.

One worker trains a stack of feed-forward layers with 12.6 M parameters on one core. Segments with a session and
segments without one take turns in the same process, with the same steps; those with one join a run at density 0.01,
every round of which begins at the first step after the last one's merge (N = 1, automatic overlap), over an emulated
link of 50 Mbit/s and 100 ms. Server, links and a second worker, which takes part and trains nothing, share the other
core. The figure is the median, over the pairs, of the steps a second with a session over those before and after it
without (target: at least 0.98). The same of segments that all have no session says how uneven the machine is.

    python benchmarks/training_throughput.py                       about three minutes; two cores
    python benchmarks/training_throughput.py --pairs 2 --seconds 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _bench

if TYPE_CHECKING:
    from torch import nn

TARGET = 0.98
LINK = "rtt=100ms,rate=50mbit"
DENSITY = 0.01
WIDTH, LAYERS, BATCH = 512, 6, 32
STEP_S = 0.01
DIMENSION = LAYERS * (2 * WIDTH * 4 * WIDTH + 5 * WIDTH)
TRAINING_CORE, OTHER_CORE = 0, 1


def on_core(core: int) -> None:
    """Keep this process, and what it starts, on one core, where the system can do that and has it."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {core})


@contextlib.contextmanager
def run_with_a_second_worker() -> Iterator[str]:
    """A server, two links and an idle worker on the other core; yields the address at the first worker's link."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: on_core(OTHER_CORE))
        )
        return started[-1]

    def first_line(arguments: list[str]) -> str:
        out = start(_bench.loscar(arguments)).stdout
        assert out is not None
        return out.readline()

    try:
        flags = ["server", "--listen", "127.0.0.1:0", "--json", "--log-level", "warning", "--workers", "2"]
        flags += ["--density", str(DENSITY), "--local-steps", "1", "--overlap-steps", "auto"]
        server = json.loads(first_line([*flags, "--final-round", "none", "--linger", "0s"]))["listening"]
        addresses = []
        for _ in range(2):
            said = first_line(["link", "--listen", "127.0.0.1:0", "--to", server, LINK])
            addresses.append(said.split("listening on ")[1].split(",")[0])
        start([sys.executable, str(Path(__file__)), "--second", addresses[1]])
        yield addresses[0]
    finally:
        for process in reversed(started):
            process.kill()
        for process in started:
            process.communicate()


def make_model() -> nn.Module:
    from torch import nn

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    return nn.Sequential(*(block() for _ in range(LAYERS)))


def second(address: str) -> None:
    """The second worker: takes part in every round, and trains nothing."""
    import loscar_worker

    with loscar_worker.join(address, make_model()) as session:
        while not session.finished:
            time.sleep(STEP_S)
            session.step()


def train(pairs: int, seconds: float) -> None:
    """The measured process: prints the pairs' steps a second, and what the rounds did."""
    on_core(TRAINING_CORE)
    import torch
    from torch import nn

    import loscar_worker

    torch.set_num_threads(1)
    torch.manual_seed(0)

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    inputs, targets = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)

    def step() -> torch.Tensor:
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    def segment(session: Any = None) -> float:
        """Steps a second over some seconds."""
        count, started = 0, time.perf_counter()
        while (now := time.perf_counter()) < started + seconds:
            loss = step()
            if session is not None:
                session.step(loss=loss)
            count += 1
        return count / (now - started)

    segment()
    merged: list[int] = []
    found: list[dict[str, Any]] = []
    for _ in range(pairs):
        pair: dict[str, Any] = {"without": segment(), "again": segment()}
        with run_with_a_second_worker() as address:
            merged.clear()
            with loscar_worker.join(address, model, on_round=lambda record: merged.append(record.round)) as session:
                warm_end = time.perf_counter() + max(1.0, seconds / 5)
                while time.perf_counter() < warm_end:
                    session.step(loss=step())
                rounds, service, idle = len(merged), session.service_s, session.idle_s
                pair["with"] = segment(session)
                pair["rounds_per_s"] = (len(merged) - rounds) / seconds
                pair["service_share"] = (session.service_s - service) / seconds
                pair["idle_share"] = (session.idle_s - idle) / seconds
        pair["after"] = segment()
        found.append(pair)
        print({name: round(value, 4) for name, value in pair.items()}, file=sys.stderr, flush=True)
    print(json.dumps(found), flush=True)


def arguments_of() -> argparse.Namespace:
    parser = _bench.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of segments (default 5)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each segment (default 6)")
    parser.add_argument("--second", metavar="ADDRESS", help="be the second worker there")
    parser.add_argument("--train", action="store_true", help="be the process that trains")
    return parser.parse_args()


def main() -> int:
    arguments = arguments_of()
    if arguments.second:
        second(arguments.second)
        return 0
    if arguments.train:
        train(arguments.pairs, arguments.seconds)
        return 0
    command = [sys.executable, str(Path(__file__)), "--train", "--pairs", str(arguments.pairs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--seconds", str(arguments.seconds)], stdout=subprocess.PIPE, text=True, env=environment, check=False
    )
    if done.returncode:
        sys.exit(f"the training process ended with status {done.returncode}")
    pairs = json.loads(done.stdout)
    # Segments without a session lie on both sides of the one with it, since the machine's speed drifts.
    ratios = [2 * p["with"] / (p["again"] + p["after"]) for p in pairs]
    noise = [2 * p["again"] / (p["without"] + p["after"]) for p in pairs]
    ratio = statistics.median(ratios)

    def median(what: str) -> float:
        return statistics.median(pair[what] for pair in pairs)

    headings = ["", "steps/s", "× without", "pairs", "rounds/s", "in session.step()", "waiting"]
    rows = [
        [
            "rounds without a pause",
            f"{median('with'):.2f}",
            f"{ratio:.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
            f"{median('rounds_per_s'):.1f}",
            f"{median('service_share'):.2%}",
            f"{median('idle_share'):.2%}",
        ],
        [
            "no synchronisation",
            f"{median('again'):.2f}",
            f"{statistics.median(noise):.3f}",
            f"{min(noise):.3f} to {max(noise):.3f}",
            "",
            "",
            "",
        ],
    ]
    result = {
        "targets": {"ratio": TARGET},
        "dimension": DIMENSION,
        "density": DENSITY,
        "link": LINK,
        "ratio": round(ratio, 4),
        "ratios": [round(r, 4) for r in ratios],
        "noise": [round(r, 4) for r in noise],
        "met": ratio >= TARGET and median("rounds_per_s") > 0,
        "pairs": pairs,
        "table": {"headings": headings, "rows": rows},
    }
    text = _bench.table(headings, rows) + f"\n{ratio:.3f} × the throughput without synchronisation (target {TARGET})"
    return _bench.finish("training_throughput", arguments, result, text)


if __name__ == "__main__":
    sys.exit(main())
