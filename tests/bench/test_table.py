"""The table that benchmarks print, and what they keep of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.table import Table, facts

COLUMNS = (("size", 6, "d"), ("who", 5, "s"), ("p50_us", 7, ".1f"))


def test_prints_header_reasons_and_aligned_rows(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(COLUMNS, {"cpu": "a", "ranks": "2"}, ["mpi: not measured: not there"])
    table.add({"size": 256, "who": "us", "p50_us": 1.26, "samples_us": [1, 2]})
    table.add({"size": 256, "who": "them", "p50_us": None})
    assert capsys.readouterr().out.splitlines() == [
        "# cpu a | ranks 2",
        "# mpi: not measured: not there",
        "# size   who  p50_us",
        "   256    us     1.3",
        "   256  them       -",
    ]


def test_a_reason_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(COLUMNS, {})
    table.note("no row for this")
    table.note("no row for this")
    assert capsys.readouterr().out.count("no row for this") == 1
    assert table.notes == ["no row for this"]


def test_json_keeps_header_notes_and_raw_samples(tmp_path: Path) -> None:
    table = Table(COLUMNS, {"ranks": "2"}, ["gone"], quiet=True)
    row = {"size": 256, "who": "us", "p50_us": 1.26, "samples_us": [1.0, 2.0]}
    table.add(row)
    path = tmp_path / "new" / "results.json"
    table.write_json(path)
    assert json.loads(path.read_text()) == {
        "header": {"ranks": "2"},
        "notes": ["gone"],
        "rows": [row],
    }
    assert json.dumps(row) in path.read_text().splitlines()


def test_facts_name_hardware_versions_and_commit() -> None:
    assert {"ringcomm", "commit", "cpu", "cores", "simd", "python", "torch"} <= set(facts())
