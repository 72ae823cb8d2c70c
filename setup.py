"""Builds ringcomm._core with CMake and Ninja, and ringcomm._c10d where torch is installed.

Needs no network, and torch only for _c10d: it is found in the environment that ringcomm goes into, also
when pip builds in isolation, and never imported.

Environment variables, all optional:
  CC, CXX                    the C++ compiler (CC=clang means clang++)
  CUDA_HOME or CUDA_PATH     the CUDA toolkit; otherwise nvcc on PATH, then /usr/local/cuda, then that of the
                             package nvidia-cuda-nvcc (requirements-cuda.txt)
  TORCH_CUDA_ARCH_LIST       such as "8.0;9.0+PTX" or "native"; the default depends on the toolkit
  RINGCOMM_SKIP_CUDA_BUILD=1 build for the CPU only
  RINGCOMM_SKIP_TORCH_BUILD=1  no _c10d; it is compiled on first use
  FORCE_CUDA=1               fail if CUDA cannot be built
  MAX_JOBS, NVCC_THREADS     parallel compilations; threads of each nvcc
  DEBUG=1                    no optimisation, debug information
  RINGCOMM_FORCE_BUILD=1     throw away what an earlier build left
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
OLDEST_CUDA = (12, 4)
OLDEST_TORCH = (2, 11)
BYTES_PER_JOB = 3 * 10**9


def enabled(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in ("1", "true", "on", "yes"):
        return True
    if value in ("", "0", "false", "off", "no"):
        return False
    raise SetupError(f"{name} must be 1 or 0, not {os.environ[name]!r}")


def positive_int(name: str) -> int | None:
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not value.isdecimal() or int(value) == 0:
        raise SetupError(f"{name} must be a whole number >= 1, not {value!r}")
    return int(value)


def output_of(*command: str) -> str:
    """Standard output of a command, or "" if it cannot be run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def find_tool(name: str) -> str:
    """cmake or ninja: from the Python environment (even when it is not on PATH), else from PATH."""
    scripts = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    found = shutil.which(name, path=scripts)
    if found is None:
        raise SetupError(
            f"{name} was not found: run `pip install {name}`, or install without --no-build-isolation"
        )
    return found


def find_cxx() -> str:
    """The C++ compiler as CMake takes it from the CXX variable."""
    cxx = os.environ.get("CXX", "").strip()
    cc = os.environ.get("CC", "").strip()
    if not cxx and cc:  # gcc-12 -> g++-12, /opt/bin/clang -> /opt/bin/clang++
        cxx = re.sub(r"gcc(?=[^/\s]*$)", "g++", re.sub(r"clang(?=[^/\s]*$)", "clang++", cc))
        if cxx == cc:
            cxx = ""  # some other cc: its C++ twin has no rule
    if cxx:
        if shutil.which(shlex.split(cxx)[0]) is None:
            raise SetupError(
                f"the C++ compiler {cxx!r} (from {'CXX' if os.environ.get('CXX') else 'CC'}) was not found"
            )
        return cxx
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise SetupError("no C++ compiler was found: install g++ (11 or newer) or set CXX")


def find_pybind11() -> str:
    """The include folder of the pybind11 package, else of the copy inside torch (torch is not imported)."""
    candidates = []
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            candidates.append(Path(spec.origin).parent / "include")
    candidates.append(Path(sysconfig.get_path("purelib")) / "torch" / "include")
    for include in candidates:
        if (include / "pybind11" / "pybind11.h").is_file():
            return str(include)
    raise SetupError(
        "pybind11 was not found: run `pip install pybind11`, or install without --no-build-isolation"
    )


@dataclasses.dataclass
class Torch:
    """The torch package to build _c10d against (folder is None when there is none, `reason` says why)."""

    folder: Path | None = None
    version: str = ""
    reason: str = ""

    def describe(self) -> str:
        return f"{self.version} ({self.folder})" if self.folder else f"no: {self.reason}"


def find_torch() -> Torch:
    if enabled("RINGCOMM_SKIP_TORCH_BUILD"):
        return Torch(reason="RINGCOMM_SKIP_TORCH_BUILD=1")
    # find_spec: without build isolation. sysconfig names the environment that pip installs into
    # even when it builds in an isolated one.
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    candidates += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    for folder in candidates:
        try:
            text = (folder / "version.py").read_text()
        except OSError:
            continue
        found = re.search(r"^__version__ = '((\d+)\.(\d+)[^']*)'", text, re.MULTILINE)
        if found is None:
            return Torch(reason=f"{folder}/version.py tells no version")
        if (int(found[2]), int(found[3])) < OLDEST_TORCH:
            return Torch(
                reason=f"torch {found[1]} is older than {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"
            )
        header = folder / "include" / "torch" / "csrc" / "distributed" / "c10d" / "Backend.hpp"
        if not header.is_file():
            return Torch(reason=f"torch {found[1]} in {folder} has no C++ headers")
        return Torch(folder, found[1])
    return Torch(
        reason="no torch in this environment; the backend is compiled on first use. uv needs --no-build-isolation"
    )


@dataclasses.dataclass
class Cuda:
    """The CUDA toolkit to build with (nvcc is empty when there is none to use, `reason` says why)."""

    nvcc: str = ""
    version: tuple[int, int] = (0, 0)
    # As CMake names them: 80-real, 90-virtual.
    archs: list[str] = dataclasses.field(default_factory=list)
    reason: str = ""


def find_cuda() -> Cuda:
    force = enabled("FORCE_CUDA")
    if enabled("RINGCOMM_SKIP_CUDA_BUILD"):
        if force:
            raise SetupError(
                "FORCE_CUDA=1 and RINGCOMM_SKIP_CUDA_BUILD=1 contradict each other: unset one"
            )
        return Cuda(reason="RINGCOMM_SKIP_CUDA_BUILD=1")
    cuda = find_nvcc()
    if cuda.nvcc:
        cuda.archs = cuda_archs(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), cuda)
    elif force:
        raise SetupError(f"FORCE_CUDA=1, but CUDA cannot be built: {cuda.reason}")
    return cuda


def find_nvcc() -> Cuda:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            nvcc = shutil.which("nvcc", path=str(Path(os.environ[name]) / "bin"))
            where = f"in bin/ of {name}={os.environ[name]}"
            break
    else:
        site = Path(sysconfig.get_path("purelib"))  # of the environment that pip installs into
        packaged = sorted(map(str, site.glob("nvidia/cu*/bin")), reverse=True)
        folders = ["/usr/local/cuda/bin", *packaged]
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))
        where = "on PATH or in /usr/local/cuda/bin; set CUDA_HOME, or run `pip install nvidia-cuda-nvcc`"
    if nvcc is None:
        return Cuda(reason=f"no nvcc {where}")
    release = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if release is None:
        return Cuda(reason=f"`{nvcc} --version` did not tell a release")
    version = (int(release[1]), int(release[2]))
    if version < OLDEST_CUDA:
        return Cuda(
            reason=f"{nvcc} is CUDA {version[0]}.{version[1]}, older than {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}"
        )
    return Cuda(nvcc, version)


def add_library_path(toolkit: Path) -> None:
    """nvcc links with what lies in lib64; its package has it in lib."""
    if (toolkit / "lib" / "libcudart_static.a").is_file() and not (toolkit / "lib64").exists():
        others = os.environ.get("LIBRARY_PATH", "").split(os.pathsep)
        os.environ["LIBRARY_PATH"] = os.pathsep.join([str(toolkit / "lib"), *filter(None, others)])


def cuda_archs(spec: str, cuda: Cuda) -> list[str]:
    """TORCH_CUDA_ARCH_LIST as CMAKE_CUDA_ARCHITECTURES; a fixed list for the toolkit when it is empty."""
    entries = spec.replace(";", " ").split()
    if not entries:
        entries = ["8.0", "8.6", "8.9", "9.0"] + (
            ["10.0", "12.0"] if cuda.version >= (12, 8) else []
        )
        entries[-1] += "+PTX"
    if [entry.lower() for entry in entries] == ["native"]:
        entries = sorted(
            set(output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split())
        )
        if not entries:
            raise SetupError(
                "TORCH_CUDA_ARCH_LIST=native, but nvidia-smi shows no GPU here: name the architectures"
            )
    known = set(re.findall(r"compute_(\d+)", output_of(cuda.nvcc, "--list-gpu-arch")))
    archs = []
    for entry in entries:
        parsed = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if parsed is None:
            raise SetupError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is not an architecture; write them like '8.0;9.0+PTX', or 'native'"
            )
        number = parsed[1] + parsed[2]
        if known and number not in known:
            raise SetupError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is unknown to CUDA {cuda.version[0]}.{cuda.version[1]} ({cuda.nvcc}), "
                f"which knows {', '.join(sorted((f'{k[:-1]}.{k[-1]}' for k in known), key=float))}"
            )
        archs.append(f"{number}{parsed[3]}-real")
        if parsed[4]:
            archs.append(f"{number}{parsed[3]}-virtual")
    return list(dict.fromkeys(archs))


def job_count() -> int:
    jobs = positive_int("MAX_JOBS")
    if jobs is not None:
        return jobs
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        available = None
    by_memory = int(available[1]) * 1024 // BYTES_PER_JOB if available else 1
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


def git_commit() -> str:
    """The commit of this checkout, or "" outside of one (an sdist, even one unpacked inside another repository)."""
    if output_of("git", "-C", str(ROOT), "rev-parse", "--show-toplevel") != str(ROOT):
        return ""
    commit = output_of("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    dirty = output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if dirty else commit


def summary_text(summary: dict[str, object]) -> str:
    lines = ["ringcomm build summary"]
    lines += [f"  {key.replace('_', ' '):<12} {value}" for key, value in summary.items()]
    return "\n".join(lines)


class BuildPython(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # a module deleted since the last build must not reach the wheel
            shutil.rmtree(Path(self.build_lib) / "ringcomm", ignore_errors=True)
        super().run()
        if not self.editable_mode:
            self.copy_adapter_sources()

    def adapter_sources(self) -> list[tuple[Path, Path]]:
        """(file, copy in the wheel) of what compiling _c10d on first use needs; see ringcomm/adapter.py."""
        files = [ROOT / "csrc/bind/c_table.h", *sorted((ROOT / "csrc/torch").iterdir())]
        target = Path(self.build_lib) / "ringcomm" / "_src"
        return [(path, target / path.relative_to(ROOT / "csrc")) for path in files]

    def copy_adapter_sources(self) -> None:
        for path, copy in self.adapter_sources():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        copies = [] if self.editable_mode else [str(copy) for _, copy in self.adapter_sources()]
        return [*super().get_outputs(include_bytecode), *copies]


class BuildCore(build_ext):
    """Runs CMake and Ninja; writes the extensions and _build_info.json where setuptools wants them."""

    def run(self) -> None:
        cmake, ninja, cxx, cuda = find_tool("cmake"), find_tool("ninja"), find_cxx(), find_cuda()
        torch = find_torch()
        jobs, build_type = job_count(), "Debug" if enabled("DEBUG") else "Release"
        cuda_version = f"{cuda.version[0]}.{cuda.version[1]} ({cuda.nvcc})"
        on_x86 = platform.machine() in ("x86_64", "AMD64")
        summary: dict[str, object] = {
            "version": self.distribution.get_version(),
            "git_commit": git_commit() or "unknown (not a git checkout)",
            "python": f"{platform.python_version()} ({sys.executable})",
            "compiler": (output_of(*shlex.split(cxx), "--version").splitlines() or [cxx])[0],
            "build_type": build_type,
            "simd_levels": "baseline avx2 avx512" if on_x86 else "baseline",
            "cuda": cuda_version if cuda.nvcc else f"no: {cuda.reason}",
            "cuda_archs": " ".join(cuda.archs) or "none",
            "torch": torch.describe(),
            "jobs": jobs,
        }
        print(summary_text(summary), flush=True)

        options = {
            "CMAKE_BUILD_TYPE": build_type,
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "RC_PYBIND11_INCLUDE": find_pybind11(),
            "RC_CUDA": "ON" if cuda.nvcc else "OFF",
            "RC_TORCH": str(torch.folder or ""),
        }
        if cuda.nvcc:
            options["CMAKE_CUDA_COMPILER"] = cuda.nvcc
            options["CMAKE_CUDA_ARCHITECTURES"] = ";".join(cuda.archs)
            options["CMAKE_CUDA_HOST_COMPILER"] = shutil.which(shlex.split(cxx)[-1]) or cxx
            options["RC_NVCC_THREADS"] = str(positive_int("NVCC_THREADS") or "")
            add_library_path(Path(cuda.nvcc).parent.parent)
        build = self.configure(
            cmake, cxx, [f"-D{name}={value}" for name, value in options.items()], torch.version
        )
        self.build_target(cmake, build, "_core", jobs)
        self.install(build, "_core")
        if torch.folder is not None:
            try:
                self.build_target(cmake, build, "_c10d", jobs)
            except SetupError as error:
                # Everything but the torch backend works, which says the same when it is used.
                print(f"WARNING: {error}", flush=True)
                summary["torch"] = f"no: it did not compile against torch {torch.describe()}"
                torch.folder = None
        self.install(build, "_c10d" if torch.folder is not None else None)
        info = Path(self.get_ext_fullpath("ringcomm._core")).parent / "_build_info.json"
        info.write_text(json.dumps(summary, indent=2) + "\n")

    def install(self, build: Path, name: str | None) -> None:
        """Puts an extension in its place; without a name, removes the _c10d of an earlier build."""
        target = Path(self.get_ext_fullpath(f"ringcomm.{name or '_c10d'}"))
        target.parent.mkdir(parents=True, exist_ok=True)
        if name is None:
            target.unlink(missing_ok=True)
            return
        # Replaced, not overwritten: a running process may have the old file mapped.
        new = target.with_name(target.name + ".new")
        shutil.copyfile(build / f"{name}.so", new)
        os.replace(new, target)

    def configure(self, cmake: str, cxx: str, options: list[str], torch_version: str) -> Path:
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # Ninja rebuilds what changed in the sources; any other change starts afresh.
        flags = [os.environ.get(name, "") for name in ("CXXFLAGS", "CUDAFLAGS", "LDFLAGS")]
        key = json.dumps([cmake, cxx, *flags, str(ROOT), *options, torch_version])
        key_file = build / "configured_with.json"
        if enabled("RINGCOMM_FORCE_BUILD") or not key_file.is_file() or key_file.read_text() != key:
            shutil.rmtree(build, ignore_errors=True)
        if not key_file.is_file():
            self.run_tool(
                [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options],
                "configuring ringcomm",
                {**os.environ, "CXX": cxx},
            )
            key_file.write_text(key)
        return build

    def build_target(self, cmake: str, build: Path, name: str, jobs: int) -> None:
        self.run_tool(
            [cmake, "--build", str(build), "--target", name, "--parallel", str(jobs)],
            f"building ringcomm.{name}",
            {**os.environ},
        )

    def run_tool(self, command: list[str], what: str, environment: dict[str, str]) -> None:
        try:
            subprocess.run(command, check=True, env=environment)
        except subprocess.CalledProcessError as error:
            raise SetupError(f"{what} failed (see above): {shlex.join(error.cmd)}") from None

    def get_outputs(self) -> list[str]:
        outputs = [path for path in super().get_outputs() if Path(path).exists()]
        folder = Path(self.get_ext_fullpath("ringcomm._core")).parent
        return [*outputs, str(folder / "_build_info.json")]


if __name__ == "__main__":
    # Older ones reject pyproject.toml with a riddle.
    if int(setuptools.__version__.split(".")[0]) < 77:
        have = setuptools.__version__
        raise SystemExit(f"ringcomm needs setuptools >= 77, not {have}: pip install -U setuptools")
    setup(
        ext_modules=[Extension(f"ringcomm.{name}", sources=[]) for name in ("_core", "_c10d")],
        cmdclass={"build_ext": BuildCore, "build_py": BuildPython},
    )
