"""One averaging of a vector by torchft's LocalSGD and DiLoCo: as many processes over gloo, each a replica of its own.

    python benchmarks/_torchft.py --lighthouse URL --kind localsgd --rank 0 --params 25000000 --rounds 10

is one of them; `benchmarks/averaging.py` starts the lighthouse and all of them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

TIMEOUT = datetime.timedelta(seconds=120)
KINDS = ("localsgd", "diloco")
WARM_UP = 2


def installed() -> bool:
    return importlib.util.find_spec("torchft") is not None


def averaging_ms(kind: str, processes: int, coordinates: int, rounds: int) -> float | None:
    """Milliseconds from a process's call to its model's being averaged; median over rounds and processes.

    None when it fails: with many short rounds one of its processes now and then waits in vain for the others.
    """
    lighthouse = subprocess.Popen(
        [sys.executable, __file__, "--lead", str(processes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert lighthouse.stdout is not None
    try:
        url = lighthouse.stdout.readline().strip()
        command = [sys.executable, __file__, "--lighthouse", url, "--kind", kind, "--processes", str(processes)]
        command += ["--params", str(coordinates), "--rounds", str(rounds), "--rank"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        started = [
            subprocess.Popen(
                [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            for rank in range(processes)
        ]
        said = [process.communicate() for process in started]
    finally:
        lighthouse.kill()
        lighthouse.communicate()
    for process, (_, error) in zip(started, said, strict=True):
        if process.returncode:
            print(f"torchft ended with status {process.returncode}:\n{error.strip()[-500:]}", file=sys.stderr)
            return None
    return statistics.median(json.loads(out.splitlines()[-1]) for out, _ in said)


def lead(processes: int) -> None:
    """Be the lighthouse until the standard input is closed; says where it is, and nothing of what it would log."""
    said = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=processes, join_timeout_ms=1000, quorum_tick_ms=1)
    said.write(f"http://127.0.0.1:{lighthouse.address().rpartition(':')[2]}\n")
    said.flush()
    sys.stdin.read()
    lighthouse.shutdown()


def replica(lighthouse: str, kind: str, processes: int, rank: int, coordinates: int, rounds: int) -> None:
    """One of the processes; prints the median of its milliseconds."""
    import torch
    from torch.distributed import TCPStore
    from torchft.local_sgd import DiLoCo, LocalSGD
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    torch.set_num_threads(1)
    model = torch.nn.Module()
    model.register_parameter("w", torch.nn.Parameter(torch.zeros(coordinates)))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=lambda _: None,
        state_dict=dict,
        min_replica_size=processes,
        use_async_quorum=False,
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica_{rank}",
        hostname="127.0.0.1",
        init_sync=False,
    )
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    if kind == "localsgd":
        method = LocalSGD(manager, model, inner, sync_every=1)
    else:
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        method = DiLoCo(manager, [model], inner, outer, sync_every=1)
    times = []
    with method:
        for number in range(rounds + WARM_UP):
            started = time.perf_counter()
            inner.step()  # no gradients: nothing but the averaging, which follows each step
            if number >= WARM_UP:
                times.append(1e3 * (time.perf_counter() - started))
    print(json.dumps(statistics.median(times)), flush=True)
    manager.shutdown(wait=False)
    sys.stdout.flush()
    os._exit(0)  # its threads may outlive the lighthouse, and then wait for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lead", type=int, metavar="N", help="be the lighthouse of so many")
    parser.add_argument("--lighthouse", default="")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--params", type=int, default=250_000)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    if given.lead:
        lead(given.lead)
        return
    replica(given.lighthouse, given.kind, given.processes, given.rank, given.params, given.rounds)


if __name__ == "__main__":
    main()
