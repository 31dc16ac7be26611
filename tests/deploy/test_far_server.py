"""A server at the other end of a slow link is reached by one-off calls and by workers, whose channels are the same."""

from __future__ import annotations

import asyncio

from processes import Processes

from loscar_deploy.client import Client
from loscar_deploy.link import LinkFarm
from loscar_deploy.link_spec import LinkSpec
from loscar_wire.transport import ClientSecurity, parse_address


def test_a_server_behind_a_satellite_is_reached(processes: Processes) -> None:
    """Connecting takes one and a half round trips: that is no reason to give up and start again."""
    host, port = parse_address(processes.server().address, "server")

    async def phase() -> str:
        farm = LinkFarm(host, port, (LinkSpec.parse("satellite"),))
        [near] = await farm.start()
        client = Client(f"127.0.0.1:{near}", ClientSecurity())
        try:
            return (await client.status()).phase
        finally:
            await client.close()
            await farm.close()

    assert asyncio.run(phase()) == "waiting"
