"""Whole runs: `loscar run`, and `loscar simulate` under a virtual clock."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from loscar_deploy import options as o
from loscar_deploy import ray_options
from loscar_deploy.commands import Declare, download, print_json, require_torch
from loscar_deploy.interrupts import ended_at_once

if TYPE_CHECKING:
    from loscar_deploy.run import RunPlan
    from loscar_deploy.simulation import SimulationPlan
    from loscar_worker.tasks import Task

BUILT_IN_TASKS = ("a9a", "charlm", "cifar10", "cifar10-resnet18", "digits", "mnist", "tiny-imagenet")
"""What needs no look, and so no torch, before a run of processes is started."""


def run_plan(args: Namespace) -> RunPlan:
    """A run of real processes, checked as far as that is possible without loading the task.

    Fills in what was left out: 30 s as the end, the slowdowns, evaluations for a target.

    Raises:
        ConfigError: a wrong value.
    """
    from loscar_deploy.link_spec import LinkSpec, parse_links
    from loscar_deploy.run import RunPlan

    _fill_in(args)
    workers = o.whole("--workers", args.workers, 1)
    args.slowdown = _default_slowdown(args, workers)
    target_loss = _target_loss(args)
    links = parse_links(args.link, workers)
    o.seconds("--step-time", args.step_time)
    o.server_limits(args, workers)
    _learning_rate(args)
    return RunPlan(
        args,
        o.run_config(args),
        workers,
        None if all(link == LinkSpec() for link in links) else links,
        tuple(o.slowdowns(args.slowdown, workers)),
        target_loss,
        tuple(o.each("--device", args.device, workers)),
        _batch_sizes(args, workers),
    )


def simulation_plan(args: Namespace, task: Task | None = None) -> SimulationPlan:
    """The same for a simulation, with its task loaded unless it is given; one thread from here on.

    Raises:
        ConfigError: a wrong value, an unknown task, or data that are not there.
    """
    from loscar_deploy.link_spec import parse_links

    _fill_in(args)
    workers = o.whole("--workers", args.workers, 1)
    step_s = o.seconds("--step-time", args.step_time)
    args.slowdown = _default_slowdown(args, workers)
    slowdown = o.slowdowns(args.slowdown, workers)
    config = o.run_config(args)
    links = parse_links(args.link, workers)
    target_loss = _target_loss(args)
    devices = tuple(o.each("--device", args.device, workers))
    batch_sizes = _batch_sizes(args, workers)
    lr = _learning_rate(args)

    import torch

    from loscar_deploy.simulation import SimulationPlan
    from loscar_worker.tasks import load_task

    torch.set_num_threads(1)
    if task is None:
        if args.download:
            download(args)
        size = None if batch_sizes is None else batch_sizes[0]
        task = load_task(args.task, args.data_dir, batch_size=size, lr=lr)
    return SimulationPlan(
        task,
        config,
        workers,
        links,
        tuple(step_s * factor for factor in slowdown),
        partition=args.partition,
        target_loss=target_loss,
        churn=o.number("--churn", args.churn),
        churn_every_s=o.seconds("--churn-every", args.churn_every, positive=True),
        away_s=o.seconds("--away", args.away),
        batch_sizes=batch_sizes,
        devices=None if set(devices) == {"cpu"} else devices,
    )


def check_task(plan: RunPlan) -> None:
    """Make the task of a run and drop it again, so that one which cannot be made is refused before anything starts.

    Built-in ones are left to the workers: they fail for missing data only, which a worker of another machine may have.

    Raises:
        LoscarError: see `loscar_worker.tasks.load_task`.
    """
    args = plan.args
    if args.task in BUILT_IN_TASKS:
        return
    from loscar_worker.tasks import load_task

    size = None if plan.batch_sizes is None else plan.batch_sizes[0]
    load_task(args.task, args.data_dir, batch_size=size, lr=_learning_rate(args))


def _fill_in(args: Namespace) -> None:
    if args.rounds is None and args.duration is None and args.max_steps is None:
        args.duration = "30s"
    if args.target_loss is not None and args.evaluate_every == "0":
        args.evaluate_every = "5"


def _target_loss(args: Namespace) -> float | None:
    return None if args.target_loss is None else o.number("--target-loss", args.target_loss)


def _learning_rate(args: Namespace) -> float | None:
    return None if args.lr is None else o.number("--lr", args.lr)


def _batch_sizes(args: Namespace, workers: int) -> tuple[int, ...] | None:
    if args.batch_size is None:
        return None
    return tuple(o.whole("--batch-size", text, 1) for text in o.each("--batch-size", args.batch_size, workers))


def _default_slowdown(args: Namespace, workers: int) -> str:
    if args.slowdown is not None:
        return str(args.slowdown)
    return "1,1,1,2" if workers == 4 else "1"


def _run(args: Namespace) -> int:
    with ended_at_once():
        import uvloop  # noqa: F401 - what runs on it has more to clean up

        from loscar_deploy.run import execute
        from loscar_deploy.writers import check as check_writers

        require_torch()
        on_ray = ray_options.ray_plan(args)
        plan = run_plan(args)
        check_writers(args.writer or ())
        if on_ray is None:  # there its module may be on the nodes only
            check_task(plan)
    if args.download:
        download(args)
    if on_ray is None:
        summary = execute(plan)
    else:
        from loscar_deploy.ray_run import execute_on_ray

        summary = execute_on_ray(plan, on_ray)
    if args.json:
        print_json(summary)
    return 0


def _simulate(args: Namespace) -> int:
    with ended_at_once():
        require_torch()
        from loscar_deploy.simulate import execute

    plan = simulation_plan(args)
    summary = execute(plan, args)
    if args.json:
        print_json(summary)
        return 0
    for e in summary["evaluations"]:
        print(f"{e['time']:8.1f} s  round {e['round']}  test loss {e['loss']:.4f}  accuracy {e['accuracy']:.4f}")
    print(
        f"consensus test accuracy {summary['accuracy']:.4f}, loss {summary['loss']:.4f} after {summary['rounds']} "
        f"rounds in {summary['virtual_seconds']:.1f} virtual seconds (idle ≤ {max(summary['idle_fraction']):.1%})"
    )
    if plan.target_loss is not None and summary["seconds_to_target"] is None:
        print(f"target loss {plan.target_loss:g} NOT reached")
    if args.out is not None:
        print(f"the run folder is {args.out}")
    return 0


def declare(command: Declare) -> None:
    """Add this group's commands."""
    run = command("run", _run, "a whole run on this machine; without options the main job")
    o.add_machines(run, "a floor under a step's time, slept")
    run.add_argument("--out", metavar="DIR", type=Path, help="the run folder (default: a new one under runs/)")
    run.add_argument("--keep-models", action="store_true", help="keep each worker's own last model as well")
    run.add_argument("--dashboard", metavar="HOST:PORT", help="serve a page that shows the run here")
    o.add_writers(run)
    run.add_argument("--json", action="store_true", help="print the summary as JSON, progress on standard error")
    o.add_task(run, many=True)
    o.add_run(run)
    o.add_limits(run)
    ray_options.declare(run)

    simulate = command("simulate", _simulate, "the same protocol under a virtual clock, in one process")
    o.add_machines(simulate, "virtual time of one step")
    o.add_churn(simulate)
    simulate.add_argument("--out", metavar="DIR", type=Path, help="write a run folder")
    simulate.add_argument("--json", action="store_true", help="print the summary as JSON")
    o.add_task(simulate, many=True)
    o.add_run(simulate)
