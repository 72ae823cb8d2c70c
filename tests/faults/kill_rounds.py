"""kill -9 of a random rank at a random moment, over and over.

    python -m tests.faults.kill_rounds --rounds 200 --seed 1 [--json FILE]

Each round: 2 to 4 ranks make a random mix of collectives (sizes, algorithms, codecs, asynchronous
ones) and messages; one of them is killed during set-up, in the middle of it all, or around close(). A round passes
if every survivor raises PeerLostError that names the dead rank within a second of the kill, all with
the same sentence, if no result was ever wrong, and if nothing is left behind: no name in the
temporary directory or /dev/shm, no descriptor, no process. Around close() a survivor may also have
finished already.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ringcomm import Communicator
from ringcomm.errors import PeerLostError, RingcommError
from ringcomm.store import TCPStore
from tests.worlds import RankFailure, Worlds, join, open_descriptors

PHASES = ("set-up", "running", "running", "running", "closing")
TIMEOUT_S = 10.0
SIZES = (1, 100, 3000, 9000, 70_000, 300_000)


@dataclass
class Summary:
    """What all rounds together have shown."""

    rounds: int = 0
    passed: int = 0
    seed: int = 0
    survivors: int = 0
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    latencies_ms: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def line(self) -> str:
        found = sorted(self.latencies_ms) or [0.0]
        return (
            f"{self.rounds:5d} rounds, {self.passed} passed, {self.survivors} survivors, noticed after p50 "
            f"{statistics.median(found):.2f} ms, p99 {found[int(0.99 * (len(found) - 1))]:.2f} ms, max "
            f"{found[-1]:.2f} ms  {self.phases}"
        )

    def to_json(self) -> str:
        table = asdict(self)
        found = sorted(table.pop("latencies_ms")) or [0.0]
        table["p50_ms"] = round(statistics.median(found), 3)
        table["p99_ms"] = round(found[int(0.99 * (len(found) - 1))], 3)
        table["max_ms"] = round(found[-1], 3)
        return json.dumps(table)


def one_call(comm: Communicator, dice: random.Random) -> None:
    """A random collective or exchange of messages, the same on all ranks, with its result checked."""
    n, rank = comm.world_size, comm.rank
    count = dice.choice(SIZES)
    kind = dice.randrange(12)
    if kind == 0:
        comm.barrier()
    elif kind == 1:
        root = dice.randrange(n)
        x = np.full(count, rank, np.int32)
        comm.broadcast(x, root)
        assert (x == root).all()
    elif kind == 2:
        got = comm.all_gather(np.full(count, rank, np.uint8))
        assert (got == np.arange(n)[:, None]).all()
    elif kind == 3:
        got = comm.reduce_scatter(np.full((n, count), rank + 1, np.int64))
        assert (got == n * (n + 1) // 2).all()
    elif kind == 8:
        counts = [[dice.choice((0, count // n)) for _ in range(n)] for _ in range(n)]
        got = comm.all_to_all(
            [np.full(counts[rank][peer], n * rank + peer, np.int32) for peer in range(n)],
            [np.empty(counts[peer][rank], np.int32) for peer in range(n)],
        )
        assert all((one == n * peer + rank).all() for peer, one in enumerate(got))
    elif kind == 9:
        root = dice.randrange(n)
        parts = comm.gather(np.full(count, rank, np.int32), root)
        got = comm.scatter(parts, root, np.empty(count, np.int32))
        assert (got == rank).all()
    elif kind == 10:
        root = dice.randrange(n)
        total = comm.reduce(np.full(count, rank + 1, np.int64), root)
        assert total is None or (total == n * (n + 1) // 2).all()
    elif kind == 11:
        rows = np.full((n, count), -1, np.int32)
        works = [comm.recv(row, src, async_op=True) for src, row in enumerate(rows)]
        works += [comm.send(np.full(count, rank, np.int32), dst, async_op=True) for dst in range(n)]
        for work in works:
            work.wait()
        assert (rows == np.arange(n)[:, None]).all()
    else:
        x = np.full(count, rank + 1, np.float32)
        algo = dice.choice((None, "two_shot", "ring"))
        codec = dice.choice((None, None, "int8", "int4/4"))
        if codec is not None:
            algo = None
        if kind < 6:
            comm.all_reduce(x, codec=codec, algo=algo)
        else:
            y = np.full(count, 1, np.float32)
            works = [comm.all_reduce(a, codec=codec, algo=algo, async_op=True) for a in (x, y)]
            for work in works:
                work.wait()
            assert (abs(y - n) < 0.1).all()
        assert (abs(x - n * (n + 1) / 2) < 0.2).all()


def be_a_rank(
    rank: int, world_size: int, port: int, seed: int, limit: int | None
) -> dict[str, Any]:
    """Joins, calls collectives (``limit`` of them or for ever) and says how it ended."""
    gc.collect()  # what an earlier test's exception held
    before = open_descriptors()
    where, done = "set-up", 0
    result: dict[str, Any] = {}
    when = 0.0
    try:
        with join(rank, world_size, port, TIMEOUT_S) as comm:
            where = "running"
            dice = random.Random(seed)
            try:
                while limit is None or done < limit:
                    one_call(comm, dice)
                    done += 1
                where = "closing"
            finally:
                when = time.monotonic()
        result = {"error": None}
    except RingcommError as error:
        result = {"error": type(error).__name__, "text": str(error), "rank": error.rank}
    return result | {
        "when": when or time.monotonic(),
        "where": where,
        "done": done,
        "leaked": open_descriptors() - before,
    }


def play_round(worlds: Worlds, dice: random.Random, summary: Summary) -> str | None:
    """One round; returns what is wrong with it."""
    world_size = dice.randint(2, 4)
    victim = dice.randrange(world_size)
    phase = dice.choice(PHASES)
    limit = 3 if phase == "closing" else None
    seed = dice.randrange(1 << 30)
    summary.phases[phase] += 1
    store = TCPStore(is_server=True, timeout=TIMEOUT_S)
    ranks = [worlds.take() for _ in range(world_size)]
    order = list(range(world_size))
    dice.shuffle(order)
    for rank in order:
        ranks[rank].start(be_a_rank, rank, world_size, store.port, seed, limit)
    store.get(f"ringcomm/0/1/hello/{victim}")  # before it has said hello, nobody knows it
    delay = {"set-up": 0.012, "running": 0.08, "closing": 0.06}[phase] * dice.random()
    time.sleep(delay)  # the random moment
    killed = time.monotonic()
    ranks[victim].kill()
    survivors: list[dict[str, Any]] = []
    problem = None
    for rank, process in enumerate(ranks):
        reusable = False
        try:
            if rank != victim:
                outcome = process.outcome(killed + TIMEOUT_S + 5)
                reusable = outcome.kind != "gone"
                if outcome.kind == "value":
                    survivors.append(outcome.value)
                else:
                    problem = f"rank {rank}: {outcome.trace or outcome.kind}"
        except RankFailure as hang:
            problem = f"rank {rank}: {hang}"
        worlds.give_back(process, reusable)
    store.close()
    problem = problem or judge(survivors, victim, phase, killed, summary)
    left = worlds.leftovers()
    if problem is None and left:
        problem = f"left behind: {left}"
    if problem is None:
        return None
    return (
        f"{phase}, rank {victim} of {world_size} after {delay * 1e3:.1f} ms, seed {seed}: {problem}"
    )


def judge(
    survivors: list[dict[str, Any]], victim: int, phase: str, killed: float, summary: Summary
) -> str | None:
    sentences = set()
    for found in survivors:
        summary.survivors += 1
        if found["leaked"]:
            return f"{found['leaked']} descriptors leaked"
        if found["error"] is None and phase == "closing":
            continue
        if found["error"] != PeerLostError.__name__ or found["rank"] != victim:
            return f"raised {found['error']} (rank {found['rank']}): {found.get('text')}"
        if found["when"] - killed > 1:
            return f"noticed after {found['when'] - killed:.3f} s: {found['text']}"
        summary.latencies_ms.append(max(0.0, found["when"] - killed) * 1e3)
        sentences.add(found["text"])
    return f"different sentences: {sentences}" if len(sentences) > 1 else None


def play(worlds: Worlds, rounds: int, seed: int, report: Any = None) -> Summary:
    summary = Summary(seed=seed)
    dice = random.Random(seed)
    for number in range(1, rounds + 1):
        problem = play_round(worlds, dice, summary)
        summary.rounds = number
        if problem is None:
            summary.passed += 1
        else:
            summary.failures.append(f"round {number}: {problem}")
            if report is not None:
                report(f"FAILED {summary.failures[-1]}")
        if report is not None and number % 20 == 0:
            report(summary.line())
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", metavar="FILE", help="write the summary there, too")
    options = parser.parse_args()
    begin = time.monotonic()
    with Worlds() as worlds:
        summary = play(worlds, options.rounds, options.seed, lambda line: print(line, flush=True))
        spawned = worlds.spawned
    alive = [pid for pid in spawned if os.path.exists(f"/proc/{pid}")]
    if alive:
        summary.failures.append(f"processes left behind: {alive}")
    print(
        f"seed {options.seed}: {summary.passed} of {summary.rounds} rounds passed in "
        f"{time.monotonic() - begin:.1f} s; {len(spawned)} processes, {len(alive)} left"
    )
    print(summary.to_json())
    if options.json:
        with open(options.json, "w") as file:
            file.write(summary.to_json() + "\n")
    return 0 if not summary.failures else 1


if __name__ == "__main__":
    from tests.faults import kill_rounds  # functions under a name that rank processes can import

    sys.exit(kill_rounds.main())
