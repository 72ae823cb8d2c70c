"""Collectives against their peers: ``python -m bench.collectives -n 2 -b 256 -e 64M``.

All contenders run interleaved in one set of processes: every iteration runs each of them once, in an
order of its own, each after a barrier and on its own arrays, with one thread per rank. Results are
verified first (-c 1): #wrong counts elements of all ranks that are off by more than rounding. A sample
is the time of the slowest rank.

Columns are those of nccl-tests: time_us is the mean, algbw = size / p50_us, busbw = algbw x the factor
of the operation, both in GB/s. to_best is p50_us as a share of the fastest peer's, to_copy as a multiple
of a copy of `size` bytes by all ranks at once; smaller is faster in both. others is the share of all
cores, in percent, that processes outside of the run had: where it is not small, ranks and peers that
wait by spinning are slowed most, and figures mean little (--tries N measures again).

Peers that are missing, or that do not have an operation or dtype, are named with the reason. With Open
MPI the ranks are started by mpirun: by this command itself, or by you:

    mpirun -n 2 --bind-to none --oversubscribe python -m bench.collectives

What an operation reads, writes and counts: bench/operations.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench import ours, peers
from bench.arguments import parse_arguments
from bench.contender import Contender, Unsupported
from bench.operations import Case
from bench.runner import COLUMNS, run_case
from bench.table import Table, facts
from bench.world import World, launch

__all__ = ["main"]


def connect(world: World, args: argparse.Namespace) -> tuple[list[Contender], list[str]]:
    """All contenders that are there, and the reasons why others are not; collective."""
    contenders: list[Contender] = []
    missing = []
    if "comm" in args.path:
        contenders += [ours.Ringcomm(world.comm, codec, args.algo) for codec in args.codec]
        if "coalesced" in args.op:
            contenders.append(ours.OneByOne(world.comm))
        try:
            contenders.append(ours.Symmetric(world.comm))
        except Unsupported as reason:
            missing.append(f"symmetric: not measured: {reason}")
    if "dist" in args.path:
        try:
            contenders.append(ours.through_dist())
        except Unsupported as reason:
            missing.append(f"dist: not measured: {reason}")
    for name in args.peers:
        module = peers.load(name)
        reason = module.available()
        absent = world.total(reason is not None)
        if absent == 0:
            contenders.append(module.connect(world.rank, world.n, world.port))
        else:
            missing.append(f"{name}: not measured: {reason or f'missing on {absent} ranks'}")
    return contenders, missing


def run_rank(world: World, args: argparse.Namespace) -> int:
    """The whole table; returns 1 if a result was wrong."""
    contenders, missing = connect(world, args)
    header = {
        **facts(),
        "ranks": str(world.n),
        "started by": world.launcher,
        "load": f"{os.getloadavg()[0]:.1f}",
    }
    if args.back_to_back > 1:
        header["calls in a row"] = str(args.back_to_back)
    for contender in contenders:
        header |= contender.facts
    table = Table(COLUMNS, header, missing, quiet=world.rank != 0)
    wrong = 0
    for op in args.op:
        for dtype in args.dtype:
            for num_bytes in args.sizes:
                case = Case(op, dtype, num_bytes, world.rank, world.n, args.redop, args.root)
                for row in run_case(world, contenders, case, args, table.note):
                    table.add(row)
                    wrong += row["#wrong"] or 0
    for contender in contenders:
        contender.close()
    if world.rank == 0:
        if args.json:
            table.write_json(args.json)
        if args.plot:
            from bench.plot import draw

            draw(table.document(), Path(args.plot))
        if wrong:
            print(f"{wrong} elements are wrong", file=sys.stderr, flush=True)
    return int(wrong > 0)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments, __doc__ or "")
    return launch(run_rank, "bench.collectives", arguments, args)


if __name__ == "__main__":
    sys.exit(main())
