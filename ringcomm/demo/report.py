"""Makes the results readable: a table on the terminal, two pictures, one JSON file."""

import importlib
import importlib.metadata
import platform
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

from ringcomm._version import __version__
from ringcomm.demo.bars import Summary
from ringcomm.demo.configs import BACKEND, BASELINE, EXACT, WORLD_SIZE, Task
from ringcomm.demo.train import RunResult
from ringcomm.info import collect

__all__ = ["NOTES", "draw_curves", "draw_table", "environment", "print_table", "table_rows"]

HEADER = (
    "task",
    "run",
    "final metric",
    "to gloo",
    "bits/value",
    "comm ms/step",
    "x gloo",
    "step ms",
    "x gloo",
)

NOTES = (
    "gloo: plain DDP on Gloo, exact; backend: the same on init_process_group('ringcomm'). The others:",
    "ringcomm.attach(ddp_model, codec=...) on Gloo, no warm-up.",
    "Metric: accuracy on test images (mean of seeds), or loss on held-out text in nats/character.",
    "bits/value: counted from the bytes that ringcomm sent; computed where DDP reduces float32 itself.",
    "comm: time per step with a bucket under way, from hook call to completion, the same clock for",
    "all; of the rank that came later, so that waiting for it is not counted. step: time of a whole",
    "training step. Both are medians over steps (and means over seeds).",
    "The runs of a seed take turns of a few steps each, so that they meet the same machine.",
)

_COLORS = {
    BASELINE: "black",
    BACKEND: "tab:purple",
    "none": "tab:gray",
    "bf16": "tab:green",
    "int8": "tab:blue",
    "int4": "tab:orange",
    "int4/4": "tab:red",
}


def table_rows(task: Task, summaries: list[Summary]) -> list[tuple[str, ...]]:
    """Cells of one task's part of the table."""
    rows: list[tuple[str, ...]] = []
    for summary in summaries:
        if task.metric == "accuracy":
            metric, difference = f"{summary.metric:.2f} %", f"{summary.difference:+.2f} pt"
        else:
            metric, difference = f"{summary.metric:.4f}", f"{summary.difference:+.2f} %"
        exact = summary.config == BASELINE
        rows.append(
            (
                task.name,
                summary.config,
                metric,
                "" if exact else difference,
                f"{summary.bits_per_value:.2f}" + ("" if summary.bits_measured else " *"),
                f"{summary.comm_ms:.2f}",
                "" if exact else f"{summary.comm_ratio:.2f}",
                f"{summary.step_ms:.1f}",
                "" if exact else f"{summary.step_ratio:.2f}",
            )
        )
    return rows


def print_table(parts: list[list[tuple[str, ...]]]) -> None:
    """One table; a part per task. With rich if it can be imported, else plain."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain(parts)
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for idx, title in enumerate(HEADER):
        table.add_column(title, justify="left" if idx < 2 else "right", no_wrap=True)
    for part in parts:
        for row in part:
            table.add_row(*row)
        table.add_section()
    console = Console(highlight=False)
    # Not a terminal, or a narrow one: better long lines than lost columns.
    console.width = max(console.width, 110)
    console.print(table)


def _print_plain(parts: list[list[tuple[str, ...]]]) -> None:
    widths = [
        max(len(row[i]) for part in parts for row in (HEADER, *part)) for i in range(len(HEADER))
    ]
    for row in (HEADER, *(row for part in parts for row in (("",) * len(HEADER), *part))):
        cells = [
            cell.ljust(width) if idx < 2 else cell.rjust(width)
            for idx, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def environment() -> dict[str, Any]:
    """Versions and hardware, for the JSON file."""
    machine = collect()["machine"]
    packages = ("torch", "numpy", "scikit-learn")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ringcomm": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "machine": machine,
        "ranks": WORLD_SIZE,
        "threads_per_rank": 1,
    }


def draw_curves(
    path: Path, tasks: list[Task], runs: list[RunResult], summaries: dict[str, list[Summary]]
) -> None:
    """Per task: the training loss above, what the codecs change below."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        2,
        len(tasks),
        figsize=(6.6 * len(tasks), 7.2),
        height_ratios=(3, 2),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for column, task in enumerate(tasks):
        mine = [r for r in runs if r.task == task.name]
        top, bottom = axes[0][column], axes[1][column]
        for summary in summaries[task.name]:
            _draw_loss(top, task, summary, [r for r in mine if r.config == summary.config])
            if summary.config != BASELINE:
                _draw_difference(bottom, task, summary.config, mine)
        count = mine[0].num_parameters
        seeds = f"mean of {len(task.seeds)} seeds" if len(task.seeds) > 1 else "one seed"
        top.set_title(f"{task.title}, {count / 1e6:.2g} million parameters, {seeds}", fontsize=11)
        top.set_ylabel(f"training loss (mean of {task.smooth_steps} steps)")
        if task.metric == "accuracy":
            top.set_yscale("log")
        top.legend(
            title="test accuracy" if task.metric == "accuracy" else "held-out loss", fontsize=9
        )
        _finish_difference(bottom, task)
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_loss(axis: Any, task: Task, summary: Summary, runs: list[RunResult]) -> None:
    exact = summary.config == BASELINE
    metric = f"{summary.metric:.2f} %" if task.metric == "accuracy" else f"{summary.metric:.4f}"
    steps, losses = _smooth(_mean_curve(runs), task.smooth_steps)
    axis.plot(
        steps,
        losses,
        color=_COLORS[summary.config],
        # The exact curves lie on each other: a wide one below, a dashed one on top.
        linewidth={BASELINE: 1.2, "none": 4.0, BACKEND: 6.0}.get(summary.config, 1.4),
        alpha=0.4 if summary.config in EXACT else 1.0,
        linestyle="--" if exact else "-",
        zorder=3 if exact else 2,
        label=f"{metric}   {summary.config}, {summary.bits_per_value:.1f} bits",
    )


def _draw_difference(axis: Any, task: Task, config: str, runs: list[RunResult]) -> None:
    ours = [r for r in runs if r.config == config]
    exact = [r for r in runs if r.config == BASELINE]
    if task.metric == "accuracy":
        steps = [step for step, _ in exact[0].evaluations]
        values = [
            fmean(
                a.evaluations[i][1] - b.evaluations[i][1] for a, b in zip(ours, exact, strict=True)
            )
            for i in range(len(steps))
        ]
    else:
        steps, losses = _smooth(_mean_curve(ours), task.smooth_steps)
        _, exact_losses = _smooth(_mean_curve(exact), task.smooth_steps)
        values = [100 * (a / b - 1) for a, b in zip(losses, exact_losses, strict=True)]
    axis.plot(
        steps,
        values,
        color=_COLORS[config],
        linewidth=4.0 if config in EXACT else 1.4,
        alpha=0.4 if config in EXACT else 1.0,
        marker="o" if task.metric == "accuracy" else None,
        markersize=3.5,
    )


def _finish_difference(axis: Any, task: Task) -> None:
    limits = sorted(set(task.bars.difference.values()))
    for limit in limits:
        for sign in (-1, 1):
            axis.axhline(sign * limit, color="black", linewidth=0.8, linestyle=":")
        names = ", ".join(c for c, most in task.bars.difference.items() if most == limit)
        axis.annotate(
            f"bar at the end, {names}",
            (1.0, limit),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    axis.axhline(0.0, color="black", linewidth=0.8)
    unit = "test accuracy, points" if task.metric == "accuracy" else "training loss, %"
    axis.set_ylabel(f"difference to gloo:\n{unit}")
    axis.set_xlabel("step")
    drawn = max(abs(y) for line in axis.get_lines() for y in line.get_ydata())
    extent = min(1.2 * drawn, 4 * limits[-1])  # early differences may be large; the end matters
    axis.set_ylim(-extent, extent)


def draw_table(path: Path, parts: list[list[tuple[str, ...]]]) -> None:
    """The table as a picture, with its notes."""
    plt = _pyplot()
    rows = [row for part in parts for row in part]
    height = 0.27 * (len(rows) + 1) + 0.19 * (len(NOTES) + 2)
    figure = plt.figure(figsize=(10.5, height))
    table_share = 0.27 * (len(rows) + 1) / height
    axis = figure.add_axes((0.02, 1 - table_share - 0.02, 0.96, table_share))
    axis.axis("off")
    table = axis.table(
        cellText=rows,
        colLabels=HEADER,
        loc="center",
        bbox=[0, 0, 1, 1],
        colWidths=[0.09, 0.09, 0.14, 0.11, 0.12, 0.14, 0.09, 0.11, 0.09],
    )
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    first_of_part = {1 + sum(len(part) for part in parts[:i]) for i in range(len(parts))}
    for (row, column), cell in table.get_celld().items():
        cell.set_linewidth(0.8)
        cell.visible_edges = "T" if row in first_of_part else "B" if row == len(rows) else "open"
        cell.set_text_props(ha="left" if column < 2 else "right")
        if row == 0:
            cell.set_text_props(weight="bold", ha="left" if column < 2 else "right")
    figure.text(0.02, 0.02, "* computed\n" + "\n".join(NOTES), fontsize=8, va="bottom")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _pyplot() -> Any:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def _mean_curve(runs: list[RunResult]) -> list[float]:
    return [fmean(losses) for losses in zip(*(r.train_losses for r in runs), strict=True)]


def _smooth(losses: list[float], length: int) -> tuple[list[int], list[float]]:
    """Steps, and means over the up to ``length`` steps that end there."""
    steps = list(range(1, len(losses) + 1))
    return steps, [fmean(losses[max(0, step - length) : step]) for step in steps]
