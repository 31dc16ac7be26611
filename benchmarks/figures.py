"""The tables of measured figures in README.md and in docs/, made from benchmarks/results/.

python benchmarks/figures.py            write them into the pages, between their marks
python benchmarks/figures.py --check    say whether they are up to date (exit status 1 when not)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parent.parent / "README.md"
REPRODUCTION = RESULTS.parent.parent / "docs" / "reproduction.md"
RELIABILITY = RESULTS.parent.parent / "docs" / "reliability.md"
LOADTEST = RESULTS.parent.parent / "docs" / "loadtest.md"
PERFORMANCE = RESULTS.parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- figures: made by benchmarks/figures.py -->", "<!-- end of figures -->"


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def row(what: str, target: str, measured: str, script: str) -> str:
    return f"| {what} | {target} | {measured} | [`{script}.py`](benchmarks/{script}.py) |"


def figures() -> str:
    """The table and the line about the machine."""
    job, a9a, session, cli = map(load, ("main_job", "a9a", "session_overhead", "cli_start"))
    seeds = len(job["runs"])
    up = [b / r["wall_seconds"] for r in job["runs"] for b in r["bytes_up"]]
    rows = [
        row(
            f"main job (`loscar run`, seeds 0–{seeds - 1}): consensus test accuracy",
            f"≥ {job['targets']['accuracy']}",
            f"{job['accuracy_min']:.4f} at worst, {job['accuracy_mean']:.4f} on average",
            "main_job",
        ),
        row(
            "main job: share of the run in which a training thread waited for the service",
            f"≤ {job['targets']['idle_fraction']:.0%}",
            f"{job['idle_fraction_max']:.2%} (and {job['service_share_max']:.2%} inside `session.step()`)",
            "main_job",
        ),
        row(
            "main job: payload that a worker sends",
            "",
            f"{max(up) / 1000:.1f} kB/s at most",
            "main_job",
        ),
        row(
            f"a9a, 8 workers of unequal speed, density .25, 100 ms (seeds 0–{len(a9a['runs']) - 1}): "
            "consensus test accuracy",
            f"≥ {a9a['targets']['accuracy']}",
            f"{a9a['accuracy_min']:.4f} at worst",
            "a9a",
        ),
        row(
            "d = 10⁷, density .01, no link delay, default pace: share of a 50 ms step in `session.step()`",
            f"≤ {session['targets']['share']:.0%}",
            f"{session['share_max']['default']:.2%}; slowest call {session['step_call_ms_max']['default']:.1f} ms",
            "session_overhead",
        ),
        row(
            "the same with a round every two steps, as often as one can be had",
            "",
            f"{session['share_max']['back-to-back']:.2%}; "
            f"slowest call {session['step_call_ms_max']['back-to-back']:.1f} ms",
            "session_overhead",
        ),
        row(
            "`loscar --help`, median, without importing torch",
            f"< {cli['targets']['seconds']} s",
            f"{cli['seconds_median']:.2f} s" + (", but torch is imported" if cli["imports_torch"] else ""),
            "cli_start",
        ),
    ]
    m = session["machine"]
    where = f"{m['system']} on {m['cores']} shared {m['architecture']} cores, Python {m['python']}, torch {m['torch']}"
    head = "| what | target | measured | script |\n|---|---|---|---|\n"
    return f"{head}{chr(10).join(rows)}\n\nMeasured on {where}; no GPU.\n"


def updated(text: str) -> str:
    """README's text with the block replaced."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{README} lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{figures()}\n{END}{after}"


def result_table(name: str) -> str:
    """A result's table and verdict in Markdown; NAME.TABLE is a further table of a result, without a verdict."""
    name, _, further = name.partition(".")
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet."
    result = load(name)
    chosen = result["tables"][further] if further else result["table"]
    headings, rows = chosen["headings"], chosen["rows"]
    lines = [headings, ["---"] * len(headings), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if further or result.get("targets") == {}:
        return table
    verdict = "The target is met." if result["met"] else "**The target is missed.**"
    return f"{table}\n\n{verdict}"


def with_tables(text: str) -> str:
    """A page's text with every result's table replaced."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{result_table(match[1])}\n\n<!-- end of table -->"

    return re.sub(r"<!-- table: ([\w.]+) -->.*?<!-- end of table -->", block, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    stale = []
    tables = (REPRODUCTION, RELIABILITY, LOADTEST, PERFORMANCE)
    for page, renew in ((README, updated), *((page, with_tables) for page in tables)):
        text = page.read_text(encoding="utf-8")
        new = renew(text)
        if new != text and check:
            stale.append(page.name)
        elif new != text:
            page.write_text(new, encoding="utf-8")
    if stale:
        print(f"figures are out of date in {', '.join(stale)}: run python benchmarks/figures.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
