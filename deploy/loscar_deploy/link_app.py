"""`loscar link`: the link emulator on its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable

from loscar_core.errors import ConfigError
from loscar_deploy.link import LinkProxy
from loscar_deploy.link_spec import LinkSpec
from loscar_wire.transport import format_address, parse_address


async def run_link(
    listen: str,
    to: str,
    spec: str,
    *,
    seed: int = 0,
    stop: asyncio.Event | None = None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:
    """Runs one link until `stop` is set or, without one, until SIGINT or SIGTERM.

    Says one line when it listens and one with the byte totals at the end. Raises ConfigError for a wrong
    address or spec, and PortInUseError when `listen` is taken.
    """
    listen_host, listen_port = parse_address(listen, "--listen")
    target_host, target_port = parse_address(to, "--to")
    if target_port == 0:
        raise ConfigError(f"--to {to}: port 0 cannot be connected to")
    proxy = LinkProxy(target_host, target_port, LinkSpec.parse(spec), seed=seed)
    loop = asyncio.get_running_loop()
    handled: list[signal.Signals] = []
    if stop is None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
            handled.append(number)
    try:
        await proxy.start(listen_host, listen_port)
        try:
            say(f"link listening on {format_address(*proxy.address)}, to {to}: {proxy.spec}")
            await stop.wait()
        finally:
            await proxy.close()
        totals = f"{proxy.bytes_up} bytes up, {proxy.bytes_down} bytes down"
        say(f"link closed: {totals}, {proxy.connections_total} connections")
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def main(listen: str, to: str, spec: str, seed: int) -> int:
    """`loscar link`: runs one link in the foreground until SIGINT or SIGTERM and returns the exit status.

    Raises ConfigError for a wrong address or spec, and PortInUseError when `listen` is taken.
    """
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if sys.platform != "win32":
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(run_link(listen, to, spec, seed=seed))
    return 0
