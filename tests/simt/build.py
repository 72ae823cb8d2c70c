"""Compiles the CUDA sources for the CPU, together with the emulator, into one shared library.

Needs g++ and nothing of CUDA. Objects are kept in build/simt under a name that says all that went into them,
so a second session compiles nothing.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CACHE = ROOT / "build" / "simt"

# No other: clang's instrumentation calls more than harness/hooks.cpp has.
COMPILER = "g++"

KERNELS = (
    *sorted((ROOT / "csrc" / "algo").glob("*_cuda.cu")),
    *sorted((ROOT / "csrc" / "codec").glob("*_cuda.cu")),
    *sorted((ROOT / "csrc" / "reduce").glob("*_cuda.cu")),
    *sorted((HERE / "kernels").glob("*.cu")),
)
# What kernels' host functions call.
HOST = (ROOT / "csrc" / "codec" / "codec.cpp", ROOT / "csrc" / "reduce" / "reduce.cpp")
EMULATOR = tuple(sorted((HERE / "harness").glob("*.cpp")))

COMMON = (
    *(
        "-std=c++17",
        "-g",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
    ),
    *("-Wall", "-Wextra", "-Werror=switch", f"-I{ROOT / 'csrc'}", f"-I{HERE / 'harness'}"),
)
# The sanitizers report every access to functions of their names, which are ours (harness/hooks.cpp).
INSTRUMENTED = (
    *("-O1", "-x", "c++", "-include", "simt/dialect.h", "-Wno-unknown-pragmas"),
    *("-fsanitize=thread", "-fsanitize=alignment,bounds,shift"),
)


def flags(source: Path) -> tuple[str, ...]:
    return (*COMMON, *(INSTRUMENTED if source.suffix == ".cu" else ("-O2",)))


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


@functools.cache
def surroundings() -> str:
    """The compiler's version, and every header."""
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    headers = sorted(path for top in (ROOT / "csrc", HERE) for path in top.rglob("*.h"))
    return digest(version.stdout, *(path.read_text() for path in headers))


def run(*command: object) -> None:
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{finished.stderr[-8000:]}")


Changes = tuple[tuple[str, str], ...]  # from what is there, once, to what comes in its place

# All kernels of a source take long to compile, so that one is left: by source, the file and what changes in it. Of
# reductions it is float32's sum, of codecs bf16 up from float32.
ONE_REDUCTION = (
    "algo/reduction_kernels.h",
    (
        (
            "call.reduce_op == ReduceOp::premul_sum ? row.scale : "
            "row.ops[static_cast<int>(call.reduce_op)]",
            "{Algorithm::template kernel<float, Sum, false>, 1}",
        ),
        ("const Row& row = ReduceRows<Device>::kTable[static_cast<int>(call.dtype)];", ""),
        ("static_assert(ReduceRows<Device>::follows_the_rule());", ""),
        ("for (const Row& row : ReduceRows<Device>::kTable)", "for (const Row& row : {Row{}})"),
    ),
)
ONE_ENCODED = (
    "algo/encoded_cuda.cu",
    (
        ("return encoded_kernel<kUp, Bfloat16Element>;", "return encoded_kernel<kUp, float>;"),
        ("return encoded_kernel<kUp, Float16Element>;", "return encoded_kernel<kUp, float>;"),
        *(
            (
                f"return kernel_from<CodecId::{codec}>(dtype);",
                "return kernel_from<CodecId::bf16>(dtype);",
            )
            for codec in ("fp16", "int8", "int4")
        ),
    ),
)
ONE_KERNEL = {
    "algo/two_shot_cuda.cu": ONE_REDUCTION,
    "algo/one_shot_cuda.cu": ONE_REDUCTION,
    "algo/ring_cuda.cu": ONE_REDUCTION,
    "algo/encoded_cuda.cu": ONE_ENCODED,
}


class Mutant(NamedTuple):
    """A source that is compiled with a mistake in it or in the header of its rounds."""

    source: str
    file: str  # both relative to csrc
    changes: Changes
    one_kernel: bool = False

    def folder(self) -> Path:
        """Where the changed files lie."""
        edits = [(self.file, self.changes)]
        if self.one_kernel:
            edits.append(ONE_KERNEL[self.source])
        texts = {file: (ROOT / "csrc" / file).read_text() for file, _ in edits}
        folder = CACHE / f"mutant-{digest(self, edits, *texts.values())}"
        for file, changes in edits:
            for right, wrong in changes:
                assert texts[file].count(right) == 1, right
                texts[file] = texts[file].replace(right, wrong)
        for file, text in texts.items():
            changed = folder / file
            changed.parent.mkdir(parents=True, exist_ok=True)
            changed.write_text(text)
        return folder

    def flags(self) -> tuple[str, ...]:
        # Under a name of its own, so that the linker does not take the right form for the wrong one.
        return (f"-I{self.folder()}", "-DRoundsOfBlock=BrokenRoundsOfBlock")


def compiled(source: Path, mutant: Mutant | None = None) -> Path:
    how = flags(source)
    if mutant is not None and source == ROOT / "csrc" / mutant.source:
        how = (*mutant.flags(), *how)
        changed = mutant.folder() / mutant.source
        source = changed if changed.exists() else source
    key = digest(surroundings(), COMPILER, how, source.read_text())
    target = CACHE / f"{source.stem}-{key}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.o")
        run(COMPILER, *how, "-c", source, "-o", partial)
        partial.replace(target)
    return target


def library(mutant: Mutant | None = None) -> Path:
    """The path of the shared library, built if need be."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        sources = (*KERNELS, *HOST, *EMULATOR)
        objects = list(pool.map(lambda source: compiled(source, mutant), sources))
    target = CACHE / f"simt-{digest(*objects)}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.so")
        run(COMPILER, "-shared", "-Wl,--no-undefined", *objects, "-o", partial, "-ldl")
        partial.replace(target)
        forget_old({target, *objects})
    return target


def forget_old(in_use: set[Path]) -> None:
    """Removes what is a day old and not part of this build."""
    for path in CACHE.iterdir():
        if path not in in_use and path.stat().st_mtime < time.time() - 86400:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
