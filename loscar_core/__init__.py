"""The algorithm and both halves of the protocol, as pure state machines.

This package imports NumPy and nothing else: no sockets, threads, clocks or torch. Everything here takes
events and the time as arguments and returns effects, so the same code runs under gRPC, under a virtual
clock, and in tests that enumerate bad schedules.
"""

__all__ = ["PROTOCOL_VERSION"]

PROTOCOL_VERSION = 1
"""Raised whenever a worker and a server of two releases would misunderstand each other."""
