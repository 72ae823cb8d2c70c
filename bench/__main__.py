"""Runs every benchmark: ``python -m bench [--quick] [--out DIR] [--plots DIR]``.

Writes one file, ``<date>-<cores>core-<processor>.json``, with the header, the notes, the rows and the raw
samples of every run in it, and the plots of the all_reduce and of the other collectives. The full set
takes about ten minutes on two cores and writes into bench/results and docs; ``--quick`` takes about two
and writes into build/bench.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.plot import draw
from bench.table import facts, to_json

ROOT = Path(__file__).parents[1]
OTHERS = ("reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")
PLOTTED = ("broadcast", "all_gather", "reduce_scatter", "all_to_all")


def suite(quick: bool) -> dict[str, list[str]]:
    """Name of a run -> module and arguments."""
    runs = {}
    every = ["--sizes", "1K", "64K", "4M"] if quick else ["-b", "256", "-e", "64M", "-f", "4"]
    few = ["--sizes", "4K", "1M"] if quick else ["--sizes", "4K", "1M", "64M"]
    seconds = ["--seconds", "0.3"] if quick else ["--seconds", "1.5", "--tries", "2"]
    for n in (2, 4):
        command = ["bench.collectives", "-n", str(n), *seconds]
        paths = ["--path", "comm", "dist"]
        runs[f"all_reduce-{n}ranks"] = [*command, *every, "--dtype", "float32", "bfloat16"]
        runs[f"others-{n}ranks"] = [*command, *few, "--op", *OTHERS]
        wire = [*paths, "--codec", "none", "int8", "int4", "--peers", "gloo", "memcpy"]
        runs[f"codecs-{n}ranks"] = [*command, *every, *wire]
        if not quick:
            dtypes = ["--dtype", "float64", "float16", "int32"]
            runs[f"dtypes-{n}ranks"] = [*command, *few, *dtypes]
        rows = ["--sizes", "1K"] if quick else ["--sizes", "256", "1K", "4K", "16K", "64K"]
        runs[f"back-to-back-{n}ranks"] = [*command, *rows, "--back-to-back", "100", *paths]
    runs["send_recv-2ranks"] = ["bench.collectives", "-n", "2", *seconds, *few, "--op", "send_recv"]
    runs["codecs"] = ["bench.codecs", "--rounds", "3" if quick else "9"]
    return runs


def machine() -> str:
    """``2core-amd-epyc``: what a result is named after."""
    about = facts()
    name = re.sub(r"[^a-z0-9]+", "-", about["cpu"].lower()).strip("-")
    return f"{about['cores']}core-{name}"


def plot(runs: dict[str, Any], folder: Path) -> None:
    for name, document in runs.items():
        if name.startswith("all_reduce"):
            draw(document, folder / f"bench-{name}.png")
        elif name.startswith("others"):
            rows = [row for row in document["rows"] if row["op"] in PLOTTED]
            draw({**document, "rows": rows}, folder / f"bench-{name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="fewer sizes, dtypes and samples")
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--plots", type=Path, help="folder of the plots")
    args = parser.parse_args()
    scratch = ROOT / "build" / "bench"
    out = args.out or (scratch if args.quick else ROOT / "bench" / "results")
    plots = args.plots or (scratch if args.quick else ROOT / "docs")
    path = out / f"{datetime.date.today():%Y-%m-%d}-{machine()}.json"

    runs: dict[str, Any] = {}
    failed = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ringcomm-bench-") as folder:
        for name, command in suite(args.quick).items():
            print(f"\n== {name}: python -m {' '.join(command)}", flush=True)
            result = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", *command, "--json", str(result)]
            if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
                failed.append(name)
            if result.exists():
                runs[name] = json.loads(result.read_text())
    minutes = (time.monotonic() - start) / 60
    header = {**facts(), "minutes": f"{minutes:.1f}", "quick": str(args.quick)}
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json({"header": header, "runs": runs}) + "\n")
    print(f"\n{minutes:.1f} minutes; wrote {path}")
    plot(runs, plots)
    print(f"wrote the plots into {plots}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
