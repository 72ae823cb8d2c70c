"""``python -m ringcomm.tune``: measures where small calls should become large ones on this machine.

Small calls run as one_shot (data beside the flag, one hop), large ones as two_shot or staged (least
bytes moved). Where one overtakes the other depends on processors, caches and the number of ranks. This
command starts ranks of its own, times both by turns at every size, and stores the best switch points in
a file of this user and machine; every communicator made later uses them (``RINGCOMM_TUNING``). Run it
while the machine does nothing else. ``comm.explain(nbytes)`` says what holds.

``--device cuda`` does so for arrays on GPUs, one per rank (``cuda:1``: all ranks on that one, under MPS):
up to which size all_reduce runs as one_shot (data and flags in packets), and up to which broadcast is staged
and not sent around a ring. It takes torch with CUDA, or CuPy. What it finds holds for GPUs of that name and
links, and that number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ringcomm import _core, env, tuning
from ringcomm.device import SIMT
from ringcomm.errors import RingcommError, UsageError
from ringcomm.machine import cpu_model, usable_cores
from ringcomm.store import TCPStore
from ringcomm.timings import DEVICE_SIZES, SIZES, START_S, Job, Timings, measure
from ringcomm.tuning import Gpus

__all__ = ["Decision", "decide", "main"]

_KIB = 1024
_WORTH = 0.02  # a limit that saves less than this share of the time is not worth another table


# ---- what the numbers mean -----------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """The switch point of one operation and world size.

    Attributes:
        row: Of the table, see :data:`ringcomm.tuning.OPS`.
        world_size: Number of ranks.
        built_in: The limit without this measurement, in bytes.
        limit: The largest call that the algorithm of small ones should run, in bytes.
        gain: How much faster calls get on average whose algorithm changes; 1.0 if none does.
    """

    row: str
    world_size: int
    built_in: int
    limit: int
    gain: float


def decide(
    row: str, built_in: dict[int, int], times: dict[int, dict[int, tuple[float, float]]]
) -> list[Decision]:
    """The best switch points of one operation; a larger world never gets a higher one.

    Args:
        built_in: By world size: the limit without measurements, in bytes.
        times: By world size and size in bytes: seconds of a call as the algorithm of small ones, and as the other.
    """
    worlds = sorted(times)
    log_ratios = {
        n: {size: math.log(small / other) for size, (small, other) in times[n].items()}
        for n in worlds
    }
    candidates = sorted({0, *built_in.values(), *(size for n in worlds for size in times[n])})

    def cost(
        n: int, limit: int
    ) -> float:  # of the one up to the limit against the other one everywhere
        return sum(ratio for size, ratio in log_ratios[n].items() if size <= limit)

    # By the limit of the smaller worlds seen so far: the least cost, and the limits.
    best: dict[int, tuple[float, list[int]]] = {candidates[-1]: (0.0, [])}
    for n in worlds:
        best = {
            limit: min(
                (total + cost(n, limit), [*limits, limit])
                for before, (total, limits) in best.items()
                if before >= limit
            )
            for limit in candidates
        }
    limits = dict(zip(worlds, min(best.values())[1], strict=True))

    def gain(n: int) -> float:
        between = sorted((built_in[n], limits[n]))
        changed = [size for size in times[n] if between[0] < size <= between[1]]
        return math.exp((cost(n, built_in[n]) - cost(n, limits[n])) / max(1, len(changed)))

    for n in worlds:
        others = [limits[m] for m in worlds if m < n] or [candidates[-1]]
        above, below = min(others), max((limits[m] for m in worlds if m > n), default=0)
        if gain(n) < 1 + _WORTH and below <= built_in[n] <= above:
            limits[n] = built_in[n]
    return [Decision(row, n, built_in[n], limits[n], gain(n)) for n in worlds]


def report(decisions: list[Decision]) -> str:
    """A table for people."""
    lines = [f"{'operation':<15} {'ranks':>5} {'built-in':>9} {'measured':>9}  faster between them"]
    for d in decisions:
        what = "(the same)" if d.limit == d.built_in else f"{d.gain:.2f} x"
        lines.append(
            f"{d.row:<15} {d.world_size:>5} {_in_kib(d.built_in):>9} {_in_kib(d.limit):>9}  {what}"
        )
    return "\n".join(lines)


def _in_kib(num_bytes: int) -> str:
    return f"{num_bytes / _KIB:.1f} KiB"


# ---- the command ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _ranks(job: Job) -> Iterator[list[Any]]:
    """Processes that measure; ended, whatever happens."""
    with contextlib.ExitStack() as cleanup:
        store = TCPStore(is_server=True)
        cleanup.callback(store.close)
        job.port = store.port
        processes = []
        for rank in range(job.world_size):
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "ringcomm.tune",
                    "--rank",
                    str(rank),
                    json.dumps(asdict(job)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(job.world_size)},
                text=True,
            )
            cleanup.callback(process.wait)
            cleanup.callback(process.kill)
            processes.append(process)
        yield processes


def run(job: Job) -> Timings:
    """Times every operation on ranks of its own.

    Raises:
        RingcommError: the ranks failed.
    """
    n = job.world_size
    with _ranks(job) as processes:
        try:
            text, errors = processes[0].communicate(timeout=2 * START_S + 4 * job.seconds)
        except subprocess.TimeoutExpired:
            raise RingcommError(f"{n} ranks did not finish measuring") from None
        if processes[0].returncode != 0:
            raise RingcommError(f"measuring with {n} ranks failed: {errors.strip()}")
    return Timings(**json.loads(text))


def tune(
    world_sizes: list[int],
    seconds: float,
    sizes: dict[str, list[int]],
    say: Callable[[str], None],
    device: str = "",
) -> dict[Gpus | None, list[Decision]]:
    """Measures every world size, then decides; by what the ranks' GPUs are, which None says of the CPU."""
    found: dict[Gpus | None, dict[str, dict[int, dict[int, tuple[float, float]]]]] = {}
    built_in: dict[Gpus | None, dict[str, dict[int, int]]] = {}
    for world_size in sorted(set(world_sizes)):
        say(f"measuring {world_size} ranks for {seconds / len(world_sizes):.0f} s")
        timings = run(Job(world_size, 0, seconds / len(world_sizes), sizes, device))
        gpus = None if timings.gpus is None else Gpus(*timings.gpus)
        for row, limit in timings.built_in.items():
            built_in.setdefault(gpus, {}).setdefault(row, {})[world_size] = limit
        for row, size, small, other in timings.rows:
            by_size = found.setdefault(gpus, {}).setdefault(row, {}).setdefault(world_size, {})
            by_size[size] = (small, other)
    return {
        gpus: [one for row in rows for one in decide(row, built_in[gpus][row], rows[row])]
        for gpus, rows in found.items()
    }


def _num_gpus(device: str) -> int:
    """How many ranks have a GPU of their own; 0: all share one.

    Raises:
        UsageError: there is no such GPU here.
    """
    if device == SIMT and _core.RUNTIME == SIMT:
        return _core.cuda_probe().count
    name, _, index = device.partition(":")
    if name != "cuda" or not (index.isdecimal() or device == "cuda"):
        raise UsageError(f"--device {device}: expected cuda, or such as cuda:0")
    if _core.RUNTIME != "cuda":
        raise UsageError(
            f"--device {device}: this build has no CUDA, so it runs nothing on GPUs (python -m ringcomm.info says more)"
        )
    probe = _core.cuda_probe()
    if probe.count == 0:
        raise UsageError(f"--device {device}: there is no GPU here: {probe.reason}")
    if index:
        if int(index) >= probe.count:
            raise UsageError(
                f"--device {device}: this machine has {probe.count} GPUs, from cuda:0 on"
            )
        return 0
    if probe.count == 1:
        raise UsageError(
            "--device cuda: there is one GPU, and every rank gets one of its own; --device cuda:0 measures ranks that "
            "share it, which takes the MPS daemon"
        )
    return probe.count


def _default_world_sizes(num_gpus: int | None) -> list[int]:
    """Powers of two that fit on the processors (four ranks are common even on two), or on the GPUs, and these all."""
    if num_gpus is None:
        most = max(4, min(usable_cores(), 64))
    else:
        most = min(num_gpus, _core.MAX_DEVICE_RANKS) or 4
    sizes = {2**power for power in range(1, 7) if 2**power <= most}
    return sorted(sizes | {most} if num_gpus else sizes)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ringcomm.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", default="", metavar="cuda[:N]", help="measure arrays on GPUs, not on the CPU"
    )
    parser.add_argument(
        "--world-sizes",
        type=lambda text: [int(part) for part in text.split(",")],
        default=None,
        metavar="N,N",
        help="numbers of ranks to measure (default: powers of two up to the number of cores, at least 2,4; or up to "
        "the number of GPUs)",
    )
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="time to measure, in all (default 40)"
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="file to write (default: the user's cache)"
    )
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--sizes", type=json.loads, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--rank", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    most = _core.MAX_DEVICE_RANKS if options.device else _core.MAX_RANKS
    if options.world_sizes and not all(2 <= size <= most for size in options.world_sizes):
        parser.error(f"--world-sizes: 2 to {most} each")
    if not 0 < options.seconds < 3600:
        parser.error("--seconds must be a positive number")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = _parse(arguments)
    try:
        if options.rank is not None:
            return _measure_as(*options.rank)
        return _tune(options)
    except RingcommError as error:
        print(f"ringcomm.tune: {error}", file=sys.stderr)
        return 1


def _measure_as(rank: str, job: str) -> int:
    timings = measure(int(rank), Job(**json.loads(job)))
    if rank == "0":
        print(json.dumps(asdict(timings)))
    return 0


def _tune(options: argparse.Namespace) -> int:
    device = options.device
    num_gpus = _num_gpus(device) if device else None
    world_sizes = options.world_sizes or _default_world_sizes(num_gpus)
    if num_gpus and max(world_sizes) > num_gpus and device != SIMT:
        raise UsageError(f"--world-sizes: at most {num_gpus}, one rank for every GPU")
    rows = DEVICE_SIZES if device else dict.fromkeys(tuning.OPS, SIZES)
    sizes = rows if options.sizes is None else dict.fromkeys(rows, options.sizes)
    path = None if options.dry_run else _output(options.output, bool(device))
    if not device:
        print(f"{cpu_model()}, {usable_cores()} cores, {_core.simd_level()} kernels", flush=True)
    found = tune(world_sizes, options.seconds, sizes, lambda line: print(line, flush=True), device)
    for gpus, decisions in found.items():
        if gpus is not None:
            print(
                f"{gpus.gpu}, linked by {gpus.link}" if gpus.link != "same" else f"one {gpus.gpu}"
            )
        print(report(decisions))
        if path is None:
            continue
        table: tuning.Table = {}
        for decision in decisions:
            table.setdefault(decision.row, {})[decision.world_size] = decision.limit
        if gpus is None:
            tuning.save(path, table)
        else:
            tuning.save(path, gpus={gpus: table})
    if path is not None:
        print(
            f"written to {path}; communicators made from now on use it (RINGCOMM_TUNING=off: not)"
        )
    return 0


def _output(given: Path | None, gpus: bool) -> Path:
    if given is not None:
        return given
    chosen = env.get("RINGCOMM_TUNING")
    if chosen is None:
        return tuning.default_path(gpus=gpus)
    if chosen.lower() == "off":
        raise UsageError(
            "RINGCOMM_TUNING=off: nothing would read the table; unset it or use --output"
        )
    return Path(chosen)


if __name__ == "__main__":
    sys.exit(main())
