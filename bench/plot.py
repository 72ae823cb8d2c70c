"""Draws a table of bench.collectives: ``python -m bench.plot RESULTS.json OUT.png [--run NAME]``.

One column of panels per operation and dtype: above time against size, both logarithmic; below the
same as a share of the fastest peer's time. Colours are Okabe and Ito's, which colour-blind people tell
apart; every line has a marker of its own, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["draw"]

# who (and codec) -> label, colour, marker. Ringcomm's lines are solid, peers' dashed, the copy dotted.
STYLES = {
    "ringcomm": ("ringcomm", "#D55E00", "o", "-"),
    "ringcomm int8": ("ringcomm int8", "#E69F00", "s", "-"),
    "ringcomm int4": ("ringcomm int4", "#F0E442", "D", "-"),
    "symmetric": ("ringcomm, comm.empty", "#CC79A7", "P", "-"),
    "dist": ("ringcomm, torch.distributed", "#8B4513", "X", "-"),
    "gloo": ("Gloo", "#0072B2", "^", "--"),
    "openmpi": ("Open MPI", "#009E73", "v", "--"),
    "deepspeed": ("DeepSpeed shm", "#56B4E9", "<", "--"),
    "memcpy": ("memory copy", "#555555", ".", ":"),
}
OTHER = ("#000000", "x", "-.")
INCHES_PER_LABEL = 2.1


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes the picture; its format is that of the suffix.

    Args:
        document: As :meth:`bench.table.Table.document`.

    Raises:
        ValueError: no rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(document["rows"])
    if not panels:
        raise ValueError("there is nothing to draw: the table has no rows")
    width = max(6.4, 4.4 * len(panels))
    figure, axes = pyplot.subplots(
        2,
        len(panels),
        figsize=(width, 7.2),
        sharex="col",
        sharey="row",
        squeeze=False,
        height_ratios=(3, 2),
        layout="constrained",
    )
    legend: dict[str, Any] = {}
    for column, (title, lines) in enumerate(panels.items()):
        upper, lower = axes[0][column], axes[1][column]
        for who, points in lines.items():
            label, colour, marker, dash = STYLES.get(who, (who, *OTHER))
            look = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 5}
            at = [row["size"] for row in points]
            (legend[label],) = upper.plot(at, [row["p50_us"] for row in points], **look)
            ratios = [(row["size"], row["to_best"]) for row in points if row["to_best"]]
            if who != "memcpy" and ratios:
                lower.plot(*zip(*ratios, strict=True), **look)
        sizes = sorted({row["size"] for points in lines.values() for row in points})
        _dress(upper, lower, title, sizes, first=column == 0)
    order = [style[0] for style in STYLES.values()]
    known = sorted(legend, key=lambda label: order.index(label) if label in order else len(order))
    handles = [legend[label] for label in known]
    columns = max(1, min(len(known), int(width / INCHES_PER_LABEL)))
    figure.legend(handles, known, loc="outside lower center", ncols=columns, fontsize=9)
    header = document["header"]
    figure.suptitle(
        f"{header['ranks']} ranks on {header['cores']} cores of {header['cpu']}", fontsize=11
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panels(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Title of a panel -> who -> rows by size."""
    panels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: row["size"]):
        encoded = row["codec"] not in (None, "none")
        who = f"{row['who']} {row['codec']}" if encoded else row["who"]
        panels.setdefault(f"{row['op']}, {row['type']}", {}).setdefault(who, []).append(row)
    return panels


def _dress(upper: Any, lower: Any, title: str, sizes: list[int], *, first: bool) -> None:
    upper.set_title(title, fontsize=11)
    ticks = sizes if len(sizes) <= 5 else sizes[:: -(-len(sizes) // 5)]
    for axis in (upper, lower):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
        axis.set_xticks(ticks, [_size(size) for size in ticks])
        axis.yaxis.set_major_formatter(lambda value, _position: f"{value:,g}")
    lower.axhline(1.0, color="#555555", linewidth=1)
    lower.set_xlabel("size")
    if first:
        upper.set_ylabel("time of the slowest rank, µs (median)")
        lower.set_ylabel("share of the fastest\npeer's time")


def _size(num_bytes: float) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:g} {name}"
    return f"{num_bytes:g} B"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", help="of a file that `python -m bench` wrote: which of its runs")
    args = parser.parse_args()
    document = json.loads(args.results.read_text())
    if "runs" in document:
        if args.run not in document["runs"]:
            parser.error(f"--run must be one of {', '.join(document['runs'])}")
        document = document["runs"][args.run]
    draw(document, args.out)


if __name__ == "__main__":
    main()
