"""The Ray cluster that a run goes to: connecting to it, and what to say of its nodes."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import grpc

from loscar_core.errors import ConfigError, ConnectError
from loscar_deploy.ray_options import RayPlan, Resources
from loscar_wire.transport import format_address, parse_address

CONNECT_S = 5.0
SCHEME = "ray://"


def ray_errors() -> type[Exception]:
    """What Ray's own errors are."""
    from ray.exceptions import RayError

    found: type[Exception] = RayError
    return found


@contextlib.contextmanager
def connected(plan: RayPlan) -> Iterator[None]:
    """Be a driver of the cluster; at the end, whatever went wrong, leave nothing of it there.

    Raises:
        ConfigError: Ray is not installed, or the cluster refuses this Ray or the code.
        ConnectError: no cluster there.
    """
    if find_spec("ray") is None:
        raise ConfigError("--on needs Ray: pip install 'loscar[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")  # by default it looks a quarter of an hour for a cluster
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if plan.working_dir is not None:
        options["runtime_env"] = {"working_dir": str(plan.working_dir)}
    try:
        _reach(plan.address)
        ray.init(plan.address, **options)
    except (ConnectionError, TimeoutError) as error:
        raise ConnectError(f"--on {plan.address}: no Ray cluster: {_first_line(error)}") from None
    except (RuntimeError, ValueError, ray_errors()) as error:
        raise ConfigError(f"--on {plan.address}: {_first_line(error)}") from None
    _hush()
    try:
        yield
    finally:
        ray.shutdown()


def _hush() -> None:
    """Ray prints pages of its logs on standard output when a node dies, whatever it is told; the run says it itself."""
    from ray._private import worker

    worker.print_to_stdstream = lambda *_, **__: None


def _reach(address: str) -> None:
    """See whether something answers: Ray's own attempts take minutes, and signals do not end them.

    Raises:
        ConnectError: nothing does.
        ConnectionError: Ray does not know of a cluster here.
        ValueError: it is no address.
    """
    at = address
    if address.startswith(SCHEME):
        at = address.removeprefix(SCHEME)
    else:
        with contextlib.suppress(ImportError):  # not public: where it is missing, what was given will have to do
            from ray._private.services import canonicalize_bootstrap_address

            at = canonicalize_bootstrap_address(address) or address
    if at == "auto":
        raise ConnectionError("none is known on this machine, and RAY_ADDRESS is not set")
    host, port = parse_address(at, "--on")
    where = format_address(host, port)
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        raise ConnectError(f"--on {address}: nothing answers at {where}: {error.strerror or error}") from None
    if os.environ.get("RAY_USE_TLS", "0") == "0":
        with grpc.insecure_channel(where) as channel:
            try:
                grpc.channel_ready_future(channel).result(CONNECT_S)
                is_ray = _speaks_ray(channel, through_client=address.startswith(SCHEME))
            except grpc.FutureTimeoutError:
                is_ray = False
            if not is_ray:
                raise ConnectError(f"--on {address}: what answers at {where} is no Ray cluster")


def _speaks_ray(channel: grpc.Channel, *, through_client: bool) -> bool:
    """Whether a gRPC server knows the methods of Ray's; yes, unless it denies it."""
    request: Any
    try:  # not public: where they are missing, Ray's own attempt will have to do
        if through_client:
            from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc

            ask = ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo
            request = ray_client_pb2.ClusterInfoRequest()
        else:
            from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

            ask = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive
            request = gcs_service_pb2.CheckAliveRequest()
    except (ImportError, AttributeError):
        return True
    try:
        ask(request, timeout=CONNECT_S)
    except grpc.RpcError as error:
        return error.code() is not grpc.StatusCode.UNIMPLEMENTED
    return True


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _nodes() -> list[tuple[str, dict[str, float]]]:
    """(address, resources) of each node that is there, by the names of the command line."""
    import ray

    names = {"CPU": "cpus", "GPU": "gpus"}
    nodes: list[dict[str, Any]] = ray.nodes()
    return [
        (node["NodeManagerAddress"], {names.get(name, name): amount for name, amount in node["Resources"].items()})
        for node in nodes
        if node["Alive"]
    ]


def fits(resources: Resources) -> bool:
    """Whether a node has so much, when nothing else runs on it."""
    wanted = {"cpus": resources.cpus, "gpus": resources.gpus, **dict(resources.custom)}
    return any(all(has.get(name, 0.0) >= amount for name, amount in wanted.items()) for _, has in _nodes())


def inventory() -> str:
    """What the cluster's nodes have, one after the other."""
    told = []
    for address, has in _nodes():
        own = {k: v for k, v in has.items() if not k.startswith("node:") and k not in ("memory", "object_store_memory")}
        amounts = ", ".join(f"{name}={amount:g}" for name, amount in sorted(own.items())) or "nothing"
        told.append(f"{address} has {amounts}")
    return "; ".join(told) or "no node"
