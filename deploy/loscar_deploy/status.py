"""`loscar status`: what a running server is doing, once or continuously."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from rich.console import Console

from loscar_core.errors import ConnectError
from loscar_deploy.client import Client
from loscar_deploy.run_folder import RUNS, metrics_of
from loscar_deploy.table import console_for, status_table
from loscar_deploy.watch import Watch
from loscar_deploy.writers import Writers, open_writers
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


_TEXTS = {
    field.name
    for message in pb.DESCRIPTOR.message_types_by_name.values()
    for field in message.fields
    if field.cpp_type in (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_ENUM)
}
"""Fields that hold text; a worker may well be called 7."""


def _with_numbers(value: Any) -> Any:
    """Protobuf's JSON writes 64-bit integers as strings; people's scripts want numbers."""
    if isinstance(value, dict):
        return {k: v if k in _TEXTS else _with_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_numbers(v) for v in value]
    return int(value) if isinstance(value, str) else value


async def show_status(
    target: str,
    security: ClientSecurity,
    *,
    as_json: bool,
    watch: bool,
    writers: Sequence[str] = (),
    out: Path | None = None,
) -> int:
    """Print the status; with `watch`, until the run is over or Ctrl+C.

    Args:
        writers: names of those that are handed what is watched.
        out: where they write; None takes runs/ and the run's id.
    """
    parse_address(target, "--server")
    client = Client(target, security)
    try:
        reply = await client.status()
        if watch:
            run = reply.run_id.hex()[:8]
            opened = open_writers(writers, out or RUNS / run, run)
            try:
                opened.settings(as_dict(reply)["config"])
                await _watch(client, reply, as_json, opened)
            finally:
                opened.close()
        elif as_json:
            print(json.dumps(as_dict(reply)))
        else:
            console = console_for(sys.stdout)
            console.print(status_table(reply))
            _print_details(console, reply)
        return 0
    finally:
        await client.close()


async def _watch(client: Client, reply: pb.StatusReply, as_json: bool, writers: Writers) -> None:
    with Watch(quiet=as_json) as shown:
        while True:
            over = reply.phase == "finished"
            if as_json:
                print(json.dumps(as_dict(reply)), flush=True)
            shown.show(reply, last=over)
            if reply.elapsed_s >= 0:
                writers.record(metrics_of(reply))
            if over:
                return
            await asyncio.sleep(REFRESH_S)
            try:
                reply = await client.status()
            except ConnectError as error:
                seen = f"the run was {reply.phase} at round {reply.round} a moment ago"
                raise ConnectError(f"the server does not answer any more ({seen}): {error}") from None


def _print_details(console: Console, reply: pb.StatusReply) -> None:
    for a in reply.averages:
        waiting = f"{a.missing} have not taken it yet" if a.answered else f"waiting for {a.missing} more"
        console.print(f"average {a.label}: {a.offered} vectors, {waiting}", highlight=False, markup=False)
    for d in reply.departures:
        console.print(f"{d.name} left {d.ago_s:.0f} s ago: {d.reason} {d.detail}", highlight=False, markup=False)
    for r in reply.refusals:
        who = " ".join(filter(None, (r.name, r.address))) or "others"
        text = f"refused {who} {r.count} ×, last {r.ago_s:.0f} s ago: {r.kind}: {r.detail}"
        console.print(text, highlight=False, markup=False)
    sys.stdout.flush()
