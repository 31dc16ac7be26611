"""`loscar fetch`: the model that a server holds, as a file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from loscar_core.errors import ConfigError, ConnectError, NoModelError, SystemRefusedError, WrongRunError
from loscar_core.layout import Shard, joined
from loscar_deploy.client import Client, FetchedModel
from loscar_deploy.commands import print_json
from loscar_deploy.model_file import save_model
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.pieces import config_from_pb
from loscar_wire.transport import ClientSecurity, parse_servers


async def fetch(servers: str, security: ClientSecurity, out: Path, *, as_json: bool) -> int:
    """Write the consensus of the last committed round to `out`, and print which one it is.

    Args:
        servers: HOST:PORT of a server of which a run is on or over, or as a worker takes it: addresses that are tried
            in turn, and those of several shards, whose parts are put together (each as of its own last round).
        out: replaced when it is there; whole or not written at all.

    Raises:
        ConfigError: `out` cannot be written; looked for before the model is fetched.
        ConnectError: no server answers.
        NoModelError: the server's run has not begun, or is being recovered.
        WrongRunError: the servers are not the shards of one run, in order.
        SystemRefusedError: the disk is full.
    """
    shards = parse_servers(servers, "--server")
    _check_writable(out)
    parts = [await _part(Shard(i, len(shards)), addresses, security) for i, addresses in enumerate(shards)]
    status, first = parts[0]
    for (other, _), addresses in zip(parts, shards, strict=True):
        if other.run_id != status.run_id:
            raise WrongRunError(f"{addresses[0]} holds run {other.run_id.hex()}, not {status.run_id.hex()}")
    model = FetchedModel(
        joined([part.layout for _, part in parts]),
        first.position,
        np.concatenate([part.vector for _, part in parts]),
        first.statistics,
    )
    try:
        save_model(out, model, status.run_id.hex())
    except OSError as error:
        raise SystemRefusedError(f"--out {out} cannot be written: {error.strerror or error}") from None
    size = 4 * (model.vector.size + model.statistics.size)
    if as_json:
        found = {"file": str(out), "run_id": status.run_id.hex(), "phase": status.phase, "bytes": size}
        print_json({**found, "epoch": model.position.epoch, "round": model.position.round})
    else:
        print(f"{out}: {size:,} bytes of run {status.run_id.hex()} at {model.position}, which is {status.phase}")
    return 0


async def _part(
    shard: Shard, addresses: tuple[str, ...], security: ClientSecurity
) -> tuple[pb.StatusReply, FetchedModel]:
    """What one shard says of itself, and its part of the model, from the first address where it is."""
    for last, address in enumerate(addresses, 1 - len(addresses)):
        client = Client(address, security)
        try:
            status = await client.status()
            found = config_from_pb(status.config).shard
            if found != shard:
                raise WrongRunError(f"{address} is shard {found} of its run, not {shard}")
            return status, await client.fetch_model()
        except (ConnectError, NoModelError):
            if last == 0:
                raise
        finally:
            await client.close()
    raise AssertionError("no address")


def _check_writable(out: Path) -> None:
    """Raises ConfigError; a large model should not be fetched in vain."""
    reason = None
    if out.is_dir():
        reason = "it is a folder"
    elif not out.parent.is_dir():
        reason = f"there is no folder {out.parent}"
    elif not os.access(out.parent, os.W_OK):
        reason = f"no permission to write in {out.parent}"
    if reason is not None:
        raise ConfigError(f"--out {out} cannot be written: {reason}")
