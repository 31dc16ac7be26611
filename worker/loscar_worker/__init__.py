"""The worker: join a run with a PyTorch model, train, and merge the others' progress between two steps.

import loscar_worker as loscar
with loscar.join("server:50051", model) as session:
    for x, y in loader:
        loss = loss_fn(model(x), y); loss.backward(); optimizer.step(); optimizer.zero_grad()
        session.step(loss=loss)
        if session.finished: break
"""

from __future__ import annotations

import os

# Before gRPC is first imported: with fork support, forked DataLoader workers beside a live stream crash now and
# then. They never use the stream, so gRPC need not prepare for the fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from loscar_worker.joining import join
from loscar_worker.round_record import RoundRecord
from loscar_worker.session import Session

__all__ = ["RoundRecord", "Session", "join"]
