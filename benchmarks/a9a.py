"""Logistic regression on a9a: eight unequal workers, a quarter of the coordinates a round, 100 ms round trip.

Target, for every seed: the saved consensus has a test accuracy of at least 0.845. Needs LIBSVM's files `a9a` and
`a9a.t` in the data folder (docs/tasks.md says where they come from).

    python benchmarks/a9a.py --data-dir DIR           or LOSCAR_DATA_DIR; three seeds, about three minutes
    python benchmarks/a9a.py --download               fetch the data first
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import _bench

ACCURACY = 0.845
RUN = [
    *("--task", "a9a", "--workers", "8", "--density", "0.25", "--link", "rtt=100ms"),
    *("--slowdown", "1,1,1,1,2,2,3,4", "--step-time", "10ms", "--duration", "30s"),
]


def measure(seed: int, data: list[str], scratch: Path) -> dict[str, Any]:
    folder = scratch / f"seed{seed}"
    summary = _bench.run_summary([*RUN, *data, "--seed", str(seed)], folder)
    return {
        "seed": seed,
        "accuracy": round(summary["accuracy"], 4),
        "loss": round(summary["loss"], 4),
        "rounds": summary["rounds"],
        "steps": summary["steps"],
        "wall_seconds": round(summary["wall_seconds"], 2),
        "idle_fraction": [round(f, 5) for f in summary["idle_fraction"]],
        "service_share": _bench.service_shares(folder, summary["workers"]),
        "bytes_up": summary["bytes_up"],
        "contributions": summary["contributions"],
        "met": summary["accuracy"] >= ACCURACY,
    }


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--seeds", default="0,1,2", help="which seeds (default 0,1,2)")
    parser.add_argument("--data-dir", metavar="DIR", type=Path, help="where the data are (default: LOSCAR_DATA_DIR)")
    parser.add_argument("--download", action="store_true", help="fetch missing data first")
    arguments = parser.parse_args()
    data = ["--download"] if arguments.download else []
    if arguments.data_dir is not None:
        data += ["--data-dir", str(arguments.data_dir)]
    runs = []
    with tempfile.TemporaryDirectory(prefix="loscar-bench-") as scratch:
        for seed in map(int, arguments.seeds.split(",")):
            runs.append(measure(seed, data, Path(scratch)))
            print(f"seed {seed}: accuracy {runs[-1]['accuracy']:.4f}", file=sys.stderr, flush=True)
    result = {
        "targets": {"accuracy": ACCURACY},
        "options": RUN,
        "accuracy_min": min(r["accuracy"] for r in runs),
        "idle_fraction_max": max(max(r["idle_fraction"]) for r in runs),
        "met": all(r["met"] for r in runs),
        "runs": runs,
    }
    rows = [
        (
            r["seed"],
            f"{r['accuracy']:.4f}",
            f"{r['loss']:.4f}",
            r["rounds"],
            "/".join(map(str, r["steps"])),
            f"{max(r['service_share']):.2%}",
            "ok" if r["met"] else "missed",
        )
        for r in runs
    ]
    headings = ("seed", "accuracy", "loss", "rounds", "steps", "in step(), worst", "")
    return _bench.finish("a9a", arguments, result, _bench.table(headings, rows))


if __name__ == "__main__":
    sys.exit(main())
