"""The members of a run, each by itself: server, worker, a look at them, their model, and a link between them."""

from __future__ import annotations

import argparse
import logging
import signal
from argparse import Namespace
from pathlib import Path

from loscar_core.errors import ConfigError
from loscar_deploy import logs
from loscar_deploy import options as o
from loscar_deploy.commands import Declare, download, print_json, quiet_grpc, require_torch
from loscar_deploy.interrupts import ended_at_once

log = logging.getLogger("loscar")

_MOST_SLOTS = 1 << 32  # the wire's; a server's own limit is --max-members
_MOST_THREADS = 4096
_METRICS = "serve Prometheus metrics here; port 0 takes a free one"
_DASHBOARD = "serve a page that shows the run here; port 0 takes a free one"
_PAUSES = ("none", "term", "hup", "usr1")
_LOG_FORMAT = (
    "text, JSON lines, or auto: JSON lines where standard error is no terminal (default: $LOSCAR_LOG_FORMAT, else auto)"
)


def _server(args: Namespace) -> int:
    logs.know(role="server")
    with ended_at_once():
        import asyncio

        import uvloop

        from loscar_deploy.dashboard.app import dashboard_at
        from loscar_deploy.metrics_endpoint import metrics_at
        from loscar_server.admission import StreamLimits
        from loscar_server.app import ServerOptions, ServerProcess, run_id_bytes, serve

    workers = None if args.workers is None else o.whole("--workers", args.workers, 1)
    config = o.run_config(args)
    if config.dependent and args.norm_bound is not None:
        raise ConfigError(
            "--norm-bound: the two averages of a round of mixvr differ in size, and one bound fits neither"
        )
    server = ServerOptions(
        listen=args.listen,
        run_id=o.given("--run-id", args.run_id),
        config=config,
        limits=o.server_limits(args, workers),
        security=o.server_security(args),
        linger_s=o.seconds("--linger", args.linger),
        checkpoints=args.checkpoints,
        checkpoint_every_s=o.seconds("--checkpoint-every", args.checkpoint_every, positive=True),
        keep=o.whole("--keep", args.keep, 1),
        resume=args.resume,
        guard=StreamLimits(
            o.whole("--streams-per-host", args.streams_per_host, 1),
            o.whole("--joins-per-second", args.joins_per_second, 1),
            average_bytes=o.whole("--max-average-bytes", args.max_average_bytes, 0),
        ),
        events=args.events,
        pause_on=None if args.pause_on == "none" else signal.Signals[f"SIG{args.pause_on.upper()}"],
    )
    if args.resume and args.checkpoints is None:
        raise ConfigError("--resume needs --checkpoints: the folder to go on from")
    if config.shard.count > 1 and (server.run_id is None or workers is None):
        raise ConfigError("--shard needs --run-id and --workers, the same for all shards: they are one run's")
    if server.run_id is not None:
        logs.know(run_id=run_id_bytes(server.run_id).hex())

    with (
        metrics_at(o.given("--metrics", args.metrics)) as endpoint,
        dashboard_at(o.given("--dashboard", args.dashboard), server.security) as dashboard,
    ):
        metrics = None
        if endpoint is not None:
            from loscar_server.metrics import ServerMetrics

            metrics = ServerMetrics()
            endpoint.serve(metrics)

        def ready(process: ServerProcess) -> None:
            told = {"listening": process.address, "run_id": process.run_id.hex()}
            if endpoint is not None:
                told["metrics"] = endpoint.address
            if dashboard is not None:
                dashboard.watch(process.service, asyncio.get_running_loop())
                told["dashboard"] = dashboard.url
            logs.know(run_id=told["run_id"])
            if args.json:
                print_json(told)
            else:
                also = "" if endpoint is None else f", metrics at http://{endpoint.address}/metrics"
                also += "" if dashboard is None else f", dashboard at {dashboard.url}"
                print(f"listening on {told['listening']}, run {told['run_id']}{also}", flush=True)

        paused = uvloop.run(serve(server, ready, metrics))
    # As if by the signal itself: a script, or whoever watches over the process, sees that the run is not over.
    return 0 if paused is None else 128 + paused


def _worker(args: Namespace) -> int:
    logs.know(role="worker")
    with ended_at_once():
        require_torch()
        quiet_grpc()
        from loscar_core.methods import parse_method
        from loscar_deploy.metrics_endpoint import metrics_at
        from loscar_server.app import run_id_bytes
        from loscar_worker.app import WorkerOptions, run_worker
        from loscar_worker.joining import default_name
        from loscar_worker.session import Session

    if args.download:
        download(args)
    run_id = run_id_bytes(args.run_id) if o.given("--run-id", args.run_id) else b""
    worker = WorkerOptions(
        servers=args.server,
        task=args.task,
        data_dir=args.data_dir,
        name=o.given("--name", args.name) or default_name(),
        slot=None if args.slot is None else o.whole("--slot", args.slot, most=_MOST_SLOTS - 1),
        token=o.token(args),
        run_id=run_id,
        local_steps=_pace("--local-steps", args.local_steps),
        sync_interval_s=None if args.sync_interval is None else o.seconds("--sync-interval", args.sync_interval),
        overlap_steps=_pace("--overlap-steps", args.overlap_steps),
        workers=None if args.workers is None else o.whole("--workers", args.workers, 1),
        partition=args.partition,
        seed=o.whole("--seed", args.seed),
        slowdown=o.slowdowns(args.slowdown, 1)[0],
        step_time_s=o.seconds("--step-time", args.step_time),
        batch_size=None if args.batch_size is None else o.whole("--batch-size", args.batch_size, 1),
        lr=None if args.lr is None else o.number("--lr", args.lr),
        device=args.device,
        threads=None if args.threads is None else o.whole("--threads", args.threads, 1, _MOST_THREADS),
        connect_timeout_s=o.seconds("--connect-timeout", args.connect_timeout),
        server_timeout_s=o.seconds("--server-timeout", args.server_timeout),
        tls_ca=args.tls_ca,
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        result=args.result,
        rounds_log=args.rounds_log,
        save_model=args.save_model,
        save_last=args.save_last,
        evaluation=args.evaluation,
        state=args.state,
        state_every_s=o.seconds("--state-every", args.state_every),
        parting_s=o.seconds("--parting", args.parting),
        method=parse_method(args.method).text(),
        rejoin=args.rejoin,
    )
    if worker.name is not None:
        logs.know(worker=worker.name)
    if run_id:
        logs.know(run_id=run_id.hex())

    def joined(session: Session) -> None:
        logs.know(worker=session.name, run_id=session.run_id)

    with metrics_at(o.given("--metrics", args.metrics)) as endpoint:
        metrics = None
        if endpoint is not None:
            from loscar_worker.metrics import WorkerMetrics

            metrics = WorkerMetrics()
            endpoint.serve(metrics)
            log.info("metrics at http://%s/metrics", endpoint.address)
        return run_worker(worker, metrics, joined)


def _pace(option: str, text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    return o.steps_or_auto(option, text)


def _status(args: Namespace) -> int:
    quiet_grpc()
    import uvloop

    from loscar_deploy.status import show_status
    from loscar_deploy.writers import check as check_writers

    if not args.watch and (args.writer or args.out is not None):
        raise ConfigError("--writer and --out need --watch: a single look makes no curve")
    if args.out is not None and not args.writer:
        raise ConfigError("--out is for the files of --writer: give one")
    check_writers(args.writer or ())
    return uvloop.run(
        show_status(
            args.server,
            o.client_security(args),
            as_json=args.json,
            watch=args.watch,
            writers=args.writer or (),
            out=args.out,
        )
    )


def _fetch(args: Namespace) -> int:
    quiet_grpc()
    import uvloop

    from loscar_deploy.fetch import fetch

    return uvloop.run(fetch(args.server, o.client_security(args), args.out, as_json=args.json))


def _link(args: Namespace) -> int:
    from loscar_deploy.link_app import main as link

    return link(args.listen, args.to, args.spec, o.whole("--seed", args.seed))


def declare(command: Declare) -> None:
    """Add this group's commands."""
    server = command("server", _server, "one parameter server")
    server.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:50051")
    server.add_argument("--run-id", metavar="ID", help="name of the run (default: a new one)")
    server.add_argument("--shard", metavar="K/N", help="average only this one of N ranges of the model, K from 0 on")
    server.add_argument("--workers", metavar="N", help="round 1 waits for so many workers")
    server.add_argument("--linger", metavar="TIME", default="5m", help="serve the final model so long after the end")
    server.add_argument("--json", action="store_true", help="say where it listens as JSON")
    server.add_argument("--metrics", metavar="HOST:PORT", help=_METRICS)
    server.add_argument("--dashboard", metavar="HOST:PORT", help=_DASHBOARD)
    server.add_argument("--log-format", choices=logs.FORMATS, help=_LOG_FORMAT)
    server.add_argument("--events", metavar="FILE", type=Path, help="append a JSON line for every event and round")
    server.add_argument(
        "--pause-on", default="none", choices=_PAUSES, help="a signal that stops the server and not its run"
    )
    o.add_run(server)
    o.add_limits(server)
    o.add_protection(server)
    o.add_server_security(server)

    worker = command("worker", _worker, "one worker")
    worker.add_argument(
        "--server",
        metavar="HOST:PORT[,HOST:PORT][;…]",
        default="127.0.0.1:50051",
        help="tried in turn; with ; between the servers of several shards, in order",
    )
    worker.add_argument("--name", help="unique in the run (default: host and process id)")
    worker.add_argument("--slot", metavar="N", help="a fixed place in the sums")
    worker.add_argument("--run-id", metavar="ID", help="insist on this run")
    worker.add_argument("--workers", metavar="N", help="N of the partition: slot i of N takes its part")
    worker.add_argument("--local-steps", metavar="N", help="override the server's")
    worker.add_argument("--sync-interval", metavar="TIME", help="override the server's")
    worker.add_argument("--overlap-steps", metavar="Q", help="override the server's")
    worker.add_argument("--seed", metavar="N", default="0", help="seeds the model and the data order")
    worker.add_argument("--slowdown", metavar="F", default="1", help="pretend to be so many times slower")
    worker.add_argument("--step-time", metavar="TIME", default="0s", help="a floor under a step's time, slept")
    worker.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto")
    worker.add_argument("--threads", metavar="N", help="compute threads (default: PyTorch's choice)")
    worker.add_argument("--connect-timeout", metavar="TIME", default="1m", help="look so long for a server")
    worker.add_argument("--server-timeout", metavar="TIME", default="10m", help="train on so long without one")
    worker.add_argument("--result", metavar="FILE", type=Path, help="write the figures here at the end")
    worker.add_argument("--state", metavar="FILE", type=Path, help="save the worker's whole state here, and resume")
    worker.add_argument("--state-every", metavar="TIME", default="1m", help="how often")
    worker.add_argument(
        "--parting", metavar="TIME", default="5s", help="hand over what it has before it leaves, so long"
    )
    worker.add_argument("--method", metavar="NAME", default="loscar", help="the run's, when that is mixvr")
    worker.add_argument("--rejoin", metavar="HOW", default="project", help="after a long absence: project, keep, drop")
    worker.add_argument("--evaluation", type=Path, help=argparse.SUPPRESS)
    worker.add_argument("--save-model", metavar="FILE", type=Path, help="write the model as this worker leaves with it")
    worker.add_argument("--save-last", metavar="FILE", type=Path, help="write its own, as it went into the final round")
    worker.add_argument("--metrics", metavar="HOST:PORT", help=_METRICS)
    worker.add_argument("--log-format", choices=logs.FORMATS, help=_LOG_FORMAT)
    worker.add_argument("--rounds-log", metavar="FILE", type=Path, help="write a JSON line here for every round")
    o.add_task(worker)
    o.add_client(worker)

    status = command("status", _status, "what a running server is doing")
    status.add_argument("--server", metavar="HOST:PORT", default="127.0.0.1:50051")
    status.add_argument("--watch", action="store_true", help="keep showing it")
    status.add_argument("--json", action="store_true")
    o.add_writers(status)
    status.add_argument(
        "--out", metavar="DIR", type=Path, help="where the writers write (default: runs/ and the run's id)"
    )
    o.add_client(status)

    fetch = command("fetch", _fetch, "the model of a running server, or of one whose run is over, as a file")
    fetch.add_argument(
        "--server",
        metavar="HOST:PORT[,HOST:PORT][;…]",
        default="127.0.0.1:50051",
        help="tried in turn; with ; between the servers of several shards, in order",
    )
    fetch.add_argument("--out", metavar="FILE", type=Path, default=Path("model.safetensors"), help="write it here")
    fetch.add_argument("--json", action="store_true")
    o.add_client(fetch)

    link = command("link", _link, "the link emulator on its own")
    link.add_argument("spec", metavar="SPEC", nargs="?", default="wan", help="a preset or rtt=…,jitter=…,rate=…")
    link.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:0")
    link.add_argument("--to", metavar="HOST:PORT", required=True)
    link.add_argument("--seed", metavar="N", default="0")
