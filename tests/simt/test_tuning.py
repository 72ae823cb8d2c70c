"""Measured limits of arrays on GPUs: one table for all ranks, rank 0's; the command that writes it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, _core, timings, tuning
from ringcomm.errors import UsageError
from ringcomm.tuning import Gpus
from tests.comm.test_tuning import environment, run_command
from tests.simt import emulated
from tests.worlds import Worlds

GPUS = Gpus("emulated GPU", "NVLink", "in_kernel")
SIMT = {"RINGCOMM_SIMT_DEVICES": "4", "RINGCOMM_CUDA_SLAB_MIB": "1"}
# What packets of two ranks hold: an eighth of the slab, in two halves with a box for each; half of it is data.
PACKETS = (1 << 20) // 8 // 2 // 2 // 2


@pytest.fixture(scope="module")
def gpus() -> Iterator[Worlds]:
    """Ranks with a GPU each."""
    emulated.require()
    with Worlds(package=emulated.PACKAGE, **SIMT) as worlds:
        yield worlds


def write(path: Path, gpus: Gpus = GPUS, **rows: dict[int, int]) -> str:
    tuning.save(path, gpus={gpus: rows})
    return str(path)


def on_gpus(comm: Communicator, table: str) -> Communicator:
    with environment(RINGCOMM_TUNING=table):
        tuned = comm.split(0)
        assert tuned is not None
        tuned.use_device("simt")
    return tuned


def explain_and_run(comm: Communicator, tables: list[str]) -> list[str]:
    """What calls would do according to explain(), after they did just that."""
    lines = []
    with on_gpus(comm, tables[comm.rank]) as tuned:
        for size in (400, 4000, 8000, 400_000):
            for op in ("all_reduce", "broadcast", "all_gather"):
                x = np.full(size // 4, tuned.rank + 1, np.float32)
                result = getattr(tuned, op)(x)
                tuned.synchronize()
                plan = tuned.explain(size, op)
                assert tuned.flight_recorder()[-1]["algo"] == plan.algo, (op, size)
                if op == "all_reduce":
                    assert (result == sum(range(1, tuned.world_size + 1))).all()
                if op == "broadcast":
                    assert (result == 1).all()
                lines.append(str(plan))
    return lines


def algos_of(lines: list[str]) -> dict[tuple[str, str], str]:
    return {(line.split()[0], line.split()[2]): line.split(": ")[1].split(",")[0] for line in lines}


def test_rank_0_s_table_holds_for_all(gpus: Worlds, tmp_path: Path) -> None:
    first = write(tmp_path / "a", all_reduce={4: 4000}, broadcast={4: 400})
    second = write(tmp_path / "b", all_reduce={4: 0})
    built_in = gpus.run(3, explain_and_run, ["off", first, second])
    results = gpus.run(3, explain_and_run, [first, second, "off"])
    assert results[0] == results[1] == results[2]
    assert not any("tune" in line for line in built_in[0])
    was, algos = algos_of(built_in[0]), algos_of(results[0])
    assert [was["all_reduce", size] for size in ("4000", "8000")] == ["one_shot"] * 2
    assert [algos["all_reduce", size] for size in ("4000", "8000")] == ["one_shot", "two_shot"]
    assert [was["broadcast", size] for size in ("400", "4000")] == ["staged"] * 2
    assert [algos["broadcast", size] for size in ("400", "4000")] == ["staged", "ring"]
    assert {algos["all_gather", size] for size in ("400", "400000")} == {"staged"}
    for line in results[0]:
        assert ("measured by tune" in line) == ("all_gather" not in line), line
    assert any("one_shot up to 4000 bytes, measured by tune" in line for line in results[0])
    assert any("staged up to 400 bytes, measured by tune" in line for line in results[0])


def explain_only(comm: Communicator, table: str, size: int) -> str:
    with on_gpus(comm, table) as tuned:
        return str(tuned.explain(size))


@pytest.mark.parametrize(
    "other", [{"gpu": "another GPU"}, {"link": "PCIe"}, {"mode": "stepped"}], ids=str
)
def test_a_table_is_for_its_gpus_their_links_and_mode(
    gpus: Worlds, tmp_path: Path, other: dict[str, str]
) -> None:
    path = write(tmp_path / "table", GPUS._replace(**other), all_reduce={2: 100})
    assert "tune" not in gpus.run(2, explain_only, path, 4000)[0]
    assert "tune" in gpus.run(2, explain_only, write(Path(path), all_reduce={2: 100}), 4000)[0]


def test_stepped_groups_have_no_limits(tmp_path: Path) -> None:
    emulated.require()
    stepped = Gpus("emulated GPU", "same", "stepped")
    path = write(tmp_path / "table", stepped, all_reduce={2: 100}, broadcast={2: 0})
    with Worlds(package=emulated.PACKAGE, RINGCOMM_CUDA_SLAB_MIB="1") as worlds:
        lines = worlds.run(2, explain_only, path, 4000)
    assert all("two_shot" in line and "tune" not in line for line in lines)


def test_a_limit_is_at_most_what_the_packets_hold(gpus: Worlds, tmp_path: Path) -> None:
    path = write(tmp_path / "table", all_reduce={2: 2**40})
    (large, _), (small, _) = (gpus.run(2, explain_only, path, size) for size in (2**39, 400))
    assert ": direct" in large
    assert ": one_shot" in small
    (limit,) = {int(line.split("one_shot up to ")[1].split()[0]) for line in (large, small)}
    assert limit == PACKETS
    fits, too_large = (gpus.run(2, explain_only, path, limit + more)[0] for more in (0, 1))
    assert ": one_shot" in fits
    assert ": two_shot" in too_large


# ---- the file ------------------------------------------------------------------------------------


def test_a_file_keeps_what_is_said_about_others(tmp_path: Path) -> None:
    path = tmp_path / "table"
    others = GPUS._replace(link="PCIe")
    tuning.save(path, {"reduce": {2: 5}})
    write(path, all_reduce={2: 1, 4: 1})
    write(path, others, broadcast={4: 2})
    write(path, all_reduce={2: 3})
    tuning.save(path, {"broadcast": {2: 7}})
    assert tuning.parse(path.read_text()) == {"broadcast": {2: 7}}
    assert tuning.parse_gpus(path.read_text()) == {
        GPUS: {"all_reduce": {2: 3}},
        others: {"broadcast": {4: 2}},
    }


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("{}", 'expected a list under "gpus"'),
        ("[7]", 'entry 0 of "gpus"'),
        ('[{"gpu": "x", "link": "same", "bytes": {}}]', 'entry 0 of "gpus".*mode'),
        ('[{"gpu": 7, "link": "same", "mode": "in_kernel", "bytes": {}}]', "expected text"),
        (
            '[{"gpu": "x", "link": "same", "mode": "m", "bytes": {"reduce": {"2": 1}}}]',
            "row 'reduce': expected one of all_reduce, broadcast",
        ),
        (
            '[{"gpu": "x", "link": "same", "mode": "m", "bytes": {"broadcast": {"2": -1}}}]',
            "-1, expected 0 to",
        ),
    ],
)
def test_what_breaks_the_rules_is_named(entries: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        tuning.parse_gpus(f'{{"format": 1, "one_shot_bytes": {{}}, "gpus": {entries}}}')


def test_limits_are_by_world_size_and_gpus(tmp_path: Path) -> None:
    path = write(tmp_path / "table", all_reduce={2: 9, 4: 5}, broadcast={8: 3})
    all_reduce, broadcast = (_core.OPS[op] for op in ("all_reduce", "broadcast"))
    with environment(RINGCOMM_TUNING=path):
        found = [dict(tuning.device_limits_for(lambda: GPUS, n)) for n in (1, 2, 3, 8, 9)]
        others = GPUS._replace(mode="stepped")
        assert tuning.device_limits_for(lambda: others, 2) == []
    assert found == [
        {},
        {all_reduce: 9, broadcast: 3},
        {all_reduce: 5, broadcast: 3},
        {broadcast: 3},
        {},
    ]


# ---- the command ---------------------------------------------------------------------------------


def tune(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ringcomm.tune", *arguments],
        env=emulated.environment(**variables),
        cwd=emulated.package(),
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_command_measures_and_the_next_group_uses_it(gpus: Worlds, tmp_path: Path) -> None:
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    finished = tune(
        *("--device", "simt", "--seconds", "0.1", "--world-sizes", "2,3"),
        *("--sizes", "[1024, 16384]"),
        **(SIMT | home),
    )
    assert finished.returncode == 0, finished.stderr
    with environment(RINGCOMM_TUNING="", **home):
        path = tuning.default_path(gpus=True)
    assert str(path) in finished.stdout
    assert "emulated GPU, linked by NVLink" in finished.stdout
    tables = tuning.parse_gpus(path.read_text())
    assert list(tables) == [GPUS]
    assert {row: set(by_size) for row, by_size in tables[GPUS].items()} == {
        "all_reduce": {2, 3},
        "broadcast": {3},
    }
    assert tuning.parse(path.read_text()) == {}
    with Worlds(package=emulated.PACKAGE, **SIMT, **home) as worlds:
        line = worlds.run(2, explain_only, "", 4000)[0]
    limit = tables[GPUS]["all_reduce"][2]
    assert f"one_shot up to {limit} bytes, measured by tune" in line


def test_the_command_says_that_there_is_nothing_to_choose() -> None:
    emulated.require()
    finished = tune("--device", "simt", "--world-sizes", "2", RINGCOMM_SIMT_DEVICES="1")
    assert finished.returncode == 1
    assert "there is nothing to tune" in finished.stderr
    assert "mode stepped" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_times_are_the_gpu_s_between_calls_that_are_queued_while_it_is_busy() -> None:
    said: list[str] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: said.append(name) or 4.0

    place = object.__new__(timings._OnDevice)
    place._library, place.control, place._comms = Recorder(), Recorder(), (Recorder(), Recorder())
    seconds = place.time(lambda: said.append("call"))
    settled, calls = ["synchronize"] * 2, ["call"] * timings._DEVICE_CALLS
    queued = ["barrier", "keep_busy", "mark", *calls, "mark"]
    assert said == ["call", *settled, *queued, *settled, "seconds"]
    assert seconds == 4.0 / len(calls)


def test_arrays_on_a_gpu_take_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(timings.importlib, "import_module", absent)
    with pytest.raises(UsageError, match="install torch with CUDA, or CuPy .*no torch .*no cupy"):
        timings._library("cuda:0")


def test_the_command_says_what_is_missing_for_gpus() -> None:
    for arguments, expected in (
        (("--device", "cpu"), "expected cuda, or such as cuda:0"),
        (("--device", "cuda:x"), "expected cuda, or such as cuda:0"),
        (("--device", "cuda", "--world-sizes", "99"), "2 to 16 each"),
    ):
        assert expected in run_command(*arguments).stderr
    finished = run_command("--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert finished.returncode == 1
    assert any(
        piece in finished.stderr for piece in ("this build has no CUDA", "there is no GPU here")
    ), finished.stderr
    assert "Traceback" not in finished.stderr
