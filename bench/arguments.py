"""The flags of ``python -m bench.collectives``."""

from __future__ import annotations

import argparse
import importlib.util
import os

from bench.operations import DTYPES, OPERATIONS, REDOPS
from bench.peers import MODULES

__all__ = ["parse_arguments", "parse_size"]

ALGOS = ("one_shot", "two_shot", "ring")
PATHS = ("comm", "dist")


def parse_size(text: str) -> int:
    """Bytes of ``4096``, ``4K``, ``64M`` or ``1G``."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (4096, 4K, 64M, 1G)")
    return int(digits) * factor


def sizes_between(begin: int, end: int, factor: int) -> list[int]:
    sizes = []
    while begin <= end:
        sizes.append(begin)
        begin *= factor
    return sizes


def parse_arguments(arguments: list[str] | None = None, about: str = "") -> argparse.Namespace:
    """The flags, with ``sizes`` in bytes; ends the program with a message if they make no sense.

    Args:
        arguments: Of the command line; None: this process's.
        about: What ``--help`` says first.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.collectives",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-n", type=int, help="ranks (2; under mpirun those that it started)")
    add("-b", type=parse_size, default=256, metavar="SIZE", help="smallest size (256)")
    add("-e", type=parse_size, default=64 << 20, metavar="SIZE", help="largest size (64M)")
    add("-f", type=int, default=4, metavar="FACTOR", help="factor between sizes (4)")
    add("--sizes", type=parse_size, nargs="+", metavar="SIZE", help="these instead of -b -e -f")
    add("-w", type=int, default=5, metavar="N", help="warm-up iterations (5)")
    add("-c", type=int, choices=(0, 1), default=1, help="verify results before timing (1)")
    add("--iters", type=int, metavar="N", help="timed iterations (as --seconds allow, 10 to 300)")
    add("--seconds", type=float, default=2.0, metavar="S", help="about, for one size (2)")
    add("--tries", type=int, default=1, metavar="N", help="times, if others use the machine (1)")
    add("--back-to-back", type=int, default=1, metavar="N", help="a sample is N calls in a row (1)")
    add("--op", nargs="+", choices=OPERATIONS, default=["all_reduce"], metavar="OP")
    add("--redop", choices=REDOPS, default="sum")
    add("--root", type=int, default=0)
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE")
    add("--algo", choices=ALGOS, help="force an exact all_reduce (the table chooses)")
    add("--codec", nargs="+", default=["none"], help="of all_reduce, e.g. none int8 int4 (none)")
    add("--path", nargs="+", choices=PATHS, default=["comm"], help="comm.all_reduce or torch's")
    add("--peers", nargs="*", default=list(MODULES), help=f"({' '.join(MODULES)}), or modules")
    add("--launch", choices=("auto", "mpirun", "spawn"), default="auto")
    add("--json", metavar="FILE", help="write header, notes, rows and raw samples")
    add("--plot", metavar="FILE", help="draw time against size, and ratios (PNG, SVG, PDF)")
    args = parser.parse_args(arguments)

    started = os.environ.get("OMPI_COMM_WORLD_SIZE")  # under mpirun
    if started is not None and args.n not in (None, int(started)):
        parser.error(f"-n {args.n}, but mpirun has started {started} ranks: leave -n out")
    args.n = int(started) if started is not None else (args.n or 2)
    if args.n < 2 or args.f < 2 or args.b > args.e:
        parser.error("need -n >= 2, -f >= 2 and -b <= -e")
    if args.w < 0 or args.back_to_back < 1 or (args.iters is not None and args.iters < 1):
        parser.error("need -w >= 0, --iters >= 1 and --back-to-back >= 1")
    if args.seconds <= 0 or args.tries < 1:
        parser.error("need --seconds > 0 and --tries >= 1")
    if not 0 <= args.root < args.n:
        parser.error(f"--root must be 0 to {args.n - 1}")
    for peer in args.peers:
        if peer not in MODULES and "." not in peer:
            parser.error(f"--peers: {peer!r} is none of {', '.join(MODULES)}, nor a dotted module")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    _check_codecs(parser, args.codec)
    args.sizes = args.sizes or sizes_between(args.b, args.e, args.f)
    return args


def _check_codecs(parser: argparse.ArgumentParser, specs: list[str]) -> None:
    from ringcomm import codec, errors

    for spec in specs:
        try:
            codec(spec)
        except errors.UsageError as error:
            parser.error(f"--codec: {error}")
