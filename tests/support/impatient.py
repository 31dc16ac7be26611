"""`loscar` with little patience: what no option changes is a hundred times shorter than it is."""

from __future__ import annotations

import functools
import sys

from loscar_deploy.cli import main
from loscar_server import admission
from loscar_wire import transport

HELLO_S, STALL_S, FETCHES = 0.5, 1.0, 2
MILLISECONDS = {"grpc.server_handshake_timeout_ms": 500, "grpc.max_connection_idle_ms": 1000}

if __name__ == "__main__":
    # What is not among the options would not be shortened: then a test waits in vain.
    admission.StreamLimits = functools.partial(  # type: ignore[assignment,misc]
        admission.StreamLimits, hello_s=HELLO_S, stall_s=STALL_S, fetches=FETCHES
    )
    transport.SERVER_OPTIONS[:] = [(name, MILLISECONDS.get(name, value)) for name, value in transport.SERVER_OPTIONS]
    sys.exit(main())
