"""How fast coordinates and values become bytes and come back, and how many bytes they take.

Explicit indices, chosen at random as the hardest case for their coding: millions a second coded and decoded in NumPy,
one after the other, each the median of several turns (target: at least 40 M/s), and the size against the entropy bound
log2 C(d, K) (target: at most 1.1 times it). Values of the four types, in messages of 65,536 of them as the protocol
cuts them: gigabytes of float32 a second, beside a copy of the same values, and bytes for each.

    python benchmarks/wire.py                     half a minute on one core
    python benchmarks/wire.py --params 1e8
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import _bench
import numpy as np
from numpy.typing import NDArray

from loscar_core.indices import decode_indices, encode_indices
from loscar_core.selection import SelectionKind, count_for, select
from loscar_core.values import ValueType, decode, encode

DENSITIES = (1e-4, 1e-3, 1e-2, 1e-1)
SPEED, SIZE = 40.0, 1.1
VALUES, MESSAGE = 1 << 24, 1 << 16
TURNS, LEAST_S, MOST = 7, 0.3, 2000


def seconds(what: Callable[[], object]) -> float:
    """The median of several calls; short ones are called more often."""
    took: list[float] = []
    while len(took) < TURNS or (sum(took) < LEAST_S and len(took) < MOST):
        started = time.perf_counter()
        what()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def entropy_bits(span: int, count: int) -> float:
    """log2 of the number of ways to choose `count` of `span`."""
    chosen = math.lgamma(span + 1) - math.lgamma(count + 1) - math.lgamma(span - count + 1)
    return chosen / math.log(2)


def indices(dimension: int, density: float) -> dict[str, Any]:
    count = count_for(density, dimension)
    chosen = select(SelectionKind.RANDOM, 0, 1, dimension, count)
    payload = encode_indices(chosen, dimension)
    if not np.array_equal(decode_indices(payload, count, dimension), chosen):
        sys.exit("the indices that came back are not those that were coded")
    return {
        "density": density,
        "coordinates": count,
        "encode_m_per_s": round(count / seconds(lambda: encode_indices(chosen, dimension)) / 1e6, 1),
        "decode_m_per_s": round(count / seconds(lambda: decode_indices(payload, count, dimension)) / 1e6, 1),
        "bits": round(8 * len(payload) / count, 3),
        "to_entropy": round(8 * len(payload) / entropy_bits(dimension, count), 4),
    }


def messages(vector: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [vector[start : start + MESSAGE] for start in range(0, vector.size, MESSAGE)]


def values(vector: NDArray[np.float32], kind: ValueType) -> dict[str, Any]:
    pieces = messages(vector)
    payloads = [encode(piece, kind) for piece in pieces]
    forth = seconds(lambda: [encode(piece, kind) for piece in pieces])
    back = seconds(lambda: [decode(p, kind, piece.size) for p, piece in zip(payloads, pieces, strict=True)])
    return {
        "type": kind.value,
        "encode_gb_per_s": round(vector.nbytes / forth / 1e9, 2),
        "decode_gb_per_s": round(vector.nbytes / back / 1e9, 2),
        "bytes": round(sum(map(len, payloads)) / vector.size, 3),
    }


def copied(pieces: Sequence[NDArray[np.float32]]) -> dict[str, Any]:
    took = seconds(lambda: [piece.tobytes() for piece in pieces])
    speed = round(4 * sum(piece.size for piece in pieces) / took / 1e9, 2)
    return {"type": "a copy", "encode_gb_per_s": speed, "decode_gb_per_s": speed, "bytes": 4.0}


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--params", type=float, default=2.5e7, help="coordinates (default 2.5e7)")
    parser.add_argument("--values", type=float, default=VALUES, help=f"values to encode (default {VALUES})")
    arguments = parser.parse_args()
    dimension = int(arguments.params)
    coded = [indices(dimension, density) for density in DENSITIES]
    vector = np.random.default_rng(0).standard_normal(int(arguments.values), np.float32)
    typed = [copied(messages(vector)), *(values(vector, kind) for kind in ValueType)]
    slowest = min(min(c["encode_m_per_s"], c["decode_m_per_s"]) for c in coded)
    largest = max(c["to_entropy"] for c in coded)
    headings = ["K/d", "K", "coded, M/s", "decoded, M/s", "bits an index", "× the entropy bound"]
    rows = [
        [
            f"{c['density']:g}",
            f"{c['coordinates']:,}",
            f"{c['encode_m_per_s']:.0f}",
            f"{c['decode_m_per_s']:.0f}",
            f"{c['bits']:.2f}",
            f"{c['to_entropy']:.3f}",
        ]
        for c in coded
    ]
    of_values = ["values", "encoded, GB/s of float32", "decoded, GB/s of float32", "bytes a value"]
    value_rows = [
        [t["type"], f"{t['encode_gb_per_s']:.2f}", f"{t['decode_gb_per_s']:.2f}", f"{t['bytes']:.2f}"] for t in typed
    ]
    text = _bench.table(headings, rows) + f"\nat worst {slowest:.0f} M/s (target {SPEED:g})"
    text += f" and {largest:.3f} × the entropy bound (target {SIZE:g})\n\n" + _bench.table(of_values, value_rows)
    result = {
        "targets": {"m_per_s": SPEED, "to_entropy": SIZE},
        "params": dimension,
        "slowest_m_per_s": slowest,
        "to_entropy_worst": largest,
        "met": slowest >= SPEED and largest <= SIZE,
        "indices": coded,
        "values": typed,
        "table": {"headings": headings, "rows": rows},
        "tables": {"values": {"headings": of_values, "rows": value_rows}},
    }
    return _bench.finish("wire", arguments, result, text)


if __name__ == "__main__":
    sys.exit(main())
