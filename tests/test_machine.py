"""How many processors there are: affinity and the quotas of cgroups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringcomm import machine


def test_affinity_counts() -> None:
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from ringcomm import machine; print(machine.usable_cores())"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "1\n"
    assert 1 <= machine.usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/job/task\n", {}, None),
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/job/task\n", {"job/cpu.max": "200000 100000", "job/task/cpu.max": "max 100000"}, 2.0),
        ("0::/job/task\n", {"job/cpu.max": "50000 100000", "cpu.max": "400000 100000"}, 0.5),
        (
            "4:memory:/a\n2:cpu,cpuacct:/job\n0::/\n",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        (
            "1:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("0::/job\n", {"job/cpu.max": "nonsense"}, None),
    ],
)
def test_the_tightest_quota_of_all_cgroups_counts(
    tmp_path: Path, own: str, files: dict[str, str], quota: float | None
) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    assert machine._cgroup_quota(tmp_path / "own", tmp_path / "fs") == quota


def test_a_machine_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert machine._cgroup_quota(tmp_path / "none", tmp_path / "fs") is None
