"""The operations that are timed: what each rank passes in, what it must get, and how bytes are counted.

``size`` is that of the larger of a rank's two arrays, as in nccl-tests: all parts together in an
all_gather, reduce_scatter, all_to_all, gather and scatter. all_reduce, reduce, broadcast and send_recv
work in place, the others from one array into another; so for every contender. send_recv is a
ping-pong of ranks 0 and 1, and its time one way. coalesced is an all_reduce of a list: 64 arrays that
make up the size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ringcomm import codec as parse_codec

__all__ = ["DTYPES", "OPERATIONS", "REDOPS", "Buffers", "Case", "Operation"]

DTYPES = ("float32", "float64", "bfloat16", "float16", "int8", "uint8", "int32", "int64")
REDOPS = ("sum", "avg", "min", "max", "product")
PERIOD = 262_147  # a prime: no chunk, segment or part is a multiple of it
HALF_STEP = {"int8": 0.5 / 127, "int4": 0.5 / 7, "bf16": 2.0**-9, "fp16": 2.0**-11, "none": 0.0}
SCALE_ROUNDING = 2.0**-8  # a block's scale is a bfloat16: its values may be off by that much, too


@dataclass(frozen=True)
class Operation:
    """Attributes: ``bus_factor(n)`` is busbw / algbw (nccl-tests); ``parts``: a size is n parts."""

    bus_factor: Callable[[int], float]
    in_place: bool = False
    reduces: bool = False
    rooted: bool = False
    parts: bool = False


def _once(_n: int) -> float:
    return 1.0


def _others(n: int) -> float:
    return (n - 1) / n


OPERATIONS = {
    "all_reduce": Operation(lambda n: 2 * (n - 1) / n, in_place=True, reduces=True),
    "reduce": Operation(_once, in_place=True, reduces=True, rooted=True),
    "broadcast": Operation(_once, in_place=True, rooted=True),
    "all_gather": Operation(_others, parts=True),
    "reduce_scatter": Operation(_others, reduces=True, parts=True),
    "all_to_all": Operation(_others, parts=True),
    "gather": Operation(_others, rooted=True, parts=True),
    "scatter": Operation(_others, rooted=True, parts=True),
    "send_recv": Operation(_once, in_place=True),
    "coalesced": Operation(lambda n: 2 * (n - 1) / n, in_place=True, reduces=True),
}
LIST = 64  # arrays of a coalesced call


@dataclass
class Buffers:
    """A contender's arrays: what it reads and what it writes; the same one if in place."""

    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class Want:
    """What ``target[begin:end]`` must be: ``values[(phase + i) % len(values)]``, within ``tolerance``."""

    begin: int
    end: int
    values: torch.Tensor  # float64, or int64
    tolerance: torch.Tensor
    phase: int


class Case:
    """One operation on one size and dtype, as one rank sees it.

    Every rank's input repeats a pattern that all ranks can compute, so each of them knows the right
    result without any of the contenders.
    """

    def __init__(
        self, op: str, dtype: str, num_bytes: int, rank: int, n: int, redop: str, root: int
    ) -> None:
        self.op, self.rank, self.n, self.redop, self.root = op, rank, n, redop, root
        self.kind = OPERATIONS[op]
        self.dtype_name = dtype
        self.dtype: torch.dtype = getattr(torch, dtype)
        count = max(1, num_bytes // self.dtype.itemsize)
        self.part = max(1, count // n)
        self.count = self.part * n if self.kind.parts else count
        self.num_bytes = self.count * self.dtype.itemsize
        self.input = _repeated(self._pattern(rank), self.count)

    @property
    def plan_bytes(self) -> int:
        """Bytes of the array that ``Communicator.explain`` asks for."""
        single = self.op in ("all_gather", "reduce_scatter", "gather", "scatter")
        return self.part * self.dtype.itemsize if single else self.num_bytes

    def buffers(self, empty: Callable[[int], torch.Tensor] | None = None) -> Buffers:
        """Fresh arrays from ``empty(count)``; the source holds the input."""
        make = empty or (lambda count: torch.empty(count, dtype=self.dtype))
        source = make(self.part if self.op in ("all_gather", "gather") else self.count)
        source.copy_(self.input[: source.numel()])
        if self.kind.in_place:
            return Buffers(source, source)
        target = make(self.part if self.op in ("reduce_scatter", "scatter") else self.count)
        return Buffers(source, target.zero_())

    def listed(self, target: torch.Tensor) -> list[torch.Tensor]:
        """The arrays of a coalesced call."""
        return list(target.tensor_split(LIST))

    def reset(self, buffers: Buffers, fill: float | None = None) -> None:
        """Gives an in-place operation its input back, or ``fill``."""
        if not self.kind.in_place:
            return
        if fill is None:
            buffers.source.copy_(self.input)
        else:
            buffers.source.fill_(fill)

    # -- verification --

    def count_wrong(self, target: torch.Tensor, codec: str = "none") -> tuple[int, float]:
        """Elements of this rank's result that are wrong, and its relative squared error."""
        wrong, squares, scale = 0, 0.0, 0.0
        for want in self._wanted(codec):
            period = want.values.numel()
            for begin in range(want.begin, want.end, period):
                end = min(begin + period, want.end)
                got = target[begin:end].to(want.values.dtype)
                first = (want.phase + begin - want.begin) % period
                index = torch.arange(first, first + end - begin).remainder_(period)
                values = want.values[index]
                error = (got - values).abs()
                wrong += int((~(error <= want.tolerance[index])).sum())  # a NaN is wrong, too
                squares += float(error.double().square().sum())
                scale += float(values.double().square().sum())
        return wrong, squares / max(scale, 1e-300)

    def _pattern(self, rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rank)
        period = min(PERIOD, self.count)
        if self.dtype.is_floating_point:
            return torch.randn(period, generator=generator).to(self.dtype)
        return torch.randint(0, 3, (period,), generator=generator).to(self.dtype)

    def _wanted(self, codec: str) -> Iterator[Want]:
        if self.op == "reduce" and self.rank != self.root:
            return
        if self.op == "gather" and self.rank != self.root:
            return
        if self.op == "send_recv" and self.rank > 1:
            return
        mine = self.rank * self.part
        if self.kind.reduces:
            values, tolerance = self._reduced(codec)
            length, phase = (self.part, mine) if self.kind.parts else (self.count, 0)
            yield Want(0, length, values, tolerance, phase)
        elif self.op in ("all_gather", "all_to_all", "gather"):
            for peer in range(self.n):
                values = _wide(self._pattern(peer))
                phase = mine if self.op == "all_to_all" else 0
                begin = peer * self.part
                yield Want(begin, begin + self.part, values, torch.zeros_like(values), phase)
        else:
            values = _wide(self._pattern(0 if self.op == "send_recv" else self.root))
            length, phase = (self.part, mine) if self.op == "scatter" else (self.count, 0)
            yield Want(0, length, values, torch.zeros_like(values), phase)

    def _reduced(self, codec: str) -> tuple[torch.Tensor, torch.Tensor]:
        """One period of the result, and how far off rounding may be."""
        inputs = torch.stack([_wide(self._pattern(rank)) for rank in range(self.n)])
        if self.redop in ("min", "max"):
            values = inputs.amin(0) if self.redop == "min" else inputs.amax(0)
            return values, torch.zeros_like(values)
        values = inputs.prod(0) if self.redop == "product" else inputs.sum(0)
        bound = values.abs() if self.redop == "product" else inputs.abs().sum(0)
        if self.redop == "avg":
            values = values / self.n if self.dtype.is_floating_point else values // self.n
        if not self.dtype.is_floating_point:
            return values, torch.zeros_like(values)
        tolerance = bound * (torch.finfo(self.dtype).eps * self.n)
        if codec != "none":
            spec = parse_codec(codec)
            steps = 2.0 if spec.rounding == "stochastic" else 1.0
            up, down = (steps * HALF_STEP[one] + SCALE_ROUNDING for one in _codec_names(codec))
            tolerance += inputs.abs().amax() * (up * self.n + down * self.n)
        return values, tolerance


def _codec_names(codec: str) -> tuple[str, str]:
    from ringcomm import _core

    names = {number: name for name, number in _core.CODECS.items()}
    spec = parse_codec(codec)
    return names[spec.up], names[spec.down]


def _repeated(pattern: torch.Tensor, count: int) -> torch.Tensor:
    times = -(-count // pattern.numel())
    return pattern.repeat(times)[:count].clone() if times > 1 else pattern.clone()


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float64 if values.dtype.is_floating_point else torch.int64)
