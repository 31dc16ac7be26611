"""What the benchmarks share: options, running `loscar`, a table, a verdict, the result file.

Every benchmark is a script of its own: seeded, ends by itself, prints what it measured and whether the target is met
(exit status 0 or 1), and writes the same as JSON to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have; `doc` is the script's docstring."""
    made = argparse.ArgumentParser(
        description=(doc or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    made.add_argument("--out", metavar="FILE", type=Path, help="write it here instead of to benchmarks/results/")
    return made


def loscar(arguments: Sequence[str]) -> list[str]:
    """The command that runs `loscar ARGUMENTS` with this interpreter."""
    return [sys.executable, "-m", "loscar_deploy", *arguments]


def run_summary(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """One `loscar run`; its summary. Exits with the run's own message when it fails."""
    command = loscar(["run", "--json", "--out", str(folder), "--log-level", "warning", *arguments])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"loscar run {' '.join(arguments)} ended with status {done.returncode}:\n{done.stderr.strip()}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def service_shares(folder: Path, workers: int) -> list[float]:
    """Per worker, the share of its run that its training thread spent in `session.step()`, waits apart."""
    shares = []
    for i in range(workers):
        figures = json.loads((folder / "workers" / f"w{i}.json").read_text(encoding="utf-8"))
        shares.append(round(figures["service_seconds"] / figures["run_seconds"], 5))
    return shares


def machine() -> dict[str, Any]:
    """What the figures depend on, as far as it can be told without naming anybody's computer."""
    versions = {}
    for name in ("loscar", "torch", "numpy", "grpcio"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "cores": os.cpu_count(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        **versions,
    }


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they need to be, numbers to the right."""
    cells = [list(map(str, row)) for row in (headings, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(lines)


def finish(name: str, arguments: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    """Write the result, show it, and return the exit status: 0 when `result["met"]`."""
    result = {"benchmark": name, **result, "machine": machine()}
    path: Path = arguments.out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(result))
    else:
        print(text)
        print(f"{'target met' if result['met'] else 'TARGET MISSED'}; written to {os.path.relpath(path)}")
    return 0 if result["met"] else 1
