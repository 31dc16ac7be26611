"""The command line's options: spelled once, shared by the commands, turned into the configuration's dataclasses.

Values are parsed here and not by argparse, so that a wrong one is one readable line with an exit code of its own
instead of a page of usage. Imports nothing heavy at the top: `loscar --help` must be quick.
"""

from __future__ import annotations

import math
import os
import re
from argparse import ArgumentParser, Namespace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loscar_core.errors import ConfigError

if TYPE_CHECKING:
    from loscar_core.config import RunConfig, ServerLimits
    from loscar_wire.transport import ClientSecurity, ServerSecurity

E = TypeVar("E", bound=Enum)


class Default(str):
    """An option's value when it was left out: a method may prefer another one."""

    __slots__ = ()


_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_LONGEST_S = 1e9
CONSOLIDATION_SHARE = 0.05
"""Of the values sent, for dense rounds before checkpoints."""

_LARGEST = (1 << 63) - 1


def seconds(option: str, text: str, *, positive: bool = False) -> float:
    """A duration such as 15ms, 2.5s or 10m; with `positive` not 0 either. Raises ConfigError naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _UNITS_S:
        raise ConfigError(f"{option} {text!r} is not a duration: write a number and us, ms, s, m or h, such as 15ms")
    value = float(match[1]) * _UNITS_S[match[2]]
    if value > _LONGEST_S:
        raise ConfigError(f"{option} {text!r} is longer than 30 years")
    if positive and value == 0:
        raise ConfigError(f"{option} {text!r} is no time at all: it must be above 0")
    return value


def whole(option: str, text: str, least: int = 0, most: int = _LARGEST) -> int:
    """A whole number, also as 1e6. Raises ConfigError naming the option."""
    try:
        number = float(text)
        if number != int(number):
            raise ValueError
        value = int(text) if re.fullmatch(r"[+-]?\d+", text.strip()) else int(number)
    except (ValueError, OverflowError):
        raise ConfigError(f"{option} {text!r} is not a whole number") from None
    if value < least:
        raise ConfigError(f"{option} {text!r} is below {least}")
    if value > most:
        raise ConfigError(f"{option} {text!r} is above {most}")
    return value


def number(option: str, text: str) -> float:
    """A finite number. Raises ConfigError naming the option."""
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a number") from None
    if not math.isfinite(value):
        raise ConfigError(f"{option} {text!r} is not a finite number")
    return value


def positive(option: str, text: str) -> float:
    """A finite number above 0. Raises ConfigError naming the option."""
    value = number(option, text)
    if value <= 0:
        raise ConfigError(f"{option} {text!r} is not above 0")
    return value


def steps_or_auto(option: str, text: str | None) -> int | None:
    """A number of steps, or None for "auto"."""
    if text is None or text == "auto":
        return None
    try:
        return whole(option, text)
    except ConfigError:
        raise ConfigError(f"{option} {text!r} is neither a number of steps nor auto") from None


def each(option: str, text: str, count: int) -> list[str]:
    """Comma-separated texts: one for all, or one for each of `count` workers. Raises ConfigError for another number."""
    values = [piece.strip() for piece in text.split(",")]
    if len(values) not in (1, count):
        raise ConfigError(f"{option} {text!r} has {len(values)} values for {count} workers: give one, or one for each")
    return values if len(values) == count else values * count


def numbers(option: str, text: str, count: int) -> list[float]:
    """The same with numbers."""
    values = [number(option, piece) for piece in text.split(",")]
    return values if len(values) == count else [number(option, piece) for piece in each(option, text, count)]


def slowdowns(text: str, count: int) -> list[float]:
    """--slowdown: how many times slower each worker is, at least 1."""
    values = numbers("--slowdown", text, count)
    if min(values) < 1:
        raise ConfigError(f"--slowdown {text!r} is below 1: a machine can only be made slower")
    return values


def given(option: str, text: str | None) -> str | None:
    """The text of an option that means something else when it is left out. Raises ConfigError when it is empty."""
    if text is not None and not text.strip():
        raise ConfigError(f"{option} is empty: give a value or leave it out")
    return text


# --- declarations -------------------------------------------------------------------------------------------


RUN_OPTIONS = (
    "density",
    "coordinates",
    "selection",
    "wire_dtype",
    "merge",
    "method",
    "local_steps",
    "sync_interval",
    "overlap_steps",
    "rounds",
    "duration",
    "max_steps",
    "evaluate_every",
    "final_round",
    "seed",
    "start_grace",
    "lease",
    "round_cap",
    "recover_after",
)
"""What `add_run` and `add_limits` declare, as a run hands it on to its server."""


def add_run(parser: ArgumentParser, *, compared: bool = False) -> None:
    """What every member of a run shares; `compared`: leave out what a comparison varies."""
    group = parser.add_argument_group("the run")
    if not compared:
        group.add_argument(
            "--density", metavar="P", default=Default("0.05"), help="share of the coordinates that a round carries"
        )
        group.add_argument("--coordinates", metavar="K", help="an exact number of coordinates instead of --density")
    group.add_argument(
        "--selection", metavar="KIND", default=Default("sweep"), help="sweep, random, block, topk or all"
    )
    group.add_argument("--wire-dtype", metavar="TYPE", default="float32", help="float32, bfloat16, float16 or int8")
    if not compared:
        group.add_argument(
            "--merge", metavar="KIND", default=Default("delay-corrected"), help="delay-corrected or overwrite"
        )
    group.add_argument(
        "--method", metavar="NAME", default="loscar", help="the training method; NAME:KEY=VALUE,… sets its options"
    )
    group.add_argument(
        "--local-steps", metavar="N", default=Default("auto"), help="steps from a merge to the next snapshot, or auto"
    )
    group.add_argument(
        "--sync-interval", metavar="TIME", default="250ms", help="with auto: time from a merge to the next snapshot"
    )
    group.add_argument(
        "--overlap-steps",
        metavar="Q",
        default=Default("auto"),
        help="steps from a snapshot to its merge; 0 blocks; or auto",
    )
    group.add_argument("--rounds", metavar="N", help="end after so many rounds")
    group.add_argument("--duration", metavar="TIME", help="end after so much run time")
    group.add_argument("--max-steps", metavar="N", help="end when one worker has taken so many steps")
    group.add_argument(
        "--evaluate-every", metavar="N", default="0", help="test the live models' average every N rounds"
    )
    group.add_argument("--final-round", metavar="KIND", default="dense", help="how the run ends: dense or none")
    group.add_argument("--seed", metavar="N", default="0", help="seeds selections, models and data order")


def add_limits(parser: ArgumentParser) -> None:
    """A server's patience."""
    group = parser.add_argument_group("patience")
    group.add_argument("--start-grace", metavar="TIME", default="5s", help="without --workers: the wait after a join")
    group.add_argument("--lease", metavar="TIME", default="15s", help="silence after which a member is gone")
    group.add_argument("--round-cap", metavar="TIME", default="2m", help="longest time one member can hold up a round")
    group.add_argument(
        "--recover-after", metavar="TIME", default="1m", help="without state: wait so long for a majority"
    )


def add_protection(parser: ArgumentParser) -> None:
    """Checkpoints, and protection against contributions that would spoil the sum."""
    group = parser.add_argument_group("protection")
    group.add_argument("--checkpoints", metavar="DIR", type=Path, help="write the run's state here regularly")
    group.add_argument("--checkpoint-every", metavar="TIME", default="1m", help="how often")
    group.add_argument("--keep", metavar="N", default="3", help="how many of the newest are kept")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    group.add_argument("--norm-bound", metavar="F", help="refuse contributions F times as large as usual")
    group.add_argument("--aggregate", metavar="HOW", default="mean", help="mean, median or trimmed:F (both are lossy)")
    group.add_argument("--max-members", metavar="N", default="4096", help="members at a time")
    group.add_argument("--max-params", metavar="N", default="64e9", help="largest model, in coordinates")
    group.add_argument("--streams-per-host", metavar="N", default="512", help="open streams from one address")
    group.add_argument("--joins-per-second", metavar="N", default="200", help="new streams a second")
    group.add_argument("--max-average-bytes", metavar="N", default="1e9", help="memory for `session.average`")


def add_client(parser: ArgumentParser) -> None:
    """How a client proves who it is."""
    group = parser.add_argument_group("security")
    group.add_argument("--token", help="the run's token (default: LOSCAR_TOKEN)")
    group.add_argument("--token-file", metavar="FILE", type=Path, help="read it from here: arguments can be listed")
    group.add_argument("--tls-ca", metavar="FILE", type=Path, help="authority of the server's certificate: TLS on")
    group.add_argument("--tls-cert", metavar="FILE", type=Path, help="own certificate, for mutual TLS")
    group.add_argument("--tls-key", metavar="FILE", type=Path, help="its key")


def add_server_security(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("security")
    group.add_argument("--token", help="what every call must carry (default: LOSCAR_TOKEN)")
    group.add_argument("--token-file", metavar="FILE", type=Path, help="read it from here: arguments can be listed")
    group.add_argument("--tls-cert", metavar="FILE", type=Path, help="the server's certificate: turns TLS on")
    group.add_argument("--tls-key", metavar="FILE", type=Path, help="its key")
    group.add_argument("--tls-client-ca", metavar="FILE", type=Path, help="authority of the workers' certificates")
    group.add_argument("--insecure", action="store_true", help="serve beyond this machine without TLS and token")


LINK = "rtt=100ms,rate=20mbit"


def add_machines(parser: ArgumentParser, step_time: str, *, compared: bool = False) -> None:
    """The workers of a whole run: how many, how fast, over which links.

    Args:
        step_time: the help of --step-time.
        compared: leave out what a comparison varies.
    """
    parser.add_argument("--workers", metavar="N", default="4", help="how many workers")
    if not compared:
        parser.add_argument("--link", metavar="SPEC", default=Default(LINK), help="each worker's link; ; separates")
    parser.add_argument("--slowdown", metavar="F[,F…]", help="how many times slower each worker is (default 1,1,1,2)")
    parser.add_argument("--step-time", metavar="TIME", default=Default("10ms"), help=step_time)
    parser.add_argument(
        "--device", metavar="NAME[,NAME…]", default=Default("cpu"), help="each worker's: cpu, cuda, cuda:1 or auto"
    )
    parser.add_argument("--target-loss", metavar="L", help="end when the average of the live models has this test loss")


def add_writers(parser: ArgumentParser) -> None:
    """Where figures go beside the run folder."""
    parser.add_argument(
        "--writer",
        choices=["tensorboard", "wandb"],
        action="append",
        help="hand the figures to TensorBoard or Weights & Biases as well; may be given twice",
    )


def add_churn(parser: ArgumentParser) -> None:
    """Workers of a simulation that die and come back."""
    parser.add_argument("--churn", metavar="P", default="0", help="share of the workers that die at once, now and then")
    parser.add_argument("--churn-every", metavar="TIME", default="10s", help="how often")
    parser.add_argument("--away", metavar="TIME", default="5s", help="they come back after so long, as new ones")


def add_task(parser: ArgumentParser, *, many: bool = False) -> None:
    """The task; `many`: for several workers, whose batch sizes may differ."""
    group = parser.add_argument_group("the task")
    group.add_argument("--task", default="digits", help="a built-in task, or package.module:factory")
    group.add_argument("--data-dir", metavar="DIR", type=Path, help="its data (default: LOSCAR_DATA_DIR, then .data)")
    group.add_argument("--download", action="store_true", help="fetch missing data first")
    if many:
        group.add_argument("--batch-size", metavar="N[,N…]", help="override the task's; one, or one for each worker")
    else:
        group.add_argument("--batch-size", metavar="N", help="override the task's")
    group.add_argument("--lr", metavar="RATE", help="override the task's")
    group.add_argument("--partition", default="iid", metavar="HOW", help="iid, dirichlet:ALPHA or by-label")


# --- conversions --------------------------------------------------------------------------------------------


def run_config(args: Namespace) -> RunConfig:
    """Raises ConfigError for every wrong value."""
    from loscar_core.config import FinalRound, RunConfig
    from loscar_core.layout import Shard, parse_shard
    from loscar_core.merge import parse_merge
    from loscar_core.methods import parse_method, settle
    from loscar_core.selection import SelectionKind
    from loscar_core.values import ValueType

    method = parse_method(args.method)
    shard = Shard() if getattr(args, "shard", None) is None else parse_shard(args.shard)
    values = {
        "seed": shard.seed(whole("--seed", args.seed)),
        "density": _density(args.density),
        "coordinates": None if args.coordinates is None else whole("--coordinates", args.coordinates, 1),
        "selection": member(SelectionKind, "--selection", args.selection),
        "value_type": member(ValueType, "--wire-dtype", args.wire_dtype),
        "merge": parse_merge(args.merge),
        "local_steps": steps_or_auto("--local-steps", args.local_steps),
        "sync_interval_s": seconds("--sync-interval", args.sync_interval, positive=True),
        "overlap_steps": steps_or_auto("--overlap-steps", args.overlap_steps),
        "rounds": None if args.rounds is None else whole("--rounds", args.rounds, 1),
        "duration_s": None if args.duration is None else seconds("--duration", args.duration, positive=True),
        "max_steps": None if args.max_steps is None else whole("--max-steps", args.max_steps, 1),
        "evaluate_every": whole("--evaluate-every", args.evaluate_every),
        "final_round": member(FinalRound, "--final-round", args.final_round),
        "method": method.text(),
        "shard": shard,
    }
    options = ("density", "selection", "merge", "local_steps", "overlap_steps")
    given = [name for name in options if not isinstance(getattr(args, name), Default)]
    if args.coordinates is not None:
        given.append("density")
    # Shard 0 knows when the run ends; a method that needs to know it is content with that.
    ending = {"rounds": 1} if shard.index else {}
    return RunConfig(**{**settle(method, {**values, **ending}, given), "rounds": values["rounds"]})


def _density(text: str) -> float:
    density = number("--density", text)
    if not 0 < density <= 1:
        raise ConfigError(f"--density {text} is outside (0, 1]: it is the share of the coordinates a round carries")
    return density


def member(kind: type[E], option: str, text: str) -> E:
    """The member of an enumeration that an option names. Raises ConfigError with those that there are."""
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise ConfigError(f"{option} {text!r} is not one of {known}") from None


def server_limits(args: Namespace, workers: int | None) -> ServerLimits:
    from loscar_core.config import ServerLimits
    from loscar_core.robust import parse_aggregate

    lease = seconds("--lease", args.lease, positive=True)
    aggregate, trim = parse_aggregate(getattr(args, "aggregate", "mean"))
    bound = getattr(args, "norm_bound", None)
    return ServerLimits(
        workers=workers,
        start_grace_s=seconds("--start-grace", args.start_grace),
        lease_s=lease,
        heartbeat_s=min(2.0, lease / 4),
        round_cap_s=seconds("--round-cap", args.round_cap, positive=True),
        recover_after_s=seconds("--recover-after", args.recover_after),
        max_members=whole("--max-members", getattr(args, "max_members", "4096"), 1),
        max_dimension=whole("--max-params", getattr(args, "max_params", "64e9"), 1),
        aggregate=aggregate,
        trim=trim,
        norm_bound=None if bound is None else number("--norm-bound", bound),
        consolidation_share=CONSOLIDATION_SHARE if getattr(args, "checkpoints", None) is not None else 0.0,
    )


def token(args: Namespace) -> str | None:
    """The run's token, or None. Raises ConfigError for one that is given twice, empty, or cannot be read."""
    if args.token is None and args.token_file is None:
        return os.environ.get("LOSCAR_TOKEN") or None
    if args.token is not None and args.token_file is not None:
        raise ConfigError("--token and --token-file: give one of them")
    given: str = args.token
    if args.token_file is not None:
        try:
            given = args.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise ConfigError(f"--token-file {args.token_file}: {reason}") from None
    if not given:
        raise ConfigError("the token is empty: without --token and --token-file there is none")
    return given


def client_security(args: Namespace) -> ClientSecurity:
    from loscar_wire.transport import ClientSecurity

    return ClientSecurity(token(args), args.tls_ca, args.tls_cert, args.tls_key)


def server_security(args: Namespace) -> ServerSecurity:
    from loscar_wire.transport import ServerSecurity

    return ServerSecurity(token(args), args.tls_cert, args.tls_key, args.tls_client_ca, args.insecure)
