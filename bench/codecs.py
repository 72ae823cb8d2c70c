"""Speed of the CPU codecs on one thread, against a memory copy.

    python -m bench.codecs [--json FILE] [--rounds N] [--codecs int8,int4] [--levels avx512]

Every figure is gigabytes of float32 per second: the bytes of the array that is encoded, decoded or
added to, not those on the wire. ``x copy`` is that rate divided by memcpy's of the same array. All
operations of one size are measured in turn within each round, so that a busy machine slows them
alike; figures are medians over the rounds. Results are verified against the reference first.
"""

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ringcomm import _core, errors, reference

CODECS = ("bf16", "fp16", "int8", "int4")
LEVELS = ("baseline", "avx2", "avx512")
OPERATIONS = ("encode", "encode+residual", "decode", "decode_add")
SIZES = (256 << 10, 64 << 20)
SAMPLE_SECONDS = 0.002  # small arrays are processed repeatedly until one sample takes this long


def header() -> dict[str, str]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": f"{models[0] if models else platform.machine()} x {len(models)}",
        "best_level": _core.best_simd_level(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": commit or "unknown",
    }


def available_levels() -> list[str]:
    """The SIMD levels that this processor runs."""
    levels = []
    for level in LEVELS:
        try:
            _core.set_simd_level(level)
        except errors.UsageError:
            continue
        levels.append(level)
    return levels


class Case:
    """One array and everything that is done to it."""

    def __init__(self, num_bytes: int) -> None:
        self.num_elems = num_bytes // 4
        rng = np.random.default_rng(0)
        self.values = rng.standard_normal(self.num_elems, dtype=np.float32)
        self.residual = np.zeros_like(self.values)
        self.output = np.zeros_like(self.values)
        self.wire = {
            codec: np.zeros(_core.wire_bytes(_core.CODECS[codec], self.num_elems), np.uint8)
            for codec in CODECS
        }

    def copy(self) -> None:
        ctypes.memmove(self.output.ctypes.data, self.values.ctypes.data, self.values.nbytes)

    def operation(self, name: str, codec: str) -> Callable[[], None]:
        codec_id, num_elems = _core.CODECS[codec], self.num_elems
        values, output = self.values.ctypes.data, self.output.ctypes.data
        wire, residual = self.wire[codec].ctypes.data, self.residual.ctypes.data
        return {
            "encode": lambda: _core.encode(codec_id, values, 0, num_elems, wire),
            "encode+residual": lambda: _core.encode(codec_id, values, 0, num_elems, wire, residual),
            "decode": lambda: _core.decode(codec_id, wire, num_elems, output, 0),
            "decode_add": lambda: _core.decode_add(codec_id, wire, num_elems, output),
        }[name]

    def verify(self, codec: str) -> None:
        """Stops the benchmark if a kernel does not give the bytes of the reference."""
        count = min(self.num_elems, 1 << 16)
        self.operation("encode", codec)()
        self.operation("decode", codec)()
        wire = reference.encode(codec, self.values[:count])
        decoded = reference.decode(codec, wire, count)
        if not np.array_equal(self.output[:count], decoded):
            raise SystemExit(f"{codec} at {_core.simd_level()}: wrong result, nothing was measured")


def seconds(work: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def measure(num_bytes: int, codecs: list[str], levels: list[str], rounds: int) -> list[dict]:
    """One row per codec, level and operation, with raw samples in seconds."""
    case = Case(num_bytes)
    rows = [
        {"bytes": num_bytes, "codec": codec, "level": level, "op": op, "seconds": [], "copy": []}
        for codec in codecs
        for level in levels
        for op in OPERATIONS
    ]
    for codec in codecs:
        for level in levels:
            _core.set_simd_level(level)
            case.verify(codec)
    repeats = max(1, round(SAMPLE_SECONDS / seconds(case.copy, 3)))
    for _ in range(rounds):
        for row in rows:
            _core.set_simd_level(row["level"])
            work = case.operation(row["op"], row["codec"])
            work()
            row["seconds"].append(seconds(work, repeats))
            row["copy"].append(seconds(case.copy, repeats))
        case.residual[:] = 0
    for row in rows:
        ratios = [copy / own for copy, own in zip(row["copy"], row["seconds"], strict=True)]
        row["gb_per_s"] = num_bytes / statistics.median(row["seconds"]) / 1e9
        row["copy_gb_per_s"] = num_bytes / statistics.median(row["copy"]) / 1e9
        row["x_copy"] = statistics.median(ratios)
    return rows


def show(rows: list[dict]) -> None:
    columns = ["bytes", "codec", "level", *(f"{op}  x copy" for op in OPERATIONS), "copy"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["bytes"], row["codec"], row["level"]), []).append(row)
    table = []
    for (num_bytes, codec, level), group in groups.items():
        cells = [f"{row['gb_per_s']:6.1f} {row['x_copy']:6.2f}" for row in group]
        copy = statistics.median(row["copy_gb_per_s"] for row in group)
        table.append([str(num_bytes), codec, level, *cells, f"{copy:.1f}"])
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, cells)) for cells in zip(columns, *table, strict=True)]
        for cells in (columns, *table):
            print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
        return
    pretty = Table(box=None)
    for column in columns:
        pretty.add_column(column, justify="right", no_wrap=True)
    for cells in table:
        pretty.add_row(*cells)
    Console(width=160).print(pretty)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.codecs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="also write everything, raw samples too, here")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--levels", default=",".join(available_levels()))
    args = parser.parse_args()

    about = header()
    print("  ".join(f"{key}: {value}" for key, value in about.items()))
    print("GB/s of float32 on one thread, and as a multiple of memcpy's rate")
    rows = []
    for num_bytes in SIZES:
        rows += measure(num_bytes, args.codecs.split(","), args.levels.split(","), args.rounds)
    show(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"header": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
