"""`loscar --print-completion SHELL`: a script with which the shell completes commands, options, values and files."""

from __future__ import annotations

import argparse
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")
_FOLDERS = ("DIR",)


class PrintCompletion(Action):
    """Prints the script and ends; what makes it is imported only then."""

    def __init__(self, option_strings: Sequence[str], dest: str = argparse.SUPPRESS, **more: Any) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, choices=SHELLS, **more)

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        import shtab

        for action in _actions(parser):
            if action.type is Path:
                action.complete = shtab.DIRECTORY if action.metavar in _FOLDERS else shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, values))
        parser.exit(0)


def _actions(parser: ArgumentParser) -> Iterator[Action]:
    """All arguments, those of the commands too."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
