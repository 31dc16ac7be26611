"""Joining a run: what a training loop calls first."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loscar_core.errors import ConfigError
from loscar_core.layout import Shard
from loscar_core.merge import parse_rejoin
from loscar_core.worker_engine import WorkerEngine
from loscar_wire.transport import ClientSecurity, parse_servers
from loscar_worker.boundary import Companion, Pace, TrainingHalf, cycle_of
from loscar_worker.connection import ConnectionOptions
from loscar_worker.model import ModelView
from loscar_worker.round_record import RoundRecord
from loscar_worker.session import Session


def default_name() -> str:
    """A name that is this process's own: host and process id."""
    return f"{socket.gethostname()}-{os.getpid()}"


def join(
    servers: str | Sequence[str],
    model: nn.Module,
    *,
    token: str | None = None,
    name: str | None = None,
    slot: int | None = None,
    run_id: bytes = b"",
    local_steps: int | str | None = None,
    sync_interval_s: float | None = None,
    overlap_steps: int | str | None = None,
    statistics: Iterable[str] = (),
    tls_ca: Path | str | None = None,
    tls_cert: Path | str | None = None,
    tls_key: Path | str | None = None,
    connect_timeout_s: float = 60.0,
    server_timeout_s: float = 600.0,
    on_round: Callable[[RoundRecord], None] | None = None,
    on_evaluation: Callable[[TrainingHalf, int], None] | None = None,
    rejoin: str = "project",
    state: Mapping[str, Any] | None = None,
    vectors: Mapping[str, Tensor] | None = None,
    companion: Companion | None = None,
) -> Session:
    """Join a run: the model takes over the run's state, and its parameters become views of flat storage.

    Returns when the run has started. Move or cast the model before, never after; make the optimizer before or
    after, as you like.

    Args:
        servers: "HOST:PORT", several separated by commas or as a sequence (tried in turn). Where the model is spread
            over several servers, those of each shard in order, with semicolons between them: "a:1;b:1".
        model: any module; its trainable parameters are averaged.
        token: the run's token; defaults to the environment's LOSCAR_TOKEN.
        name: this worker's name, unique in the run; defaults to host and process id.
        slot: a fixed place in the sums, or None for the smallest free one.
        run_id: 16 bytes, to insist on one run.
        local_steps, sync_interval_s, overlap_steps: see `Pace`.
        statistics: further buffers to average as absolute values; normalisation layers' are found.
        tls_ca, tls_cert, tls_key: PEM files; TLS is on when `tls_ca` is given.
        connect_timeout_s: how long to look for a server.
        server_timeout_s: how long the server may stay away later, while training goes on.
        on_round: called in the training thread after every merge.
        rejoin: what becomes of own unsent progress after an absence of more than 1/density rounds: `project`
            leaves out what the others have done too, `keep` and `drop` say it all.
        state: from `Session.state_dict`: come back as the worker that saved it (its name and slot count), with its
            parameters and its unsent progress.
        on_evaluation: called right after an evaluation round was merged, with the session and the round.
        vectors: float32 vectors that are averaged along with the model, by name; they are re-seated like parameters.
        companion: a method's part of the training around averages, such as `MixVrOptimizer`.

    Raises:
        ConfigError: something about the arguments or the model.
        ConnectError: no server in time.
        WrongModelError, WrongRunError, VersionMismatchError, AuthenticationError, RefusedError: the server
            does not take this worker.
    """
    shards = parse_servers(servers)
    security = ClientSecurity(
        token if token is not None else os.environ.get("LOSCAR_TOKEN"),
        Path(tls_ca) if tls_ca else None,
        Path(tls_cert) if tls_cert else None,
        Path(tls_key) if tls_key else None,
    )
    pace = Pace(local_steps, sync_interval_s, overlap_steps)
    cycle_of(pace, 1, 1.0, None, 0.0)
    view = ModelView(model, statistics, vectors)
    if view.vectors and len(shards) > 1:
        raise ConfigError(f"vectors are averaged beside the model only by one server, not by {len(shards)} shards")
    incarnation, vector = os.urandom(16), view.vector()
    halves = []
    for index, targets in enumerate(shards):
        shard = Shard(index, len(shards))
        first, end = shard.span(view.layout.dimension)
        engine = WorkerEngine(
            default_name() if name is None else name,
            incarnation,
            shard.layout(view.layout),
            vector[first:end],
            view.statistics() if index == 0 else view.statistics()[:0],
            run_id=run_id,
            slot=slot,
            shard=shard,
        )
        engine.held_back = len(shards) > 1  # until all shards are there, none of them should wait for this worker
        halves.append((engine, ConnectionOptions(targets, security, connect_timeout_s, server_timeout_s)))
    session = Session(view, halves, pace, on_round=on_round, on_evaluation=on_evaluation, rejoin=parse_rejoin(rejoin))
    if companion is not None:
        session.follow(companion)
    if state is not None:
        session.resume(state)
    session._join()
    return session
