"""One table of all results in benchmarks/results/: what was to be reached, and whether it was.

python benchmarks/summary.py
"""

from __future__ import annotations

import json
import sys
from typing import Any

import _bench


def told(result: dict[str, Any]) -> str:
    """A result's targets in one line."""
    targets = result.get("targets", {"target": result["target"]} if "target" in result else {})
    return ", ".join(f"{name} {value}" for name, value in targets.items())


def main() -> int:
    rows = []
    for path in sorted(_bench.RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "met" not in result:
            continue
        targets = told(result)
        rows.append((path.stem, targets or "none", ("met" if result["met"] else "MISSED") if targets else ""))
    width = max(len(name) for name, _, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {verdict.ljust(6)}  {targets}" for name, targets, verdict in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
