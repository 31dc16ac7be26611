"""How long `loscar --help` takes, and that it does not import torch.

Target: a median below 0.4 s over several runs in fresh processes.

    python benchmarks/cli_start.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import _bench

SECONDS = 0.4
HEAVY = ("torch", "grpc", "numpy", "rich")
PROBE = """
import sys
from loscar_deploy.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print(*(m for m in sys.argv[1:] if m in sys.modules), file=sys.stderr)
"""


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--runs", type=int, default=21, help="how many runs (default 21)")
    arguments = parser.parse_args()
    script = Path(sys.executable).with_name("loscar")
    command = [str(script), "--help"] if script.exists() else _bench.loscar(["--help"])
    took = []
    for _ in range(arguments.runs):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - started)
    probe = [sys.executable, "-c", PROBE, *HEAVY]
    imported = subprocess.run(probe, check=True, text=True, capture_output=True).stderr.split()
    median = statistics.median(took)
    result = {
        "targets": {"seconds": SECONDS, "imports_torch": False},
        "runs": arguments.runs,
        "seconds_median": round(median, 4),
        "seconds_max": round(max(took), 4),
        "imports_torch": "torch" in imported,
        "imports": imported,
        "met": median < SECONDS and "torch" not in imported,
    }
    text = (
        f"loscar --help: median {median:.3f} s, slowest {max(took):.3f} s of {arguments.runs} runs; "
        f"of {', '.join(HEAVY)} it imports {', '.join(imported) or 'none'}"
    )
    return _bench.finish("cli_start", arguments, result, text)


if __name__ == "__main__":
    sys.exit(main())
