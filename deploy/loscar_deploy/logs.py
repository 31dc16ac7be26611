"""The log of a command: text for people, or JSON lines for whatever collects them.

A JSON line has `time` (ISO 8601, UTC), `level`, `logger`, `message`, `role`, `run_id` and `worker` (null until they are
known), and where there is one `exception`, a traceback. The error that ends a command is one too, with `hint` and
`exit_code`; so are Python's warnings and uncaught exceptions. Everything goes to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from loscar_core.errors import ConfigError, LoscarError

FORMATS = ("auto", "text", "json")
VARIABLE = "LOSCAR_LOG_FORMAT"
EXTRA = ("hint", "exit_code")

log = logging.getLogger("loscar")


class JsonLines(logging.Formatter):
    """One JSON object a record.

    Attributes:
        context: what every line says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.context: dict[str, str | None] = {"role": None, "run_id": None, "worker": None}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self.context,
        }
        line |= {name: getattr(record, name) for name in EXTRA if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


_json: JsonLines | None = None


def wanted() -> str:
    """What the environment asks for; by default text on a terminal and JSON lines otherwise."""
    return os.environ.get(VARIABLE) or "auto"


def configure(level: str, style: str) -> None:
    """Set the log up for this process.

    Args:
        level: debug, info, warning or error.
        style: text, json, or auto: text on a terminal, JSON lines otherwise.

    Raises:
        ConfigError: it is none of them.
    """
    global _json
    if style not in FORMATS:
        raise ConfigError(f"{VARIABLE}={style}: it must be one of {', '.join(FORMATS)}")
    if style == "text" or (style == "auto" and sys.stderr.isatty()):
        logging.basicConfig(level=level.upper(), format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        return
    _json = JsonLines()
    handler = logging.StreamHandler()
    handler.setFormatter(_json)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def know(**context: str) -> None:
    """What every JSON line says from now on: `role`, `run_id`, `worker`."""
    if _json is not None:
        _json.context = {**_json.context, **context}


def say(error: LoscarError) -> None:
    """The error that ends the command, and what to do about it."""
    if _json is not None:
        log.error("%s", error, extra={"hint": error.hint, "exit_code": error.exit_code})
        return
    print(f"loscar: {error}", file=sys.stderr)
    print(f"  {error.hint}", file=sys.stderr)


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None and issubclass(kind, Exception):
        log.critical("%r", error, exc_info=(kind, error, trace))
