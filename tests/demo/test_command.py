"""The command from outside: what is missing, what fails, what stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from ringcomm.demo import __main__ as command

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0

# A rank that writes down its pid, then does what the test says.
RANK = """
import os, pathlib, time
from ringcomm.demo.launch import die_with_launcher
die_with_launcher()
folder, rank = pathlib.Path(os.environ["PID_FOLDER"]), os.environ["RANK"]
(folder / f"new{rank}").write_text(str(os.getpid()))
(folder / f"new{rank}").rename(folder / f"pid{rank}")
"""
WAIT_FOR_PEER = """
while not (folder / "pid0").exists() or not (folder / "pid1").exists():
    time.sleep(0.01)
"""


def start(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    (tmp_path / "a_rank.py").write_text(RANK + body)
    program = "import sys; from ringcomm.demo.launch import launch; sys.exit(launch('a_rank', []))"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PID_FOLDER": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )


def gone(tmp_path: Path) -> bool:
    """Whether both ranks end; they may need a moment after the launcher."""
    deadline = time.monotonic() + DEADLINE
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    while any(Path(f"/proc/{pid}/cmdline").exists() and alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def wait_for_ranks(tmp_path: Path, launcher: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + DEADLINE
    while not all((tmp_path / f"pid{rank}").exists() for rank in range(2)):
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failing_rank_shows_its_traceback_and_takes_the_others_with_it(tmp_path: Path) -> None:
    body = WAIT_FOR_PEER + "if rank == '1': raise ValueError('on purpose')\ntime.sleep(600)\n"
    launcher = start(tmp_path, body)
    try:
        _, err = launcher.communicate(timeout=DEADLINE)
    finally:
        launcher.kill()
    assert launcher.returncode == 1
    assert "ValueError: on purpose" in err
    assert "demo: rank 1 (pid " in err
    assert gone(tmp_path)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_a_killed_launcher(tmp_path: Path, signal_number: int) -> None:
    launcher = start(tmp_path, "time.sleep(600)\n")
    try:
        wait_for_ranks(tmp_path, launcher)
        launcher.send_signal(signal_number)
        launcher.communicate(timeout=DEADLINE)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    assert gone(tmp_path)


@pytest.mark.slow
def test_quick_digits_train_and_keep_their_bars(tmp_path: Path) -> None:
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module)
    arguments = ["--quick", "--task", "digits", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "ringcomm.demo", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for config in ("backend", "none"):
        assert f"digits {config}: every training loss bit-identical to gloo" in done.stdout
    record = json.loads((tmp_path / "demo.json").read_text())
    bits = {run["config"]: run["bits_per_value"] for run in record["runs"]}
    assert bits["int8"] < 9 < bits["bf16"] < 17 < bits["none"] == 32
    assert "\r" not in done.stderr  # a progress bar is for terminals


def test_missing_packages_are_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = command.find_spec
    monkeypatch.setattr(
        command,
        "find_spec",
        lambda name: None if name in ("sklearn", "matplotlib") else there(name),
    )
    assert command.main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "-m pip install scikit-learn matplotlib" in err


def test_an_output_folder_that_cannot_be_made_is_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module)
    (tmp_path / "file").touch()
    assert command.main(["--out", str(tmp_path / "file" / "results")]) == 2
    assert "cannot write to" in capsys.readouterr().err
