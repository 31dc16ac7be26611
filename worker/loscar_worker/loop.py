"""The process's one background event loop, on a thread of its own.

gRPC's asyncio wants a single event loop per process, so all sessions of a process share this one, however many are
opened one after the other or at once. It is started by the first session and stopped and joined at exit.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading

import uvloop

_STOP_S = 5.0


class LoopThread:
    """An event loop that runs on a daemon thread until stopped."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self.pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="loscar", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def stop(self) -> None:
        """End the loop and join its thread; a forked child has neither."""
        if os.getpid() == self.pid and self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(_STOP_S)


_lock = threading.Lock()
_shared: LoopThread | None = None


def shared_loop() -> asyncio.AbstractEventLoop:
    """The process's loop; a forked child that joins a run itself gets one of its own."""
    global _shared
    with _lock:
        if _shared is None or _shared.pid != os.getpid():
            _shared = LoopThread()
        return _shared.loop
