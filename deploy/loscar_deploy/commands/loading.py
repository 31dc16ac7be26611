"""Load tests."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec

from loscar_core.errors import ConfigError
from loscar_deploy import options as o
from loscar_deploy.commands import Declare, quiet_grpc, require_torch


def _loadtest(args: Namespace) -> int:
    quiet_grpc()
    require_torch()
    if find_spec("psutil") is None and (args.server is None or not args.no_reference):
        raise ConfigError(
            "this load test needs the psutil package: pip install psutil, or give --server and --no-reference"
        )
    import uvloop

    from loscar_core.selection import SelectionKind
    from loscar_deploy.link_spec import LinkSpec
    from loscar_deploy.loadtest import LoadPlan, run_load_test

    try:
        selection = SelectionKind(args.selection)
    except ValueError:
        raise ConfigError(f"--selection {args.selection!r} is not one of sweep, random, block, all") from None
    if selection is SelectionKind.TOPK:
        raise ConfigError("--selection topk: synthetic workers have no changes whose largest they could send")
    plan = LoadPlan(
        workers=o.whole("--workers", args.workers, 1),
        dimension=o.whole("--params", args.params, 1),
        density=o.number("--density", args.density),
        selection=selection,
        rounds=o.whole("--rounds", args.rounds, 1),
        link=LinkSpec.parse(args.link),
        pause_s=o.seconds("--pause", args.pause),
        server=o.given("--server", args.server),
        security=o.client_security(args),
        reference=not args.no_reference,
    )
    return uvloop.run(run_load_test(plan, as_json=args.json))


def declare(command: Declare) -> None:
    sub = command("loadtest", _loadtest, "measure a server under many synthetic workers")
    sub.add_argument("--workers", metavar="N", default="16", help="synthetic workers, all in this process")
    sub.add_argument("--params", metavar="N", default="25e6", help="coordinates of the model")
    sub.add_argument("--density", metavar="F", default="0.001", help="share of them that a round carries")
    sub.add_argument("--selection", metavar="NAME", default="sweep", help="sweep, random, block or all")
    sub.add_argument("--rounds", metavar="N", default="200", help="rounds to measure, after a tenth more to warm up")
    sub.add_argument("--link", metavar="SPEC", default="none", help="what lies between each worker and the server")
    sub.add_argument("--pause", metavar="TIME", default="0s", help="from a commit to a worker's next contribution")
    sub.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="a fresh server of this machine or a private network, in place of one that is started here; started with "
        "--workers N, it waits for all of them",
    )
    sub.add_argument("--no-reference", action="store_true", help="leave out the bare echo of the same bytes")
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
    o.add_client(sub)
