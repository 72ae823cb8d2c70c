"""ringcomm with emulated GPUs, for processes that tests start.

``package()`` builds _core with RC_SIMT (CMakeLists.txt), where the kernels run on the CPU beside the host
(runtime/gpu.h), and puts it into a folder with this checkout's Python files. A process that finds the folder
first on its path has a ringcomm whose ``_core.RUNTIME`` is "simt" and whose ``_core.simt`` is base/runtime.h.

``Worlds(package=package(), RINGCOMM_SIMT_DEVICES="2")`` (tests/worlds.py) has ranks with emulated GPUs; ``python()``
starts one process. What the emulation is asked by environment variables stands in runtime/gpu.h and runtime/devices.h. Nothing of
CUDA is needed; g++, CMake and Ninja are, and a minute on two cores. It is kept in build/emulated; what changes is
compiled again.
"""

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

from tests.simt.build import COMPILER, HERE, ROOT, digest

FOLDER = ROOT / "build" / "emulated"
PACKAGE = FOLDER / "package"
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
# Half the time of -O3 to compile; fibers are slow anyway.
OPTIONS = (
    *("-DRC_SIMT=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", f"-DCMAKE_CXX_COMPILER={COMPILER}"),
    *(f"-DPython_EXECUTABLE={sys.executable}", f"-DRC_PYBIND11_INCLUDE={pybind11.get_include()}"),
)


def missing_tool() -> str:
    """The first tool that is not here, or ""."""
    return next((name for name in (COMPILER, "cmake", "ninja") if not which(name)), "")


def which(name: str) -> str:
    return shutil.which(name, path=TOOLS) or ""


def python_files() -> list[Path]:
    """What a package folder links to: modules and sub-packages, nothing that was built."""
    return sorted(
        path
        for path in (ROOT / "ringcomm").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    )


def torch_backend() -> list[Path]:
    """The torch backend that was built beside this checkout's files, which fits every _core; or else its sources."""
    built = sorted((ROOT / "ringcomm").glob("_c10d*.so"))
    return built or [ROOT / "csrc"]


def state() -> str:
    """Says all that goes into the package."""
    sources = [
        path
        for top in (ROOT / "csrc", HERE / "harness", HERE / "runtime")
        for path in sorted(top.rglob("*"))
        if path.suffix in (".h", ".cpp", ".cu")
    ]
    texts = [f"{path.relative_to(ROOT)}\n{path.read_text()}" for path in sources]
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    cmake = (ROOT / "CMakeLists.txt").read_text()
    return digest(
        *(version.stdout, sys.version, pybind11.__version__, OPTIONS, cmake),
        *(python_files(), torch_backend()),
        *texts,
    )


def run(*command: object) -> None:
    finished = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PATH": TOOLS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{finished.stdout[-8000:]}")


@functools.cache
def package() -> Path:
    """The folder to put first on a path, built if need be.

    Raises:
        RuntimeError: the compiler refused; with what it said.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:  # another session may be at it
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = FOLDER / "state"
        now = state()
        if stamp.exists() and stamp.read_text() == now:
            return PACKAGE
        cores = len(os.sched_getaffinity(0))
        run(which("cmake"), "-S", ROOT, "-B", FOLDER, "-G", "Ninja", *OPTIONS)
        run(which("cmake"), "--build", FOLDER, "--target", "_core", "--parallel", cores)
        lay_out()
        stamp.write_text(now)
    return PACKAGE


def lay_out() -> None:
    folder = PACKAGE / "ringcomm"
    shutil.rmtree(PACKAGE, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in torch_backend():
        (PACKAGE / path.relative_to(ROOT)).symlink_to(path)
    for path in python_files():
        (folder / path.name).symlink_to(path)
    shutil.copyfile(FOLDER / "_core.so", folder / "_core.so")


def environment(**variables: str) -> dict[str, str]:
    """Of a process with emulated GPUs; start it in the folder ``PACKAGE``, which Python may look into first."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RINGCOMM_", "CUDA_"))}
    path = os.pathsep.join([str(package()), str(ROOT), *filter(None, sys.path)])
    return {**inherited, "PYTHONPATH": path, **variables}


def python(*arguments: str, timeout: float = 60, **variables: str) -> str:
    """What ``python *arguments`` prints with emulated GPUs and these environment variables.

    Raises:
        AssertionError: it failed; with what it printed.
    """
    finished = subprocess.run(
        [sys.executable, *arguments],
        env=environment(**variables),
        cwd=package(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert finished.returncode == 0, f"exit status {finished.returncode}\n{finished.stderr}"
    return finished.stdout


def require() -> None:
    """Builds the package, or skips the test where that cannot be done."""
    if name := missing_tool():
        pytest.skip(f"{name} is not here: it builds ringcomm with emulated GPUs")
    package()
