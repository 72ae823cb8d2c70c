"""``python -m ringcomm.info``: how this copy was built and what it finds here. Paste it into bug reports.

``--json`` prints the same as JSON, ``--build`` only the build summary, ``--variables`` a Markdown table
of all environment variables.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ringcomm import env
from ringcomm._version import __version__
from ringcomm.errors import RingcommError
from ringcomm.machine import cpu_model, usable_cores

__all__ = ["build_info", "collect", "main", "render", "variables_table"]

# What _core.RUNTIME means.
_RUNTIMES = {
    "cuda": "run on CUDA devices",
    "none": "none: ringcomm was built without CUDA, and GPU arrays are refused",
    "simt": "run on the CPU, on devices that ringcomm's own tests emulate",
}

# Variables of others that change what ringcomm sees.
_FOREIGN_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCH_CUDA_ARCH_LIST")


def build_info() -> dict[str, Any]:
    """The build summary that setup.py stored beside the extension; empty if there is none."""
    try:
        text = (Path(__file__).parent / "_build_info.json").read_text()
    except OSError:
        return {}
    found: dict[str, Any] = json.loads(text)
    return found


def collect() -> dict[str, dict[str, Any]]:
    """Sections of facts. Nothing in it raises: what cannot be had is said in its place.

    Initialises the CUDA driver (no context) when there is one; imports neither torch nor CuPy. The matrix of
    links says "none" where one device does not reach the other's memory, and "NVLink" where NVML says so. Where
    there is no NVML, that is where CUDA says that atomics work between the two; "links known from" tells.
    """
    build = build_info() or {"summary": "missing: ringcomm was not built by its setup.py"}
    return {
        "build": build,
        "python": {
            "ringcomm": f"{__version__} ({Path(__file__).parent})",
            "python": f"{platform.python_version()} ({sys.executable})",
            **{name: _version_of(name) for name in ("numpy", "torch", "cupy")},
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": cpu_model(),
            "cores": f"{usable_cores()} usable of {os.cpu_count()}",
            "simd": _or_reason(_simd),
            "memfd": _or_reason(_memfd),
            "pidfd": _or_reason(_pidfd),
        },
        "cuda": _cuda(str(build.get("cuda_archs", ""))),
        "environment": _environment(),
    }


def render(sections: dict[str, dict[str, Any]]) -> str:
    """The text form of :func:`collect`."""
    lines = []
    for title, facts in sections.items():
        lines.append(title)
        names = facts if title == "environment" else {key.replace("_", " "): key for key in facts}
        width = max([16, *map(len, names)])
        lines += [
            f"  {name:<{width}} {value}" for name, value in zip(names, facts.values(), strict=True)
        ]
    return "\n".join(lines)


def variables_table() -> str:
    """The table of environment variables in Markdown, as the README shows it."""
    rows: list[tuple[str, ...]] = [("variable", "value", "default", "meaning"), ("---",) * 4]
    rows += [
        (f"`{name}`", allowed.replace("|", "or"), *rest) for name, allowed, *rest in env.table()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _environment() -> dict[str, str]:
    """Our own variables, set or not, and those of others that are set."""
    own = {
        name: "not set" if variable.default is None else f"{variable.default} (default)"
        for name, variable in env.VARIABLES.items()
        if name.startswith("RINGCOMM_")
    }
    seen = (*env.VARIABLES, *_FOREIGN_VARIABLES)
    return own | {name: os.environ[name] for name in seen if os.environ.get(name)}


def _version_of(package: str) -> str:
    """The installed version, without importing the package."""
    spec = find_spec(package)
    if spec is None:
        return "not installed"
    names = importlib.metadata.packages_distributions().get(package, [package])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def _or_reason(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except (ImportError, OSError, RingcommError) as error:
        return f"no: {error}"


def _simd() -> str:
    core = import_module("ringcomm._core")
    forced = env.get("RINGCOMM_SIMD")
    if forced is not None:
        core.set_simd_level(forced)
        return f"{forced} (forced by RINGCOMM_SIMD; best here: {core.best_simd_level()})"
    return str(core.simd_level())


def _memfd() -> str:
    os.close(os.memfd_create("ringcomm-info", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    return "yes"


def _pidfd() -> str:
    os.close(os.pidfd_open(os.getpid()))
    return "yes"


def _cuda(built_for: str) -> dict[str, Any]:
    try:
        core = import_module("ringcomm._core")
    except ImportError as error:
        return {"devices": f"unknown: {error}"}
    probe = core.cuda_probe()
    version = _cuda_version(probe.runtime_version)
    facts: dict[str, Any] = {
        "kernels": _RUNTIMES[core.RUNTIME],
        "runtime": version or "none in this build",
        "driver": _cuda_version(probe.driver_version) or "none",
        "devices": probe.count or f"none: {probe.reason}",
    }
    for idx, device in enumerate(probe.devices):
        major, minor = device.compute_capability
        facts[f"device_{idx}"] = (
            f"{device.name}, compute capability {major}.{minor}, "
            f"{device.total_bytes / 2**30:.1f} GiB, {device.num_multiprocessors} multiprocessors"
        )
        if core.RUNTIME == "cuda" and not runs_on(built_for, major, minor):
            facts[f"device_{idx}"] += (
                f" -- NOT in this build: rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}"
            )
    if probe.count > 1:
        facts |= _links(probe.count, core.link_between)
    return facts


def _links(count: int, link_between: Callable[[int, int], tuple[str, str]]) -> dict[str, str]:
    """The matrix of links, a row per device, and how it is known."""
    sources = set()

    def kind(device: int, peer: int) -> str:
        found, source = link_between(device, peer)
        sources.add(source)
        return found

    def cell(device: int, peer: int) -> str:
        return "-" if device == peer else _or_reason(lambda: kind(device, peer))

    header = "".join(f"{peer:<8}" for peer in range(count))
    rows = {"links": f"to device {header}".rstrip()}
    for device in range(count):
        cells = "".join(f"{cell(device, peer):<8}" for peer in range(count))
        rows[f"links_{device}"] = f"{'':<10}{cells}".rstrip()
    return rows | {"links_known_from": "; ".join(sorted(sources))}


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def runs_on(built_for: str, major: int, minor: int) -> bool:
    """Whether a build for these architectures (``"80-real 90-virtual"``) has code for a device."""
    for arch in built_for.split():
        parsed = re.fullmatch(r"(\d+)(\d)([af]?)-(real|virtual)", arch)
        if parsed is None:
            continue
        built = (int(parsed[1]), int(parsed[2]))
        if parsed[3] == "a":  # this very architecture
            fits = built == (major, minor)
        elif parsed[3] == "f" or parsed[4] == "real":  # the same generation, this one or later
            fits = built[0] == major and built[1] <= minor
        else:  # PTX: anything later
            fits = built <= (major, minor)
        if fits:
            return True
    return False


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ringcomm.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--build", action="store_true", help="print only the build summary")
    parser.add_argument("--variables", action="store_true", help="print the table of variables")
    options = parser.parse_args(arguments)
    if options.variables:
        print(variables_table())
        return 0
    sections = {"build": build_info()} if options.build else collect()
    print(json.dumps(sections, indent=2) if options.json else render(sections))
    return 0


if __name__ == "__main__":
    sys.exit(main())
