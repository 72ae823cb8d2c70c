"""The one table that every benchmark prints, and the facts that stand above it."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Table", "facts", "to_json"]


def facts() -> dict[str, str]:
    """Hardware, versions and commit: what a figure means nothing without."""
    from ringcomm import __version__, _core

    found = {
        "ringcomm": __version__,
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "simd": _core.simd_level(),
        "python": platform.python_version(),
    }
    for package in ("torch", "numpy"):
        module = sys.modules.get(package)
        if module is not None:
            found[package] = str(module.__version__)
    return found


def _commit() -> str:
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def to_json(document: Any) -> str:
    """JSON with the outer levels on lines of their own, and a table's row on one."""
    if isinstance(document, list) and document and isinstance(document[0], dict):
        return "[\n" + ",\n".join(json.dumps(row) for row in document) + "\n]"
    if isinstance(document, dict):
        items = (f"{json.dumps(name)}: {to_json(value)}" for name, value in document.items())
        return "{\n" + ",\n".join(items) + "\n}"
    return json.dumps(document)


class Table:
    """Prints rows as they come, in fixed columns, and keeps them for JSON.

    Args:
        columns: (name, width, format) of each column; the format is one of ``format()``.
        header: Facts for the comment line.
        notes: What else a reader must know, such as what is missing and why; a line each.
        quiet: Keep rows, print nothing.
    """

    def __init__(
        self,
        columns: Sequence[tuple[str, int, str]],
        header: dict[str, str],
        notes: Sequence[str] = (),
        *,
        quiet: bool = False,
    ) -> None:
        self.columns = columns
        self.header = header
        self.notes: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self._quiet = quiet
        self._print("# " + " | ".join(f"{name} {value}" for name, value in header.items()))
        for line in notes:
            self.note(line)
        self._print("# " + " ".join(f"{name:>{width}}" for name, width, _ in columns)[2:])

    def note(self, line: str) -> None:
        """Prints a comment line, once however often it is said."""
        if line not in self.notes:
            self.notes.append(line)
            self._print(f"# {line}")

    def add(self, row: dict[str, Any]) -> None:
        """Prints the row; values that are no column (raw samples) only go to JSON."""
        self.rows.append(row)
        cells = []
        for name, width, spec in self.columns:
            value = row.get(name)
            text = "-" if value is None else format(value, spec)
            cells.append(f"{text:>{width}}")
        self._print(" ".join(cells))

    def document(self) -> dict[str, Any]:
        """Header, notes and rows, raw samples included."""
        return {"header": self.header, "notes": self.notes, "rows": self.rows}

    def write_json(self, path: str | Path) -> None:
        """Writes :meth:`document`, a row per line. Whoever is ended meanwhile leaves what was there before."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        part = Path(f"{path}.part")
        part.write_text(to_json(self.document()) + "\n")
        part.replace(path)

    def _print(self, line: str) -> None:
        if not self._quiet:
            print(line, flush=True)
