"""What this machine is, as far as communication cares."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path

__all__ = ["cpu_model", "usable_cores"]


def cpu_model() -> str:
    """The processor's name, or "unknown"."""
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or "unknown"


def usable_cores() -> int:
    """How many processors this process can keep busy: its affinity, less if its cgroup has a quota."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return cores if quota is None else min(cores, max(1, math.ceil(quota)))


def _cgroup_quota(own_groups: Path, root: Path) -> float | None:
    """Processors that the tightest CPU quota of this process's cgroups allows; None without one.

    Args:
        own_groups: ``/proc/self/cgroup``.
        root: Where cgroups are mounted. In a container the own one often is the root itself.
    """
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0":  # version 2
            tops = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [root / "cpu", root / "cpu,cpuacct"]
        else:
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for top in tops:
            for depth in range(len(parts) + 1):
                quotas.append(_quota_of(top.joinpath(*parts[:depth])))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    """The quota of one cgroup, of either version."""
    try:
        maximum, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            maximum = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not maximum.isdigit() or not period.isdigit() or int(period) == 0:  # "max", "-1"
        return None
    return int(maximum) / int(period)
