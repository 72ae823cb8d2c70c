"""Builds, tests and measures ringcomm on a machine with a GPU: ``make gpu-check [OUT=FILE|FOLDER]``.

    python3 bench/gpu_check.py [--out FILE|FOLDER] [--only STAGE ...]

Needs no network and installs nothing: this Python's packages build the extensions in place, for this GPU alone, and run
bench.kernels, compute-sanitizer over a short run, and the tests of tests/gpu, which get the time that is left. It takes
less than nine minutes. Every stage has a time limit (with --only, that limit alone); what fails or is missing does not
stop the next one. Writes one JSON file with the hardware, the versions, the commit, and what every stage and test came
to, by default into bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 525.0
TEST_SECONDS = 280.0
REPORT_SECONDS = 30.0  # for the test that is running when the time is over, and pytest's end
TAIL = 6000  # characters of a stage's output that are kept

# What a stage cannot do without, as pip names it; and what makes it say more.
NEEDED = {
    "build": ("setuptools", "cmake", "ninja", "pybind11"),
    "test": ("pytest", "pytest-timeout"),
}
NEEDED_BY_ALL = ("numpy", "torch")
HELPFUL = ("ml_dtypes", "triton", "cupy-cuda13x", "cupy-cuda12x")


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def header() -> dict[str, Any]:
    """Hardware, versions and commit."""
    fields = "name,memory.total,driver_version,compute_cap"
    gpus = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
    nvcc = shutil.which("nvcc", path=tool_path()) or "nvcc"
    release = re.search(r"release ([\d.]+), (V[\d.]+)", output_of(nvcc, "--version"))
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    commit = output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10")
    packages = (*NEEDED_BY_ALL, *(name for names in NEEDED.values() for name in names), *HELPFUL)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "gpus": gpus,
        "nvcc": release[2] if release else "none",
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in packages},
    }


def missing(stage: str) -> list[str]:
    """Packages that a stage needs and that are not here."""
    names = (*NEEDED_BY_ALL, *NEEDED.get(stage, ()))
    found = {name: version_of(name) for name in names}
    tools = {
        "cmake",
        "ninja",
    }  # as programs they need no package; torch brings a pybind11 of its own
    return [
        name
        for name, version in found.items()
        if version is None
        and not (name in tools and shutil.which(name))
        and not (name == "pybind11" and found["torch"])
    ]


def tool_path() -> str:
    """Where nvcc and compute-sanitizer may be."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [
        folder for home in homes if home for folder in (f"{home}/bin", f"{home}/compute-sanitizer")
    ]
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])


class Check:
    """The stages, and what they came to."""

    def __init__(self, scratch: Path, total: float) -> None:
        self.scratch, self.total = scratch, total
        self.started = time.monotonic()
        self.stages: list[dict[str, Any]] = []

    def left(self) -> float:
        return self.total - (time.monotonic() - self.started)

    def run(self, name: str, limit: float, command: list[str], **variables: str) -> dict[str, Any]:
        """Runs one stage; its output is shown as it comes, and the end of it kept."""
        stage: dict[str, Any] = {"stage": name, "command": " ".join(command), "status": "skipped"}
        self.stages.append(stage)
        if lacking := missing(name.partition(" ")[0]):
            stage["reason"] = f"not installed here: {', '.join(lacking)}"
        elif self.left() < 10:
            stage["reason"] = "no time is left"
        else:
            limit = min(limit, self.left())
            print(f"\n== {name} (at most {limit:.0f} s): {stage['command']}", flush=True)
            self._execute(stage, limit, command, variables)
        word = f"{stage['status']}: {stage['reason']}" if "reason" in stage else stage["status"]
        print(f"== {name}: {word} ({stage.get('seconds', 0)} s)", flush=True)
        return stage

    def _execute(
        self, stage: dict[str, Any], limit: float, command: list[str], variables: dict[str, str]
    ) -> None:
        log = self.scratch / "log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **variables}
        start = time.monotonic()
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(limit)
                stage["status"] = "passed" if status == 0 else "failed"
                if status != 0:
                    stage["reason"] = f"exit status {status}"
            except subprocess.TimeoutExpired:
                stage["status"], stage["reason"] = "failed", f"not done after {limit:.0f} s"
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)  # and what it may have left
                except ProcessLookupError:
                    pass
                process.wait()
        stage["seconds"] = round(time.monotonic() - start, 1)
        text = log.read_text(errors="replace")
        stage["output"] = text[-TAIL:]
        print(text[-TAIL:], flush=True)


def build(check: Check) -> None:
    jobs = str(len(os.sched_getaffinity(0)))
    check.run(
        "build",
        240,
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        TORCH_CUDA_ARCH_LIST="native",
        FORCE_CUDA="1",
        MAX_JOBS=jobs,
        PATH=tool_path(),
    )


def test(check: Check) -> None:
    """tests/gpu, but for the emulated GPU's; with the outcome of every test."""
    report = check.scratch / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu",
        "-q",
        "-k",
        "not simt",
        "--durations=10",
    ]
    command += ["-p", "no:cacheprovider", "--maxfail=40", f"--junitxml={report}"]
    # Later than the deadlines of the tests' own processes, which say more; and the end of a test, not of pytest.
    command += ["-o", "timeout=200", "-o", "timeout_method=signal"]
    installed = (version_of("pytest-timeout") or "0").split(".")
    if [int(part) for part in installed[:2]] >= [2, 3]:  # then an overrun leaves a report
        most = min(TEST_SECONDS, max(1.0, check.left() - REPORT_SECONDS))
        command.append(f"--session-timeout={most:.0f}")
    stage = check.run("test", TEST_SECONDS + REPORT_SECONDS, command)
    if not report.exists():
        return
    rows, counts = [], {"passed": 0, "failed": 0, "skipped": 0}
    for case in ET.parse(report).iter("testcase"):
        trouble = next((x for x in case if x.tag in ("failure", "error", "skipped")), None)
        outcome = (
            "passed" if trouble is None else "skipped" if trouble.tag == "skipped" else "failed"
        )
        counts[outcome] += 1
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        row = {"test": name, "outcome": outcome, "seconds": float(case.get("time", 0))}
        if trouble is not None:
            row["reason"] = (trouble.get("message") or "")[:1500]
        rows.append(row)
    stage.update(counts=counts, tests=rows)
    if not counts["passed"] and stage["status"] == "passed":
        stage["status"], stage["reason"] = "failed", "every test was skipped"


def bench(check: Check) -> None:
    result = check.scratch / "kernels.json"
    command = [sys.executable, "-m", "bench.kernels", "--device", "cuda", "--json", str(result)]
    stage = check.run("bench", 180, command)
    if result.exists():
        stage["results"] = json.loads(result.read_text())


# racecheck knows shared memory only, of which these kernels hardly have any: it is run because it costs little.
SANITIZERS = {"memcheck": 100, "synccheck": 45, "racecheck": 45}


def sanitize(check: Check) -> None:
    """compute-sanitizer's tools over kernels and collectives whose ranks take turns: under them, kernels may not run at
    the same time."""
    tool = shutil.which("compute-sanitizer", path=tool_path())
    for name, limit in SANITIZERS.items():
        if tool is None:
            check.stages.append(
                {
                    "stage": f"sanitize {name}",
                    "status": "skipped",
                    "reason": "no compute-sanitizer here",
                }
            )
            print(f"\n== sanitize {name}: skipped: no compute-sanitizer here", flush=True)
            continue
        command = [tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all"]
        if name == "memcheck":  # ringcomm and torch ask CUDA what may be refused, and go on
            command += ["--report-api-errors", "no"]
        command += [sys.executable, "-m", "tests.gpu.short_run"]
        check.run(f"sanitize {name}", limit, command, RINGCOMM_CUDA_MODE="stepped")


# The longest is last and gets what the others leave.
STAGES = {"build": build, "bench": bench, "sanitize": sanitize, "test": test}


def place_for(out: str | None, about: dict[str, Any]) -> Path:
    gpu = re.sub(r"[^a-z0-9]+", "-", (about["gpus"] or ["no gpu"])[0].split(",")[0].lower())
    name = f"{about['date'][:10]}-gpu-{gpu.strip('-')}.json"
    if not out:
        return ROOT / "bench" / "results" / name
    path = Path(out)
    return path / name if path.is_dir() else path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 bench/gpu_check.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", default=os.environ.get("OUT"), help="file or folder of the JSON")
    parser.add_argument("--only", nargs="+", choices=tuple(STAGES), help="nothing else")
    args = parser.parse_args()
    about = header()
    path = place_for(args.out, about)
    for name, value in about.items():
        print(f"{name}: {value}")
    if not about["gpus"]:
        print("nvidia-smi shows no GPU: tests will be skipped")
    with tempfile.TemporaryDirectory(prefix="ringcomm-gpu-check-") as folder:
        check = Check(Path(folder), math.inf if args.only else TOTAL_SECONDS)
        for name in (stage for stage in STAGES if stage in (args.only or STAGES)):
            try:
                STAGES[name](check)
            except Exception as error:  # the other stages still count
                check.stages.append({"stage": name, "status": "failed", "reason": repr(error)})
                print(f"== {name}: failed: {error!r}", flush=True)
            document = {
                "header": {**about, "seconds": round(time.monotonic() - check.started, 1)},
                "stages": check.stages,
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, indent=1) + "\n")
    print("\nstage            status   seconds")
    for stage in check.stages:
        note = stage.get("reason", "") or stage.get("counts", "")
        print(f"{stage['stage']:16} {stage['status']:8} {stage.get('seconds', 0):7} {note}")
    print(f"wrote {path}")
    return int(any(stage["status"] != "passed" for stage in check.stages))


if __name__ == "__main__":
    sys.exit(main())
