"""The processes of a run: how they start, meet and agree."""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ringcomm
from bench.contender import Unsupported
from bench.peers import openmpi

__all__ = ["World", "launch"]

TIMEOUT = 300.0  # seconds; contenders without a deadline of their own are ended with the process


@dataclass
class World:
    """One rank. What ranks must agree on goes through Gloo, not through what is measured.

    Attributes:
        port: A TCP port that no other run has.
        launcher: How the processes were started, for the header.
    """

    rank: int
    n: int
    port: int
    launcher: str
    comm: ringcomm.Communicator

    def maximum(self, values: list[float]) -> list[float]:
        """The largest of all ranks, element by element."""
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together.tolist()

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all ranks, element by element."""
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together)
        return together.tolist()

    def total(self, value: int) -> int:
        return round(self.sum([value])[0])


Body = Callable[[World, argparse.Namespace], int]


def launch(body: Body, module: str, arguments: list[str], args: argparse.Namespace) -> int:
    """Runs ``body(world, args)`` on ``args.n`` ranks and returns an exit status.

    In a process that mpirun has started this is one rank. Elsewhere mpirun starts
    ``python -m module arguments`` where Open MPI takes part, else ranks are spawned here.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        return _run_under_mpirun(body, args)
    if args.launch == "mpirun" or (args.launch == "auto" and "openmpi" in args.peers):
        try:
            command = [*openmpi.launcher(), "-n", str(args.n), sys.executable, "-m", module]
        except Unsupported as reason:
            if args.launch == "mpirun":
                raise SystemExit(f"--launch mpirun: {reason}") from None
        else:
            done = subprocess.run([*command, *arguments], stdin=subprocess.DEVNULL, check=False)
            return done.returncode
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        mp.spawn(_run_spawned, (args.n, server.port, body, args), args.n)
    except mp.ProcessExitedException as error:
        return error.exit_code or 1
    return 0


def _run_spawned(rank: int, n: int, port: int, body: Body, args: argparse.Namespace) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    with _joined(rank, n, store, "spawned processes") as world:
        status = body(world, args)
    if status:
        sys.exit(status)


def _run_under_mpirun(body: Body, args: argparse.Namespace) -> int:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f"ranks started by mpirun need mpi4py ({error})") from None
    everyone = MPI.COMM_WORLD
    try:
        server = None
        if everyone.rank == 0:
            server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = everyone.bcast(server.port if server is not None else 0)
        store = server or dist.TCPStore("127.0.0.1", port, is_master=False)
        with _joined(everyone.rank, everyone.size, store, "mpirun") as world:
            return body(world, args)
    except BaseException:
        import traceback

        traceback.print_exc()
        everyone.Abort(1)
        raise


@contextmanager
def _joined(rank: int, n: int, store: dist.TCPStore, launcher: str) -> Iterator[World]:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("gloo", store),
        rank=rank,
        world_size=n,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    try:
        ours = dist.PrefixStore("ringcomm", store)
        with ringcomm.init(rank, n, store=ours, timeout=TIMEOUT) as comm:
            yield World(rank, n, store.port, launcher, comm)
            dist.barrier()
    finally:
        dist.destroy_process_group()
