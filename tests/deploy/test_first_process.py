"""A container's first process, which the kernel spares every signal that it has no handler for."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
os.getpid = lambda: int(sys.argv[1])
from loscar_deploy import cli
def handler(args):
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)
    signal.raise_signal(signal.SIGTERM)
def parser():
    found = cli.argparse.ArgumentParser()
    found.set_defaults(handler=handler, log_level="info", exit_with_parent=False)
    return found
cli.build_parser = parser
cli.main([])
"""


@pytest.mark.parametrize(("pid", "default", "status"), [(1, "False", 143), (2, "True", -signal.SIGTERM)])
def test_the_first_process_can_be_told_to_end_from_its_start(pid: int, default: str, status: int) -> None:
    """Before a command has imported what it needs and installed its own handlers."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(pid)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.returncode) == (default, status), done.stderr
