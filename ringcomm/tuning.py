"""Measured switch points between algorithms: the file that ``python -m ringcomm.tune`` leaves and
rank 0 of every group reads. What it says travels to the others while they meet, so all choose alike.

    {"format": 1, "ringcomm": "0.1.0", "machine": {"cpu": "...", "cores": 2},
     "one_shot_bytes": {"all_reduce": {"2": 32768, "4": 8192}, ..., "exchange": {...}}}

The largest call, in bytes per rank, that one_shot runs, by operation and world size. A world size
between two measured ones gets the limit of the larger; one above all gets the built-in limit.
``exchange`` stands for gather, scatter and all_to_all, in bytes that a rank hands to others.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ringcomm import _core, env
from ringcomm._version import __version__
from ringcomm.errors import SystemResourceError, UsageError
from ringcomm.machine import cpu_model, usable_cores

__all__ = ["FORMAT", "OPS", "Limits", "default_path", "limits_for", "machine", "parse", "save"]

FORMAT = 1

OPS: dict[str, tuple[str, ...]] = {
    **{op: (op,) for op in ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter")},
    "exchange": ("gather", "scatter", "all_to_all"),
}
"""Rows of the table, and the operations that each one is about."""

Limits = list[tuple[int, int]]
"""As the core takes them: (id of an operation, largest call of one_shot in bytes)."""

Table = dict[str, dict[int, int]]
"""Row, world size, bytes."""


def machine() -> dict[str, Any]:
    """What a table depends on, apart from ringcomm's version."""
    return {"cpu": cpu_model(), "cores": usable_cores()}


def default_path() -> Path:
    """Where this user's table of this machine and this version of ringcomm is kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if base else Path.home() / ".cache") / "ringcomm"
    identity = json.dumps([FORMAT, __version__, machine()], sort_keys=True)
    return folder / f"tuning-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"


def limits_for(world_size: int) -> Limits:
    """What the chosen file says about groups of ``world_size`` ranks; nothing without a file.

    ``RINGCOMM_TUNING`` chooses it: a path, or ``off``; default :func:`default_path`. Never raises: a
    file that cannot be used is a warning, and the built-in limits hold.
    """
    chosen = env.get("RINGCOMM_TUNING")
    if world_size == 1 or (chosen is not None and chosen.lower() == "off"):
        return []
    try:
        path = default_path() if chosen is None else Path(chosen)
        if chosen is None and not path.exists():
            return []
        try:
            table = parse(path.read_text())
        except ValueError as problem:  # UsageError, or not UTF-8
            raise UsageError(f"{path}: {problem}") from problem
    except (OSError, RuntimeError) as problem:  # RuntimeError: also where there is no home folder
        env.logger("TUNE").warning(
            "the tuning table cannot be used (%s); the built-in limits hold. Run `python -m ringcomm.tune`, or set "
            "RINGCOMM_TUNING=off",
            problem,
        )
        return []
    limits = []
    for row, by_size in table.items():
        sizes = [size for size in by_size if size >= world_size]
        if sizes:
            limits += [(_core.OPS[op], by_size[min(sizes)]) for op in OPS[row]]
    return sorted(limits)


def parse(text: str) -> Table:
    """The table of a file.

    Raises:
        UsageError: it is not one; the message says where and what was expected.
    """
    try:
        content = json.loads(text)
    except ValueError as problem:
        raise UsageError(f"not JSON: {problem}") from problem
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f'expected an object with "format": {FORMAT}')
    rows = content.get("one_shot_bytes")
    if not isinstance(rows, dict):
        raise UsageError('expected an object under "one_shot_bytes"')
    table: Table = {}
    for row, by_size in rows.items():
        if row not in OPS or not isinstance(by_size, dict):
            raise UsageError(f"row {row!r}: expected one of {', '.join(OPS)}, with an object")
        table[row] = {}
        for size, limit in by_size.items():
            if not (size.isdigit() and 2 <= int(size) <= _core.MAX_RANKS):
                raise UsageError(
                    f"row {row!r}: world size {size!r}, expected 2 to {_core.MAX_RANKS}"
                )
            if type(limit) is not int or not 0 <= limit <= _core.INLINE_BYTES:
                raise UsageError(
                    f"row {row!r}, {size} ranks: {limit!r}, expected 0 to {_core.INLINE_BYTES} bytes"
                )
            table[row][int(size)] = limit
        in_order = [table[row][size] for size in sorted(table[row])]
        if in_order != sorted(in_order, reverse=True):
            raise UsageError(f"row {row!r}: a limit grows with the world size: {in_order}")
    return table


def save(path: Path, table: Table) -> None:
    """Writes a table: all of it or nothing, one writer at a time.

    Raises:
        UsageError: the table breaks the rules of :func:`parse`.
        SystemResourceError: the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "ringcomm": __version__,
        "machine": machine(),
        "one_shot_bytes": {
            row: {str(size): limit for size, limit in sorted(by_size.items())}
            for row, by_size in table.items()
        },
    }
    text = json.dumps(content, indent=1) + "\n"
    parse(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
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
