"""What communication adds to a DDP step: ``python -m bench.ddp [--steps N] [--json FILE]``.

Trains the demo's transformer on two ranks in three ways, which take turns of a few steps in one set of
processes: plain DDP on Gloo, plain DDP on the backend ``"ringcomm"``, and DDP whose gradients stay where
they are. Exposed is what a step takes longer than one without communication: what did not hide behind the
backward pass. Medians over steps, each of the slower rank. Afterwards the parameters must be the same
bits on both ranks.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ringcomm.backend
from bench.table import facts
from ringcomm.demo.data import VOCABULARY
from ringcomm.demo.models import CONTEXT, CharTransformer

__all__ = ["main"]

RANKS = 2
BATCH = 4
TURN = 10
UNTIMED_TURNS = 3
SILENT = "no communication"


class Contender:
    """One replica of the model and the times of its steps."""

    def __init__(self, name: str, rank: int) -> None:
        torch.manual_seed(0)
        self.name = name
        self.seconds: list[float] = []
        group = dist.new_group(backend="ringcomm") if name == "ringcomm" else None
        self.ddp = DistributedDataParallel(CharTransformer(), process_group=group)
        if name == SILENT:
            self.ddp.register_comm_hook(None, _leave_alone)
        self._optimizer = torch.optim.AdamW(self.ddp.parameters(), lr=1e-3, fused=True)
        self._dice = torch.Generator().manual_seed(rank)

    def step(self) -> None:
        text = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=self._dice)
        begin = time.perf_counter()
        loss = cross_entropy(self.ddp(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - begin)

    def replicas_equal(self) -> bool:
        """Collective."""
        mine = torch.cat([p.detach().flatten() for p in self.ddp.parameters()]).view(torch.int32)
        first = mine.clone()
        dist.broadcast(first, 0)
        equal = torch.tensor([int(torch.equal(mine, first))])
        dist.all_reduce(equal, dist.ReduceOp.MIN)
        return bool(equal.item())


def _leave_alone(
    state: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _run(rank: int, store: str, steps: int, file: str) -> None:
    torch.set_num_threads(1)
    ringcomm.backend.register()
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    contenders = [Contender(name, rank) for name in ("gloo", "ringcomm", SILENT)]
    for turn in range(UNTIMED_TURNS + steps // TURN):
        for contender in contenders:
            if turn == UNTIMED_TURNS:
                contender.seconds.clear()
            dist.barrier()
            for _ in range(TURN):
                contender.step()
    rows = []
    for contender in contenders:
        slower = torch.tensor(contender.seconds, dtype=torch.float64)
        dist.all_reduce(slower, dist.ReduceOp.MAX)
        equal = contender.replicas_equal()
        rows.append(
            {
                "who": contender.name,
                "step_ms": statistics.median(slower.tolist()) * 1e3,
                "equal": equal,
            }
        )
    if rank == 0:
        Path(file).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ddp", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=200, help="timed steps of each (200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ringcomm-bench-") as folder:
        file = Path(folder) / "rows.json"
        mp.spawn(_run, (str(Path(folder) / "store"), args.steps, str(file)), RANKS)
        rows = json.loads(file.read_text())
    silent = next(row["step_ms"] for row in rows if row["who"] == SILENT)
    for row in rows:
        row["exposed_ms"] = row["step_ms"] - silent
    slowest = rows[0]["exposed_ms"]
    wrong = [row["who"] for row in rows if row["who"] != SILENT and not row["equal"]]
    print("who               step ms  exposed ms  share of Gloo's")
    for row in rows:
        share = f"{row['exposed_ms'] / slowest:.2f}" if row["who"] != SILENT else ""
        print(f"{row['who']:<16} {row['step_ms']:8.2f} {row['exposed_ms']:11.2f}  {share:>15}")
    if args.json:
        args.json.write_text(json.dumps({"header": facts(), "rows": rows}, indent=1) + "\n")
    if wrong:
        print(f"parameters differ between ranks: {', '.join(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
