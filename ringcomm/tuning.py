"""Measured switch points between algorithms: the file that ``python -m ringcomm.tune`` leaves and
rank 0 of every group reads. What it says travels to the others while they meet, so all choose alike.

    {"format": 1, "ringcomm": "0.1.0", "machine": {"cpu": "...", "cores": 2},
     "one_shot_bytes": {"all_reduce": {"2": 32768, "4": 8192}, ..., "exchange": {...}},
     "gpus": [{"gpu": "NVIDIA H200", "link": "NVLink", "mode": "in_kernel",
               "bytes": {"all_reduce": {"2": 262144}, "broadcast": {"4": 1048576}}}]}

``one_shot_bytes`` is about arrays of the CPU: the largest call, in bytes per rank, that one_shot runs, by
operation and world size. ``exchange`` stands for gather, scatter and all_to_all, in bytes that a rank hands
to others. ``gpus`` is about arrays on GPUs, by what their speed depends on: the largest all_reduce that
one_shot runs, and the largest broadcast that is staged; larger ones go around a ring. A world size between
two measured ones gets the limit of the larger; one above all gets the built-in limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ringcomm import _core, env
from ringcomm._version import __version__
from ringcomm.errors import SystemResourceError, UsageError
from ringcomm.machine import cpu_model, usable_cores

__all__ = [
    "DEVICE_OPS",
    "FORMAT",
    "OPS",
    "Gpus",
    "Limits",
    "Table",
    "default_path",
    "device_limits_for",
    "gpus_of",
    "limits_for",
    "machine",
    "parse",
    "parse_gpus",
    "save",
]

FORMAT = 1

OPS: dict[str, tuple[str, ...]] = {
    **{op: (op,) for op in ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter")},
    "exchange": ("gather", "scatter", "all_to_all"),
}
"""Rows of the CPU's table, and the operations that each one is about."""

DEVICE_OPS: dict[str, tuple[str, ...]] = {
    "all_reduce": ("all_reduce",),
    "broadcast": ("broadcast",),
}
"""The same of a table of GPUs."""

Limits = list[tuple[int, int]]
"""As the core takes them: (id of an operation, largest call of its first algorithm in bytes)."""

Table = dict[str, dict[int, int]]
"""Row, world size, bytes."""

_LINKS = ("same", "NVLink", "PCIe", "none")  # fastest first
_MOST_DEVICE_BYTES = 2**40
T = TypeVar("T")


class Gpus(NamedTuple):
    """What the speed of a group of GPUs depends on, apart from their number.

    Attributes:
        gpu: Their name; of several kinds, all names in order with ``" + "`` between.
        link: The slowest between any two, as ``python -m ringcomm.info`` names it; ``same``: they share one GPU.
        mode: How collectives run, see :attr:`ringcomm.Communicator.device_mode`.
    """

    gpu: str
    link: str
    mode: str


def gpus_of(ordinals: Sequence[int], mode: str) -> Gpus:
    """What a group is whose ranks work on these GPUs of this process, by rank."""
    devices = _core.cuda_probe().devices
    used = sorted({*ordinals})
    links = [_core.link_between(a, b)[0] for a in used for b in used if a != b]
    names = sorted({devices[ordinal].name for ordinal in used})
    return Gpus(" + ".join(names), max(["same", *links], key=_LINKS.index), mode)


def machine() -> dict[str, Any]:
    """What the CPU's table depends on, apart from ringcomm's version."""
    return {"cpu": cpu_model(), "cores": usable_cores()}


def default_path(*, gpus: bool = False) -> Path:
    """Where this user's table of this machine and this version of ringcomm is kept; ``gpus``: that of all GPUs."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if base else Path.home() / ".cache") / "ringcomm"
    about = "gpus" if gpus else machine()  # how many cores a rank has does not matter to its GPU
    identity = json.dumps([FORMAT, __version__, about], sort_keys=True)
    return folder / f"tuning-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"


def limits_for(world_size: int) -> Limits:
    """What the chosen file says about groups of ``world_size`` ranks on the CPU; nothing without a file.

    ``RINGCOMM_TUNING`` chooses it: a path, or ``off``; default :func:`default_path`. Never raises: a
    file that cannot be used is a warning, and the built-in limits hold.
    """
    table = _read(world_size, default_path, parse)
    return _limits(table or {}, OPS, world_size)


def device_limits_for(gpus: Callable[[], Gpus], world_size: int) -> Limits:
    """What the chosen file says about groups of ``world_size`` such GPUs; as :func:`limits_for`.

    Args:
        gpus: Asked only if there is a file.
    """
    tables = _read(world_size, lambda: default_path(gpus=True), parse_gpus)
    return _limits(tables.get(gpus(), {}), DEVICE_OPS, world_size) if tables else []


def _read(world_size: int, default: Callable[[], Path], parsed: Callable[[str], T]) -> T | None:
    chosen = env.get("RINGCOMM_TUNING")
    if world_size == 1 or (chosen is not None and chosen.lower() == "off"):
        return None
    try:
        path = default() if chosen is None else Path(chosen)
        if chosen is None and not path.exists():
            return None
        try:
            return parsed(path.read_text())
        except ValueError as problem:  # UsageError, or not UTF-8
            raise UsageError(f"{path}: {problem}") from problem
    except (OSError, RuntimeError) as problem:  # RuntimeError: also where there is no home folder
        env.logger("TUNE").warning(
            "the tuning table cannot be used (%s); the built-in limits hold. Run `python -m ringcomm.tune`, or set "
            "RINGCOMM_TUNING=off",
            problem,
        )
        return None


def _limits(table: Table, ops: dict[str, tuple[str, ...]], world_size: int) -> Limits:
    limits = []
    for row, by_size in table.items():
        sizes = [size for size in by_size if size >= world_size]
        if sizes:
            limits += [(_core.OPS[op], by_size[min(sizes)]) for op in ops[row]]
    return sorted(limits)


def parse(text: str) -> Table:
    """The CPU's table of a file.

    Raises:
        UsageError: it is not one; the message says where and what was expected.
    """
    rows = _content(text).get("one_shot_bytes")
    if not isinstance(rows, dict):
        raise UsageError('expected an object under "one_shot_bytes"')
    return _table(rows, OPS, _core.INLINE_BYTES)


def parse_gpus(text: str) -> dict[Gpus, Table]:
    """The tables of GPUs of a file; none if it has only the CPU's.

    Raises:
        UsageError: as :func:`parse`.
    """
    entries = _content(text).get("gpus", [])
    if not isinstance(entries, list):
        raise UsageError('expected a list under "gpus"')
    tables: dict[Gpus, Table] = {}
    for number, entry in enumerate(entries):
        try:
            gpus = Gpus(*(entry[field] for field in Gpus._fields))
            rows = entry["bytes"]
        except (TypeError, KeyError) as problem:
            raise UsageError(f'entry {number} of "gpus": it has no {problem}') from problem
        if not all(isinstance(field, str) for field in gpus) or not isinstance(rows, dict):
            raise UsageError(
                f'entry {number} of "gpus": expected text for {", ".join(Gpus._fields)}, and an object for bytes'
            )
        tables[gpus] = _table(rows, DEVICE_OPS, _MOST_DEVICE_BYTES)
    return tables


def _content(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as problem:
        raise UsageError(f"not JSON: {problem}") from problem
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f'expected an object with "format": {FORMAT}')
    return content


def _table(rows: dict[str, Any], ops: dict[str, tuple[str, ...]], most: int) -> Table:
    table: Table = {}
    for row, by_size in rows.items():
        if row not in ops or not isinstance(by_size, dict):
            raise UsageError(f"row {row!r}: expected one of {', '.join(ops)}, with an object")
        table[row] = {}
        for size, limit in by_size.items():
            if not (size.isdigit() and 2 <= int(size) <= _core.MAX_RANKS):
                raise UsageError(
                    f"row {row!r}: world size {size!r}, expected 2 to {_core.MAX_RANKS}"
                )
            if type(limit) is not int or not 0 <= limit <= most:
                raise UsageError(
                    f"row {row!r}, {size} ranks: {limit!r}, expected 0 to {most} bytes"
                )
            table[row][int(size)] = limit
        in_order = [table[row][size] for size in sorted(table[row])]
        if in_order != sorted(in_order, reverse=True):
            raise UsageError(f"row {row!r}: a limit grows with the world size: {in_order}")
    return table


def save(path: Path, table: Table | None = None, gpus: dict[Gpus, Table] | None = None) -> None:
    """Writes a table of the CPU, tables of GPUs, or both: all of it or nothing, one writer at a time.

    What the file says about the CPU, or about other GPUs, stays if it is not given.

    Raises:
        UsageError: the table breaks the rules of :func:`parse`.
        SystemResourceError: the file cannot be written.
    """
    parse(_text(table or {}, gpus or {}))
    parse_gpus(_text(table or {}, gpus or {}))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before, of_gpus = _there_already(path)
            text = _text(before if table is None else table, of_gpus | (gpus or {}))
            number, unfinished = tempfile.mkstemp(dir=path.parent, prefix=path.name)
            try:
                with os.fdopen(number, "w") as file:
                    file.write(text)
                os.replace(unfinished, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished)
                raise
    except OSError as error:
        raise SystemResourceError(f"cannot write the tuning table {path}: {error}") from error


def _there_already(path: Path) -> tuple[Table, dict[Gpus, Table]]:
    try:
        text = path.read_text()
        return parse(text), parse_gpus(text)
    except (FileNotFoundError, ValueError):  # what cannot be used is not kept
        return {}, {}


def _text(table: Table, gpus: dict[Gpus, Table]) -> str:
    def sorted_rows(rows: Table) -> dict[str, dict[str, int]]:
        return {
            row: {str(size): limit for size, limit in sorted(by_size.items())}
            for row, by_size in rows.items()
        }

    content = {
        "format": FORMAT,
        "ringcomm": __version__,
        "machine": machine(),
        "one_shot_bytes": sorted_rows(table),
        "gpus": [
            one._asdict() | {"bytes": sorted_rows(rows)} for one, rows in sorted(gpus.items())
        ],
    }
    return json.dumps(content, indent=1) + "\n"
