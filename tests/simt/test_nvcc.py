"""The real compiler takes every CUDA source without a warning, and makes kernels that stay in registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.simt.build import HERE, ROOT

SOURCES = sorted((ROOT / "csrc").rglob("*_cuda.cu"))
ARCHITECTURE = "sm_90"
# As in CMakeLists.txt; sizes and registers are those that ptxas prints.
FLAGS = (
    *("-std=c++17", "--fmad=false", "--Werror=all-warnings", f"-arch={ARCHITECTURE}"),
    *("-Xcompiler=-Wall,-Wextra,-ffp-contract=off", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"),
)
MOST_REGISTERS = 64  # four blocks of 256 threads on a multiprocessor
MOST_OF_COLLECTIVES = 128  # one block of 512 threads
# Kernels without 16-byte accesses, and why.
NARROW = {
    "one_shot_kernel": "data travels in packets of 8 bytes, each beside its epoch",
    "divide_kernel": "the registers of a vector would be spilled around a division",
}

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '\w+'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def compile_for_gpu(source: Path, folder: Path) -> tuple[str, str]:
    """What ptxas says, and the PTX."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here: the CUDA toolkit compiles what the emulator executes")
    command = ["nvcc", *FLAGS, "--keep", f"--keep-dir={folder}"]
    command += ["-c", str(source), "-o", str(folder / "object.o")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stderr, (folder / f"{source.stem}.ptx").read_text()


def resources(log: str) -> dict[str, tuple[int, int]]:
    """By kernel: bytes of stack and spills together, registers."""
    found = {}
    parts = ENTRY.split(log)[1:]
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        stack = STACK.search(part)
        registers = REGISTERS.search(part)
        assert stack and registers, part
        found[name] = (sum(map(int, stack.groups())), int(registers.group(1)))
    return found


def bodies(ptx: str) -> dict[str, str]:
    """The code of each kernel."""
    parts = re.split(r"\.entry (\w+)\(", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_need_neither_stack_nor_spills(source: Path, tmp_path: Path) -> None:
    log, ptx = compile_for_gpu(source, tmp_path)
    kernels = resources(log)
    code = bodies(ptx)
    assert set(kernels) == set(code)
    assert bool(kernels) == ("__global__" in source.read_text())
    most = MOST_OF_COLLECTIVES if source.parent.name == "algo" else MOST_REGISTERS
    wrong = {name: spent for name, spent in kernels.items() if spent[0] or spent[1] > most}
    assert wrong == {}
    narrow = {
        name
        for name, body in code.items()
        if not re.search(r"\b(ld|st)\.global(\.nc)?\.v(4\.[ubf]32|2\.[ubf]64)", body)
    }
    assert not {name for name in narrow if not any(kernel in name for kernel in NARROW)}


def test_a_stack_would_be_noticed(tmp_path: Path) -> None:
    source = tmp_path / "stack.cu"
    source.write_text(
        "__global__ void indexed(int* out, const int* in) {\n"
        "  int kept[8];\n"
        "  for (int i = 0; i < 8; ++i) kept[in[i] & 7] = i;\n"
        "  out[0] = kept[in[0] & 7];\n"
        "}\n"
    )
    log, _ = compile_for_gpu(source, tmp_path)
    ((stack, _),) = resources(log).values()
    assert stack > 0


@pytest.mark.parametrize(
    "source", sorted((HERE / "kernels").glob("*.cu")), ids=lambda path: path.stem
)
def test_the_kernels_of_these_tests_are_cuda(source: Path, tmp_path: Path) -> None:
    """What the emulator accepts in them is what nvcc accepts."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here: the CUDA toolkit compiles what the emulator executes")
    command = ["nvcc", *FLAGS, f"-I{HERE / 'harness'}", "-cubin", str(source)]
    command += ["-o", str(tmp_path / "kernels.cubin")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
