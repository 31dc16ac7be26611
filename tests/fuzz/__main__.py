"""Fuzz what a server does with a worker's bytes, decoding and state machine, and a worker with a server's.

    make fuzz                                            10^6 inputs, about a quarter of an hour
    python tests/fuzz [--runs N] [--seconds S] [--seed N] [--blind]

With atheris, which `make fuzz` installs where there is a wheel for this Python, coverage guides the mutations;
without it (or with --blind) they are drawn from a seed. What an input is, and what must hold, is in
`conversation.py`. The inputs run in a child process, so that one that hangs or takes the interpreter along is
noticed and kept as well. The exit status is 1 when there was a crash, a hang or too few inputs.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import gc
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType

from conversation import drive
from honest import honest_runs
from mutations import mutated, structured
from progress import Progress

from loscar_core import plan

HANG_S = 20.0
"""An input that takes longer hangs; most take a millisecond."""

MAX_INPUT_BYTES = 8192
ARITHMETIC = {f"loscar_core.{name}" for name in ("values", "selection", "permutation", "indices", "robust", "replica")}
"""Not instrumented: of each comparison of arrays that atheris traces, it keeps the result for good."""

FLAT = 1.05
"""Memory at the end over memory after a tenth of the inputs, at most: the process's, or, while coverage guides (what
libFuzzer keeps for itself grows with every input that it finds interesting), what Python has allocated in it."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=lambda text: int(float(text)), default=1_000_000, help="how many inputs")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="keep what was found interesting here")
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"), help="inputs that crash or hang go here")
    parser.add_argument("--blind", action="store_true", help="mutations that nothing guides")
    parser.add_argument("--input", type=Path, help="run this one input and nothing else")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.blind = args.blind or find_spec("atheris") is None
    return args


def main() -> int:
    args = options()
    if args.input is not None:
        drive(args.input.read_bytes())
        return 0
    return work(args) if args.child is not None else supervise(args)


# --- the parent ---------------------------------------------------------------------------------------------


def supervise(args: argparse.Namespace) -> int:
    """Run the child, watch each input's time, and say what came of it."""
    with tempfile.TemporaryDirectory(prefix="loscar-fuzz-") as scratch:
        shared = Path(scratch) / "progress"
        progress = Progress(shared)
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(shared)]
        if args.corpus is None and not args.blind:
            command += ["--corpus", str(Path(scratch) / "corpus")]
        started = time.monotonic()
        # Sets are iterated in one order, so that a seed means the same inputs.
        child = subprocess.Popen(command, env=dict(os.environ, PYTHONHASHSEED="0"))
        hangs = 0
        try:
            while True:
                try:
                    status = child.wait(0.5)
                    break
                except subprocess.TimeoutExpired:
                    if not hangs and progress.current_s() > HANG_S:
                        hangs = 1
                        child.send_signal(signal.SIGABRT)  # its fault handler says where it is
        finally:
            child.kill()
            child.wait()
        took = time.monotonic() - started
        died = status != 0 and not hangs
        if died or hangs:
            keep(args.crashes, progress.current(), "hang" if hangs else "crash")
        how = f"mutated from seed {args.seed}" if args.blind else f"guided by coverage, seed {args.seed}"
        p = progress
        crashes = p.crashes + died
        complete = p.inputs >= args.runs
        flat = p.blocks <= FLAT * p.blocks_early and (not args.blind or p.peak <= FLAT * p.peak_early)
        met = complete and flat and not crashes and not hangs
        if args.out is not None:
            cells = [
                ("inputs", f"{p.inputs:,}"),
                ("seconds", f"{took:.0f}"),
                ("mutations", how),
                ("crashes", str(crashes)),
                ("hangs (20 s)", str(hangs)),
                ("slowest input, s", f"{p.slowest_s:.2f}"),
                ("MB after a tenth", f"{p.peak_early / 1e6:.1f}"),
                ("MB at the end", f"{p.peak / 1e6:.1f}"),
                ("Python's blocks after a tenth", f"{p.blocks_early:,}"),
                ("at the end", f"{p.blocks:,}"),
            ]
            table = {"headings": [c[0] for c in cells], "rows": [[c[1] for c in cells]]}
            args.out.write_text(json.dumps({"table": table, "met": met}, indent=2) + "\n", encoding="utf-8")
        print(
            f"inputs   {p.inputs} in {took:.0f} s ({p.inputs / max(took, 1e-9):.0f} a second), {how}"
            f"{'' if complete else f'; {args.runs} were wanted'}\n"
            f"crashes  {crashes}\n"
            f"hangs    {hangs} (the slowest input took {p.slowest_s:.2f} s)\n"
            f"memory   {p.peak_early / 1e6:.1f} MB after 10 % of the inputs, {p.peak / 1e6:.1f} MB at the end "
            f"(highest resident set until then), {p.blocks_early} and {p.blocks} blocks of Python's"
            f"{'' if flat else ': IT GROWS'}",
            flush=True,
        )
        return 0 if met else 1


def keep(folder: Path, data: bytes, kind: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    print(f"{kind}: the input is in {path}; python tests/fuzz --input {path} runs it again", file=sys.stderr)


# --- the child ----------------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> int:
    """Run inputs, and note in the shared file how that goes."""
    faulthandler.enable()
    # Choosing coordinates is most of an input's time, and has no part in what is looked for here.
    select = plan._last_selection = functools.lru_cache(maxsize=4096)(plan.select)
    progress, parent = Progress(args.child), os.getppid()
    seen: set[tuple[str, str, int]] = set()

    def one(data: bytes) -> None:
        progress.begin(data)
        try:
            drive(data)
        except Exception as error:
            progress.crashes += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            cause = (type(error).__name__, where.filename, where.lineno or 0)
            if cause not in seen:  # once each
                seen.add(cause)
                traceback.print_exc()
                keep(args.crashes, data, "crash")
        progress.done()
        if progress.inputs % 1000 == 0 or progress.inputs == args.runs // 10:
            progress.peak = max(progress.peak, resident_bytes())
            if progress.inputs <= args.runs // 10:
                progress.peak_early = progress.peak
            if progress.inputs % max(1, args.runs // 10) == 0:
                select.cache_clear()
                gc.collect()
                progress.blocks = sys.getallocatedblocks()
                progress.blocks_early = progress.blocks_early or progress.blocks
            if os.getppid() != parent:
                os._exit(1)  # nobody is left to tell

    (blind if args.blind else guided)(one, args)
    return 0


def resident_bytes() -> int:
    text = Path("/proc/self/statm").read_text(encoding="ascii")
    return int(text.split()[1]) * resource.getpagesize()


def blind(one: Callable[[bytes], None], args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    pool = honest_runs()
    end = time.monotonic() + args.seconds
    for _ in range(args.runs):
        one(mutated(rng.choice(pool), rng))
        if time.monotonic() > end:
            return


def guided(one: Callable[[bytes], None], args: argparse.Namespace) -> None:
    import atheris

    args.corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(honest_runs()):
        (args.corpus / f"honest-{number}").write_bytes(data)

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
        if "_generated" not in module.__name__ and module.__name__ not in ARITHMETIC:
            instrument(module)
    flags = [f"-atheris_runs={args.runs}", f"-max_total_time={int(args.seconds)}", f"-seed={args.seed}"]
    # The parent watches the time: what libFuzzer's own limit ends leaves no report.
    flags += [f"-timeout={int(100 * HANG_S)}", "-rss_limit_mb=2048", f"-max_len={MAX_INPUT_BYTES}"]
    # Entropic scheduling would count every feature for every input that is kept: memory of the fuzzer's own.
    flags += ["-entropic=0", "-print_funcs=0", "-reduce_inputs=0", f"-artifact_prefix={args.corpus}/"]
    atheris.Setup([sys.argv[0], *flags, str(args.corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
