"""What is made of runs: `loscar compare` does many of them, `loscar report` draws those that are there."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loscar_core.errors import ConfigError
from loscar_deploy import options as o
from loscar_deploy.commands import Declare, download, print_json, require_torch
from loscar_deploy.commands.training import check_task, run_plan, simulation_plan

if TYPE_CHECKING:
    from loscar_deploy.compare import Case, Row

_OWN = ("densities", "links", "variants", "repeat", "simulate", "blocking_steps", "past_target")
"""Options that the single runs have not."""


def _compare(args: Namespace) -> int:
    from loscar_deploy import compare as c
    from loscar_deploy.compare_table import Progress, print_tables
    from loscar_deploy.plots import require_matplotlib
    from loscar_deploy.table import console_for

    require_torch()
    require_matplotlib()
    target_loss = None if args.target_loss is None else o.number("--target-loss", args.target_loss)
    if args.past_target and target_loss is None:
        raise ConfigError("--past-target says nothing without --target-loss")
    out: Path = args.out if args.out is not None else Path("runs") / time.strftime("%Y%m%d-%H%M%S-compare")
    seed = o.whole("--seed", args.seed)
    blocking_steps = _blocking_steps(args)
    cases = c.cases_of(
        _common(args),
        _distinct("--densities", args.densities, ","),
        _distinct("--links", args.links, "|"),
        _variants(args.variants),
        range(seed, seed + o.whole("--repeat", args.repeat, 1)),
        blocking_steps,
        out,
    )
    # Before the first run: it may be a long time until the last one's options would be looked at.
    execute = _simulated(cases) if args.simulate else _real(args, cases)
    c.new_folder(out)

    rows: list[Row] = []
    with Progress(cases, sys.stderr if args.json else sys.stdout) as progress:
        clock = "under a virtual clock" if args.simulate else "of real processes, one after the other"
        progress.say(f"{len(cases)} runs {clock}; blocking ones with {blocking_steps} local steps; results in {out}")
        try:
            for row in c.run_all(cases, execute, target_loss):
                rows.append(row)
                progress.done(row, target_loss)
        finally:
            c.write_csv(out / "compare.csv", rows)
    results = c.results_of(rows, target_loss)
    settings = {"task": args.task, "simulated": args.simulate, "target_loss": target_loss}
    settings |= {"past_target": args.past_target, "blocking_steps": blocking_steps, "out": str(out)}
    told = {"settings": settings, "results": results, "runs": [asdict(row) for row in rows]}
    c.write_json(out / "compare.json", told)
    _draw(out, rows, results, target_loss)
    if args.json:
        print_json(told)
    else:
        print_tables(console_for(sys.stdout), results, target_loss)
        print(f"tables, pictures and run folders are in {out}")
    return 0


def _common(args: Namespace) -> Namespace:
    """The options that all runs share, as `loscar run` or `loscar simulate` would have them."""
    common = Namespace(**{k: v for k, v in vars(args).items() if k not in _OWN})
    common.coordinates, common.keep_models = None, False
    if args.method != "loscar":
        raise ConfigError(f"--method {args.method}: compare sets LOSCAR-SGD's merges and paces side by side")
    if args.simulate:
        common.churn, common.churn_every, common.away = "0", "10s", "5s"
    if args.evaluate_every == "0":
        common.evaluate_every = "1"
    if args.past_target:
        common.target_loss = None
    return common


def _variants(text: str) -> list[str]:
    from loscar_deploy.compare import VARIANTS

    variants = _distinct("--variants", text, ",")
    for variant in variants:
        if variant not in VARIANTS:
            raise ConfigError(f"--variants {variant!r} is not one of {', '.join(VARIANTS)}")
    return variants


def _distinct(option: str, text: str, separator: str) -> list[str]:
    items = [item.strip() for item in text.split(separator)]
    for item in items:
        if not item:
            raise ConfigError(f"{option} {text!r} has an empty item")
        if items.count(item) > 1:
            raise ConfigError(f"{option} {text!r} has {item} twice")
    return items


def _blocking_steps(args: Namespace) -> int:
    """N of the blocking runs: as given, else that of the overlapped ones, else what fits into their interval."""
    if o.steps_or_auto("--overlap-steps", args.overlap_steps) == 0:
        raise ConfigError("--overlap-steps 0 would block: the overlapped runs need auto or at least 1")
    if args.blocking_steps is not None:
        return o.whole("--blocking-steps", args.blocking_steps, 1)
    local_steps = o.steps_or_auto("--local-steps", args.local_steps)
    if local_steps is not None:
        if local_steps == 0:
            raise ConfigError("--local-steps 0 says nothing about the blocking runs: give --blocking-steps too")
        return local_steps
    step_s = o.seconds("--step-time", args.step_time)
    if step_s == 0:
        raise ConfigError("--blocking-steps is needed: --local-steps auto and no --step-time do not say how many fit")
    return max(1, round(o.seconds("--sync-interval", args.sync_interval) / step_s))


def _real(args: Namespace, cases: Sequence[Case]) -> Callable[[Case], dict[str, Any]]:
    """Look at every run's options; returns what does one run."""
    from loscar_deploy.run import execute

    plans = {case.name: run_plan(case.args) for case in cases}
    check_task(plans[cases[0].name])
    if args.download:
        download(args)
    return lambda case: execute(plans[case.name], quiet=True)


def _simulated(cases: Sequence[Case]) -> Callable[[Case], dict[str, Any]]:
    from loscar_deploy.simulate import execute

    first = simulation_plan(cases[0].args)
    plans = {case.name: simulation_plan(case.args, first.task) for case in cases}
    return lambda case: execute(plans[case.name], case.args)


def _draw(out: Path, rows: Sequence[Row], results: Sequence[dict[str, Any]], target_loss: float | None) -> None:
    from loscar_deploy import compare_plots, plots
    from loscar_deploy.run_data import load_run

    done = [(row, load_run(Path(row.folder), row.variant)) for row in rows]
    for name, figure in compare_plots.draw(done, results, target_loss).items():
        plots.save(figure, out / f"{name}.png")


def _report(args: Namespace) -> int:
    from loscar_deploy.report import write_report
    from loscar_deploy.run_data import load_runs

    runs = load_runs(args.runs)
    default = args.runs[0] / "report" if len(args.runs) == 1 else Path("report")
    told = write_report(runs, args.out or default)
    if args.json:
        print_json(told)
    else:
        print(f"the report is {told['page']}")
    return 0


def declare(command: Declare) -> None:
    """Add this group's commands."""
    compare = command("compare", _compare, "overlapped, overwriting and blocking runs side by side, with their spread")
    compare.add_argument(
        "--densities", "--density", metavar="P[,P…]", default="0.05", help="shares of the coordinates, each compared"
    )
    compare.add_argument(
        "--links",
        "--link",
        metavar="SPEC[|SPEC…]",
        default=o.LINK,
        help="links, each compared; within one, ; separates the workers'",
    )
    compare.add_argument(
        "--variants", metavar="V[,V…]", default="overlapped,overwrite,blocking", help="which of them to compare"
    )
    compare.add_argument(
        "--blocking-steps", metavar="N", help="local steps of the blocking runs (default: as the overlapped ones)"
    )
    compare.add_argument("--repeat", metavar="R", default="3", help="repetitions, each with the next seed")
    compare.add_argument("--simulate", action="store_true", help="under a virtual clock instead of real processes")
    compare.add_argument(
        "--past-target", action="store_true", help="go on after the target, to compare what comes later too"
    )
    o.add_machines(compare, "a floor under a step's time", compared=True)
    compare.add_argument("--out", metavar="DIR", type=Path, help="where to (default: a new folder under runs/)")
    compare.add_argument("--json", action="store_true", help="print the results as JSON, progress on standard error")
    o.add_task(compare, many=True)
    o.add_run(compare, compared=True)
    o.add_limits(compare)

    report = command("report", _report, "a page with pictures of one or several runs")
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folders")
    report.add_argument("--out", metavar="DIR", type=Path, help="where to (default: RUN/report; of several, report)")
    report.add_argument("--json", action="store_true", help="print what was written, and the figures, as JSON")
