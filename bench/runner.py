"""Times one case: every contender on the same data, in turn, in the same processes."""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench.busy import Watch
from bench.contender import Contender, Unsupported
from bench.operations import Buffers, Case
from bench.world import World
from ringcomm.errors import RingcommError, UsageError

__all__ = ["COLUMNS", "run_case"]

COLUMNS = (
    ("size", 10, "d"),
    ("count", 9, "d"),
    ("type", 8, "s"),
    ("op", 14, "s"),
    ("redop", 7, "s"),
    ("root", 4, "d"),
    ("who", 9, "s"),
    ("algo", 8, "s"),
    ("codec", 6, "s"),
    ("time_us", 10, ".1f"),
    ("p50_us", 10, ".1f"),
    ("p99_us", 10, ".1f"),
    ("algbw", 6, ".2f"),
    ("busbw", 6, ".2f"),
    ("wire_bytes", 10, "d"),
    ("error", 7, ".0e"),
    ("#wrong", 6, "d"),
    ("to_best", 7, ".3f"),
    ("to_copy", 7, ".2f"),
    ("others", 6, ".0f"),
)
QUIET = 0.03  # of the machine: what other processes may take unnoticed
FEWEST, MOST = 10, 300  # samples, unless the user says how many


class Entry:
    """A contender in one case."""

    def __init__(self, contender: Contender, case: Case, buffers: Buffers, calls: int) -> None:
        self.contender, self.case, self.buffers = contender, case, buffers
        self.facts = contender.describe(case)
        self.samples: list[float] = []
        self.wrong: int | None = None
        self.error: float | None = None
        self._calls = calls
        self._run: Callable[[], Any] = contender.prepare(case, buffers)

    def verify(self, world: World, check: bool) -> None:
        """The first call, and whether its result is right.

        Raises:
            Unsupported: this rank's call raised.
        """
        self.case.reset(self.buffers)
        world.comm.barrier()
        try:
            self._run()
        except UsageError as error:
            raise Unsupported(str(error).splitlines()[0]) from None
        except RingcommError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise Unsupported((str(error) or repr(error)).splitlines()[0]) from None
        if check and self.contender.baseline != "copy":
            codec = self.facts.get("codec", "none")
            self.wrong, self.error = self.case.count_wrong(self.buffers.target, codec)

    def sample(self, world: World) -> float:
        """Seconds of a call: from a barrier on, on this rank."""
        # Sums of sums would overflow, so calls in a row add zeros.
        self.case.reset(self.buffers, None if self._calls == 1 else 0)
        run, calls = self._run, self._calls
        world.comm.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        elapsed = (time.perf_counter() - start) / calls
        return elapsed / 2 if self.case.op == "send_recv" else elapsed


def run_case(
    world: World,
    contenders: list[Contender],
    case: Case,
    args: argparse.Namespace,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of all contenders that can run the case; collective.

    Args:
        note: Called with the reason for every row that is missing.
    """
    entries = []
    for contender in contenders:
        try:
            entry = Entry(contender, case, contender.allocate(case), args.back_to_back)
        except Unsupported as reason:
            note(f"{contender.name}: no row for {case.op}: {reason}")
            continue
        refusal = None
        try:
            entry.verify(world, bool(args.c))
        except Unsupported as reason:
            refusal = str(reason)
        refused = world.total(refusal is not None)
        if refused == 0:
            entries.append(entry)
        elif refused == world.n:
            note(f"{contender.name}: no row for {case.op} of {case.dtype_name}: {refusal}")
        else:
            raise SystemExit(
                f"{contender.name} refused {case.op} on {refused} of {world.n} ranks: {refusal}"
            )
    others = _measure(world, entries, args)
    for _ in range(args.tries - 1):
        if others is None or others <= QUIET:
            break
        before = [entry.samples for entry in entries]
        again = _measure(world, entries, args)
        if again is not None and again < others:
            others = again
        else:
            for entry, samples in zip(entries, before, strict=True):
                entry.samples = samples
    return _rows(world, entries, args, others)


def _measure(world: World, entries: list[Entry], args: argparse.Namespace) -> float | None:
    """Takes the samples; returns the share of the machine that other processes had, if that is known."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(args.w):
            for entry in entries:
                entry.sample(world)
        (warm_up,) = world.maximum([time.perf_counter() - start])
        if args.iters is not None:
            iterations = args.iters
        elif args.w == 0:
            iterations = FEWEST
        else:
            iterations = min(MOST, max(FEWEST, int(args.seconds * args.w / warm_up)))
        for entry in entries:
            entry.samples = []
        watch = Watch(world)
        # What ran before leaves caches and sleeping threads behind: in a new order every time, which
        # is the same on all ranks, everybody follows everybody.
        order, dice = list(entries), random.Random(0)
        for _ in range(iterations):
            dice.shuffle(order)
            for entry in order:
                entry.samples.append(entry.sample(world))
        return watch.others()
    finally:
        gc.enable()


def _rows(
    world: World, entries: list[Entry], args: argparse.Namespace, others: float | None
) -> list[dict[str, Any]]:
    rows = []
    for entry in entries:
        case, contender = entry.case, entry.contender
        samples = world.maximum(entry.samples)
        ordered = sorted(samples)
        p50 = statistics.median(ordered)
        verified = entry.wrong is not None
        is_copy = contender.baseline == "copy"
        rows.append(
            {
                "size": case.num_bytes,
                "count": case.part if case.kind.parts else case.count,
                "type": case.dtype_name,
                "op": case.op,
                "redop": case.redop if case.kind.reduces else None,
                "root": case.root if case.kind.rooted else None,
                "who": contender.name,
                "baseline": contender.baseline,
                "algo": entry.facts.get("algo"),
                "codec": entry.facts.get("codec"),
                "calls": args.back_to_back,
                "time_us": statistics.fmean(ordered) * 1e6,
                "p50_us": p50 * 1e6,
                "p99_us": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6,
                "algbw": case.num_bytes / p50 / 1e9,
                "busbw": None
                if is_copy
                else case.num_bytes / p50 / 1e9 * case.kind.bus_factor(world.n),
                "wire_bytes": entry.facts.get("wire_bytes"),
                "error": world.maximum([entry.error or 0.0])[0] if verified else None,
                "#wrong": world.total(entry.wrong or 0) if verified else None,
                "others": None if others is None else others * 100,
                "samples_us": [round(sample * 1e6, 2) for sample in samples],
            }
        )
    peers = {row["who"]: row["p50_us"] for row in rows if row["baseline"] == "peer"}
    copies = [row["p50_us"] for row in rows if row["baseline"] == "copy"]
    best = min(peers, key=peers.__getitem__, default=None)
    for row in rows:
        row["best"] = best
        row["to_best"] = None if best is None else row["p50_us"] / peers[best]
        row["to_copy"] = row["p50_us"] / copies[0] if copies else None
    return rows
