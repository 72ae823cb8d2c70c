"""make gpu-check: stages that fail, hang or cannot start do not stop the next one, and all is written down."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from bench import gpu_check


@pytest.fixture
def check(tmp_path: Path) -> gpu_check.Check:
    return gpu_check.Check(tmp_path, gpu_check.TOTAL_SECONDS)


def test_a_stage_says_how_it_ended(check: gpu_check.Check) -> None:
    good = check.run("one", 30, [sys.executable, "-c", "print('fine')"])
    assert (good["status"], good["output"]) == ("passed", "fine\n")
    bad = check.run("two", 30, [sys.executable, "-c", "raise SystemExit(7)"])
    assert (bad["status"], bad["reason"]) == ("failed", "exit status 7")
    seen = "import os; print(os.environ['RC_SEEN'], os.getcwd())"
    where = check.run("three", 30, [sys.executable, "-c", seen], RC_SEEN="yes")
    assert where["output"] == f"yes {gpu_check.ROOT}\n"
    assert [stage["stage"] for stage in check.stages] == ["one", "two", "three"]


def test_a_stage_that_hangs_is_ended_with_what_it_started(check: gpu_check.Check) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    stage = check.run("hangs", 1.0, [sys.executable, "-c", child])
    assert (stage["status"], stage["reason"]) == ("failed", "not done after 1 s")
    assert stage["seconds"] < 20


def test_what_is_missing_is_named(check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_check.NEEDED, "build", ("setuptools", "no-such-package"))
    stage = check.run("build", 30, [sys.executable, "-c", ""])
    assert stage["status"] == "skipped"
    assert stage["reason"] == "not installed here: no-such-package"
    check.total = 5.0
    assert check.run("late", 30, [sys.executable])["reason"] == "no time is left"


def test_the_results_are_written_after_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fine(check: gpu_check.Check) -> None:
        check.run("fine", 30, [sys.executable, "-c", "print(1)"])

    def broken(check: gpu_check.Check) -> None:
        raise OSError("nothing works")

    monkeypatch.setattr(gpu_check, "STAGES", {"broken": broken, "fine": fine})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert gpu_check.main() == 1
    (path,) = tmp_path.glob("*-gpu-*.json")
    found = json.loads(path.read_text())
    assert {"commit", "gpus", "nvcc", "packages", "seconds"} <= set(found["header"])
    stages = {stage["stage"]: stage["status"] for stage in found["stages"]}
    assert stages == {"broken": "failed", "fine": "passed"}


def test_stages_keep_their_order_and_alone_their_own_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests are last: what is left is theirs."""
    assert list(gpu_check.STAGES) == ["build", "bench", "sanitize", "test"]
    seen: list[tuple[str, float]] = []
    for name in gpu_check.STAGES:
        monkeypatch.setitem(
            gpu_check.STAGES, name, lambda check, name=name: seen.append((name, check.total))
        )
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    gpu_check.main()
    assert seen == [(name, gpu_check.TOTAL_SECONDS) for name in gpu_check.STAGES]
    seen.clear()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "test", "build"])
    gpu_check.main()
    assert seen == [("build", math.inf), ("test", math.inf)]


def test_every_tool_of_the_sanitizer_has_its_turn(
    check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: "true")
    monkeypatch.setattr(gpu_check, "missing", lambda stage: [])
    gpu_check.sanitize(check)
    commands = {stage["stage"]: stage["command"] for stage in check.stages}
    assert list(commands) == [f"sanitize {tool}" for tool in ("memcheck", "synccheck", "racecheck")]
    assert ["--report-api-errors no" in command for command in commands.values()] == [
        True,
        False,
        False,
    ]


def test_every_test_of_the_tests_is_counted(
    check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the real command, where no GPU is: all of them are skipped, and that is no success."""
    from tests.gpu.conftest import why_no_cuda

    if not why_no_cuda():
        pytest.skip("there is a GPU here")
    gpu_check.test(check)
    (stage,) = check.stages
    assert stage["counts"]["skipped"] > 50
    assert (stage["counts"]["failed"], stage["counts"]["passed"]) == (0, 0)
    assert all(row["reason"] for row in stage["tests"])
    assert (stage["status"], stage["reason"]) == ("failed", "every test was skipped")
