"""Real runs of two ranks: what they print, keep, and refuse to call right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import suite
from bench.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
FAST = ["--launch", "spawn", "-n", "2", "-w", "1", "--iters", "3"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMPI_")}
    command = [sys.executable, "-m", "bench.collectives", *FAST, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def rows_of(document: dict[str, Any], who: str) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row["who"] == who]


def test_a_run_measures_all_that_is_there_and_names_what_is_not(tmp_path: Path) -> None:
    out, picture = tmp_path / "results.json", tmp_path / "plot.png"
    flags = ["--sizes", "1K", "96K", "--op", "all_reduce", "all_gather", "--codec", "none", "int8"]
    peers = ["--peers", "gloo", "memcpy", "deepspeed", "tests.bench.absent"]
    done = bench(
        *flags, *peers, "--path", "comm", "dist", "--json", str(out), "--plot", str(picture)
    )
    assert done.returncode == 0, done.stderr

    document = json.loads(out.read_text())
    assert document["header"]["ranks"] == "2" and document["header"]["commit"]
    for who, codecs in (("ringcomm", {"none", "int8"}), ("gloo", {None}), ("memcpy", {None})):
        rows = rows_of(document, who)
        assert {row["size"] for row in rows} == {1 << 10, 96 << 10}
        assert {row["op"] for row in rows} == {"all_reduce", "all_gather"}
        assert {row["codec"] for row in rows} == codecs
        assert all(len(row["samples_us"]) == 3 for row in rows)
        for row in rows:
            assert abs(row["p50_us"] - sorted(row["samples_us"])[1]) < 0.01
    assert all(row["#wrong"] == 0 for row in document["rows"] if row["who"] != "memcpy")
    assert all(row["best"] is not None and row["to_best"] > 0 for row in document["rows"])
    assert all(row["#wrong"] is None for row in rows_of(document, "memcpy"))
    for who in ("symmetric", "dist", "deepspeed"):
        assert rows_of(document, who) or any(
            note.startswith(f"{who}: ") for note in document["notes"]
        )
    assert "tests.bench.absent: not measured: it is not installed, for a test" in document["notes"]
    assert "# tests.bench.absent: not measured" in done.stdout
    assert all(row["others"] is None or 0 <= row["others"] <= 100 for row in document["rows"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_element_on_one_rank_is_counted_and_fails_the_run(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    flags = ["--sizes", "1K", "64K", "--peers", "gloo", "tests.bench.liar", "--json", str(out)]
    done = bench(*flags)
    assert done.returncode != 0
    assert "2 elements are wrong" in done.stderr
    document = json.loads(out.read_text())
    assert [row["#wrong"] for row in rows_of(document, "liar")] == [1, 1]
    assert [row["#wrong"] for row in rows_of(document, "gloo")] == [0, 0]


@pytest.mark.parametrize("quick", [False, True])
def test_the_suite_has_every_operation_on_two_and_four_ranks(quick: bool) -> None:
    ops = set()
    for name, (module, *arguments) in suite(quick).items():
        if module != "bench.collectives":
            assert name == "codecs"
            continue
        args = parse_arguments(arguments)
        assert name.endswith(f"{args.n}ranks")
        ops |= {(op, args.n) for op in args.op}
    every = ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all")
    assert ops == {(op, n) for op in (*every, "gather", "scatter") for n in (2, 4)} | {
        ("send_recv", 2)
    }
