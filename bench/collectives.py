"""Collectives against their peers: ``python -m bench.collectives -n 2 -b 4K -e 64M``.

All contenders run interleaved in one set of processes: iteration i of each follows iteration i of the
others. A sample is the time of the slowest rank; the table shows medians. Results are verified before
anything is timed. algbw = bytes / time; busbw = algbw x the factor of the operation (nccl-tests).
Baselines: Gloo (torch's default on CPU) and a memory copy of the same array on all ranks at once.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ringcomm
from bench.table import Table, facts

COLUMNS = (
    ("bytes", 10, "d"),
    ("count", 10, "d"),
    ("dtype", 9, "s"),
    ("op", 14, "s"),
    ("who", 9, "s"),
    ("algo", 9, "s"),
    ("codec", 7, "s"),
    ("p50_us", 10, ".1f"),
    ("p99_us", 10, ".1f"),
    ("algbw", 7, ".2f"),
    ("busbw", 7, ".2f"),
    ("wire_bytes", 10, "d"),
    ("error", 9, ".1e"),
    ("wrong", 6, "d"),
    ("to_gloo", 8, ".3f"),
    ("to_copy", 8, ".2f"),
)
OPS = ("all_reduce", "broadcast", "all_gather", "reduce_scatter")


def bus_factor(op: str, n: int) -> float:
    """busbw / algbw, as nccl-tests defines it."""
    if op == "all_reduce":
        return 2 * (n - 1) / n
    return 1.0 if op == "broadcast" else (n - 1) / n


class Contender:
    """Something that runs the operation on its own copy of the data."""

    def __init__(
        self,
        who: str,
        run: Callable[[], Any],
        result: Callable[[], torch.Tensor] | None,
        **row: Any,
    ) -> None:
        self.who = who
        self.run = run
        self.result = result
        self.row = row
        self.samples: list[float] = []


def make_contenders(
    comm: ringcomm.Communicator, op: str, source: torch.Tensor, args: argparse.Namespace
) -> list[Contender]:
    n, count = comm.world_size, source.numel()
    part = max(1, count // n)
    many = torch.empty(n * part, dtype=source.dtype)
    work = source.clone()  # ringcomm's in-place array
    other = source.clone()  # the peer's
    mine = source[:part].clone()
    contenders = []

    def add(
        who: str, run: Callable[[], Any], result: Callable[[], torch.Tensor] | None, **row: Any
    ) -> None:
        contenders.append(Contender(who, run, result, **row))

    gloo_op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[
        args.redop
    ]
    if op == "all_reduce":
        for codec in args.codec:
            out = work if codec == "none" else source.clone()
            plan = comm.explain(source.nbytes, codec=codec)
            add(
                "ringcomm",
                lambda out=out, codec=codec: comm.all_reduce(
                    out, args.redop, None if codec == "none" else codec, args.algo
                ),
                lambda out=out: out,
                algo=args.algo or plan.algo,
                codec=codec,
                wire_bytes=plan.wire_bytes,
                reset=lambda out=out: out.copy_(source),
            )
        add(
            "gloo",
            lambda: dist.all_reduce(other, gloo_op),
            lambda: other,
            reset=lambda: other.copy_(source),
        )
    elif op == "broadcast":
        plan = comm.explain(source.nbytes, op)
        add(
            "ringcomm",
            lambda: comm.broadcast(work),
            lambda: work,
            algo=plan.algo,
            wire_bytes=plan.wire_bytes,
        )
        add("gloo", lambda: dist.broadcast(other, 0), lambda: other)
    elif op == "all_gather":
        plan = comm.explain(mine.nbytes, op)
        theirs = torch.empty_like(many)
        add(
            "ringcomm",
            lambda: comm.all_gather(mine, many),
            lambda: many,
            algo=plan.algo,
            wire_bytes=plan.wire_bytes,
        )
        add("gloo", lambda: dist.all_gather_into_tensor(theirs, mine), lambda: theirs)
    else:
        plan = comm.explain(mine.nbytes, op)
        whole = source[: n * part].clone() if count >= n else source.repeat(n)
        theirs = torch.empty_like(mine)
        pieces = [whole[r * part : (r + 1) * part].clone() for r in range(n)]
        add(
            "ringcomm",
            lambda: comm.reduce_scatter(whole, args.redop, mine),
            lambda: mine,
            algo=plan.algo,
            wire_bytes=plan.wire_bytes,
        )
        add("gloo", lambda: dist.reduce_scatter(theirs, pieces, gloo_op), lambda: theirs)
    copy = torch.empty_like(source)
    add("memcpy", lambda: copy.copy_(source), None)
    return contenders


def check(contenders: list[Contender], n: int) -> None:
    """Runs everything once and compares with Gloo's result: bits, or the codec's error."""
    for contender in contenders:
        contender.run()
    expected = next(c for c in contenders if c.who == "gloo").result()
    for contender in contenders:
        if contender.result is None:
            continue
        got, want = contender.result().double(), expected.double()
        scale = want.square().sum().clamp_min(1e-300)
        contender.row["error"] = float((got - want).square().sum() / scale)
        codec = contender.row.get("codec", "none")
        # Sums of more than two ranks may differ in order from Gloo's by rounding.
        exact = codec == "none" and n == 2
        limit = 0.0 if exact else (1e-9 if codec == "none" and expected.itemsize > 2 else 5e-2)
        contender.row["wrong"] = int(contender.row["error"] > limit)


def run_rank(rank: int, n: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, n, is_master=rank == 0)
    dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=n)
    dtype = getattr(torch, args.dtype)
    with ringcomm.init(rank, n, store=dist.PrefixStore("ringcomm", store), timeout=60) as comm:
        header = {**facts(), "ranks": str(n), "warm-up": str(args.w), "redop": args.redop}
        table = Table(COLUMNS, header, quiet=rank != 0)
        for op in args.op:
            for num_bytes in args.sizes:
                generator = torch.Generator().manual_seed(rank)
                count = max(1, num_bytes // dtype.itemsize)
                if dtype.is_floating_point:
                    source = torch.randn(count, generator=generator).to(dtype)
                else:
                    source = torch.randint(0, 100, (count,), generator=generator).to(dtype)
                contenders = make_contenders(comm, op, source, args)
                check(contenders, n)
                iterations = args.iters or max(8, min(400, int(2e8 / num_bytes)))
                for iteration in range(-args.w, iterations):
                    for contender in contenders:
                        contender.row.get("reset", lambda: None)()
                        comm.barrier()
                        start = time.perf_counter()
                        contender.run()
                        elapsed = time.perf_counter() - start
                        if iteration >= 0:
                            contender.samples.append(elapsed)
                report(table, comm, op, source, contenders)
        if rank == 0 and args.json:
            table.write_json(args.json)
        wrong = sum(row["wrong"] or 0 for row in table.rows)
    dist.destroy_process_group()
    if wrong:
        sys.exit(f"{wrong} results are wrong")


def report(
    table: Table,
    comm: ringcomm.Communicator,
    op: str,
    source: torch.Tensor,
    contenders: list[Contender],
) -> None:
    medians = {}
    rows = []
    for contender in contenders:
        samples = (
            comm.all_gather(torch.tensor(contender.samples, dtype=torch.float64)).max(dim=0).values
        )
        ordered = sorted(samples.tolist())
        p50 = statistics.median(ordered)
        medians.setdefault(contender.who, p50)
        algbw = source.nbytes / p50 / 1e9
        rows.append(
            {
                "bytes": source.nbytes,
                "count": source.numel(),
                "dtype": str(source.dtype).removeprefix("torch."),
                "op": op,
                "who": contender.who,
                "algo": contender.row.get("algo"),
                "codec": contender.row.get("codec"),
                "p50_us": p50 * 1e6,
                "p99_us": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6,
                "algbw": algbw,
                "busbw": algbw * bus_factor(op, comm.world_size) if contender.result else None,
                "wire_bytes": contender.row.get("wire_bytes"),
                "error": contender.row.get("error"),
                "wrong": contender.row.get("wrong"),
                "samples_us": [round(s * 1e6, 2) for s in samples.tolist()],
            }
        )
    for row in rows:
        row["to_gloo"] = row["p50_us"] / 1e6 / medians["gloo"]
        row["to_copy"] = row["p50_us"] / 1e6 / medians["memcpy"]
        table.add(row)


def parse_size(text: str) -> int:
    """Bytes of ``4096``, ``4K``, ``64M`` or ``1G``."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdigit() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (4096, 4K, 64M, 1G)")
    return int(digits) * factor


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.collectives", description=__doc__)
    parser.add_argument("-n", type=int, default=2, help="ranks (2)")
    parser.add_argument("-b", type=parse_size, default=4 << 10, help="smallest size (4K)")
    parser.add_argument("-e", type=parse_size, default=64 << 20, help="largest size (64M)")
    parser.add_argument("-f", type=int, default=4, help="factor between sizes (4)")
    parser.add_argument("-w", type=int, default=3, help="warm-up iterations (3)")
    parser.add_argument("--iters", type=int, default=0, help="timed iterations (by size)")
    parser.add_argument("--op", nargs="+", choices=OPS, default=["all_reduce"])
    parser.add_argument("--redop", choices=("sum", "max", "min"), default="sum")
    parser.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16", "float16", "int32"), default="float32"
    )
    parser.add_argument(
        "--algo", choices=("one_shot", "two_shot", "ring"), help="force (the table chooses)"
    )
    parser.add_argument(
        "--codec", nargs="+", default=["none"], help="codecs of all_reduce, e.g. none int8 int4"
    )
    parser.add_argument("--json", help="write rows with raw samples here")
    args = parser.parse_args(arguments)
    if args.n < 2 or args.f < 2 or args.b > args.e:
        parser.error("need -n >= 2, -f >= 2 and -b <= -e")
    args.sizes = []
    size = args.b
    while size <= args.e:
        args.sizes.append(size)
        size *= args.f
    return args


def main() -> None:
    args = parse_arguments()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)  # finds a free port
    port = server.port
    del server
    mp.spawn(run_rank, (args.n, port, args), args.n)


if __name__ == "__main__":
    main()
