"""The command line: one entry point, `loscar`.

Commands import what they need when they run, so that `loscar --help` answers at once and needs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from loscar_core.errors import ConfigError, LoscarError, all_errors
from loscar_deploy import options as o


def _print_json(value: Any) -> None:
    print(json.dumps(value), flush=True)


# --- commands -----------------------------------------------------------------------------------------------


def _server(args: Namespace) -> int:
    import uvloop

    from loscar_server.app import ServerOptions, ServerProcess, serve
    from loscar_server.service import StreamLimits

    workers = None if args.workers is None else o.whole("--workers", args.workers, 1)
    server = ServerOptions(
        listen=args.listen,
        run_id=args.run_id,
        config=o.run_config(args),
        limits=o.server_limits(args, workers),
        security=o.server_security(args),
        linger_s=o.seconds("--linger", args.linger),
        checkpoints=args.checkpoints,
        checkpoint_every_s=o.seconds("--checkpoint-every", args.checkpoint_every),
        keep=o.whole("--keep", args.keep, 1),
        resume=args.resume,
        guard=StreamLimits(
            o.whole("--streams-per-host", args.streams_per_host, 1),
            o.whole("--joins-per-second", args.joins_per_second, 1),
        ),
        events=args.events,
    )
    if args.resume and args.checkpoints is None:
        raise ConfigError("--resume needs --checkpoints: the folder to go on from")

    def ready(process: ServerProcess) -> None:
        if args.json:
            _print_json({"listening": process.address, "run_id": process.run_id.hex()})
        else:
            print(f"listening on {process.address}, run {process.run_id.hex()}", flush=True)

    uvloop.run(serve(server, ready))
    return 0


def _worker(args: Namespace) -> int:
    _require_torch()
    from loscar_server.app import run_id_bytes
    from loscar_worker.app import WorkerOptions, run_worker

    if args.download:
        _download(args)
    return run_worker(
        WorkerOptions(
            servers=args.server,
            task=args.task,
            data_dir=args.data_dir,
            name=args.name,
            slot=None if args.slot is None else o.whole("--slot", args.slot),
            token=o.token(args),
            run_id=run_id_bytes(args.run_id) if args.run_id else b"",
            local_steps=_pace("--local-steps", args.local_steps),
            sync_interval_s=None if args.sync_interval is None else o.seconds("--sync-interval", args.sync_interval),
            overlap_steps=_pace("--overlap-steps", args.overlap_steps),
            workers=None if args.workers is None else o.whole("--workers", args.workers, 1),
            partition=args.partition,
            seed=o.whole("--seed", args.seed),
            slowdown=o.number("--slowdown", args.slowdown),
            step_time_s=o.seconds("--step-time", args.step_time),
            batch_size=None if args.batch_size is None else o.whole("--batch-size", args.batch_size, 1),
            lr=None if args.lr is None else o.number("--lr", args.lr),
            device=args.device,
            threads=None if args.threads is None else o.whole("--threads", args.threads, 1),
            connect_timeout_s=o.seconds("--connect-timeout", args.connect_timeout),
            server_timeout_s=o.seconds("--server-timeout", args.server_timeout),
            tls_ca=args.tls_ca,
            tls_cert=args.tls_cert,
            tls_key=args.tls_key,
            result=args.result,
            rounds_log=args.rounds_log,
            save_model=args.save_model,
            evaluation=args.evaluation,
            state=args.state,
            state_every_s=o.seconds("--state-every", args.state_every),
            rejoin=args.rejoin,
        )
    )


def _pace(option: str, text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    return o.steps_or_auto(option, text)


def _require_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise ConfigError("this command needs PyTorch: pip install 'loscar[worker]'")


def _download(args: Namespace) -> None:
    from loscar_worker.tasks.download import download_task

    download_task(args.task, args.data_dir)


def _run(args: Namespace) -> int:
    from loscar_deploy.link_spec import LinkSpec, parse_links
    from loscar_deploy.run import RunPlan, execute

    _require_torch()
    if args.rounds is None and args.duration is None and args.max_steps is None:
        args.duration = "30s"
    workers = o.whole("--workers", args.workers, 1)
    args.slowdown = _default_slowdown(args, workers)
    if args.target_loss is not None:
        o.number("--target-loss", args.target_loss)
        if args.evaluate_every == "0":
            args.evaluate_every = "5"
    links = parse_links(args.link, workers)
    o.seconds("--step-time", args.step_time)
    o.server_limits(args, workers)
    plan = RunPlan(
        args,
        o.run_config(args),
        workers,
        None if all(link == LinkSpec() for link in links) else links,
        tuple(o.numbers("--slowdown", args.slowdown, workers)),
        None if args.target_loss is None else o.number("--target-loss", args.target_loss),
    )
    if args.download:
        _download(args)
    summary = execute(plan)
    if args.json:
        _print_json(summary)
    return 0


def _simulate(args: Namespace) -> int:
    _require_torch()
    from loscar_deploy.link_spec import parse_links

    if args.rounds is None and args.duration is None and args.max_steps is None:
        args.duration = "30s"
    if args.target_loss is not None and args.evaluate_every == "0":
        args.evaluate_every = "5"
    workers = o.whole("--workers", args.workers, 1)
    step_s = o.seconds("--step-time", args.step_time)
    slowdown = o.numbers("--slowdown", _default_slowdown(args, workers), workers)
    config = o.run_config(args)
    links = parse_links(args.link, workers)

    import torch

    from loscar_deploy.simulate import Simulation, SimulationPlan, summary_of
    from loscar_worker.tasks import load_task

    torch.set_num_threads(1)
    if args.download:
        _download(args)
    task = load_task(
        args.task,
        args.data_dir,
        batch_size=None if args.batch_size is None else o.whole("--batch-size", args.batch_size, 1),
        lr=None if args.lr is None else o.number("--lr", args.lr),
    )
    plan = SimulationPlan(
        task,
        config,
        workers,
        links,
        tuple(step_s * factor for factor in slowdown),
        partition=args.partition,
        target_loss=None if args.target_loss is None else o.number("--target-loss", args.target_loss),
        churn=o.number("--churn", args.churn),
        churn_every_s=o.seconds("--churn-every", args.churn_every),
        away_s=o.seconds("--away", args.away),
    )
    summary = summary_of(plan, Simulation(plan).run())
    if args.json:
        _print_json(summary)
        return 0
    for e in summary["evaluations"]:
        print(f"{e['time']:8.1f} s  round {e['round']}  test loss {e['loss']:.4f}  accuracy {e['accuracy']:.4f}")
    print(
        f"consensus test accuracy {summary['accuracy']:.4f}, loss {summary['loss']:.4f} after {summary['rounds']} "
        f"rounds in {summary['virtual_seconds']:.1f} virtual seconds (idle ≤ {max(summary['idle_fraction']):.1%})"
    )
    if plan.target_loss is not None and summary["seconds_to_target"] is None:
        print(f"target loss {plan.target_loss:g} NOT reached")
    return 0


def _default_slowdown(args: Namespace, workers: int) -> str:
    if args.slowdown is not None:
        return str(args.slowdown)
    return "1,1,1,2" if workers == 4 else "1"


def _status(args: Namespace) -> int:
    import uvloop

    from loscar_deploy.status import show_status

    return uvloop.run(show_status(args.server, o.client_security(args), as_json=args.json, watch=args.watch))


def _evaluate(args: Namespace) -> int:
    import tomllib

    from loscar_core.errors import DataMissingError
    from loscar_deploy.run import evaluate_model

    _require_torch()
    path, task, data_dir = args.model, args.task, args.data_dir
    if path.is_dir():
        config = path / "config.toml"
        if not config.is_file():
            raise DataMissingError(f"{path} is no run folder: it has no config.toml")
        try:
            saved = tomllib.loads(config.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config} cannot be read: {error}") from None
        task = task or saved.get("task")
        data_dir = data_dir or (Path(saved["data_dir"]) if "data_dir" in saved else None)
        path = path / "model.safetensors"
    if task is None:
        raise ConfigError("--task is needed to evaluate a model file that is not in a run folder")
    result = evaluate_model(path, task, data_dir)
    if args.json:
        _print_json(result)
    else:
        print(f"test accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f}")
    return 0


def _link(args: Namespace) -> int:
    from loscar_deploy.link_app import main as link

    return link(args.listen, args.to, args.spec, o.whole("--seed", args.seed))


def _certs(args: Namespace) -> int:
    from importlib.util import find_spec

    if find_spec("cryptography") is None:
        raise ConfigError("this command needs the cryptography package: pip install 'loscar[certs]'")
    from loscar_deploy.certs import make_certificates

    hosts = [h for h in args.hosts.split(",") if h]
    workers = [w for w in (args.workers or "").split(",") if w]
    written = make_certificates(args.folder, hosts, workers, o.whole("--days", args.days, 1))
    if args.json:
        _print_json({"written": [str(path) for path in written]})
    else:
        for path in written:
            print(path)
    return 0


def _doctor(args: Namespace) -> int:
    from loscar_deploy.doctor import Questions, examine, report

    findings = examine(
        Questions(
            server=args.server,
            listen=args.listen,
            security=o.client_security(args),
            server_certificate=args.server_cert,
            server_key=args.server_key,
            task=args.task,
            data_dir=args.data_dir,
            out=args.out,
        )
    )
    if args.json:
        _print_json(report(findings))
    else:
        for finding in findings:
            print(f"{finding.state:<8} {finding.check}: {finding.text}")
    return next((f.exit_code for f in findings if f.exit_code), 0)


def _chaos(args: Namespace) -> int:
    import uvloop

    _require_torch()
    from loscar_deploy.chaos import ChaosOptions, execute, print_verdict

    options = ChaosOptions(
        seconds=o.number("--seconds", args.seconds),
        workers=o.whole("--workers", args.workers, 2),
        seed=o.whole("--seed", args.seed),
        faults_per_s=o.number("--faults", args.faults),
        undisturbed=not args.alone,
        out=args.out,
    )
    verdict = uvloop.run(execute(options))
    if args.json:
        _print_json(verdict)
    else:
        print_verdict(verdict)
    return 0 if verdict["passed"] else 1


# --- the parser ---------------------------------------------------------------------------------------------


def build_parser() -> ArgumentParser:
    """Every command and option; a documented table is generated from it."""
    parser = ArgumentParser(
        prog="loscar",
        description="Train one model on many unequal machines that are joined by slow, unreliable links.",
        epilog=_exit_codes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, handler: Any, text: str) -> ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(handler=handler)
        sub.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
        sub.add_argument("--exit-with-parent", action="store_true", help=argparse.SUPPRESS)
        return sub

    run = command("run", _run, "a whole run on this machine; without options the main job")
    run.add_argument("--workers", metavar="N", default="4", help="how many workers")
    run.add_argument("--link", metavar="SPEC", default="rtt=100ms,rate=20mbit", help="each worker's link; ; separates")
    run.add_argument("--slowdown", metavar="F[,F…]", help="how many times slower each worker is (default 1,1,1,2)")
    run.add_argument("--step-time", metavar="TIME", default="10ms", help="a floor under a step's time, slept")
    run.add_argument("--target-loss", metavar="L", help="end when the average of the live models has this test loss")
    run.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 or auto")
    run.add_argument("--out", metavar="DIR", type=Path, help="the run folder (default: a new one under runs/)")
    run.add_argument("--json", action="store_true", help="print the summary as JSON, progress on standard error")
    o.add_task(run)
    o.add_run(run)
    o.add_limits(run)

    simulate = command("simulate", _simulate, "the same protocol under a virtual clock, in one process")
    simulate.add_argument("--workers", metavar="N", default="4", help="how many workers, up to thousands")
    simulate.add_argument("--link", metavar="SPEC", default="rtt=100ms,rate=20mbit", help="as for run")
    simulate.add_argument("--slowdown", metavar="F[,F…]", help="as for run")
    simulate.add_argument("--step-time", metavar="TIME", default="10ms", help="virtual time of one step")
    simulate.add_argument("--target-loss", metavar="L", help="end at this test loss of the live models' average")
    simulate.add_argument(
        "--churn", metavar="P", default="0", help="share of the workers that die at once, now and then"
    )
    simulate.add_argument("--churn-every", metavar="TIME", default="10s", help="how often")
    simulate.add_argument("--away", metavar="TIME", default="5s", help="they come back after so long, as new ones")
    simulate.add_argument("--json", action="store_true", help="print the summary as JSON")
    o.add_task(simulate)
    o.add_run(simulate)

    server = command("server", _server, "one parameter server")
    server.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:50051")
    server.add_argument("--run-id", metavar="ID", help="name of the run (default: a new one)")
    server.add_argument("--workers", metavar="N", help="round 1 waits for so many workers")
    server.add_argument("--linger", metavar="TIME", default="5m", help="serve the final model so long after the end")
    server.add_argument("--json", action="store_true", help="say where it listens as JSON")
    server.add_argument("--events", metavar="FILE", type=Path, help="append a JSON line for every event and round")
    o.add_run(server)
    o.add_limits(server)
    o.add_protection(server)
    o.add_server_security(server)

    worker = command("worker", _worker, "one worker")
    worker.add_argument("--server", metavar="HOST:PORT[,HOST:PORT]", default="127.0.0.1:50051")
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
    worker.add_argument("--rejoin", metavar="HOW", default="project", help="after a long absence: project, keep, drop")
    worker.add_argument("--evaluation", type=Path, help=argparse.SUPPRESS)
    worker.add_argument("--save-model", metavar="FILE", type=Path, help="write the model as this worker leaves with it")
    worker.add_argument("--rounds-log", metavar="FILE", type=Path, help="write a JSON line here for every round")
    o.add_task(worker)
    o.add_client(worker)

    status = command("status", _status, "what a running server is doing")
    status.add_argument("--server", metavar="HOST:PORT", default="127.0.0.1:50051")
    status.add_argument("--watch", action="store_true", help="keep showing it")
    status.add_argument("--json", action="store_true")
    o.add_client(status)

    evaluate = command("evaluate", _evaluate, "a saved model on the task's test data")
    evaluate.add_argument("model", type=Path, help="a run folder or a model.safetensors")
    evaluate.add_argument("--task", help="needed outside a run folder")
    evaluate.add_argument("--data-dir", metavar="DIR", type=Path)
    evaluate.add_argument("--json", action="store_true")

    certs = command("certs", _certs, "a certificate authority of one's own, and certificates")
    certs.add_argument("folder", type=Path, metavar="DIR", help="where to; an authority that is there is used again")
    certs.add_argument("--hosts", default="localhost,127.0.0.1", help="the server's names and addresses")
    certs.add_argument("--workers", metavar="NAME[,NAME…]", help="certificates for workers, for mutual TLS")
    certs.add_argument("--days", metavar="N", default="365", help="how long they are valid")
    certs.add_argument("--json", action="store_true")

    doctor = command("doctor", _doctor, "looks for what usually goes wrong, and names it")
    doctor.add_argument("--server", metavar="HOST:PORT", help="is this server reachable?")
    doctor.add_argument("--listen", metavar="HOST:PORT", help="could a server listen here?")
    doctor.add_argument("--server-cert", metavar="FILE", type=Path, help="look at a server's certificate")
    doctor.add_argument("--server-key", metavar="FILE", type=Path, help="and whether this key belongs to it")
    doctor.add_argument("--task", help="are this task's data there?")
    doctor.add_argument("--data-dir", metavar="DIR", type=Path)
    doctor.add_argument("--out", metavar="DIR", type=Path, help="can this folder be written?")
    doctor.add_argument("--json", action="store_true")
    o.add_client(doctor)

    chaos = command("chaos", _chaos, "kills, stops and cuts off the processes of a run, and balances its books")
    chaos.add_argument("--seconds", metavar="S", default="60", help="how long faults are injected")
    chaos.add_argument("--workers", metavar="N", default="8", help="how many workers")
    chaos.add_argument("--seed", metavar="N", default="0", help="seeds the faults, the run and the models")
    chaos.add_argument("--faults", metavar="F", default="0.8", help="faults a second")
    chaos.add_argument("--alone", action="store_true", help="leave out the undisturbed run to compare with")
    chaos.add_argument("--out", metavar="DIR", type=Path, help="keep logs and books here")
    chaos.add_argument("--json", action="store_true")

    link = command("link", _link, "the link emulator on its own")
    link.add_argument("spec", metavar="SPEC", nargs="?", default="wan", help="a preset or rtt=…,jitter=…,rate=…")
    link.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:0")
    link.add_argument("--to", metavar="HOST:PORT", required=True)
    link.add_argument("--seed", metavar="N", default="0")
    return parser


def _version() -> str:
    from loscar_core import PROTOCOL_VERSION

    return f"loscar {metadata.version('loscar')} (protocol {PROTOCOL_VERSION})"


def _exit_codes() -> str:
    lines = ["exit codes:", "  0    done", "  2    the command line cannot be read"]
    seen = {0, 2}
    for cls in all_errors():
        if cls.exit_code not in seen:
            seen.add(cls.exit_code)
            lines.append(f"  {cls.exit_code:<4} {cls.summary}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.exit_with_parent:
        from loscar_deploy.children import exit_with_parent

        exit_with_parent()
    try:
        status: int = args.handler(args)
        return status
    except LoscarError as error:
        print(f"loscar: {error}", file=sys.stderr)
        print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            sys.stderr.close()
        return 141
