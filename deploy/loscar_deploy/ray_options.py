"""`loscar run --on`: the options of a run on a Ray cluster, read and checked without Ray."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loscar_core.errors import ConfigError
from loscar_deploy import options as o

HEAD = "node:__internal_head__"
"""Ray's name for a resource that only the head node has, one of it."""

_FINEST = 1e-4
_OWN = ("worker_resources", "server_resources", "working_dir", "restarts", "placement_timeout")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one actor takes of its node.

    Attributes:
        cpus, gpus: how many, fractions too.
        custom: other resources, as the cluster's nodes name them.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    custom: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        amounts = {"cpus": self.cpus, "gpus": self.gpus, **dict(self.custom)}
        return ", ".join(f"{name}={amount:g}" for name, amount in amounts.items() if amount) or "nothing"

    def for_ray(self) -> dict[str, Any]:
        """The same as options of an actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": dict(self.custom)}


@dataclass(frozen=True, slots=True)
class RayPlan:
    """Where a run's actors go.

    Attributes:
        address: auto, HOST:PORT or ray://HOST:PORT.
        workers: what each worker's actor takes.
        server: what the server's takes.
        restarts: how many times Ray starts each actor again.
        placement_s: how long to wait until all of them have found a node.
        working_dir: folder with code that the nodes need, or None.
    """

    address: str
    workers: tuple[Resources, ...]
    server: Resources
    restarts: int
    placement_s: float
    working_dir: Path | None


def declare(parser: ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("on a Ray cluster")
    group.add_argument("--on", metavar="ADDRESS", help="a Ray cluster: auto, HOST:PORT or ray://HOST:PORT")
    group.add_argument(
        "--worker-resources",
        metavar="LIST",
        help="what each worker takes: cpus=1,gpus=0.5,NAME=1 (default cpus=1); ; separates",
    )
    group.add_argument(
        "--server-resources", metavar="LIST", help="what the server takes (default: nothing, on the head node)"
    )
    group.add_argument("--working-dir", metavar="DIR", type=Path, help="a folder with the task's code, for all nodes")
    group.add_argument("--restarts", metavar="N", help="have Ray start a lost process again so many times (default 3)")
    group.add_argument("--placement-timeout", metavar="TIME", help="wait so long for nodes with room (default 1m)")


def parse_resources(option: str, text: str) -> Resources:
    """`cpus=1,gpus=0.5,NAME=1`; cpus is 1 when it is left out. Raises ConfigError naming the option."""
    amounts: dict[str, float] = {}
    for item in text.split(","):
        name, equals, amount = (piece.strip() for piece in item.partition("="))
        if not (name and equals):
            raise ConfigError(f"{option} {text!r}: expected NAME=AMOUNT, such as cpus=1, not {item.strip()!r}")
        if name.lower() in ("cpu", "gpu", "num_cpus", "num_gpus"):
            raise ConfigError(f"{option} {text!r}: write cpus and gpus, not {name}")
        if name in amounts:
            raise ConfigError(f"{option} {text!r}: {name} is there twice")
        value = o.number(f"{option} {name}", amount)
        if value < 0 or 0 < value < _FINEST or (value > 1 and value != int(value)):
            raise ConfigError(
                f"{option} {name} {amount!r}: Ray takes whole numbers, and fractions of one down to {_FINEST:g}"
            )
        amounts[name] = value
    cpus, gpus = amounts.pop("cpus", 1.0), amounts.pop("gpus", 0.0)
    return Resources(cpus, gpus, tuple((name, value) for name, value in amounts.items() if value))


def ray_plan(args: Namespace) -> RayPlan | None:
    """The plan for --on, or None without it; fills in what has another default on Ray than on one machine.

    Raises:
        ConfigError: a wrong value, or an option that has no meaning here.
    """
    address = o.given("--on", args.on)
    if address is None:
        for name in _OWN:
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is for runs on a Ray cluster: it needs --on")
        return None
    workers = o.whole("--workers", args.workers, 1)
    option = "--worker-resources"
    texts = (o.given(option, args.worker_resources) or "cpus=1").split(";")
    if len(texts) not in (1, workers):
        raise ConfigError(f"{option} has {len(texts)} lists for {workers} workers: give one, or one for each")
    each = tuple(parse_resources(option, text) for text in texts)
    each = each if len(each) == workers else each * workers
    server = o.given("--server-resources", args.server_resources)
    plan = RayPlan(
        address,
        each,
        Resources(0.0, 0.0, ((HEAD, 0.001),)) if server is None else parse_resources("--server-resources", server),
        3 if args.restarts is None else o.whole("--restarts", args.restarts, 0, 10_000),
        o.seconds("--placement-timeout", args.placement_timeout or "1m", positive=True),
        args.working_dir,
    )
    if plan.working_dir is not None and not plan.working_dir.is_dir():
        raise ConfigError(f"--working-dir {plan.working_dir} is no folder")
    _refuse(args)
    _fill_in(args, each)
    return plan


def _refuse(args: Namespace) -> None:
    """What the parts of a local run do that need all of it on one machine."""
    if not isinstance(args.link, o.Default) and set(args.link.split(";")) != {"none"}:
        raise ConfigError("--link: the nodes of a Ray cluster have links of their own, none are emulated between them")
    if args.target_loss is not None or args.evaluate_every != "0":
        raise ConfigError(
            "--target-loss and --evaluate-every: the evaluator reads the live models from files of its own machine, "
            "and the workers of a Ray cluster have none there"
        )
    if args.dashboard is not None and not os.environ.get("LOSCAR_TOKEN"):
        raise ConfigError("--dashboard on a Ray cluster asks for the run's token: choose one in LOSCAR_TOKEN")


def _fill_in(args: Namespace, workers: tuple[Resources, ...]) -> None:
    """Real machines instead of emulated ones: their own links, speed and devices."""
    args.link = "none"
    if isinstance(args.step_time, o.Default):
        args.step_time = "0s"
    if args.slowdown is None:
        args.slowdown = "1"
    if isinstance(args.device, o.Default):
        args.device = ",".join("auto" if resources.gpus else "cpu" for resources in workers)
