"""How actors of a Ray cluster start their processes: `loscar`, killed at once when its actor is gone.

With --exit-with-parent a process that is left behind ends in order. Here it must not: its node has failed, as far as
the run can see, and a server that ended in order would end the whole run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

from loscar_deploy import cli


def _die_with_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    # Standard input is a pipe that nothing is written to and that closes with the actor, however that went.
    threading.Thread(target=_die_with_parent, name="parent", daemon=True).start()
    sys.exit(cli.main())
