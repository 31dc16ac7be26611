"""Computers of a test that are network namespaces of this one: a network in the middle, and one behind a router."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import pytest
from engine import COMMAND_S, call, new_name, remove_namespace

OPEN = "198.51.100"
"""The network that all are on, this computer with its containers included."""
BEHIND = "192.168.77"
THIS = 9
ROUTER = 8

_links = itertools.count()


class Machines:
    """Namespaces by name; the last one is behind a router that translates addresses and lets nothing in.

    Args:
        folder: has a folder for each of them, in which its commands run.
        direct: those with an address on the open network; the first is number 1 there.
        hidden: the one behind the router.
        others: machines that have a folder and nothing else, as for the one that the engine is on.

    Raises (as a skip): this kernel gives no namespaces, or no links between them.
    """

    def __init__(self, folder: Path, direct: Sequence[str], hidden: str, others: Sequence[str] = ()) -> None:
        self.folder = folder
        self._spaces = {name: f"{new_name()}-{name}" for name in (*direct, hidden, "router", "net")}
        self._started: list[subprocess.Popen[str]] = []
        self._made: list[str] = []
        for name in (*direct, hidden, *others):
            (folder / name).mkdir()
        self._direct, self._hidden = direct, hidden

    def __enter__(self) -> Machines:
        try:
            self._connect()
        except (AssertionError, OSError) as error:
            self.close()
            pytest.skip(f"no network namespaces can be joined here: {str(error).strip()[-300:]}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _connect(self) -> None:
        for space in self._spaces.values():
            call("ip", "netns", "add", space)
            self._made.append(space)
            call("ip", "-n", space, "link", "set", "lo", "up")
        net, router, hidden = (self._spaces[name] for name in ("net", "router", self._hidden))
        call("ip", "-n", net, "link", "add", "br0", "type", "bridge")
        call("ip", "-n", net, "link", "set", "br0", "up")
        for number, name in enumerate((*self._direct, None, "router")):
            place = {None: THIS, "router": ROUTER}.get(name, number + 1)
            inner = f"lt{os.getpid()}n{next(_links)}"  # at most 15 letters; it is this computer's for a moment
            outer = "eth0" if name is not None else f"lt{os.getpid()}h"
            there = ("netns", self._spaces[name]) if name is not None else ()
            call("ip", "link", "add", inner, "netns", net, "type", "veth", "peer", "name", outer, *there)
            call("ip", "-n", net, "link", "set", inner, "master", "br0", "up")
            space = ("-n", self._spaces[name]) if name is not None else ()
            call("ip", *space, "addr", "add", f"{OPEN}.{place}/24", "dev", outer)
            call("ip", *space, "link", "set", outer, "up")
        call("ip", "link", "add", "lan0", "netns", router, "type", "veth", "peer", "name", "eth0", "netns", hidden)
        for space, device, place in ((router, "lan0", 1), (hidden, "eth0", 2)):
            call("ip", "-n", space, "addr", "add", f"{BEHIND}.{place}/24", "dev", device)
            call("ip", "-n", space, "link", "set", device, "up")
        call("ip", "-n", hidden, "route", "add", "default", "via", f"{BEHIND}.1")
        inside = ("ip", "netns", "exec", router)
        call(*inside, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        call(*inside, "iptables", "-w", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
        known = ("-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED")
        call(*inside, "iptables", "-w", "-A", "FORWARD", "-i", "eth0", *known, "-j", "ACCEPT")
        call(*inside, "iptables", "-w", "-A", "FORWARD", "-i", "eth0", "-j", "DROP")

    def translated(self) -> int:
        """How many connections the router has translated."""
        space = self._spaces["router"]
        table = call("ip", "netns", "exec", space, "iptables", "-w", "-t", "nat", "-L", "POSTROUTING", "-v", "-x", "-n")
        [rule] = [line for line in table.stdout.splitlines() if "MASQUERADE" in line]
        return int(rule.split()[0])

    def run(self, name: str, line: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """A line of a shell on one of them, to its end."""
        return subprocess.run(
            self._command(name, line), cwd=self.folder / name, env={**os.environ, **environment}, text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_S, check=False,
        )  # fmt: skip

    def start(self, name: str, line: str, environment: Mapping[str, str], log: Path) -> subprocess.Popen[str]:
        """A line of a shell that stays; its output goes into a file. It is gone when this is closed."""
        with log.open("wb") as out:
            process = subprocess.Popen(
                self._command(name, f"exec {line}"), cwd=self.folder / name, env={**os.environ, **environment},
                text=True, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        self._started.append(process)
        return process

    def _command(self, name: str, line: str) -> list[str]:
        space = self._spaces.get(name)
        return [*(() if space is None else ("ip", "netns", "exec", space)), "bash", "-c", line]

    def close(self) -> None:
        """End every process and take the namespaces away, and with them the links."""
        for process in self._started:
            process.kill()
            process.wait()
        for space in self._made:
            remove_namespace(space)
        self._made.clear()
