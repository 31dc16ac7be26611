"""`loscar chaos`: a run on this machine whose processes and links fail at random, and an audit of what became of it.

Real processes: one server that a supervisor starts again whenever it dies (by turns with its disk and without), and
workers behind a link proxy each. For some time they are killed, stopped and continued, cut off and reset, at random
phases of rounds; then everything is left in peace, the run is ended, and the books are balanced (see `audit`). The
schedule follows from the seed; what it meets depends on the machine.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from loscar_core.errors import LoscarError
from loscar_deploy.chaos_faults import ChaosOptions, plan_faults
from loscar_deploy.chaos_run import ChaosRun

ACCURACY_MARGIN = 0.01
"""How far a disturbed run may stay below an undisturbed one that lasted as long."""


async def execute(options: ChaosOptions) -> dict[str, Any]:
    """Run, audit, compare; returns the verdict."""
    base = Path(tempfile.mkdtemp(prefix="loscar-chaos-")) if options.out is None else options.out
    try:
        verdict = await _verdict(options, base)
        (base / "verdict.json").write_text(json.dumps(verdict, indent=2) + "\n", encoding="utf-8")
        return verdict
    finally:
        if options.out is None:
            shutil.rmtree(base, ignore_errors=True)


async def _attempt(run: ChaosRun) -> None:
    try:
        await run.run()
    except LoscarError as error:
        run.failures.append(str(error))


async def _verdict(options: ChaosOptions, base: Path) -> dict[str, Any]:
    import torch

    from loscar_deploy.audit import Audit, audit
    from loscar_deploy.chaos_worker import DATA, SavedDigits
    from loscar_worker.model import ModelView
    from loscar_worker.tasks import load_task

    torch.set_num_threads(1)
    task = load_task("digits", None)
    model = task.make_model(options.seed)
    view = ModelView(model)
    initial = view.vector()
    names = [f"w{i}" for i in range(options.workers)]

    async def attempt(name: str, attempted: ChaosOptions, disturbed: bool) -> tuple[ChaosRun, Audit, float | None]:
        folder = base / name
        folder.mkdir(parents=True)
        SavedDigits.save(task, folder / DATA)
        run = ChaosRun(attempted, folder, plan_faults(attempted) if disturbed else [])
        await _attempt(run)
        found = audit(folder, names, run.config, initial)
        if found.live_mean is None:
            return run, found, None
        view.load_vector(found.live_mean.astype("float32"))
        return run, found, task.evaluate(model).accuracy

    run, found, accuracy = await attempt("disturbed", options, disturbed=True)
    left = run.left_behind()
    failures = run.failures + found.failures + [f"left behind: {text}" for text in left]
    verdict: dict[str, Any] = {
        "seed": options.seed,
        "workers": options.workers,
        "seconds": round(run.seconds, 1),
        "faults": dict(run.injected),
        "faults_total": sum(run.injected.values()),
        "faults_by_quarter_of_round": run.phases,
        "server_starts": run.server.starts,
        "worker_starts": [w.starts for w in run.workers],
        **found.figures(),
        "accuracy": accuracy,
        "accuracy_undisturbed": None,
        "left_behind": left,
    }
    if options.undisturbed and not run.failures:
        peaceful = replace(options, seconds=run.seconds, calm_rounds=1)
        other, compared, expected = await attempt("undisturbed", peaceful, disturbed=False)
        failures += [f"undisturbed: {text}" for text in other.failures + compared.failures]
        verdict["accuracy_undisturbed"] = expected
        verdict["rounds_undisturbed"] = compared.figures()["rounds"]
        if accuracy is not None and expected is not None and accuracy < expected - ACCURACY_MARGIN:
            failures.append(f"accuracy {accuracy:.4f} where the undisturbed run reached {expected:.4f}")
    verdict["failures"] = failures
    verdict["passed"] = not failures
    return verdict


def print_verdict(verdict: dict[str, Any]) -> None:
    """For people."""
    print(f"chaos with seed {verdict['seed']}: {verdict['workers']} workers, {verdict['seconds']} s")
    for kind, count in sorted(verdict["faults"].items()):
        print(f"  {count:4d} × {kind}")
    quarters = "/".join(map(str, verdict["faults_by_quarter_of_round"]))
    print(f"  {verdict['faults_total']} faults injected; while rounds went on, by quarter of a round: {quarters}")
    print(
        f"  {verdict['rounds']} rounds closed, {verdict['rounds_abandoned']} more abandoned and undone; "
        f"{verdict['server_starts']} server processes"
    )
    print(
        f"  {verdict['contributions_in_consensus']} contributions in the consensus, "
        f"{verdict['contributions_lost']} lost, {verdict['contributions_doubled']} counted twice"
    )
    for ledger in verdict["ledger"]:
        lives = "" if ledger["lives"] == 1 else f" in {ledger['lives']} lives"
        print(
            f"  {ledger['name']}: {ledger['steps']} steps{lives}, {ledger['sent']} contributions sent, "
            f"{ledger['in_consensus']} in the consensus; out of balance by {ledger['error']:.1e}"
        )
    if verdict["accuracy"] is not None:
        other = verdict["accuracy_undisturbed"]
        text = "" if other is None else f", undisturbed {other:.4f}"
        print(f"  accuracy of the live models' average {verdict['accuracy']:.4f}{text}")
    for text in verdict["failures"]:
        print(f"  FAILED: {text}")
    print("passed" if verdict["passed"] else "failed")
