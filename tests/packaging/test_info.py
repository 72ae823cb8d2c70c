from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from ringcomm import __version__, _core, env, info


def run_info(*arguments: str, **variables: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "ringcomm.info", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def test_the_build_summary_is_stored_and_complete() -> None:
    summary = info.build_info()
    assert set(summary) == {
        "version", "git_commit", "python", "compiler", "build_type", "simd_levels", "cuda",
        "cuda_archs", "torch", "jobs",
    }  # fmt: skip
    assert summary["version"] == __version__
    assert summary["cuda"].startswith("no: ") == (_core.cuda_probe().runtime_version == 0)
    assert _core.best_simd_level() in summary["simd_levels"].split()


def test_info_shows_build_and_machine_and_environment() -> None:
    text = run_info(RINGCOMM_TIMEOUT="12")
    for part in (
        "compiler",
        "cuda archs",
        "numpy",
        "torch",
        "simd",
        "memfd",
        "pidfd",
        "kernels",
        "devices",
    ):
        assert f"  {part} " in text
    assert re.search(r"^  RINGCOMM_TIMEOUT +12$", text, re.MULTILINE)
    assert re.search(r"^  RINGCOMM_DEBUG +WARN \(default\)$", text, re.MULTILINE)
    facts = json.loads(run_info("--json", RINGCOMM_SIMD="baseline"))
    assert facts["machine"]["simd"].startswith("baseline (forced by RINGCOMM_SIMD")
    assert facts["environment"]["RINGCOMM_SIMD"] == "baseline"
    assert facts["build"] == info.build_info()


def test_the_variables_table_is_complete() -> None:
    rows = run_info("--variables").splitlines()
    assert len(rows) == 2 + len(env.VARIABLES)
    assert {row.count(" | ") for row in rows} == {3}


def test_info_survives_bad_variables() -> None:
    assert "no: environment variable RINGCOMM_SIMD='sse9'" in run_info(RINGCOMM_SIMD="sse9")


def test_the_cuda_probe_gives_devices_or_a_reason() -> None:
    probe = _core.cuda_probe()
    assert probe.count == len(probe.devices)
    assert bool(probe.reason) == (probe.count == 0)
    for device in probe.devices:
        assert device.name
        assert device.compute_capability >= (5, 0)
        assert device.total_bytes > 0
        assert device.num_multiprocessors > 0


@pytest.mark.parametrize(
    ("built_for", "device", "runs"),
    [
        ("80-real 90-real", (9, 0), True),
        ("80-real", (8, 6), True),
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("80-real 80-virtual", (9, 0), True),
        ("90a-real", (9, 0), True),
        ("90a-real 90a-virtual", (10, 0), False),
        ("100f-real", (10, 3), True),
        ("120-virtual", (10, 0), False),
        ("none", (9, 0), False),
    ],
)
def test_whether_a_build_has_code_for_a_device(
    built_for: str, device: tuple[int, int], runs: bool
) -> None:
    assert info.runs_on(built_for, *device) == runs
