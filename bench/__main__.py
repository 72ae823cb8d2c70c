"""Runs every benchmark and keeps the raw figures: ``python -m bench [--quick] [--out DIR]``.

Writes ``DIR/<date>-<cores>core-<name>.json`` (default ``bench/results``).
"""

import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and ranks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today():%Y-%m-%d}-{len(os.sched_getaffinity(0))}core"
    ranks = (2,) if args.quick else (2, 4)
    runs = {
        f"collectives-{n}ranks": [
            "bench.collectives",
            "-n",
            str(n),
            "--codec",
            "none",
            "int8",
            "int4",
        ]
        + (["-f", "64"] if args.quick else [])
        for n in ranks
    }
    runs["codecs"] = ["bench.codecs"]
    for name, command in runs.items():
        path = args.out / f"{stem}-{name}.json"
        print(f"\n== {' '.join(command)} -> {path}", flush=True)
        subprocess.run([sys.executable, "-m", *command, "--json", str(path)], check=True)


if __name__ == "__main__":
    main()
