"""A Ray cluster of several nodes on this machine, on its loopback interface alone, until standard input closes.

    python ray_nodes.py FOLDER '[{"num_cpus": 1}, {"num_cpus": 2, "resources": {"fast": 1}}]'

The first node is the head. Prints a JSON line with the addresses and each node's process id once all nodes are there,
and one for each line on standard input, which names a node to kill: all of its processes at once, as when a machine
loses power.
"""

from __future__ import annotations

import json
import os
import socket
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TMPDIR"] = sys.argv[1]  # for `auto` as well, whose address is kept there
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # otherwise 127.0.0.1 is taken for another of its addresses

from ray.cluster_utils import Cluster

MEMORY = 80 << 20  # of each node's object store; Ray takes no less than 75 MB


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main(wanted: list[dict[str, object]]) -> None:
    client = free_port()
    common = {"node_ip_address": "127.0.0.1", "object_store_memory": MEMORY, "include_dashboard": False}
    head = {"ray_client_server_port": client, "include_log_monitor": False}
    cluster = Cluster()
    try:
        nodes = [cluster.add_node(**common, **spec, **(head if i == 0 else {})) for i, spec in enumerate(wanted)]
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        told = {"cluster": cluster.address, "client": f"ray://127.0.0.1:{client}", "raylets": raylets}
        print(json.dumps(told), flush=True)
        for line in sys.stdin:
            cluster.remove_node(nodes[int(line)], allow_graceful=False)
            print(json.dumps({"killed": int(line)}), flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
