"""One worker process of the comparison with the paper: joins one run after the other, each time from the same start.

    python paper_worker.py JOBS.json

JOBS is a list of {"address", "name", "slot", "workers", "local", "overlap", "seed", "method",
"out"}; `out` gets the live vector
at the run's end. Several runs in one process only save the import of torch: each has a session, a server and a model
of its own.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import numpy as np
import torch
from tiny_task import PlainSgd

import loscar_worker as loscar
from loscar_core.methods import parse_method
from loscar_core.methods.mixvr import MixVr
from loscar_worker.mixvr import MixVrOptimizer
from loscar_worker.tasks import load_task
from loscar_worker.tasks.partition import Batches, partition


def main(path: str) -> None:
    torch.set_num_threads(1)
    task = load_task("digits")
    with open(path, encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        model = task.make_model(job["seed"])
        optimizer = PlainSgd(list(model.parameters()), task.lr)
        indices = partition(task.labels(), "iid", job["workers"], job["slot"], job["seed"])
        batches = Batches(task.train, indices, task.batch_size, seed=job["seed"], slot=job["slot"])
        own = {"local_steps": job["local"], "overlap_steps": job["overlap"]}
        method = parse_method(job["method"])
        if isinstance(method, MixVr):
            losses = (partial(task.loss, model, batch) for batch in batches)
            mixvr = MixVrOptimizer(model, lr=task.lr, method=method, minibatch=partial(next, losses))
            own |= {"vectors": mixvr.vectors, "companion": mixvr}
        with loscar.join(job["address"], model, name=job["name"], slot=job["slot"], **own) as session:
            while not session.finished:
                if isinstance(method, MixVr):
                    loss = mixvr.take_step(next(losses))
                else:
                    loss = task.loss(model, next(batches))
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                session.step(loss=loss)
        vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        np.save(job["out"], np.concatenate([vector.numpy(), [session.steps]]))


if __name__ == "__main__":
    main(sys.argv[1])
