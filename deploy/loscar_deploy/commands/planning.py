"""`loscar plan`: settings for given links, before anything is run."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from loscar_core.errors import ConfigError
from loscar_deploy import options as o
from loscar_deploy.commands import Declare, print_json

if TYPE_CHECKING:
    from loscar_deploy.plan import Question
    from loscar_deploy.plan_report import Place
    from loscar_deploy.plan_timing import Seat

_MOST_PARAMS = 1 << 40
_MOST_WORKERS = 1 << 16


def question_of(args: Namespace) -> Question:
    """Raises ConfigError for every wrong value, and for values that exclude each other."""
    from loscar_core.selection import SelectionKind
    from loscar_core.values import ValueType
    from loscar_deploy.plan import Question

    local, interval = args.local_steps, args.sync_interval
    if local is not None and interval is not None:
        raise ConfigError("--local-steps and --sync-interval: give one of them, steps or a time")
    steps = None if local is None else o.whole("--local-steps", local)
    overlap = o.steps_or_auto("--overlap-steps", args.overlap_steps)
    if steps == 0 and overlap == 0:
        raise ConfigError("--local-steps 0 with --overlap-steps 0 would average without ever training")
    selection = o.member(SelectionKind, "--selection", args.selection)
    if selection in (SelectionKind.TOPK, SelectionKind.HEAD, SelectionKind.TAIL):
        raise ConfigError(f"--selection {selection.value} cannot be planned: use sweep, random, block or all")
    density = None if args.density is None else _density(args.density)
    if selection is SelectionKind.ALL and density is not None and density < 1:
        raise ConfigError(f"--density {args.density} with --selection all, which carries every coordinate")
    share = o.positive("--link-share", args.link_share)
    if share > 1:
        raise ConfigError(f"--link-share {args.link_share} is above 1")
    bound = args.max_staleness
    return Question(
        o.whole("--params", args.params, 1, _MOST_PARAMS),
        _seats(args, o.whole("--workers", args.workers, 1, _MOST_WORKERS)),
        o.whole("--statistics", args.statistics, 0, _MOST_PARAMS),
        selection,
        density,
        None if args.wire_dtype is None else o.member(ValueType, "--wire-dtype", args.wire_dtype),
        steps,
        None if interval is None else o.seconds("--sync-interval", interval, positive=True),
        overlap,
        share,
        None if bound is None else o.whole("--max-staleness", bound),
        None if args.max_disagreement is None else o.positive("--max-disagreement", args.max_disagreement),
        None if args.max_traffic is None else o.positive("--max-traffic", args.max_traffic),
    )


def _density(text: str) -> float:
    density = o.positive("--density", text)
    if density > 1:
        raise ConfigError(f"--density {text} is above 1: it is the share of the coordinates that a round carries")
    return density


def _seats(args: Namespace, workers: int) -> tuple[Seat, ...]:
    """The workers in the order of slots, neighbours that are alike together."""
    from loscar_deploy.link_spec import parse_links
    from loscar_deploy.plan_timing import Seat

    step_s = o.seconds("--step-time", args.step_time, positive=True)
    seats: list[Seat] = []
    links = parse_links(args.link, workers)
    for factor, link in zip(o.slowdowns(args.slowdown, workers), links, strict=True):
        if seats and (seats[-1].step_s, seats[-1].link) == (step_s * factor, link):
            seats[-1] = Seat(step_s * factor, link, seats[-1].count + 1)
        else:
            seats.append(Seat(step_s * factor, link))
    return tuple(seats)


def place_of(args: Namespace) -> Place:
    """The same for what only the printed commands need, and for the size of the noise."""
    from loscar_deploy.plan_report import Place
    from loscar_wire.transport import parse_address

    parse_address(args.server, "--server")
    lr = None if args.lr is None else o.positive("--lr", args.lr)
    noise = None if args.noise is None else o.positive("--noise", args.noise)
    if (lr is None) != (noise is None):
        raise ConfigError("--lr and --noise belong together: the disagreement is in units of their product")
    return Place(args.server, args.task, args.step_time, args.link, args.slowdown, lr, noise)


def _plan(args: Namespace) -> int:
    from loscar_deploy.plan import make_plan
    from loscar_deploy.plan_report import as_json, show
    from loscar_deploy.table import console_for

    place = place_of(args)
    plan, best = make_plan(question_of(args))
    if args.json:
        print_json(as_json(plan, best, place))
    else:
        show(plan, best, place, console_for(sys.stdout))
    return 0


def declare(command: Declare) -> None:
    """Add this group's command."""
    plan = command("plan", _plan, "which settings hide a link, and what they cost")
    plan.add_argument("--params", metavar="D", required=True, help="trainable parameters of the model, such as 124e6")
    plan.add_argument("--step-time", metavar="TIME", required=True, help="how long one step takes")
    plan.add_argument("--link", metavar="SPEC", default=o.LINK, help="each worker's link; ; separates")
    plan.add_argument("--workers", metavar="N", default="4", help="how many workers")
    plan.add_argument("--slowdown", metavar="F[,F…]", default="1", help="how many times slower each worker is")
    plan.add_argument("--statistics", metavar="S", default="0", help="values of normalisation layers, sent whole")
    plan.add_argument("--json", action="store_true")

    fixed = plan.add_argument_group("what is decided already")
    fixed.add_argument("--density", metavar="P", help="share of the coordinates that a round carries")
    fixed.add_argument("--selection", metavar="KIND", default="sweep", help="sweep, random, block or all")
    fixed.add_argument("--wire-dtype", metavar="TYPE", help="float32, bfloat16, float16 or int8")
    fixed.add_argument("--local-steps", metavar="N", help="steps from a merge to the next snapshot")
    fixed.add_argument("--sync-interval", metavar="TIME", help="time from a merge to the next snapshot instead")
    fixed.add_argument(
        "--overlap-steps", metavar="Q", default="auto", help="steps from a snapshot to its merge; 0 blocks"
    )

    limits = plan.add_argument_group("limits")
    limits.add_argument("--link-share", metavar="F", default="0.8", help="how much of its time a link may be busy")
    limits.add_argument("--max-staleness", metavar="STEPS", help="most steps from a snapshot to its merge")
    limits.add_argument("--max-traffic", metavar="BYTES", help="of a worker in a day, both ways together")
    limits.add_argument(
        "--max-disagreement", metavar="STEPS", help="in steps' gradient noise; the least traffic is planned then"
    )

    rest = plan.add_argument_group("for the commands and the units")
    rest.add_argument("--server", metavar="HOST:PORT", default="127.0.0.1:50051", help="where the server will be")
    rest.add_argument("--task", default="package.module:factory", help="what the workers will train")
    rest.add_argument("--lr", metavar="RATE", help="the learning rate η, for the disagreement's size")
    rest.add_argument("--noise", metavar="SIGMA", help="the deviation σ of one coordinate's gradient")
