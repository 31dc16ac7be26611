"""`loscar fetch`: the model that a server holds, as a file."""

from __future__ import annotations

import os
from pathlib import Path

from loscar_core.errors import ConfigError, SystemRefusedError
from loscar_deploy.client import Client
from loscar_deploy.commands import print_json
from loscar_deploy.model_file import save_model
from loscar_wire.transport import ClientSecurity, parse_address


async def fetch(target: str, security: ClientSecurity, out: Path, *, as_json: bool) -> int:
    """Write the consensus of the last committed round to `out`, and print which one it is.

    Args:
        target: HOST:PORT of a server of which a run is on or over.
        out: replaced when it is there; whole or not written at all.

    Raises:
        ConfigError: `out` cannot be written; looked for before the model is fetched.
        ConnectError: no server answers.
        NoModelError: the server's run has not begun, or is being recovered.
        SystemRefusedError: the disk is full.
    """
    parse_address(target, "--server")
    _check_writable(out)
    client = Client(target, security)
    try:
        status = await client.status()
        model = await client.fetch_model()
    finally:
        await client.close()
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
