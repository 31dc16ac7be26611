"""Where `loscar` begins: Ctrl+C while it is being loaded ends it without a word, and not with a traceback."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself takes a while to import


def main() -> int:
    """Run the command line; returns its exit code."""
    handled = _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler
    if handled:  # and not ignored, as under nohup
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from loscar_deploy.cli import main as command

    if handled:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    return command()
