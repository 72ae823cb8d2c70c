"""Open MPI, through mpi4py, in processes that mpirun has started.

Calls on NumPy views of torch tensors, with Open MPI's defaults: the shared-memory transport is vader
(sm from 5.0 on), which reads large messages out of the other process (cma) where the kernel lets it;
collectives are those of coll/tuned, since coll/sm has priority 0.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.contender import Contender, Unsupported
from bench.operations import Buffers, Case

__all__ = ["available", "connect", "launcher", "prepare"]

PIN = "mpi4py==4.1.2"
FLAGS = ("--bind-to", "none", "--oversubscribe")
OPS = {"sum": "SUM", "min": "MIN", "max": "MAX", "product": "PROD"}


def launcher() -> list[str]:
    """The mpirun command, without -n; run as root it needs one flag more.

    Raises:
        Unsupported: mpi4py or mpirun is not installed.
    """
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise Unsupported("mpirun was not found (Debian, Ubuntu: apt install openmpi-bin)")
    if importlib.util.find_spec("mpi4py") is None:
        raise Unsupported("mpi4py cannot be imported (python -m bench.peers --prepare)")
    return [mpirun, *FLAGS, *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]


def available() -> str | None:
    try:
        launcher()
    except Unsupported as reason:
        return str(reason)
    if "OMPI_COMM_WORLD_RANK" not in os.environ:
        return "these processes were not started by Open MPI's mpirun (--launch mpirun)"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return f"mpi4py.MPI cannot be loaded ({error})"
    if MPI.get_vendor()[0] != "Open MPI":
        return f"the MPI library is {MPI.get_vendor()[0]}"
    return None


def connect(_rank: int, n: int, _port: int) -> Contender:
    from mpi4py import MPI

    if MPI.COMM_WORLD.size != n:
        raise Unsupported(f"mpirun has started {MPI.COMM_WORLD.size} processes, not {n}")
    return OpenMpi()


def prepare() -> str:
    """Installs mpi4py where mpirun is; returns what was done.

    Raises:
        Unsupported: no mpirun, or pip failed.
    """
    try:
        launcher()
        return "mpi4py is installed"
    except Unsupported as reason:
        if shutil.which("mpirun") is None:
            raise
        pip = [sys.executable, "-m", "pip", "install", "--quiet", PIN]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            error = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise Unsupported(f"{reason}; {error}") from None
        return f"installed {PIN}"


class OpenMpi(Contender):
    name = "openmpi"
    baseline = "peer"

    def __init__(self) -> None:
        from mpi4py import MPI

        super().__init__()
        self._mpi = MPI
        version = ".".join(map(str, MPI.get_vendor()[1]))
        self.facts = {"openmpi": f"{version} ({_transport()}; mpirun {' '.join(launcher()[1:])})"}

    def prepare(self, case: Case, buffers: Buffers) -> Callable[[], Any]:
        comm, root, mpi = self._mpi.COMM_WORLD, case.root, self._mpi
        source, target = self._view(buffers.source, case), self._view(buffers.target, case)
        is_root = case.rank == root
        if case.kind.reduces and case.redop not in OPS:
            raise Unsupported(f"MPI has no {case.redop}")
        op = getattr(mpi, OPS.get(case.redop, "SUM"))
        if case.op == "all_reduce":
            return lambda: comm.Allreduce(mpi.IN_PLACE, target, op)
        if case.op == "reduce" and is_root:
            return lambda: comm.Reduce(mpi.IN_PLACE, target, op, root)
        if case.op == "reduce":
            return lambda: comm.Reduce(source, None, op, root)
        if case.op == "broadcast":
            return lambda: comm.Bcast(target, root)
        if case.op == "all_gather":
            return lambda: comm.Allgather(source, target)
        if case.op == "reduce_scatter":
            return lambda: comm.Reduce_scatter_block(source, target, op)
        if case.op == "all_to_all":
            return lambda: comm.Alltoall(source, target)
        if case.op == "gather":
            return lambda: comm.Gather(source, target if is_root else None, root)
        if case.op == "scatter":
            return lambda: comm.Scatter(source if is_root else None, target, root)
        if case.op == "coalesced":
            return self._one_by_one([self._view(x, case) for x in case.listed(buffers.target)], op)
        return self._ping_pong(case, target)

    def _one_by_one(self, arrays: list[Any], op: Any) -> Callable[[], Any]:
        comm, in_place = self._mpi.COMM_WORLD, self._mpi.IN_PLACE

        def run() -> None:
            for array in arrays:
                comm.Allreduce(in_place, array, op)

        return run

    def _view(self, tensor: torch.Tensor, case: Case) -> Any:
        """The tensor for mpi4py; as bytes where only bytes move."""
        if not case.kind.reduces:
            return tensor.view(torch.uint8).numpy()
        if case.dtype in (torch.bfloat16, torch.float16):
            raise Unsupported(f"MPI has no {case.dtype_name}")
        return tensor.numpy()

    def _ping_pong(self, case: Case, target: Any) -> Callable[[], Any]:
        comm = self._mpi.COMM_WORLD

        def first() -> None:
            comm.Send(target, 1)
            comm.Recv(target, 1)

        def second() -> None:
            comm.Recv(target, 0)
            comm.Send(target, 0)

        return (first, second, lambda: None)[min(case.rank, 2)]


def _transport() -> str:
    """The shared-memory transport at its defaults, from ompi_info."""
    for name in ("vader", "sm"):
        command = ["ompi_info", "--parsable", "--param", "btl", name, "--level", "9"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except OSError:
            return "transport unknown: no ompi_info"
        for line in found.splitlines():
            if line.startswith(f"mca:btl:{name}:param:btl_{name}_single_copy_mechanism:value:"):
                return f"btl {name}, single copy {line.rpartition(':')[2]}, coll tuned"
    return "transport unknown"
