"""What callers pass to a collective, in the form in which the core takes it.

Everything here answers for one rank, sends nothing, and raises
:class:`~ringcomm.errors.UsageError` with what to pass instead.
"""

import operator
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from ringcomm import _core
from ringcomm.arrays import ArrayView, contiguous_copy, copy_back, view
from ringcomm.errors import UsageError

__all__ = [
    "PREMUL_SUM",
    "Parts",
    "equal_parts",
    "group_name",
    "in_place",
    "is_list",
    "lookup",
    "output",
    "parts_to_receive",
    "parts_to_send",
    "premul_factor",
    "readable",
    "residual_view",
    "row_counts",
    "seconds",
    "whole_number",
]

_FLOAT32: int = _core.DTYPES["float32"]
_MAX_NAME_BYTES = 64
PREMUL_SUM = "premul_sum"
"""The operator that has a factor."""


def lookup(name: str | None, table: dict[Any, int], what: str) -> int:
    """The code of ``name`` in ``table``."""
    value = table.get(name)
    if value is None:
        known = ", ".join(repr(key) for key in table)
        raise UsageError(f"{what} must be one of {known}, not {name!r}")
    return value


def premul_factor(op: str, factor: Any) -> float:
    """The factor of ``op``, 1 for those that have none."""
    if op != PREMUL_SUM:
        if factor is not None:
            raise UsageError(f"factor belongs to op='{PREMUL_SUM}', op is {op!r}")
        return 1.0
    if factor is None:
        raise UsageError(f"op='{PREMUL_SUM}' needs factor, the number that x is multiplied by")
    try:
        if hasattr(factor, "__float__"):  # not a string
            return float(factor)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # an array with several elements
        pass
    raise UsageError(f"factor must be a real number, not {factor!r}")


def seconds(timeout: float | timedelta) -> float:
    """A deadline in seconds."""
    number = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if not 0 < number < 1e9:
        raise UsageError(f"timeout must be a positive number of seconds, not {timeout}")
    return number


def group_name(name: str) -> str:
    """``name``, if it is short enough for errors and segments."""
    num_bytes = len(name.encode())
    if num_bytes > _MAX_NAME_BYTES:
        raise UsageError(f"name has {num_bytes} bytes, at most {_MAX_NAME_BYTES} are allowed")
    return name


def whole_number(value: Any, what: str) -> int:
    """``value`` as an int that fits into 64 bits."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{what} must be a whole number, not {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise UsageError(f"{what} must fit into 64 bits, {number} does not")
    return number


# ---- one array -----------------------------------------------------------------------------------


def in_place(x: Any, writable: bool = True) -> tuple[ArrayView, Callable[[], None] | None]:
    """The memory to work on, and what copies the result back into ``x`` (None: it is ``x``)."""
    target = view(x, writable=writable)
    if target.contiguous:
        return target, None
    copy = contiguous_copy(x)
    return view(copy, writable=True), (lambda: copy_back(copy, x)) if writable else None


def readable(x: Any, role: str = "x") -> ArrayView:
    """Contiguous memory with the values of ``x``: its own, or a copy."""
    source = view(x, writable=False, role=role)
    if source.contiguous:
        return source
    return view(contiguous_copy(x), writable=False)._replace(shape=source.shape)


def output(
    out: Any, source: ArrayView | None = None, num_elems: int | None = None, role: str = "out"
) -> ArrayView:
    """The memory of ``out``, which must be contiguous, of the dtype of ``source`` and that long."""
    target = view(out, writable=True, role=role)
    if not target.contiguous:
        raise UsageError(f"{role}: must be contiguous")
    if source is not None and target.dtype != source.dtype:
        raise UsageError(f"{role}: dtype {target.dtype_name}, expected {source.dtype_name} like x")
    if num_elems is not None and target.num_elems != num_elems:
        raise UsageError(f"{role}: {target.num_elems} elements, expected {num_elems}")
    return target


def residual_view(residual: Any, num_elems: int, role: str) -> ArrayView | None:
    """The memory of a residual, None for None."""
    if residual is None:
        return None
    target = view(residual, writable=True, role=role)
    if target.dtype != _FLOAT32 or not target.contiguous or target.num_elems != num_elems:
        raise UsageError(
            f"{role}: {target.num_elems} elements of {target.dtype_name}, expected a contiguous float32 array of "
            f"{num_elems} elements, as many as x has"
        )
    return target


# ---- one part per rank ---------------------------------------------------------------------------


class Parts(NamedTuple):
    """What goes to, or comes from, each rank."""

    spans: list[tuple[int, int]]
    """By rank: address and number of elements."""
    views: list[ArrayView]
    """The array that is cut into parts, or one array per rank. Keeps the memory alive."""

    @property
    def num_elems(self) -> int:
        """Of all parts together."""
        return sum(count for _, count in self.spans)


def is_list(x: Any) -> bool:
    """Whether ``x`` is a list of arrays, one per rank, and not one array."""
    return isinstance(x, (list, tuple))


def equal_parts(array: ArrayView, world_size: int, role: str = "x") -> int:
    """How many rows (elements of the first dimension) each of ``world_size`` ranks gets."""
    if not array.shape or array.shape[0] % world_size:
        raise UsageError(
            f"{role}: shape {tuple(array.shape)} cannot be split into {world_size} equal parts; the first "
            "dimension must be a multiple of the world size (pad it)"
        )
    return array.shape[0] // world_size


def parts_to_send(x: Any, world_size: int, counts: Sequence[int] | None = None) -> Parts:
    """Cuts ``x`` along its first dimension, into ``counts`` rows or evenly; or takes a list of arrays."""
    if not is_list(x):
        source = readable(x)
        if counts is not None:
            return Parts(_cut(source, counts, world_size, "x", "send_counts"), [source])
        equal_parts(source, world_size)
        return Parts(_evenly(source, world_size), [source])
    _refuse_counts(counts, "x", "send_counts")
    views = _views(x, world_size, "x", readable)
    for rank, one in enumerate(views):
        if one.dtype != views[0].dtype:
            raise UsageError(
                f"x[{rank}]: dtype {one.dtype_name}, expected {views[0].dtype_name} like x[0]"
            )
    return Parts([(one.ptr, one.num_elems) for one in views], views)


def parts_to_receive(
    out: Any, source: ArrayView, world_size: int, counts: Sequence[int] | None = None
) -> Parts:
    """Where what comes from each rank goes: parts of one array (of equally many elements, or of
    ``counts`` rows), or a list of arrays. All are contiguous and of the dtype of ``source``."""
    if is_list(out):
        _refuse_counts(counts, "out", "receive_counts")
        views = _views(out, world_size, "out", lambda one, role: output(one, source, role=role))
        return Parts([(one.ptr, one.num_elems) for one in views], views)
    target = output(out, source)
    if counts is not None:
        return Parts(_cut(target, counts, world_size, "out", "receive_counts"), [target])
    if target.num_elems % world_size:
        raise UsageError(
            f"out: {target.num_elems} elements, which is no multiple of the world size {world_size}; pass "
            "receive_counts, or a list of arrays"
        )
    return Parts(_evenly(target, world_size), [target])


def _evenly(array: ArrayView, world_size: int) -> list[tuple[int, int]]:
    part, part_bytes = array.num_elems // world_size, array.num_bytes // world_size
    return [(array.ptr + rank * part_bytes, part) for rank in range(world_size)]


def row_counts(counts: Sequence[int], world_size: int, role: str) -> list[int]:
    """How many rows each rank sends or gets."""
    rows = [whole_number(count, role) for count in counts]
    if len(rows) != world_size or min(rows) < 0:
        raise UsageError(f"{role}: {rows}, expected {world_size} counts of 0 or more")
    return rows


def _cut(
    array: ArrayView, counts: Sequence[int], world_size: int, role: str, counts_role: str
) -> list[tuple[int, int]]:
    rows = row_counts(counts, world_size, counts_role)
    if not array.shape or sum(rows) != array.shape[0]:
        raise UsageError(
            f"{counts_role}: {rows} adds up to {sum(rows)}, expected the first dimension of {role}, which has "
            f"shape {tuple(array.shape)}"
        )
    row_elems = array.num_elems // array.shape[0] if array.shape[0] else 0
    row_bytes = array.num_bytes // array.shape[0] if array.shape[0] else 0
    spans, begin = [], 0
    for count in rows:
        spans.append((array.ptr + begin * row_bytes, count * row_elems))
        begin += count
    return spans


def _views(
    arrays: Sequence[Any], world_size: int, role: str, look: Callable[[Any, str], ArrayView]
) -> list[ArrayView]:
    if len(arrays) != world_size:
        raise UsageError(f"{role}: a list of {len(arrays)}, expected {world_size}, one per rank")
    return [look(one, f"{role}[{rank}]") for rank, one in enumerate(arrays)]


def _refuse_counts(counts: Sequence[int] | None, role: str, counts_role: str) -> None:
    if counts is not None:
        raise UsageError(
            f"{counts_role}: only for one array; {role} is a list, whose arrays have lengths"
        )
