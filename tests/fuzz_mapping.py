"""Coverage-guided fuzzing of what a server does with bytes: `decode_worker_message`, then `ServerMachine.received`.

    python tests/fuzz_mapping.py [--runs 1000000] [--seconds 900] [--seed 1]

Needs atheris (`make fuzz` installs it). An input is a whole conversation: which server, then frames of messages,
broken connections, time that passes and outboxes that run empty. The corpus begins with recorded honest runs, so
mutations reach deep into them. Allowed is a LoscarError, which the machine itself turns into a refusal; anything else
is a crash. Every answer must be encodable, and the clock must go on ticking whatever was received.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import random
import resource
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from loscar_core import effects as fx
from loscar_core import plan
from loscar_core import worker_effects as we
from loscar_core.config import FinalRound, RunConfig, ServerLimits
from loscar_core.errors import LoscarError
from loscar_core.layout import Layout, Segment
from loscar_core.messages import ServerMessage, WorkerReport
from loscar_core.robust import Aggregate
from loscar_core.selection import SelectionKind
from loscar_core.server_machine import ServerMachine
from loscar_core.values import ValueType
from loscar_core.worker_engine import WorkerEngine
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.mapping import decode_server_message, decode_worker_message, encode_server_message
from loscar_wire.mapping import encode_worker_message as encode

# Choosing coordinates is most of an input's time, and has no part in what is looked for here.
plan.select = functools.lru_cache(maxsize=4096)(plan.select)

RUN = b"r" * 16
PEERS = 4
MOST_FRAMES = 200
MESSAGE, GONE, TICK, DRAINED, STOP = range(5)

PLAIN = Layout((Segment("w", (6, 5), "float32"), Segment("b", (6,), "float32")))
NORMALISED = Layout(PLAIN.parameters, (Segment("running_mean", (4,), "float32"),))

LIMITS = ServerLimits(workers=2, lease_s=20.0, heartbeat_s=2.0, start_grace_s=0.5, recover_after_s=5.0, round_cap_s=5.0)
SERVERS: tuple[tuple[Layout, RunConfig, ServerLimits], ...] = (
    (PLAIN, RunConfig(density=0.25, local_steps=1), LIMITS),
    (
        NORMALISED,
        RunConfig(density=0.5, local_steps=1, value_type=ValueType.INT8, rounds=4, final_round=FinalRound.NONE),
        ServerLimits(start_grace_s=0.5, recover_after_s=5.0, norm_bound=3.0),
    ),
    (
        PLAIN,
        RunConfig(coordinates=9, local_steps=1, selection=SelectionKind.RANDOM, value_type=ValueType.BFLOAT16),
        ServerLimits(start_grace_s=0.5, aggregate=Aggregate.MEDIAN, max_members=3),
    ),
    (
        NORMALISED,
        RunConfig(density=1.0, local_steps=1, selection=SelectionKind.ALL, value_type=ValueType.FLOAT16, rounds=3),
        LIMITS,
    ),
)


class Target:
    """A server machine behind its wire format; everything that it wants to send is encoded."""

    def __init__(self, which: int) -> None:
        self.layout, config, limits = SERVERS[which % len(SERVERS)]
        self.now = 0.0
        self.machine = ServerMachine(config, limits, RUN, self.now)
        self.closed: set[int] = set()
        self.sent: dict[int, deque[bytes]] = {peer: deque(maxlen=64) for peer in range(PEERS)}

    def message(self, peer: int, data: bytes) -> None:
        if peer in self.closed:
            return
        try:
            message = decode_worker_message(data)
        except LoscarError as error:
            self.carry_out(self.machine.refuse(peer, error, self.now))
            return
        self.carry_out(self.machine.received(peer, message, self.now))

    def gone(self, peer: int) -> None:
        """The stream breaks; the next message under this number is of a new one."""
        self.closed.discard(peer)
        self.sent[peer].clear()
        self.carry_out(self.machine.disconnected(peer, self.now))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.carry_out(self.machine.tick(self.now))
        self.machine.next_wakeup()

    def drained(self, peer: int) -> None:
        self.carry_out(self.machine.drained(peer, self.now))

    def stop(self) -> None:
        self.carry_out(self.machine.request_stop("fuzzing", self.now))

    def carry_out(self, effects: list[fx.ServerEffect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(peers, message):
                    payload = encode_server_message(message)
                    for peer in peers:
                        self.sent[peer].append(payload)
                case fx.Close(peer, _, _):
                    self.closed.add(peer)
                case _:
                    pass

    def finish(self) -> None:
        """Whatever it was told, it must still work."""
        self.tick(1.0)
        self.tick(1000.0)
        self.machine.saved_state(self.now)
        self.carry_out(self.machine.shut_down(self.now))


def frames(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(operation, argument, payload) of each frame; the last may be short."""
    at = 1
    for _ in range(MOST_FRAMES):
        if at >= len(data):
            return
        operation, argument = data[at] % 5, data[at] // 5
        at += 1
        payload = b""
        if operation == MESSAGE:
            (size,) = struct.unpack("<H", data[at : at + 2].ljust(2, b"\0"))
            at += 2
            payload = data[at : at + size]
            at += size
        yield operation, argument, payload


def drive(data: bytes) -> Target:
    """Run one input."""
    target = Target(data[0] if data else 0)
    for operation, argument, payload in frames(data):
        if operation == MESSAGE:
            target.message(argument % PEERS, payload)
        elif operation == GONE:
            target.gone(argument % PEERS)
        elif operation == TICK:
            target.tick(argument * 0.25)
        elif operation == DRAINED:
            target.drained(argument % PEERS)
        else:
            target.stop()
    target.finish()
    return target


# --- honest runs to begin with ------------------------------------------------------------------------------


class Recorder:
    """Two or three honest workers and a server, in step; writes down what the server receives."""

    def __init__(self, which: int) -> None:
        self.target = Target(which)
        self.data = bytearray([which])
        self.engines: dict[int, WorkerEngine] = {}
        self.open: dict[int, we.RoundOpen] = {}
        self.rng = np.random.default_rng(which)

    def _frame(self, operation: int, argument: int, payload: bytes = b"") -> None:
        self.data.append(argument * 5 + operation)
        if operation == MESSAGE:
            self.data += struct.pack("<H", len(payload)) + payload

    def up(self, peer: int, payload: bytes) -> None:
        self._frame(MESSAGE, peer, payload)
        self.target.message(peer, payload)

    def join(self, peer: int, engine: WorkerEngine | None = None) -> None:
        layout = self.target.layout
        if engine is None:
            vector = self.rng.normal(size=layout.dimension).astype(np.float32)
            statistics = np.zeros(layout.statistics_size, np.float32)
            engine = WorkerEngine(f"w{peer}", bytes([peer]) * 16, layout, vector, statistics, run_id=RUN)
        self.engines[peer] = engine
        self.up(peer, encode(engine.hello()))
        self.settle()

    def tick(self, quarters: int) -> None:
        self._frame(TICK, quarters)
        self.target.tick(quarters * 0.25)
        self.settle()

    def lose(self, peer: int) -> WorkerEngine:
        self._frame(GONE, peer)
        self.target.gone(peer)
        engine = self.engines.pop(peer)
        engine.disconnected()
        return engine

    def settle(self) -> None:
        """Deliver until everybody is silent."""
        moved = True
        while moved:
            moved = False
            for peer, engine in list(self.engines.items()):
                box = self.target.sent[peer]
                while box:
                    moved = True
                    self.answered(peer, engine, decode_server_message(box.popleft()))
                self._frame(DRAINED, peer)
                self.target.drained(peer)

    def answered(self, peer: int, engine: WorkerEngine, message: ServerMessage) -> None:
        for effect in engine.received(message):
            match effect:
                case we.Emit(reply):
                    self.up(peer, encode(reply))
                case we.RoundOpen():
                    self.open[peer] = effect
                case we.ProgressWanted():
                    for more in engine.progress(engine.anchor.vector + np.float32(0.5)):
                        assert isinstance(more, we.Emit)
                        self.up(peer, encode(more.message))

    def train(self, peer: int) -> None:
        """One contribution to the open round, if there is one."""
        engine, opened = self.engines[peer], self.open.pop(peer, None)
        self.up(peer, encode(engine.heartbeat(1, WorkerReport(steps=1))))
        if opened is not None and not opened.contributed:
            values = self.rng.normal(size=opened.indices.size).astype(np.float32)
            statistics = np.ones(self.target.layout.statistics_size, np.float32)
            for effect in engine.snapshot(opened.plan.round, values, statistics, 1, 0) or []:
                assert isinstance(effect, we.Emit)
                self.up(peer, encode(effect.message))
        self.settle()


def honest_runs() -> list[bytes]:
    """Inputs of runs in which nobody misbehaves: starts, rounds, absences, newcomers, recoveries, ends."""
    found = []
    for which in range(len(SERVERS)):
        r = Recorder(which)
        r.join(0)
        r.join(1)
        r.tick(4)
        for _ in range(3):
            r.train(0)
            r.train(1)
        found.append(bytes(r.data))
        engine = r.lose(1)
        r.tick(4)
        r.train(0)
        r.join(1, engine)
        r.join(2)
        for peer in (0, 1, 2, 0, 1):
            r.train(peer)
        found.append(bytes(r.data))
        r.target.stop()
        r._frame(STOP, 0)
        r.settle()
        for peer in (0, 1, 2):
            r.train(peer)
        found.append(bytes(r.data))
        # The same workers meet a server that has lost everything.
        again = Recorder(which)
        for peer, engine in list(r.engines.items()):
            engine.disconnected()
            again.join(peer, engine)
        again.tick(24)
        again.tick(24)
        for peer in (0, 1, 0):
            again.train(peer)
        found.append(bytes(again.data))
    return found


# --- mutations ----------------------------------------------------------------------------------------------

EXTREMES = {
    "int": (0, 1, 2, 3, 7, 36, 40, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1),
    "huge": ((1 << 64) - 1, 1 << 63, (1 << 64) - 2),
    "float": (0.0, -0.0, -1.0, 1e-300, 1e300, 5.0, math.inf, -math.inf, math.nan),
    "text": ("", "w0", "w1", "loscar", "dense", "none", "float32", "\n", "x" * 300),
    "bytes": (b"", b"\0" * 16, b"\1" * 16, b"r" * 16, b"\xff" * 64, b"\0\0\xc0\x7f" * 9, b"\0\0\x80\x7f" * 9, b"x"),
}


def fields_of(message: Any) -> list[tuple[Any, Any]]:
    """Every (message, field) of a protobuf message, depth first."""
    found = []
    for field, value in message.ListFields():
        found.append((message, field))
        if field.message_type is not None:
            for each in value if field.is_repeated else [value]:
                found += fields_of(each)
    return found


def disturb(message: Any, rng: random.Random) -> None:
    """Change one field of a protobuf message to something that fits its type and nothing else."""
    owner, field = rng.choice(fields_of(message) or [(message, rng.choice(message.DESCRIPTOR.fields))])
    if rng.random() < 0.2:  # one that may not be set
        field = rng.choice(owner.DESCRIPTOR.fields)
    if field.is_repeated:
        values = getattr(owner, field.name)
        if len(values) and rng.random() < 0.5:
            del values[rng.randrange(len(values))]
        elif len(values) and field.message_type is not None:
            values.add().CopyFrom(rng.choice(values))
        elif field.message_type is not None:
            values.add()
        else:
            values.append(extreme(field, rng))
    elif field.message_type is not None:
        owner.ClearField(field.name)
    else:
        setattr(owner, field.name, extreme(field, rng))


def extreme(field: Any, rng: random.Random) -> Any:
    kinds = {field.CPPTYPE_STRING: "bytes" if field.type == field.TYPE_BYTES else "text"}
    kinds |= dict.fromkeys((field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT), "float")
    if field.cpp_type == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.cpp_type == field.CPPTYPE_ENUM:
        return rng.randrange(7)
    kind = kinds.get(field.cpp_type, "int")
    if kind == "int" and field.cpp_type == field.CPPTYPE_UINT64 and rng.random() < 0.3:
        kind = "huge"
    value = rng.choice(EXTREMES[kind])
    if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_INT32):
        value &= (1 << 31) - 1 if field.cpp_type == field.CPPTYPE_INT32 else (1 << 32) - 1
    return value


def structured(data: bytes, rng: random.Random) -> bytes:
    """Disturb one message within an input, or move, repeat or drop a frame."""
    found = list(frames(data))
    if not found:
        return data
    at = rng.randrange(len(found))
    operation, argument, payload = found[at]
    what = rng.random()
    if operation == MESSAGE and what < 0.75:
        message = pb.WorkerMessage()
        with contextlib.suppress(DecodeError):
            message.ParseFromString(payload)
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                disturb(message, rng)
            found[at] = operation, argument, message.SerializeToString()
    elif what < 0.8:
        del found[at]
    elif what < 0.9:
        found.insert(rng.randrange(len(found)), found[at])
    else:
        frame = rng.choice(((GONE, argument % PEERS, b""), (TICK, rng.randrange(51), b""), (STOP, 0, b"")))
        found.insert(at, (MESSAGE, rng.randrange(PEERS), payload) if rng.random() < 0.4 else frame)
    out = bytearray(data[:1])
    for operation, argument, payload in found:
        out.append(argument * 5 % 255 // 5 * 5 + operation)
        if operation == MESSAGE:
            out += struct.pack("<H", min(len(payload), 65535)) + payload[:65535]
    return bytes(out)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A mutation that nothing guides, for runs without atheris."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = structured(data, rng) if rng.random() < 0.8 else _bytewise(data, rng)
    return data


def _bytewise(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    at = rng.randrange(len(out))
    what = rng.random()
    if what < 0.6:
        out[at] = rng.randrange(256)
    elif what < 0.8:
        del out[at]
    else:
        out[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\0\0\xc0\x7f" * 2))
    return bytes(out) or b"\0"


# --- running ------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    text = Path("/proc/self/statm").read_text(encoding="ascii")
    return int(text.split()[1]) * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=lambda text: int(float(text)), default=1_000_000)
    parser.add_argument("--seconds", type=float, default=1800.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="keep what was found interesting here")
    parser.add_argument("--blind", action="store_true", help="without atheris: mutations that nothing guides")
    args = parser.parse_args()
    state = {"executions": 0, "started": time.monotonic(), "rss_early": 0, "rss_peak": 0}

    def one(data: bytes) -> None:
        drive(data)
        state["executions"] += 1
        if state["executions"] % 1000 == 0:
            state["rss_peak"] = max(state["rss_peak"], resident_bytes())
        if state["executions"] == min(50_000, args.runs // 10):
            state["rss_early"] = resident_bytes()

    def report() -> None:
        took = time.monotonic() - state["started"]
        count = state["executions"]
        print(
            f"{count} executions in {took:.0f} s ({count / max(took, 1e-9):.0f} a second); "
            f"resident {state['rss_early'] / 1e6:.0f} MB after warm-up, {state['rss_peak'] / 1e6:.0f} MB at most",
            flush=True,
        )

    if args.blind:
        blind(one, args.runs, args.seconds, args.seed)
        report()
        return 0
    return guided(one, report, args)


def blind(one: Callable[[bytes], None], runs: int, seconds: float, seed: int) -> None:
    rng = random.Random(seed)
    pool = honest_runs()
    end = time.monotonic() + seconds
    for number in range(runs):
        data = mutated(rng.choice(pool), rng)
        try:
            one(data)
        except BaseException:
            print(f"crashed on input {number} of seed {seed}: {data.hex()}", file=sys.stderr)
            raise
        if time.monotonic() > end:
            return


def guided(one: Callable[[bytes], None], report: Callable[[], None], args: argparse.Namespace) -> int:
    import atexit
    import tempfile

    import atheris

    folder = args.corpus or Path(tempfile.mkdtemp(prefix="loscar-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(honest_runs()):
        (folder / f"honest-{number}").write_bytes(data)
    atexit.register(report)

    def instrument(module: ModuleType) -> None:
        """Coverage of our own code only: instrumenting NumPy and protobuf as well costs a factor of ten."""
        for value in vars(module).values():
            if getattr(value, "__module__", "") != module.__name__:
                continue
            functions = vars(value).values() if isinstance(value, type) else [value]
            for function in functions:
                if isinstance(function, FunctionType):
                    atheris.instrument_func(function)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if data and rng.random() < 0.6:
            return structured(data, rng)[:most]
        return bytes(atheris.Mutate(data, most))

    for module in [m for name, m in sys.modules.items() if name.startswith(("loscar_core.", "loscar_wire."))]:
        if "_generated" not in module.__name__:
            instrument(module)
    flags = [f"-atheris_runs={args.runs}", f"-max_total_time={int(args.seconds)}", f"-seed={args.seed}"]
    flags += ["-timeout=20", "-rss_limit_mb=2048", "-max_len=8192", "-print_final_stats=1", str(folder)]
    atheris.Setup([sys.argv[0], *flags], one, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
