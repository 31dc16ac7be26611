"""Writes down a simulated run as `loscar run` does a real one: the same folder, the same files."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loscar_deploy.client import FetchedModel
from loscar_deploy.model_file import save_model
from loscar_deploy.run_folder import RunFolder, metrics_of
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_worker.round_record import RoundRecord

if TYPE_CHECKING:
    from loscar_deploy.simulation import SimulatedEvaluation, SimulationPlan, SimulationResult

STATUS_EVERY_S = 1.0
LINES_KEPT = 100


class Recorder:
    """Records one simulation.

    Args:
        folder: where to.
        workers: how many there are; of very many, the status is written less often.

    Attributes:
        status_every_s: how often `status` wants to be called.
    """

    def __init__(self, folder: RunFolder, workers: int) -> None:
        self._folder = folder
        # Lines wait here: a file for each of thousands of workers could not be kept open.
        self._lines: dict[str, list[str]] = defaultdict(list)
        self.status_every_s = STATUS_EVERY_S * max(1.0, workers / 100)

    def round(self, name: str, record: RoundRecord) -> None:
        """A worker has merged a round."""
        lines = self._lines[name]
        lines.append(json.dumps(asdict(record)) + "\n")
        if len(lines) >= LINES_KEPT:
            self._write(name)

    def status(self, reply: pb.StatusReply) -> None:
        """What the server knows."""
        self._folder.append_metrics(metrics_of(reply))

    def evaluation(self, found: SimulatedEvaluation) -> None:
        """The average of the live models was tested."""
        line = {"round": found.round, "elapsed_s": found.time, "steps": found.steps}
        self._folder.append_evaluation({**line, "loss": found.loss, "accuracy": found.accuracy})

    def finish(self, plan: SimulationPlan, result: SimulationResult, summary: dict[str, Any]) -> None:
        """The rest of the folder: each worker's figures, the model, the summary."""
        for i in range(plan.workers):
            name = f"w{i}"
            figures = {"name": name, "slot": i, "finished": result.finished[i], "steps": result.steps[i]}
            figures |= {"run_seconds": result.run_seconds[i], "idle_fraction": result.idle_fraction[i]}
            figures |= {"step_seconds_median": plan.step_s[i]}
            figures |= {"bytes_up": result.bytes_up[i], "bytes_down": result.bytes_down[i]}
            figures |= {"contributions": result.ledgers[i], "reconnects": 0}
            self._folder.worker_result(name).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        if result.layout is not None and result.consensus is not None and result.statistics is not None:
            model = FetchedModel(result.layout, result.position, result.consensus, result.statistics)
            save_model(self._folder.model, model, "simulated")
        self._folder.write_summary(summary)

    def flush(self) -> None:
        """Write what still waits here."""
        for name in list(self._lines):
            self._write(name)

    def _write(self, name: str) -> None:
        with self._folder.worker_rounds(name).open("a", encoding="utf-8") as file:
            file.writelines(self._lines.pop(name, []))
