"""The command line: one entry point, `loscar`.

The commands are in `loscar_deploy.commands`; they import what they need when they run, so that `loscar --help` answers
at once and needs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import metadata

from loscar_core.errors import LoscarError, SystemRefusedError, all_errors
from loscar_deploy import logs
from loscar_deploy.commands import Handler, comparing, loading, planning, services, tools, training
from loscar_deploy.completion import PrintCompletion

log = logging.getLogger("loscar")


def build_parser() -> ArgumentParser:
    """Every command and option; a documented table is generated from it."""
    parser = ArgumentParser(
        prog="loscar",
        description="Train one model on many unequal machines that are joined by slow, unreliable links.",
        epilog=_exit_codes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("--print-completion", action=PrintCompletion, help="print a script for this shell and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, handler: Handler, text: str) -> ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(handler=handler)
        sub.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
        sub.add_argument("--exit-with-parent", action="store_true", help=argparse.SUPPRESS)
        return sub

    for group in (training, planning, comparing, services, loading, tools):
        group.declare(command)
    return parser


def _version() -> str:
    from loscar_core import PROTOCOL_VERSION

    return f"loscar {metadata.version('loscar')} (protocol {PROTOCOL_VERSION})"


def _exit_codes() -> str:
    lines = ["exit codes:", "  0    done", "  2    the command line cannot be read"]
    seen = {0, 2}
    for cls in all_errors():
        if cls.exit_code not in seen:
            seen.add(cls.exit_code)
            lines.append(f"  {cls.exit_code:<4} {cls.summary}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    _fill_closed_streams()
    if os.getpid() == 1:
        # A container's first process gets no signal without a handler, and a command's own comes after slow imports.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    args = build_parser().parse_args(arguments)
    try:
        logs.configure(args.log_level, getattr(args, "log_format", "text") or logs.wanted())
        if args.exit_with_parent:
            from loscar_deploy.children import exit_with_parent

            exit_with_parent()
        status: int = args.handler(args)
        sys.stdout.flush()
        return status
    except LoscarError as error:
        return _say(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        log.debug("refused here", exc_info=error)
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        return _say(SystemRefusedError(f"{where}{error.strerror or error}"))


def _say(error: LoscarError) -> int:
    logs.say(error)
    return error.exit_code


def _drop_output() -> None:
    """What is still to be written to standard output cannot be; Python would try again at its exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fill_closed_streams() -> None:
    """A stream that was closed by whoever started this is None, and the next file to be opened would take its place."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
