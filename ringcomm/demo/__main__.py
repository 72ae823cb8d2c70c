"""``python -m ringcomm.demo``: trains two models on real data, through Gloo and through ringcomm.

Two ranks of this machine, started by torchrun. Prints a table, checks it against bars, and writes
demo.json, loss_curves.png and table.png. Exit status: 0 if all bars are kept, 1 if one is missed
or a rank fails, 2 if something is missing.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ringcomm.demo.configs import Task, plan
from ringcomm.demo.launch import launch

__all__ = ["main"]

_NEEDED = {
    "torch": "torch",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ringcomm.demo",
        description="Train on real data with two local ranks, through Gloo and through ringcomm.",
    )
    parser.add_argument("--quick", action="store_true", help="shorter runs, coarser bars")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_results"), help="folder for results (%(default)s)"
    )
    parser.add_argument(
        "--task", choices=[task.name for task in plan(False)], help="only this task"
    )
    options = parser.parse_args(argv)
    problem = _what_is_missing()
    if problem is not None:
        print(f"demo: {problem}", file=sys.stderr)
        return 2
    tasks = [task for task in plan(options.quick) if options.task in (None, task.name)]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"demo: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ringcomm-demo-") as folder:
        results_path = Path(folder) / "results.json"
        arguments = [f"--results={results_path}", *(f"--task={task.name}" for task in tasks)]
        status = launch("ringcomm.demo.worker", arguments + ["--quick"] * options.quick)
        if status:
            return status
        results: dict[str, Any] = json.loads(results_path.read_text())
    return _report(tasks, options.quick, options.out, results, time.perf_counter() - started)


def _what_is_missing() -> str | None:
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        return (
            f"needs {' and '.join(missing)}, not installed here: "
            f"{Path(sys.executable).name} -m pip install {' '.join(missing)}"
        )
    from ringcomm.demo.data import DataError, load_text

    try:
        load_text()
    except DataError as error:
        return str(error)
    return None


def _report(
    tasks: list[Task], quick: bool, out: Path, results: dict[str, Any], seconds: float
) -> int:
    from ringcomm.demo.bars import check, summarise
    from ringcomm.demo.report import (
        NOTES,
        draw_curves,
        draw_table,
        environment,
        print_table,
        table_rows,
    )
    from ringcomm.demo.train import RunResult

    runs = [RunResult(**fields) for fields in results["runs"]]
    of_task = {task.name: [r for r in runs if r.task == task.name] for task in tasks}
    summaries = {task.name: summarise(task, of_task[task.name]) for task in tasks}
    checks = [c for t in tasks for c in check(t, of_task[t.name], summaries[t.name])]
    parts = [table_rows(task, summaries[task.name]) for task in tasks]

    print_table(parts)
    print("* computed\n" + "\n".join(NOTES) + "\n")
    if quick:
        print("Short runs, so the bars on accuracy and loss are coarse; those on bytes are not.")
    for bar in checks:
        print(("ok    " if bar.kept else "MISS  ") + bar.text)

    record = {
        "quick": quick,
        "seconds": seconds,
        "environment": environment(),
        "data": results["data"],
        "tasks": [asdict(task) for task in tasks],
        "summaries": [asdict(s) for group in summaries.values() for s in group],
        "checks": [asdict(bar) for bar in checks],
        "notes": NOTES,
        "runs": results["runs"],
    }
    (out / "demo.json").write_text(json.dumps(record, indent=1))
    draw_curves(out / "loss_curves.png", tasks, runs, summaries)
    draw_table(out / "table.png", parts)
    print(f"\n{seconds:.0f} s; saved demo.json, loss_curves.png and table.png in {out}")

    missed = [bar.text for bar in checks if not bar.kept]
    if missed:
        print(
            f"demo: {len(missed)} of {len(checks)} bars missed: {'; '.join(missed)}",
            file=sys.stderr,
        )
        return 1
    print(f"all {len(checks)} bars kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
