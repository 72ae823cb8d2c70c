"""What the compiler makes of every kernel: registers, stack, spills, and which accesses the machine code has.

Compiled as setup.py does, for the same architectures; a front end's PTX serves all its architectures. Results are kept
in build/cuda_build under a name that says all that went into them, so a second session compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cuda_build.toolkit import ROOT, toolkit

CACHE = ROOT / "build" / "cuda_build"
SOURCES = tuple(sorted((ROOT / "csrc").rglob("*_cuda.cu")))

# As in CMakeLists.txt, and the host's warnings are errors too.
FLAGS = (
    *("-std=c++17", "--fmad=false", "--Werror=all-warnings", f"-I{ROOT / 'csrc'}"),
    "-Xcompiler=-Wall,-Wextra,-Werror,-ffp-contract=off",
)

INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '\w+'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
WIDE_LOAD = re.compile(r"\bLDG?\.\S*\b(128|256)\b")
WIDE_STORE = re.compile(r"\bSTG?\.\S*\b(128|256)\b")
STORE = re.compile(
    r"\bSTG\.E(\.64|\.128)? (?:desc\[\w+\])?\[(R\d+)[^]+]*(\+UR\d+)?(?:\+(-?0x[0-9a-f]+))?\]"
)
LOCAL = re.compile(r"\b(LDL|STL)\b")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One instance of a kernel on one architecture; sizes in bytes. What only the machine code tells is None where it
    was not disassembled."""

    name: str  # mangled, without what changes with every compilation
    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    wide_load: bool | None = None
    wide_store: bool | None = None
    cut_store: bool | None = None
    local: bool | None = None

    @property
    def family(self) -> str:
        """The name in the source."""
        return family_of(self.name)


class CompilationError(Exception):
    """What the compiler said."""


def family_of(mangled: str) -> str:
    """``hop_kernel`` of ``_ZN8ringcomm4cuda12_GLOBAL__N_110hop_kernelIfE...``."""
    rest = re.sub(r"^_ZN?K?", "", mangled)
    name = ""
    while rest[:1].isdigit():
        digits = re.match(r"\d+", rest)
        assert digits is not None
        end = len(digits[0]) + int(digits[0])
        name, rest = rest[len(digits[0]) : end], rest[end:]
    return name or mangled


def stable(mangled: str) -> str:
    """Without what the name of the source's unnamed namespace has of this one compilation."""
    found = re.search(r"(\d+)_GLOBAL__N__", mangled)
    if found is None:
        return mangled
    end = found.end(1) + int(found[1])
    return f"{mangled[: found.start()]}12_GLOBAL__N_1{mangled[end:]}"


def run(*command: object) -> str:
    """Standard error of a command; its standard output as well if it fails."""
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if finished.returncode != 0:
        said = (finished.stderr + finished.stdout)[-8000:]
        raise CompilationError(f"{' '.join(map(str, command))}\n{said}")
    return finished.stderr


def front_end(source: Path, folder: Path) -> dict[int, Path]:
    """PTX by architecture; the host's half of the source is compiled too."""
    archs = toolkit().front_ends
    code = (f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs)
    keep = ("--keep", f"--keep-dir={folder}", "--threads", len(archs))
    run(toolkit().nvcc, *FLAGS, *code, *keep, "-c", source, "-o", folder / "object.o")
    if len(archs) == 1:  # then nvcc leaves the architecture out of the name
        return {archs[0]: next(folder.glob("*.ptx"))}
    return {arch: next(folder.glob(f"*compute_{arch}.ptx")) for arch in archs}


def back_end(ptx: Path, arch: int) -> list[Kernel]:
    """The kernels of a file for one architecture."""
    code = ptx.with_name(f"sm_{arch}.cubin")
    log = run(
        toolkit().nvcc,
        *("-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", "--Werror=all-warnings", ptx, "-o", code),
    )
    kernels = [Kernel(name, arch, *numbers) for name, numbers in resources(log).items()]
    if toolkit().disassembler and kernels and arch in toolkit().newest:
        bodies = machine_code(code)
        kernels = [dataclasses.replace(k, **accesses(bodies[k.name])) for k in kernels]
    return [dataclasses.replace(k, name=stable(k.name)) for k in kernels]


def resources(log: str) -> dict[str, tuple[int, int, int, int]]:
    """By kernel: registers, and bytes of stack, spills and shared memory."""
    found = {}
    parts = ENTRY.split(log)[1:]
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        stack, registers, shared = STACK.search(part), REGISTERS.search(part), SHARED.search(part)
        assert stack and registers, part
        spills = int(stack[2]) + int(stack[3])
        found[name] = (int(registers[1]), int(stack[1]), spills, int(shared[1]) if shared else 0)
    return found


def machine_code(cubin: Path) -> dict[str, str]:
    """SASS by kernel."""
    finished = subprocess.run(
        [toolkit().disassembler, "-c", str(cubin)], capture_output=True, text=True
    )
    if finished.returncode != 0:
        raise CompilationError(f"nvdisasm {cubin}: {finished.stderr}")
    parts = re.split(r"^\.text\.(\w+):$", finished.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def accesses(sass: str) -> dict[str, bool]:
    return {
        "wide_load": bool(WIDE_LOAD.search(sass)),
        "wide_store": bool(WIDE_STORE.search(sass)),
        "cut_store": has_cut_stores(sass),
        "local": bool(LOCAL.search(sass)),
    }


def has_cut_stores(sass: str) -> bool:
    """Whether 16 bytes are stored as 8 + 4 + 4, or as 4 times 4 more often than in one piece: the compiler does that to
    a 16-byte store beside a branch that stores its elements one by one."""
    stores = [
        (address, 4 if width is None else int(width[1:]) // 8, int(offset or "0", 16))
        for width, *address, offset in (found.groups() for found in STORE.finditer(sass))
    ]
    whole = sum(num_bytes == 16 for _, num_bytes, _ in stores)
    quarters = 0
    for i, (address, num_bytes, offset) in enumerate(stores):
        near = [
            place - offset
            for base, width, place in stores[max(0, i - 4) : i + 8]
            if base == address and width == 4
        ]
        if num_bytes == 8 and 0 not in near and any(d in near for d in (-8, -4, 8)):
            return True
        quarters += num_bytes == 4 and -4 not in near and all(d in near for d in (4, 8, 12))
    return quarters > whole


@functools.cache
def surroundings() -> str:
    """The tools, and how they are called."""
    about = toolkit()
    tools = (about.release, str(about.archs), Path(about.disassembler).name)
    return "\0".join((*tools, *FLAGS, Path(__file__).read_text()))


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text()


def sources_of(source: Path) -> list[Path]:
    """The source and all headers of csrc that it includes."""
    found: list[Path] = []
    left = [source]
    while left:
        path = left.pop()
        if path not in found and path.is_file():
            found.append(path)
            left += [ROOT / "csrc" / name for name in INCLUDE.findall(text_of(path))]
    return sorted(found)


def cached_results(source: Path) -> Path:
    text = "\0".join([surroundings(), *(f"{p}\0{text_of(p)}" for p in sources_of(source))])
    return CACHE / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


@functools.cache
def compile_all() -> dict[str, list[Kernel] | CompilationError]:
    """Kernels by source, or what the compiler said against it. The processors work side by side."""
    CACHE.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Kernel] | CompilationError] = {}
    missing = []
    for source in SOURCES:
        results = cached_results(source)
        if results.exists():
            rows = json.loads(results.read_text())
            found[name_of(source)] = [Kernel(**row) for row in rows]
        else:
            missing.append(source)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as top, ThreadPoolExecutor(cores) as pool:
        fronts = {}
        for source in sorted(missing, key=lambda path: -path.stat().st_size):
            folder = Path(top) / name_of(source).replace("/", "-")
            folder.mkdir()
            fronts[source] = pool.submit(front_end, source, folder)
        backs = {}
        for source, front in fronts.items():
            try:
                ptx = front.result()
            except CompilationError as error:
                found[name_of(source)] = error
                continue
            backs[source] = [
                pool.submit(back_end, ptx[toolkit().front_end_of(arch)], arch)
                for arch in toolkit().archs
            ]
        for source, halves in backs.items():
            try:
                kernels = [kernel for half in halves for kernel in half.result()]
            except CompilationError as error:
                found[name_of(source)] = error
                continue
            found[name_of(source)] = kernels
            keep(cached_results(source), kernels)
    forget_old()
    return found


def keep(results: Path, kernels: list[Kernel]) -> None:
    partial = results.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([dataclasses.asdict(kernel) for kernel in kernels]))
    partial.replace(results)


def name_of(source: Path) -> str:
    """``codec/cast_cuda``."""
    return str(source.relative_to(ROOT / "csrc").with_suffix(""))


def forget_old() -> None:
    """Removes results that are a day old and not of today's sources."""
    in_use = {cached_results(source) for source in SOURCES}
    for path in CACHE.iterdir():
        if path not in in_use and path.stat().st_mtime < time.time() - 86400:
            path.unlink(missing_ok=True)


def table(found: dict[str, list[Kernel]]) -> dict[str, dict[str, dict[str, int]]]:
    """The most registers by source, family and architecture."""
    most: dict[str, dict[str, dict[str, int]]] = {}
    for source, kernels in sorted(found.items()):
        for kernel in kernels:
            row = most.setdefault(source, {}).setdefault(kernel.family, {})
            arch = f"sm_{kernel.arch}"
            row[arch] = max(row.get(arch, 0), kernel.registers)
    return {source: dict(sorted(rows.items())) for source, rows in most.items()}
