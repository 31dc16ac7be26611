"""A plan for people and scripts: the commands to run, the JSON, the tables."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from loscar_core.selection import SelectionKind
from loscar_deploy.plan import DAY_S, Plan
from loscar_deploy.table import size

_LISTED_WORKERS = 3
_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Place:
    """Where the run is to be, as the command line has it.

    Attributes:
        server: HOST:PORT.
        task: what the workers train.
        step_time, link: the texts.
        slowdown: of each worker; None when all are alike.
        lr, noise: η and σ; None leaves the disagreement relative.
    """

    server: str
    task: str
    step_time: str
    link: str
    slowdown: str | None
    lr: float | None
    noise: float | None


def run_options(plan: Plan) -> list[str]:
    """The options of a run that has this plan, as `loscar server` and `loscar run` take them."""
    pace, selection = plan.pace, plan.round.selection
    options = ["--selection", selection.value]
    if selection is not SelectionKind.ALL:
        options += ["--density", f"{plan.density:.6g}"]
    options += ["--wire-dtype", plan.round.value_type.value]
    if pace.local_steps is None:
        options += ["--local-steps", "auto", "--sync-interval", f"{1e3 * pace.interval_s:.6g}ms"]
    else:
        options += ["--local-steps", str(pace.local_steps)]
    options += ["--overlap-steps", "auto" if pace.overlap_steps is None else str(pace.overlap_steps)]
    if plan.round_cap_s is not None:
        options += ["--round-cap", f"{plan.round_cap_s:g}s"]
    return options


def commands(plan: Plan, place: Place) -> dict[str, Any]:
    """`server`, `workers` (one for each) and `try`, the run on one machine, ready for a shell."""
    host, _, port = place.server.rpartition(":")
    listen, secured, trusting = place.server, [], []
    if host not in ("127.0.0.1", "localhost", "[::1]"):
        listen = f"0.0.0.0:{port}"
        secured = ["--token-file", "token", "--tls-cert", "certs/server.pem", "--tls-key", "certs/server-key.pem"]
        trusting = ["--token-file", "token", "--tls-ca", "certs/ca.pem"]
    count = str(plan.question.workers)
    server = ["loscar", "server", "--listen", listen, *secured, "--workers", count, *run_options(plan)]
    worker = ["loscar", "worker", "--server", place.server, *trusting, "--task", place.task, "--workers", count]
    slots = [[*worker, "--name", f"w{i}", "--slot", str(i)] for i in range(plan.question.workers)]
    attempt = ["loscar", "run", "--task", place.task, "--workers", count, "--link", place.link]
    attempt += ["--step-time", place.step_time, "--slowdown", place.slowdown or "1", *run_options(plan)]
    return {"server": shlex.join(server), "workers": [shlex.join(w) for w in slots], "try": shlex.join(attempt)}


def as_json(plan: Plan, best: Sequence[Plan], place: Place) -> dict[str, Any]:
    """Everything that is known of a plan; times in seconds, sizes in bytes, per worker in the order of slots."""
    question, carried, pace, timing = plan.question, plan.round, plan.pace, plan.timing
    each = [s for s, seat in zip(timing.seats, question.seats, strict=True) for _ in range(seat.count)]
    up, down = plan.bytes_per_day
    blocking = plan.if_blocking()
    return {
        "params": question.dimension,
        "statistics": question.statistics,
        "workers": question.workers,
        "density": plan.density,
        "coordinates": carried.selected,
        "selection": carried.selection.value,
        "wire_dtype": carried.value_type.value,
        "local_steps": "auto" if pace.local_steps is None else pace.local_steps,
        "sync_interval_seconds": pace.interval_s if pace.local_steps is None else None,
        "overlap_steps": "auto" if pace.overlap_steps is None else pace.overlap_steps,
        "round_cap_seconds": plan.round_cap_s,
        "hidden": plan.hidden,
        "round_seconds": timing.round_s,
        "flight_seconds": timing.flight_s,
        "round_payload_bytes": carried.payload,
        "round_wire_bytes_up": carried.bytes_each_way()[0],
        "round_wire_bytes_down": carried.bytes_each_way()[1],
        "idle_fraction": [s.idle for s in each],
        "local_steps_expected": [s.local_steps for s in each],
        "overlap_steps_expected": [s.overlap_steps for s in each],
        "link_share_up": [s.up for s in each],
        "link_share_down": [s.down for s in each],
        "worker_payload_bytes_per_day": plan.payload_per_day,
        "worker_bytes_up_per_day": up,
        "worker_bytes_down_per_day": down,
        "server_bytes_in_per_day": question.workers * up,
        "server_bytes_out_per_day": question.workers * down,
        "rounds_per_coordinate": carried.rounds_per_coordinate,
        "steps_per_coordinate": carried.rounds_per_coordinate * plan.cycle_steps,
        "seconds_per_coordinate": carried.rounds_per_coordinate * timing.round_s,
        "disagreement_noise_steps": plan.noise_steps,
        "disagreement_noise_steps_most": plan.most_noise_steps,
        "disagreement_variance": _variance(plan.noise_steps, place),
        "disagreement_variance_most": _variance(plan.most_noise_steps, place),
        "worker_memory_bytes": carried.worker_memory(),
        "server_memory_bytes": carried.server_memory(),
        "start_bytes": plan.start_bytes,
        "start_seconds": plan.start_s,
        "final_round_seconds": plan.final_s,
        "blocking_idle_fraction": blocking.idle,
        "blocking_round_seconds": blocking.timing.round_s,
        "best_of_each_dtype": [_row(p) for p in best],
        "commands": commands(plan, place),
    }


def _row(plan: Plan) -> dict[str, Any]:
    return {
        "wire_dtype": plan.round.value_type.value,
        "density": plan.density,
        "local_steps": "auto" if plan.pace.local_steps is None else plan.pace.local_steps,
        "overlap_steps_expected": plan.overlap_steps,
        "idle_fraction": plan.idle,
        "worker_bytes_per_day": sum(plan.bytes_per_day),
        "disagreement_noise_steps": plan.noise_steps,
        "disagreement_noise_steps_most": plan.most_noise_steps,
    }


def _variance(noise_steps: float, place: Place) -> float | None:
    if place.lr is None or place.noise is None:
        return None
    return float(noise_steps * (place.lr * place.noise) ** 2)


def show(plan: Plan, best: Sequence[Plan], place: Place, console: Console) -> None:
    """The same for people."""
    console.print(_settings(plan, place))
    if len(best) > 1:
        console.print()
        console.print(_types(plan, best))

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for text in _remarks(plan):
        say("\n" + textwrap.fill(text, _WIDTH))
    lines = commands(plan, place)
    workers = lines["workers"]
    say(f"\nTo try it on one machine:\n\n{_broken(lines['try'])}\n\nTo run it:\n\n{_broken(lines['server'])}")
    for line in workers[:_LISTED_WORKERS]:
        say(_broken(line))
    if len(workers) > _LISTED_WORKERS:
        say(f"    # and so on, to --name w{len(workers) - 1} --slot {len(workers) - 1}")


def _broken(line: str) -> str:
    """A command in lines that a shell takes for one, cut before options."""
    lines, current = [], ""
    for piece in re.split(r" (?=--)", line):
        if current and len(current) + len(piece) > _WIDTH:
            lines.append(current)
            current = "    " + piece
        else:
            current = f"{current} {piece}" if current else piece
    return textwrap.indent(" \\\n".join([*lines, current]), "    ")


def _settings(plan: Plan, place: Place) -> Table:
    question, carried, timing, pace = plan.question, plan.round, plan.timing, plan.pace
    up, down = plan.bytes_per_day
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()

    def row(name: str, text: str) -> None:
        table.add_row(name, text)

    local = f"every {1e3 * pace.interval_s:.6g} ms" if pace.local_steps is None else f"{pace.local_steps}"
    row("density", f"{plan.density:.6g} by {carried.selection.value}: {carried.selected:,} coordinates a round")
    row("values", f"{carried.value_type.value}: {size(carried.payload)} a round each way")
    row("local steps", f"{local}; a round every {_time(timing.round_s)}, {_time(timing.flight_s)} of it in flight")
    idle = f"{plan.idle:.1%} of the time" if plan.idle else "never"
    blocking = plan.if_blocking().idle
    row("training waits", f"{idle} (if it waited for each round: {blocking:.0%})")
    busiest = max(timing.seats, key=lambda s: max(s.up, s.down))
    row("the link is busy", f"up {busiest.up:.0%}, down {busiest.down:.0%} of the time")
    row("traffic a day", f"each worker up {size(up)}, down {size(down)}")
    n = question.workers
    rates = f"{_mbit(n * up)} in, {_mbit(n * down)} out"
    row("", f"the server in {size(n * up)}, out {size(n * down)} (on average {rates})")
    spread = sorted({round(s.overlap_steps, 1) for s in timing.seats})
    steps = f"{spread[0]:g}" if len(spread) == 1 else f"{spread[0]:g} to {spread[-1]:g}"
    row("staleness", f"{steps} steps from a snapshot to its merge")
    apart = carried.rounds_per_coordinate
    text = f"each coordinate once in {apart:.4g} rounds, {apart * plan.cycle_steps:.4g} steps, "
    row("", text + _time(apart * timing.round_s))
    row(
        "disagreement",
        f"{plan.noise_steps:.4g} steps' noise after a merge, {plan.most_noise_steps:.4g} before the next",
    )
    after, before = (_variance(v, place) for v in (plan.noise_steps, plan.most_noise_steps))
    if after is not None and before is not None:
        row("", f"a deviation of {after**0.5:.3g} and {before**0.5:.3g} a coordinate")
    own, theirs = size(carried.worker_memory()), size(carried.server_memory())
    row("memory", f"about {own} of a worker beside its model and optimizer, {theirs} of the server")
    start, end = _time(plan.start_s), _time(plan.final_s)
    row("start and end", f"up to {start} to hand out the model, {end} for the final round")
    return table


def _types(plan: Plan, best: Sequence[Plan]) -> Table:
    table = Table(title="The best of each value type:", title_justify="left", title_style="", box=None, pad_edge=False)
    for heading in ("", "values", "density", "local steps", "in flight", "a worker's day", "disagreement"):
        table.add_column(heading, justify="left" if heading in ("", "values") else "right")
    for p in best:
        local = f"{1e3 * p.pace.interval_s:.6g} ms" if p.pace.local_steps is None else f"{p.pace.local_steps}"
        table.add_row(
            "→" if p is plan else "",
            p.round.value_type.value,
            f"{p.density:.6g}",
            local,
            f"{p.overlap_steps:.3g}",
            size(sum(p.bytes_per_day)),
            f"{p.noise_steps:.4g} – {p.most_noise_steps:.4g}",
        )
    return table


def _remarks(plan: Plan) -> list[str]:
    """What the figures alone do not say."""
    remarks = []
    if not plan.hidden:
        remarks.append("The link is not hidden: leave --overlap-steps out, or make the rounds shorter.")
    if plan.round_cap_s is not None:
        remarks.append(
            "--round-cap: the final round carries everything in float32, and the server's default would close it "
            "without those who are still sending. --final-round none leaves it out."
        )
    return remarks


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _mbit(bytes_per_day: float) -> str:
    rate = 8 * bytes_per_day / DAY_S
    return f"{rate / 1e6:.3g} Mbit/s" if rate >= 1e5 else f"{rate / 1e3:.3g} kbit/s"
