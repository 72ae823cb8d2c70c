"""Measured limits: one table for all ranks, rank 0's; what a file may say; the command that writes it."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, _core, env, tune, tuning
from ringcomm.errors import SystemResourceError, UsageError
from tests.worlds import ROOT, Worlds, environment

ROWS = ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "exchange")


def write(path: Path, **rows: dict[int, int]) -> Path:
    tuning.save(path, rows)
    return path


def split_with(comm: Communicator, table: str) -> Communicator:
    with environment(RINGCOMM_TUNING=table):
        other = comm.split(0)
    assert other is not None
    return other


# ---- in a group ----------------------------------------------------------------------------------


def explain_and_run(comm: Communicator, tables: list[str]) -> list[str]:
    """What calls would do according to explain(), after they did just that."""
    n, others = comm.world_size, comm.world_size - 1
    lines = []
    with split_with(comm, tables[comm.rank]) as tuned:
        for size in (400, 4000, 12_000, 30_000):
            x = np.full(size // 4, tuned.rank, np.float32)
            for op in ("all_reduce", "broadcast", "all_gather", "reduce"):
                tuned.reset_stats()
                result = getattr(tuned, op)(x.copy())
                plan = tuned.explain(size, op)
                lines.append(str(plan))
                record = tuned.flight_recorder()[-1]
                assert record["algo"] == plan.algo, (op, size)
                if op == "all_reduce":
                    assert (result == n * others / 2).all()
                    sent = tuned.stats()[op]["bytes_sent"]
                    assert (sent == others * size) == (plan.algo == "one_shot")
            parts = np.arange(n * size // 4, dtype=np.float32).reshape(n, -1) + 1000 * tuned.rank
            got = tuned.all_to_all(parts)
            mine = np.arange(n * size // 4).reshape(n, -1)[tuned.rank]
            assert (got == mine + 1000 * np.arange(n)[:, None]).all()
            lines.append(str(tuned.explain(parts.nbytes, "all_to_all")))
            uneven = [np.full(size * (r + 1), tuned.rank, np.uint8) for r in range(n)]
            out = [np.empty(size * (tuned.rank + 1), np.uint8) for _ in range(n)]
            tuned.all_to_all(uneven, out)
            assert all((out[r] == r).all() for r in range(n))
    return lines


def test_rank_0_s_table_holds_for_all(worlds: Worlds, tmp_path: Path) -> None:
    first = write(tmp_path / "a", all_reduce={4: 4000}, broadcast={4: 0}, exchange={4: 2400})
    second = write(tmp_path / "b", all_reduce={4: 16_000}, all_gather={4: 500})
    results = worlds.run(3, explain_and_run, [str(first), str(second), "off"])
    assert results[0] == results[1] == results[2]
    algos = {tuple(line.split()[i] for i in (0, 2)): line.split(": ")[1] for line in results[0]}
    assert algos["all_reduce", "4000"].startswith("one_shot")
    assert algos["all_reduce", "12000"].startswith("two_shot")
    assert algos["broadcast", "400"].startswith("staged")
    assert algos["all_gather", "30000"].startswith("one_shot"), "no limit of rank 0's: built in"
    assert algos["all_to_all", "1200"].startswith("one_shot"), "800 bytes for others"
    assert algos["all_to_all", "12000"].startswith("staged"), "8000 bytes for others"
    for line in results[0]:
        tuned = line.split()[0] in ("all_reduce", "broadcast", "all_to_all")
        assert ("measured by tune" in line) == tuned, line
    assert any("one_shot up to 4000 bytes, measured by tune" in line for line in results[0])
    swapped = worlds.run(3, explain_and_run, ["off", str(first), str(second)])
    assert not any("tune" in line for line in swapped[0] + swapped[1] + swapped[2])


def limits_with(comm: Communicator, table: str) -> tuple[list[tuple[int, int]], list[str]]:
    """A new group's limits, and the warnings of making it."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    env.logger().addHandler(handler)
    try:
        with split_with(comm, table) as tuned:
            tuned.all_reduce(np.ones(5000))
            return tuned._limits, messages
    finally:
        env.logger().removeHandler(handler)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1, "one_shot_bytes": {"all_reduce": {"2": 99999}}}']
)
def test_a_broken_file_is_a_warning_and_changes_nothing(
    worlds: Worlds, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    for rank, (limits, warnings) in enumerate(worlds.run(2, limits_with, str(path))):
        assert limits == []
        assert len(warnings) == (1 if rank == 0 else 0)
        assert all(str(path) in line and "built-in limits hold" in line for line in warnings)
    missing = worlds.run(2, limits_with, str(tmp_path / "none.json"))
    assert [limits for limits, _ in missing] == [[], []]
    assert "No such file" in missing[0][1][0]


def test_off_reads_nothing(worlds: Worlds) -> None:
    assert worlds.run(2, limits_with, "off") == [([], []), ([], [])]


# ---- the file ------------------------------------------------------------------------------------


def test_a_world_between_two_measured_ones_gets_the_limit_of_the_larger(tmp_path: Path) -> None:
    path = write(tmp_path / "table.json", all_reduce={2: 32_768, 4: 8192, 8: 0}, exchange={2: 100})
    with environment(RINGCOMM_TUNING=str(path)):
        found = {size: dict(tuning.limits_for(size)) for size in (1, 2, 3, 4, 5, 9)}
    ops = _core.OPS
    assert found[1] == {}
    assert found[2] == {ops["all_reduce"]: 32_768} | {
        ops[op]: 100 for op in ("gather", "scatter", "all_to_all")
    }
    assert [found[size].get(ops["all_reduce"]) for size in (3, 4, 5, 9)] == [8192, 8192, 0, None]


def test_the_default_file_is_the_user_s_and_of_this_machine(tmp_path: Path) -> None:
    with environment(XDG_CACHE_HOME=str(tmp_path), RINGCOMM_TUNING=""):
        path = tuning.default_path()
        assert path.parent == tmp_path / "ringcomm"
        assert tuning.limits_for(2) == []
        write(path, broadcast={2: 77})
        assert tuning.limits_for(2) == [(_core.OPS["broadcast"], 77)]
        path.write_text("nonsense")
        assert tuning.limits_for(2) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1], '"format": 1'),
        ({"format": 2, "one_shot_bytes": {}}, '"format": 1'),
        ({"format": 1}, "one_shot_bytes"),
        ({"format": 1, "one_shot_bytes": {"allreduce": {}}}, "expected one of all_reduce"),
        ({"format": 1, "one_shot_bytes": {"reduce": 7}}, "with an object"),
        ({"format": 1, "one_shot_bytes": {"reduce": {"1": 7}}}, "world size '1', expected 2 to"),
        ({"format": 1, "one_shot_bytes": {"reduce": {"two": 7}}}, "world size 'two'"),
        ({"format": 1, "one_shot_bytes": {"reduce": {"2": -1}}}, "-1, expected 0 to 32768"),
        ({"format": 1, "one_shot_bytes": {"reduce": {"2": 32769}}}, "expected 0 to 32768"),
        ({"format": 1, "one_shot_bytes": {"reduce": {"2": True}}}, "True, expected"),
        ({"format": 1, "one_shot_bytes": {"reduce": {"4": 9, "2": 8}}}, r"grows .* \[8, 9\]"),
    ],
)
def test_what_breaks_the_rules_is_named(content: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        tuning.parse(json.dumps(content))


def test_limits_are_checked_by_the_core_as_well() -> None:
    with pytest.raises(UsageError, match="expected 0 to 100"):
        _core.choose_algo(
            _core.OPS["reduce"], 10, 2, False, False, 100, [(_core.OPS["reduce"], 101)]
        )
    with pytest.raises(UsageError, match="barrier has no limit"):
        _core.choose_algo(
            _core.OPS["reduce"], 10, 2, False, False, 100, [(_core.OPS["barrier"], 1)]
        )


def test_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "table.json"
    write(path, reduce={2: 1})
    threads = [
        threading.Thread(target=lambda k=k: [write(path, reduce={2: k}) for _ in range(20)])
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert tuning.parse(path.read_text())["reduce"][2] in range(4)  # whole at any moment
    for thread in threads:
        thread.join()
    assert sorted(file.name for file in path.parent.iterdir()) == ["table.json", "table.lock"]


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemResourceError, match="cannot write the tuning table"):
        write(tmp_path / "file" / "table.json", reduce={2: 1})
    with pytest.raises(UsageError):
        write(tmp_path / "table.json", reduce={2: 10**9})
    assert not (tmp_path / "table.json").exists()


# ---- the command ---------------------------------------------------------------------------------

SIZES = (1000, 2000, 4000, 8000)


Ratios = tuple[float, ...]


def times_of(*by_world: Ratios) -> dict[int, dict[int, tuple[float, float]]]:
    """What measuring 2, 4, ... ranks found: one_shot takes so many times as long as the other."""
    return {
        2 * (number + 1): {
            size: (1e-5 * ratio, 1e-5) for size, ratio in zip(SIZES, ratios, strict=True)
        }
        for number, ratios in enumerate(by_world)
    }


@pytest.mark.parametrize(
    ("ratios", "built_in", "limit", "gain"),
    [
        ((0.5, 0.8, 1.25, 2.0), 8000, 2000, (1.25 * 2.0) ** 0.5),  # goes down
        ((0.5, 0.8, 0.9, 2.0), 1000, 4000, (0.8 * 0.9) ** -0.5),  # goes up
        ((0.5, 0.8, 1.25, 2.0), 2000, 2000, 1.0),  # is right
        ((2.0, 2.0, 2.0, 2.0), 4000, 0, 2.0),  # one_shot never pays
        ((0.5, 1.05, 0.5, 2.0), 8000, 4000, 2.0),  # noise at one size
        ((0.99, 1.01, 1.01, 1.0), 8000, 8000, 1.0),  # not worth it
    ],
)
def test_the_switch_point_is_where_the_least_time_is_lost(
    ratios: Ratios, built_in: int, limit: int, gain: float
) -> None:
    (decision,) = tune.decide("reduce", {2: built_in}, times_of(ratios))
    assert decision.limit == limit
    assert decision.gain == pytest.approx(gain)


@pytest.mark.parametrize(
    ("first", "second", "limits"),
    [
        ((0.5, 0.5, 0.5, 2.0), (0.5, 2.0, 2.0, 2.0), [4000, 1000]),  # each its own
        ((0.5, 1.1, 1.1, 1.1), (0.1, 0.1, 0.1, 0.1), [8000, 8000]),  # the second matters more
        ((0.5, 9.0, 9.0, 9.0), (0.5, 0.9, 0.9, 0.9), [1000, 1000]),  # the first does
        ((1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0), [4000, 2000]),  # built in
    ],
)
def test_a_larger_world_never_gets_a_higher_limit(
    first: Ratios, second: Ratios, limits: list[int]
) -> None:
    decisions = tune.decide("reduce", {2: 4000, 4: 2000}, times_of(first, second))
    assert [decision.limit for decision in decisions] == limits


def run_command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ringcomm.tune", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_command_measures_and_stores(tmp_path: Path) -> None:
    finished = run_command(
        *("--seconds", "0.5", "--world-sizes", "2,3", "--sizes", "[512, 16384]"),
        XDG_CACHE_HOME=str(tmp_path),
        RINGCOMM_TUNING="",
    )
    assert finished.returncode == 0, finished.stderr
    with environment(XDG_CACHE_HOME=str(tmp_path), RINGCOMM_TUNING=""):
        path = tuning.default_path()
        assert str(path) in finished.stdout
        table = tuning.parse(path.read_text())
        assert tuning.limits_for(2)
    assert set(table) == set(ROWS)
    assert all(set(by_size) == {2, 3} for by_size in table.values())
    for row in ROWS:
        assert (
            len([line for line in finished.stdout.splitlines() if line.startswith(row + " ")]) == 2
        )


def test_the_command_says_what_is_wrong() -> None:
    assert "--world-sizes" in run_command("--world-sizes", "1").stderr
    finished = run_command(RINGCOMM_TUNING="off")
    assert finished.returncode == 1
    assert "RINGCOMM_TUNING=off" in finished.stderr
