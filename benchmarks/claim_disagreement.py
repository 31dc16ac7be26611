"""Claim: in the steady state the workers disagree by V* = η²σ²(1 − 1/n)[Q + (q/p)H] a coordinate.

n workers, step size η, gradient noise of variance σ², density p = 1 − q, N local steps, Q in flight, H = N + Q. A
quadratic whose noise dominates, simulated until it is stationary; measured is the variance among the workers (with
divisor n), averaged over all coordinates, just after a merge. Overwriting has the same formula without Q. For `sweep`,
at the end of a sweep a coordinate's age is uniform instead of geometric: q/2p in place of q/p. Verdict: every
case within 5 %.

    python benchmarks/claim_disagreement.py      about two minutes
"""

from __future__ import annotations

import sys

import _claims
import numpy as np
import torch
from torch import Tensor, nn

from loscar_worker.tasks.base import ArrayDataset, Batch, Evaluation, Task

WORKERS = 8
DIMENSION = 12_000
ETA, SIGMA, CURVATURE = 0.1, 1.0, 1e-5
TOLERANCE = 0.05
CASES = [
    (p, selection, n, q, merge)
    for p, selection in ((1.0, "random"), (0.2, "random"), (0.05, "random"), (0.05, "sweep"))
    for n, q in ((4, 0), (4, 4), (1, 7))
    for merge in ("delay-corrected", "overwrite")
]


class Point(nn.Module):
    """The parameters alone, starting at the optimum."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(DIMENSION))


class NoisyQuadratic(Task):
    """½ h ‖w‖², with gradients h w + σ ξ, ξ standard normal."""

    def __init__(self) -> None:
        def noise(inputs: Tensor, generator: torch.Generator | None) -> Tensor:
            return torch.randn(len(inputs), DIMENSION, generator=generator)

        data = ArrayDataset(torch.zeros(1024, 1), torch.zeros(1024), noise, random=True)
        super().__init__("noisy quadratic", data, data, batch_size=1, lr=ETA)

    def build_model(self) -> nn.Module:
        return Point()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, Point)
        return CURVATURE / 2 * (model.w @ model.w) + SIGMA * (model.w @ batch[0].mean(0))

    def evaluate(self, model: nn.Module) -> Evaluation:
        assert isinstance(model, Point)
        return Evaluation(CURVATURE / 2 * float(model.w.detach().square().sum()), 0.0)


def theory(p: float, selection: str, local: int, overlap: int, merge: str) -> float:
    age = (1 - p) / p * (0.5 if selection == "sweep" else 1.0)
    own = 0 if merge == "overwrite" else overlap
    return ETA**2 * SIGMA**2 * (1 - 1 / WORKERS) * (own + age * (local + overlap))


def main() -> int:
    parser = _claims.parser(__doc__, seeds="0")
    arguments = parser.parse_args()
    task = NoisyQuadratic()
    rows, runs, met = [], [], True
    for p, selection, local, overlap, merge in CASES:
        expected = theory(p, selection, local, overlap, merge)
        measured = []
        for seed in _claims.seeds_of(arguments):
            outcome = _claims.simulate(
                task,
                workers=WORKERS,
                rounds=round(6 / p),  # whole sweeps: within one the mean age is larger
                density=p,
                selection=selection,
                merge=merge,
                local_steps=local,
                overlap_steps=overlap,
                seed=seed,
            )
            vectors = np.stack(outcome.result.vectors).astype(np.float64)
            measured.append(float(vectors.var(axis=0).mean()))
        mean = sum(measured) / len(measured)
        # Where theory says that all are equal, rounding of single precision is all that may be left.
        off = mean / expected - 1 if expected else 0.0
        ok = abs(off) <= TOLERANCE if expected else mean < 1e-9
        met = met and ok
        case = {"density": p, "selection": selection, "local_steps": local, "overlap_steps": overlap, "merge": merge}
        runs.append({**case, "theory": expected, "measured": measured, "off": off, "met": ok})
        row = (f"{p:g}", selection, local, overlap, merge, f"{expected:.4f}", f"{mean:.4f}", f"{off:+.1%}")
        rows.append(row)
        print(*row, file=sys.stderr, flush=True)
    headings = ("density", "selection", "N", "Q", "merge", "theory", "measured", "off")
    result = {"targets": {"off": TOLERANCE}, "met": met, "runs": runs}
    return _claims.finish("claim_disagreement", arguments, result, headings, rows)


if __name__ == "__main__":
    sys.exit(main())
