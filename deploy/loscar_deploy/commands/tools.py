"""What is used beside runs: evaluate, certs, doctor and chaos."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from loscar_core.errors import ConfigError
from loscar_deploy import options as o
from loscar_deploy.commands import Declare, print_json, quiet_grpc, require_torch

_MOST_DAYS = 36_500


def _evaluate(args: Namespace) -> int:
    import tomllib

    from loscar_core.errors import DataMissingError
    from loscar_deploy.run import evaluate_model
    from loscar_deploy.run_data import NO_RUN_FOLDER

    require_torch()
    path, task, data_dir = args.model, args.task, args.data_dir
    if not path.exists():
        raise DataMissingError(f"there is no model at {path}").with_hint(NO_RUN_FOLDER)
    if path.is_dir():
        config = path / "config.toml"
        if not config.is_file():
            raise DataMissingError(f"{path} is no run folder: it has no config.toml").with_hint(NO_RUN_FOLDER)
        try:
            saved = tomllib.loads(config.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config} cannot be read: {error}") from None
        task = task or saved.get("task")
        data_dir = data_dir or (Path(saved["data_dir"]) if "data_dir" in saved else None)
        path = path / "model.safetensors"
    if task is None:
        raise ConfigError("--task is needed to evaluate a model file that is not in a run folder")
    result: dict[str, Any] = dict(evaluate_model(path, task, data_dir))
    if args.sharpness or args.surface is not None:
        result |= _valley(args, path, task, data_dir)
    if args.json:
        print_json(result)
    else:
        print(f"test accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f}")
        if args.sharpness:
            width = result["mean_valley"]
            print(
                f"training loss {result['training_loss']:.4g}; mean valley "
                + (f"{width:.4g}, sharpness {1 / width:.4g}" if width else "not found: the loss never doubles")
            )
    return 0


def _valley(args: Namespace, path: Path, task: str, data_dir: Path | None) -> dict[str, Any]:
    """What is asked about the surroundings of a run's average."""
    from loscar_deploy.valley import Landscape, draw, figures
    from loscar_worker.tasks import load_task

    if not args.model.is_dir():
        raise ConfigError("--sharpness and --surface need a run folder: the workers' own models are in it")
    models = sorted((path.parent / "workers").glob("*.safetensors"))
    landscape = Landscape.load(load_task(task, data_dir), path, models)
    if args.surface is not None:
        try:
            draw(landscape.surface(0, 1), args.surface)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--surface {args.surface} cannot be written: {error}") from None
    return figures(landscape.valley()) if args.sharpness else {}


def _certs(args: Namespace) -> int:
    from importlib.util import find_spec

    if find_spec("cryptography") is None:
        raise ConfigError("this command needs the cryptography package: pip install 'loscar[certs]'")
    from loscar_deploy.certs import make_certificates

    hosts = [h for h in args.hosts.split(",") if h]
    workers = [w for w in (args.workers or "").split(",") if w]
    written = make_certificates(args.folder, hosts, workers, o.whole("--days", args.days, 1, _MOST_DAYS))
    if args.json:
        print_json({"written": [str(path) for path in written]})
    else:
        for path in written:
            print(path)
    return 0


def _doctor(args: Namespace) -> int:
    quiet_grpc()
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
        print_json(report(findings))
    else:
        for finding in findings:
            print(f"{finding.state:<8} {finding.check}: {finding.text}")
    return next((f.exit_code for f in findings if f.exit_code), 0)


def _chaos(args: Namespace) -> int:
    import uvloop

    require_torch()
    from loscar_deploy.chaos import execute, print_verdict
    from loscar_deploy.chaos_faults import ChaosOptions

    options = ChaosOptions(
        seconds=o.positive("--seconds", args.seconds),
        workers=o.whole("--workers", args.workers, 2),
        seed=o.whole("--seed", args.seed),
        faults_per_s=o.positive("--faults", args.faults),
        undisturbed=not args.alone,
        out=args.out,
    )
    verdict = uvloop.run(execute(options))
    if args.json:
        print_json(verdict)
    else:
        print_verdict(verdict)
    return 0 if verdict["passed"] else 1


def declare(command: Declare) -> None:
    """Add this group's commands."""
    evaluate = command("evaluate", _evaluate, "a saved model on the task's test data")
    evaluate.add_argument("model", type=Path, help="a run folder or a model.safetensors")
    evaluate.add_argument("--task", help="needed outside a run folder")
    evaluate.add_argument("--data-dir", metavar="DIR", type=Path)
    evaluate.add_argument("--sharpness", action="store_true", help="how wide the valley is (runs with --keep-models)")
    evaluate.add_argument(
        "--surface", metavar="FILE", type=Path, help="draw the loss around the average (the same runs)"
    )
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
