"""Speed of the codecs' and reductions' kernels, against a copy on the same device.

    python -m bench.kernels --device cuda|simt|cpu [--sizes 64M ...] [--dtype float32 bfloat16] [--json FILE]

``GB/s`` counts the bytes that must be read and written, each once, over the median time; ``to_copy`` is that rate over
the one of the device's own copy of an array of that size, which takes turns with the rest. Every result is verified
before anything is timed: ringcomm's must have the CPU's bytes. On a GPU, times are those of events around the kernel,
with a cache that holds nothing of it; the other rows are torch's eager operations and kernels in Triton that do the
same. The first rows are the fused all_reduce of four ranks on one GPU (bench/fused.py), as share of the bound by the
bytes that it moves. Then come the largest arrays; the JSON is written anew after every size and dtype, and what fails
does not stop the rest.

``--device simt`` runs the CUDA kernels on the CPU, in the emulated build of the tests, which it makes if need be: it
verifies, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import fused
from bench.arguments import parse_size
from bench.devices import DEVICES, Device, Unavailable, device
from bench.kernel_cases import WHOLE, Entry, Setting, Wrong, entries
from bench.kernel_peers import peers
from bench.table import Table, facts
from ringcomm import _core

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
COLUMNS = (
    ("size", 10, "d"),
    ("type", 8, "s"),
    ("op", 15, "s"),
    ("codec", 6, "s"),
    ("who", 8, "s"),
    ("algo", 8, "s"),
    ("p50_us", 10, ".1f"),
    ("p99_us", 10, ".1f"),
    ("GB/s", 8, ".1f"),
    ("to_copy", 7, ".3f"),
)
DTYPES = ("float32", "bfloat16", "float16")
SIZES = {"cuda": ["4M", "64M", "256M"], "cpu": ["1M", "64M"], "simt": ["64K"]}
FUSED = {"cuda": "64M", "simt": "256K"}
FUSED_CODECS = ["none", "bf16", "int8"]
SAMPLES = {"cuda": 50, "cpu": 9, "simt": 1}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--device", choices=tuple(DEVICES), required=True)
    add("--sizes", type=parse_size, nargs="+", metavar="SIZE", help="bytes of the array")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], metavar="DTYPE")
    add("--samples", type=int, metavar="N", help="of each row (50, on the CPU 9)")
    add("--fused", type=parse_size, metavar="SIZE", help="of the all_reduce of four ranks (64M)")
    add("--no-fused", action="store_true", help="leave the all_reduce out")
    add("--json", type=Path, metavar="FILE", help="write header, notes, rows and raw samples")
    args = parser.parse_args(arguments)
    if args.samples is not None and args.samples < 1:
        parser.error("need --samples >= 1")
    args.sizes = args.sizes or [parse_size(size) for size in SIZES[args.device]]
    args.samples = args.samples or SAMPLES[args.device]
    if args.fused is None and args.device in FUSED:
        args.fused = parse_size(FUSED[args.device])
    return args


def measure(where: Device, dtype: str, size: int, table: Table, samples: int) -> None:
    """Verifies and times everything of one dtype and size, and prints the rows."""
    setting = Setting(where, dtype, size)
    everything: list[Entry] = []
    for entry in (*entries(setting), *peers(setting, table.note)):
        entry.work()
        setting.device.synchronize()
        entry.check()
        everything.append(entry)
    order, dice = list(everything), random.Random(0)
    for turn in range(samples + 1):  # the first is the warm-up
        dice.shuffle(order)
        seconds = setting.device.sample([entry.work for entry in order])
        if turn > 0 or samples == 1:
            for entry, second in zip(order, seconds, strict=True):
                entry.samples.append(second)
    copy_rate = everything[0].moved / statistics.median(everything[0].samples)
    for entry in everything:
        table.add(row_of(setting, entry, copy_rate))


def row_of(setting: Setting, entry: Entry, copy_rate: float) -> dict[str, Any]:
    ordered = sorted(entry.samples)
    rate = entry.moved / statistics.median(ordered)
    return {
        "size": setting.count * setting.item,
        "type": setting.dtype,
        "op": entry.op,
        "codec": entry.codec,
        "who": entry.who,
        "moved": entry.moved,
        "p50_us": statistics.median(ordered) * 1e6,
        "p99_us": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6,
        "GB/s": rate / 1e9,
        "to_copy": rate / copy_rate,
        "samples_us": [round(sample * 1e6, 2) for sample in entry.samples],
    }


def in_emulated_build(arguments: list[str]) -> int:
    """Runs this program again with the ringcomm whose GPUs are emulated."""
    from tests.simt import emulated

    if name := emulated.missing_tool():
        raise SystemExit(
            f"--device simt: {name} is not here: it builds ringcomm with emulated GPUs"
        )
    arguments = [
        str(Path(arguments[i]).absolute()) if i and arguments[i - 1] == "--json" else arguments[i]
        for i in range(len(arguments))
    ]
    command = [sys.executable, "-m", "bench.kernels", *arguments]
    environment = {**emulated.environment(), "RINGCOMM_TUNING": "off"}
    return subprocess.run(command, env=environment, cwd=emulated.package(), check=False).returncode


def run(args: argparse.Namespace, where: Device) -> int:
    """Exit status: 0, or 1 if a result was wrong or a collective failed."""
    notes = ["every row was verified before it was timed"]
    if max(args.sizes) > WHOLE:
        notes.append(
            f"arrays of more than {WHOLE >> 20} MiB repeat their values, and of them both ends and every so many bytes "
            "between were compared; smaller ones are compared whole"
        )
    if not where.timed:
        notes.append("the GPU is emulated on the CPU: these times mean nothing")
    table = Table(COLUMNS, {**facts(), **where.facts()}, notes)
    status = 0

    def attempt(what: str, work: Callable[[], None]) -> None:
        nonlocal status
        try:
            work()
        except (Wrong, RuntimeError) as error:
            status = 1
            traceback.print_exc()
            table.note(f"{what}: failed, was not measured: {error}")
        if args.json:
            table.write_json(args.json)

    def all_reduce() -> None:
        rounds = max(1, args.samples // 5)
        for row in fused.measure(
            where, args.fused, args.dtype[0], FUSED_CODECS, rounds, table.note
        ):
            table.add(row)

    if args.no_fused or args.fused is None:
        table.note("no all_reduce: " + ("--no-fused" if args.no_fused else "see bench.collectives"))
    else:
        attempt(f"all_reduce of {args.fused} bytes", all_reduce)
    for size in sorted(args.sizes, reverse=True):
        for dtype in args.dtype:
            attempt(
                f"{dtype} of {size} bytes",
                partial(measure, where, dtype, size, table, args.samples),
            )
    if args.json:
        print(f"# wrote {args.json}")
    return status


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)
    if args.device == "simt" and _core.RUNTIME != "simt":
        return in_emulated_build(arguments)
    try:
        return run(args, device(args.device))
    except Unavailable as reason:
        print(f"--device {args.device}: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
