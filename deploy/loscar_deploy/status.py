"""`loscar status`: what a running server is doing, once or continuously."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.live import Live

from loscar_deploy.client import Client
from loscar_deploy.table import console_for, status_table
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.transport import ClientSecurity, parse_address

REFRESH_S = 1.0


def as_dict(reply: pb.StatusReply) -> dict[str, Any]:
    """The reply with its protobuf field names; ids in hexadecimal, counts as numbers."""
    values: dict[str, Any] = MessageToDict(
        reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    values["run_id"] = reply.run_id.hex()
    numbered: dict[str, Any] = _with_numbers(values)
    return numbered


def _with_numbers(value: Any) -> Any:
    """Protobuf's JSON writes 64-bit integers as strings; people's scripts want numbers."""
    if isinstance(value, dict):
        return {k: v if k == "run_id" else _with_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_numbers(v) for v in value]
    if isinstance(value, str) and value.lstrip("-").isdigit():
        return int(value)
    return value


async def show_status(target: str, security: ClientSecurity, *, as_json: bool, watch: bool) -> int:
    """Print the status; with `watch`, until the run is over or Ctrl+C."""
    parse_address(target, "--server")
    client = Client(target, security)
    console = console_for(sys.stdout)
    try:
        reply = await client.status()
        if not watch:
            if as_json:
                print(json.dumps(as_dict(reply)))
            else:
                console.print(status_table(reply))
                _print_departures(console, reply)
            return 0
        with Live(status_table(reply), console=console, auto_refresh=False) as live:
            while reply.phase != "finished":
                await asyncio.sleep(REFRESH_S)
                reply = await client.status()
                if as_json:
                    print(json.dumps(as_dict(reply)), flush=True)
                else:
                    live.update(status_table(reply), refresh=True)
        return 0
    finally:
        await client.close()


def _print_departures(console: Console, reply: pb.StatusReply) -> None:
    for d in reply.departures:
        console.print(f"{d.name} left {d.ago_s:.0f} s ago: {d.reason} {d.detail}", highlight=False, markup=False)
    for kind, count in reply.refused.items():
        console.print(f"refused {count} × {kind}", highlight=False, markup=False)
    sys.stdout.flush()
