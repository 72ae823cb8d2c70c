"""What a collective will do, before it does it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ringcomm import _core
from ringcomm.codecs import Codec
from ringcomm.errors import UsageError

__all__ = ["Plan", "choose", "encoded_wire_bytes", "largest", "one_shot_limit"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The algorithm that a call gets, and why. ``str(plan)`` is one line for people.

    Attributes:
        op: Name of the collective.
        num_bytes: Of the array, per rank; reduce_scatter and scatter: of what a rank gets.
        world_size: Ranks in the group.
        algo: ``one_shot``, ``two_shot``, ``ring``, ``staged`` or ``direct``. With uneven parts every
            rank of a gather, scatter or all_to_all decides by what it sends itself.
        codec: Canonical codec string.
        wire_bytes: What one rank hands to its peers, in bytes: the root in a broadcast or scatter,
            each other rank in a reduce or gather.
        reason: Why this algorithm.
    """

    op: str
    num_bytes: int
    world_size: int
    algo: str
    codec: str
    wire_bytes: int
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.op} of {self.num_bytes} bytes on {self.world_size} ranks: {self.algo}, codec {self.codec}, "
            f"{self.wire_bytes} bytes sent per rank ({self.reason})"
        )


def choose(
    op: str,
    num_bytes: int,
    world_size: int,
    codec: Codec,
    inline_bytes: int,
    limits: Sequence[tuple[int, int]] = (),
    symmetric: bool = False,
) -> Plan:
    """The plan of a call; a pure function, so it is the same on every rank.

    Args:
        op: Name of a collective.
        num_bytes: Bytes of the caller's array on one rank (reduce_scatter, scatter: of its output).
        codec: Of an all_reduce; counts ``num_bytes / 4`` float32 values.
        inline_bytes: What fits beside a flag.
        limits: Measured limits of one_shot, see :mod:`ringcomm.tuning`.
        symmetric: The array is in symmetric memory.

    Raises:
        UsageError: an unknown operation, or a negative size.
    """
    if op not in _core.OPS:
        raise UsageError(f"op must be one of {', '.join(_core.OPS)}, not {op!r}")
    if num_bytes < 0:
        raise UsageError(f"num_bytes is {num_bytes}, expected 0 or more")
    if world_size == 1:
        return Plan(op, num_bytes, 1, "copy", "none", 0, "a single rank has nobody to talk to")
    algo, reason, wire_bytes = _core.choose_algo(
        _core.OPS[op], num_bytes, world_size, not codec.exact, symmetric, inline_bytes, limits
    )
    if not codec.exact:
        wire_bytes = encoded_wire_bytes(codec, num_bytes, world_size)
    return Plan(op, num_bytes, world_size, algo, codec.spec, wire_bytes, reason)


def encoded_wire_bytes(codec: Codec, num_bytes: int, world_size: int) -> int:
    """What a rank hands to its peers in an all_reduce of ``num_bytes / 4`` values with a codec."""
    num_elems = num_bytes // 4
    both = codec.wire_bytes(num_elems) + codec.wire_bytes(num_elems, down=True)
    return -(-(world_size - 1) * both // world_size)


def one_shot_limit(
    op: str, world_size: int, inline_bytes: int, limits: Sequence[tuple[int, int]] = ()
) -> int:
    """The largest call, in bytes per rank, that ``one_shot`` runs; -1 if it runs none."""

    def fits(num_bytes: int) -> bool:
        plan = _core.choose_algo(
            _core.OPS[op], num_bytes, world_size, False, False, inline_bytes, list(limits)
        )
        return plan[0] == "one_shot"

    return largest(fits, 2 * inline_bytes)


def largest(fits: Callable[[int], bool], below: int) -> int:
    """The largest number below ``below`` that fits, as all smaller ones do; -1 if none does."""
    low, high = -1, below  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
