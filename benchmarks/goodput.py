"""How much payload the server carries, against a bare gRPC echo with the same number of clients in the same minute.

Four workers, each in a process of its own, average 25 M coordinates at density 1 as float32: 100 MB from and 100 MB to
each of them in every round. They are the load test's synthetic workers: the real protocol with its checks, sums and
digests, but no model. The echo is asyncio gRPC with messages of 1 MiB, and four client processes. Both take turns,
since a shared machine is not equally fast at all times; the figure is the median of the pairs' ratios (target: at
least 0.85).

    python benchmarks/goodput.py                            about three minutes
    python benchmarks/goodput.py --params 250e3 --rounds 200
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import _bench
import grpc
import psutil
import uvloop

from loscar_deploy.loadtest_echo import METHOD, there_and_back
from loscar_wire.transport import CLIENT_OPTIONS

TARGET = 0.85
CLIENTS = 4
MESSAGE_BYTES = 1 << 20


DENSE = ("--density", "1", "--selection", "all")


def ours(
    coordinates: int, rounds: int, more: Sequence[str] = DENSE, selection: str = "all", density: float = 1.0
) -> dict[str, float]:
    """Payload bytes a second in and out, and the server's processor seconds a round.

    Args:
        more: options of the server.
        selection, density: the same for the clients.
    """
    flags = ["server", "--listen", "127.0.0.1:0", "--json", "--log-level", "warning", "--workers", str(CLIENTS)]
    flags += [*more, "--final-round", "none", "--linger", "0s"]
    server = subprocess.Popen(_bench.loscar(flags), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = json.loads(server.stdout.readline())["listening"]
        client = ["loadtest", "--server", address, "--workers", "1", "--params", str(coordinates)]
        client += [
            "--density",
            str(density),
            "--selection",
            selection,
            "--rounds",
            str(rounds),
            "--no-reference",
            "--json",
        ]
        started = [
            subprocess.Popen(_bench.loscar(client), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(CLIENTS)
        ]
        said = [process.communicate() for process in started]
        for process, (_, error) in zip(started, said, strict=True):
            if process.returncode:
                sys.exit(f"a client ended with status {process.returncode}:\n{error.strip()}")
        found = [json.loads(out) for out, _ in said]
        times = psutil.Process(server.pid).cpu_times()
        spent = times.user + times.system
    finally:
        server.kill()
        server.communicate()
    return {
        "bytes_per_s": sum(f["payload_bytes_per_s"] for f in found),
        "round_ms": statistics.median(f["round_ms"]["p50"] for f in found),
        # With those that only warm up, and the start.
        "cpu_s": spent / (rounds + max(1, rounds // 10)),
    }


def echo(coordinates: int, rounds: int) -> dict[str, float]:
    """The same of the echo; what is sent comes back."""
    server = subprocess.Popen(
        [sys.executable, "-m", "loscar_deploy.loadtest_echo"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        port = server.stdout.readline().strip()
        command = [sys.executable, __file__, "--client", port, "--params", str(coordinates), "--rounds", str(rounds)]
        started = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(CLIENTS)
        ]
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # connected, and buffers have grown
        before = psutil.Process(server.pid).cpu_times()
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [json.loads(process.communicate()[0]) for process in started]
        after = psutil.Process(server.pid).cpu_times()
    finally:
        server.kill()
        server.communicate()
    seconds = max(f["ended"] for f in found) - min(f["began"] for f in found)
    return {
        "bytes_per_s": 2 * CLIENTS * rounds * 4 * coordinates / seconds,
        "round_ms": 1e3 * seconds / rounds,
        "cpu_s": (after.user + after.system - before.user - before.system) / rounds,
    }


async def echo_client(port: str, coordinates: int, rounds: int) -> None:
    """One client of the echo: connects, waits for a word, and says when it began and ended."""
    whole, rest = divmod(4 * coordinates, MESSAGE_BYTES)
    payloads = [bytes(MESSAGE_BYTES)] * whole + ([bytes(rest)] if rest else [])
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CLIENT_OPTIONS)
    call: Any = channel.stream_stream(METHOD)()

    await there_and_back(call, payloads)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began = time.monotonic()
    for _ in range(rounds):
        await there_and_back(call, payloads)
    print(json.dumps({"began": began, "ended": time.monotonic()}), flush=True)
    call.cancel()
    await channel.close()


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--params", type=float, default=25e6, help="coordinates (default 25e6)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each turn (default 10)")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--client", metavar="PORT", help="be a client of the echo there")
    arguments = parser.parse_args()
    coordinates, rounds = int(arguments.params), arguments.rounds
    if arguments.client is not None:
        uvloop.run(echo_client(arguments.client, coordinates, rounds))
        return 0
    pairs = []
    for _ in range(arguments.pairs):
        pair = {"ours": ours(coordinates, rounds), "echo": echo(coordinates, rounds)}
        pairs.append(pair)
        print({who: {k: round(v, 3) for k, v in f.items()} for who, f in pair.items()}, file=sys.stderr, flush=True)
    ratios = [pair["ours"]["bytes_per_s"] / pair["echo"]["bytes_per_s"] for pair in pairs]
    ratio = statistics.median(ratios)

    def median(who: str, what: str) -> float:
        return statistics.median(pair[who][what] for pair in pairs)

    rows = [
        [
            who,
            f"{median(who, 'bytes_per_s') / 1e6:.0f}",
            f"{median(who, 'round_ms'):.0f}",
            f"{median(who, 'cpu_s'):.2f}",
        ]
        for who in ("ours", "echo")
    ]
    headings = ["", "MB/s in and out", "ms a round", "server CPU s a round"]
    text = _bench.table(headings, rows)
    text += f"\ngoodput {ratio:.2f} × the echo's (pairs {min(ratios):.2f} to {max(ratios):.2f}; target {TARGET})"
    result = {
        "target": TARGET,
        "coordinates": coordinates,
        "ratio": round(ratio, 3),
        "ratios": [round(r, 3) for r in ratios],
        "met": ratio >= TARGET,
        "pairs": pairs,
        "table": {"headings": headings, "rows": rows},
    }
    return _bench.finish("goodput", arguments, result, text)


if __name__ == "__main__":
    sys.exit(main())
