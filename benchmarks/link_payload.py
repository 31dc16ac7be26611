"""How much of what a slow link carries is payload: four workers, each behind an emulated link of 100 Mbit/s.

The load test's synthetic workers, over `loscar link`'s emulator, average a vector densely as bfloat16, and a hundredth
of a larger one as float32. Counted at the emulator, for each link and direction, from one commit to the next: the bytes
that it carried, in which gRPC's framing, heartbeats and messages about rounds are included (TCP's and IP's are not,
since the emulator is above them). Target: at least 0.95 of them are values. Beside it: how much of the link's rate was
used from the first to the last byte of a transfer, which is what a member waits for.

    python benchmarks/link_payload.py            about two minutes
    python benchmarks/link_payload.py --rounds 3
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from typing import Any

import _bench
import uvloop

from loscar_core.selection import SelectionKind
from loscar_core.values import ValueType, payload_size
from loscar_deploy.link import LinkFarm
from loscar_deploy.link_spec import LinkSpec
from loscar_deploy.loadtest import LoadPlan, LoadTest, SyntheticWorker
from loscar_wire.transport import format_address, parse_address

TARGET = 0.95
WORKERS = 4
RATE_BYTES = 100e6 / 8
LINK = "rtt=20ms,rate=100mbit"
SAMPLE_S = 0.005
EDGE = 0.01
"""Share of a transfer's bytes that may come before it counts as begun, and after it as ended: small messages."""
# selection, density, value type, coordinates
CASES = {
    "dense bfloat16": ("all", 1.0, "bfloat16", 12_500_000),
    "0.01 sweep, float32": ("sweep", 0.01, "float32", 50_000_000),
}

Counts = tuple[float, int, int]
"""Seconds, and bytes up and down so far."""


class Measured(LoadTest):
    """A load test that notes what its links have carried at every commit, and in between.

    Attributes:
        commits: of each worker, by its number.
        samples: of each worker's link.
    """

    def __init__(self, plan: LoadPlan, farm: LinkFarm) -> None:
        super().__init__(plan)
        self._farm = farm
        self.commits: list[list[Counts]] = [[] for _ in farm.links]
        self.samples: list[list[Counts]] = [[] for _ in farm.links]

    def _counts(self, number: int) -> Counts:
        link = self._farm.links[number]
        return time.perf_counter(), link.bytes_up, link.bytes_down

    def note(self, worker: SyntheticWorker, round_: int, seconds: float) -> None:
        number = self._workers.index(worker)
        self.commits[number].append(self._counts(number))
        super().note(worker, round_, seconds)

    async def _sample(self) -> None:
        while True:
            for number, samples in enumerate(self.samples):
                samples.append(self._counts(number))
            await asyncio.sleep(SAMPLE_S)

    async def live(self, ports: list[int]) -> None:
        """All workers, each over its own link, until enough rounds were measured."""
        sampling = asyncio.create_task(self._sample())
        self._workers = [SyntheticWorker(self, number) for number in range(len(ports))]
        tasks = [
            asyncio.create_task(worker.live(format_address("127.0.0.1", port)))
            for worker, port in zip(self._workers, ports, strict=True)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)


def used(samples: list[Counts], began: Counts, ended: Counts, direction: int) -> float | None:
    """Share of the rate that a direction's transfer between two commits used, from its first to its last bytes."""
    size = ended[direction] - began[direction]
    inside = [s for s in samples if began[0] <= s[0] <= ended[0]]
    moving = [s for s in inside if EDGE * size < s[direction] - began[direction] < (1 - EDGE) * size]
    if len(moving) < 3:
        return None
    first, last = moving[0], moving[-1]
    return (last[direction] - first[direction]) / (RATE_BYTES * (last[0] - first[0]))


async def over_links(address: str, plan: LoadPlan) -> Measured:
    host, port = parse_address(address, "the server")
    async with LinkFarm(host, port, [plan.link] * plan.workers) as farm:
        test = Measured(plan, farm)
        await test.live([link.address[1] for link in farm.links])
        return test


def measure(name: str, selection: str, density: float, dtype: str, coordinates: int, rounds: int) -> dict[str, Any]:
    flags = ["server", "--listen", "127.0.0.1:0", "--json", "--log-level", "warning", "--workers", str(WORKERS)]
    flags += ["--density", str(density), "--selection", selection, "--wire-dtype", dtype]
    flags += ["--final-round", "none", "--linger", "0s"]
    server = subprocess.Popen(_bench.loscar(flags), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = json.loads(server.stdout.readline())["listening"]
        kind = SelectionKind(selection)
        plan = LoadPlan(
            WORKERS, coordinates, density, kind, rounds, LinkSpec.parse(LINK), server=address, reference=False
        )
        test = uvloop.run(over_links(address, plan))
    finally:
        server.kill()
        server.communicate()
    payload = payload_size(ValueType(dtype), max(1, round(density * coordinates)))
    # A sweep's rounds differ by one coordinate at most.
    found: dict[str, list[float]] = {"up": [], "down": [], "up_used": [], "down_used": [], "round_s": []}
    for commits, samples in zip(test.commits, test.samples, strict=True):
        for began, ended in pairwise(commits):
            found["round_s"].append(ended[0] - began[0])
            for direction, way in ((1, "up"), (2, "down")):
                found[way].append(payload / (ended[direction] - began[direction]))
                if (share := used(samples, began, ended, direction)) is not None:
                    found[f"{way}_used"].append(share)
    return {
        "case": name,
        "coordinates": coordinates,
        "payload_bytes": payload,
        "rounds": len(test.commits[0]) - 1,
        **{what: round(statistics.median(values), 4) if values else None for what, values in found.items()},
    }


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="rounds of each case (default 8)")
    parser.add_argument("--scale", type=float, default=1.0, help="take so much of the coordinates (default 1)")
    arguments = parser.parse_args()
    cases = []
    for name, (selection, density, dtype, coordinates) in CASES.items():
        size = int(arguments.scale * coordinates)
        cases.append(measure(name, selection, density, dtype, size, arguments.rounds))
        print(cases[-1], file=sys.stderr, flush=True)
    worst = min(min(case["up"], case["down"]) for case in cases)
    headings = ["", "payload, MB", "s a round", "payload of the bytes up", "down", "of the rate used up", "down"]
    rows = [
        [
            c["case"],
            f"{c['payload_bytes'] / 1e6:.1f}",
            f"{c['round_s']:.2f}",
            *(f"{c[what]:.4f}" for what in ("up", "down")),
            *("" if c[what] is None else f"{c[what]:.2f}" for what in ("up_used", "down_used")),
        ]
        for c in cases
    ]
    result = {
        "targets": {"payload": TARGET},
        "link": LINK,
        "workers": WORKERS,
        "worst": worst,
        "met": worst >= TARGET,
        "cases": cases,
        "table": {"headings": headings, "rows": rows},
    }
    text = _bench.table(headings, rows) + f"\nat worst {worst:.4f} of the link's bytes are payload (target {TARGET})"
    return _bench.finish("link_payload", arguments, result, text)


if __name__ == "__main__":
    sys.exit(main())
