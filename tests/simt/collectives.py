"""Groups of emulated GPUs, and collectives on their arrays in both modes."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from ringcomm import _core
from tests.simt.emulator import Emulator

MOST_RANKS = 16
OPS = ("barrier", "all_reduce", "broadcast", "all_gather", "reduce_scatter", "reduce")
OPS += ("gather", "scatter", "all_to_all")
EXCHANGES = OPS[-3:]
ALGOS = ("one_shot", "two_shot", "ring", "staged", "direct")
# One launch with flags; or a launch for every round.
MODES = ("in_kernel", "stepped")

Array = Any


class Part(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("count", ctypes.c_int64)]


class Call(ctypes.Structure):
    """DeviceCall; see harness/collectives.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("op", "algo", "dtype", "reduce_op")),
        ("factor", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("count", "root")),
        *((name, ctypes.c_void_p) for name in ("input", "output")),
        *((name, Part * MOST_RANKS) for name in ("sends", "receives")),
        *((name, ctypes.c_int64) for name in ("has_parts", "most_part_elems")),
        *((name, ctypes.c_void_p * MOST_RANKS) for name in ("peer_inputs", "peer_outputs")),
        *((name, ctypes.c_int64) for name in ("codec_up", "codec_down", "stochastic")),
        *((name, ctypes.c_uint64) for name in ("seed", "step")),
        *((name, ctypes.c_void_p) for name in ("residual", "owner_residual")),
    ]


class View(ctypes.Structure):
    """GroupView; likewise."""

    _fields_ = [
        ("slabs", ctypes.c_void_p * MOST_RANKS),
        ("watch", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("world_size", "num_blocks")),
        *((name, ctypes.c_int64) for name in ("box_bytes", "packets_per_box", "rank")),
    ]


def address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


def call(op: str, algo: str, dtype: str, count: int = 0, **fields: Any) -> Call:
    """A DeviceCall. Arrays go as they are; sends and receives are lists with an array or None for each rank."""
    made = Call(op=OPS.index(op), algo=ALGOS.index(algo), dtype=_core.DTYPES[dtype], count=count)
    made.factor = 1
    for name in ("input", "output", "residual", "owner_residual"):
        setattr(made, name, address(fields.pop(name, None)))
    for name in ("sends", "receives"):
        for part, array in zip(getattr(made, name), fields.pop(name, ()), strict=False):
            if array is not None:
                part.data, part.count = address(array), array.size
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def where_they_are(calls: Sequence[Call]) -> None:
    """Makes one collective's calls direct: every rank knows everyone's arrays."""
    for rank, made in enumerate(calls):
        made.algo = ALGOS.index("direct")
        for peer, other in enumerate(calls):
            is_exchange = OPS[made.op] in EXCHANGES
            made.peer_inputs[peer] = other.sends[rank].data if is_exchange else other.input
            made.peer_outputs[peer] = other.output


class Group:
    """The slabs of ranks, each a GPU of its own, in a mode of theirs."""

    def __init__(
        self,
        simt: Emulator,
        world_size: int,
        mode: str,
        num_blocks: int = 2,
        box_bytes: int = 512,
        packets_per_box: int = 16,
        first_epoch: int = 0,
    ) -> None:
        self.simt = simt
        self.mode = mode
        self.epoch = first_epoch
        self.views: list[View] = []
        self.watches: list[Array] = []
        for rank in range(world_size):
            view = View(world_size=world_size, num_blocks=num_blocks, box_bytes=box_bytes)
            view.packets_per_box = packets_per_box
            view.rank = rank
            view.timeout_ns = 10**6
            self.watches.append(simt.array(np.zeros(16, np.uint32), f"watch of rank {rank}"))
            view.watch = address(self.watches[rank])
            self.views.append(view)
        simt.library.simt_slab_bytes.restype = ctypes.c_int64
        num_bytes = simt.library.simt_slab_bytes(ctypes.byref(self.views[0]))
        empty = np.full(num_bytes, 0xA5, np.uint8)
        lines = empty[: 128 * num_blocks].view(np.uint32).reshape(num_blocks, 32)
        lines[:] = first_epoch & 0xFFFFFFFF
        self.slabs = [simt.array(empty, f"slab of rank {rank}") for rank in range(world_size)]
        for view in self.views:
            view.slabs = (ctypes.c_void_p * MOST_RANKS)(*map(address, self.slabs))

    @property
    def world_size(self) -> int:
        return len(self.views)

    def late_ranks(self) -> list[int]:
        """DeviceWatch::late_rank of every rank that takes part."""
        return [int(self.watches[view.rank][1]) for view in self.views]

    def plan(self, calls: Sequence[Call]) -> tuple[int, int]:
        """Rounds and blocks, which all ranks agree on."""
        plans = set()
        for view, made in zip(self.views, calls, strict=True):
            numbers = [ctypes.c_int64() for _ in range(2)]
            references = [ctypes.byref(number) for number in (made, view, *numbers)]
            self.simt.call("simt_plan", *references)
            plans.add(tuple(number.value for number in numbers))
        (plan,) = plans
        return plan[0], plan[1]

    def queue(self, calls: Sequence[Call], begin: int, end: int, epoch: int = 0) -> None:
        for view, made in zip(self.views, calls, strict=True):
            self.simt.call(
                "simt_collective",
                *(ctypes.byref(made), ctypes.byref(view), begin, end),
                *(int(self.mode == "in_kernel"), epoch & 0xFFFFFFFF, self.simt.stream(view.rank)),
            )

    def run(self, collectives: Sequence[Sequence[Call]], *plan: Any) -> list[str]:
        """Runs collectives one after the other: each a call for every rank. In the kernels nobody waits between them.
        Returns the reports."""
        reports = []
        for calls in collectives:
            num_rounds, _ = self.plan(calls)
            if self.mode == "in_kernel":
                self.queue(calls, 0, num_rounds)
                continue
            for number in range(num_rounds):
                self.epoch += number > 0
                self.queue(calls, number, number + 1, self.epoch)
                reports += self.simt.run(*plan)
        return reports + self.simt.run(*plan)
