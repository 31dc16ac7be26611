"""Runs servers and workers: on one machine, over emulated links; and the command line."""

from __future__ import annotations

import os

# Before gRPC is first imported: this package starts child processes, which gRPC need not prepare for.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
