"""nvcc takes every CUDA source without a warning for all architectures, and makes kernels that stay in registers and
move 16 bytes at a time."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda_build import budgets
from tests.cuda_build.kernels import (
    FLAGS,
    SOURCES,
    CompilationError,
    Kernel,
    back_end,
    compile_all,
    name_of,
)
from tests.cuda_build.toolkit import ROOT, toolkit

pytestmark = pytest.mark.timeout(1200)  # the first test compiles everything

# Kernels without 16-byte loads or stores, and why.
NARROW_LOADS = {
    r"algo/device_collective_cuda format_kernel": "it writes zeros",
    r"algo/one_shot_cuda one_shot_kernel": "data travels in packets of 8 bytes, each beside its epoch",
    r"codec/block_quantize_cuda decode_kernel.*Lb0E": "what a lane decodes takes 4 or 8 bytes on the wire",
    r"codec/cast_cuda decode_kernel.*EfLb0E": "likewise",
    r"codec/cast_cuda divide_kernel": "the registers of a vector would be spilled around a division",
}
NARROW_STORES = {
    r"algo/one_shot_cuda one_shot_kernel": "as its loads",
    r"codec/cast_cuda divide_kernel": "as its loads",
}


def label(source: str, kernel: Kernel) -> str:
    """What the tables' patterns match: ``codec/cast_cuda decode_kernelI...``."""
    return f"{source} {kernel.name[kernel.name.index(kernel.family) :]}"


def excused(table: dict[str, str], text: str) -> bool:
    return any(re.match(pattern, text) for pattern in table)


@pytest.fixture(scope="module", autouse=True)
def nvcc() -> str:
    if not toolkit().nvcc:
        pytest.skip(f"{toolkit().reason}: the CUDA toolkit compiles what the emulator executes")
    return toolkit().nvcc


@pytest.fixture(params=SOURCES, ids=name_of)
def source(request: pytest.FixtureRequest) -> str:
    return name_of(request.param)


@pytest.fixture
def kernels(source: str) -> list[Kernel]:
    found = compile_all()[source]
    if isinstance(found, CompilationError):
        pytest.fail(str(found), pytrace=False)
    return found


def test_it_compiles_without_a_warning_for_every_architecture(
    source: str, kernels: list[Kernel]
) -> None:
    if "__global__" in (ROOT / "csrc" / f"{source}.cu").read_text():
        assert {kernel.arch for kernel in kernels} == set(toolkit().archs)
    names = {arch: {k.name for k in kernels if k.arch == arch} for arch in toolkit().archs}
    assert len({frozenset(each) for each in names.values()}) == 1


def test_nothing_lies_on_the_stack(source: str, kernels: list[Kernel]) -> None:
    wrong = []
    for kernel in kernels:
        text = label(source, kernel)
        if kernel.stack + kernel.spills > 0:
            wrong.append(f"sm_{kernel.arch} {text}: stack {kernel.stack}, spills {kernel.spills}")
        if kernel.local:
            wrong.append(f"sm_{kernel.arch} {text}: local memory (LDL, STL) in its machine code")
    assert wrong == []


def test_registers_are_within_the_committed_budgets(source: str, kernels: list[Kernel]) -> None:
    release, budget = budgets.read()
    if release != toolkit().release:
        pytest.skip(f"the budgets are those of CUDA {release}, this is {toolkit().release}")
    changed = budgets.differences(budget, source, kernels)
    assert not changed, "\n".join([f"{source}:", *changed, budgets.HOW])


def test_memory_is_moved_16_bytes_at_a_time(source: str, kernels: list[Kernel]) -> None:
    if not toolkit().disassembler:
        pytest.skip("nvdisasm is not here: pip install nvidia-cuda-nvdisasm")
    wrong = []
    for kernel in kernels:
        text = label(source, kernel)
        if kernel.wide_load is False and not excused(NARROW_LOADS, text):
            wrong.append(f"sm_{kernel.arch} {text}: no 16-byte load")
        if kernel.wide_store is False and not excused(NARROW_STORES, text):
            wrong.append(f"sm_{kernel.arch} {text}: no 16-byte store")
        if kernel.cut_store:
            wrong.append(f"sm_{kernel.arch} {text}: a 16-byte store is cut: store_run, or kWhole")
    assert wrong == []


def test_no_excuse_is_left_over() -> None:
    """Every pattern above still means a kernel that needs it."""
    narrow_loads, narrow_stores = set(), set()
    for source, kernels in compile_all().items():
        for kernel in kernels if isinstance(kernels, list) else []:
            text = label(source, kernel)
            if kernel.wide_load is False:
                narrow_loads.add(text)
            if kernel.wide_store is False:
                narrow_stores.add(text)
    for table, needed in ((NARROW_LOADS, narrow_loads), (NARROW_STORES, narrow_stores)):
        if toolkit().disassembler:
            for pattern in table:
                assert any(re.match(pattern, text) for text in needed), pattern


# ---- The gate itself -------------------------------------------------------------------------------


def made_of(tmp_path: Path, text: str, arch: int) -> list[Kernel]:
    source = tmp_path / "made.cu"
    source.write_text(text)
    ptx = tmp_path / "made.ptx"
    command = [toolkit().nvcc, "-ptx", f"-arch=compute_{arch}", str(source), "-o", str(ptx)]
    subprocess.run(command, check=True, capture_output=True)
    return back_end(ptx, arch)


def test_a_stack_would_be_noticed(tmp_path: Path) -> None:
    (kernel,) = made_of(
        tmp_path,
        "__global__ void indexed(int* out, const int* in) {\n"
        "  int kept[8];\n"
        "  for (int i = 0; i < 8; ++i) kept[in[i] & 7] = i;\n"
        "  out[0] = kept[in[0] & 7];\n"
        "}\n",
        toolkit().newest[-1],
    )
    assert kernel.stack > 0
    assert kernel.family == "indexed"
    if toolkit().disassembler:
        assert kernel.local is True
        assert kernel.wide_load is kernel.wide_store is False


def test_wide_accesses_would_be_seen(tmp_path: Path) -> None:
    if not toolkit().disassembler:
        pytest.skip("nvdisasm is not here: pip install nvidia-cuda-nvdisasm")
    for arch in toolkit().newest:
        loads, stores = made_of(
            tmp_path,
            "namespace a { namespace {\n"
            "template <typename T> __global__ void loads(int* out, const T* in) {\n"
            "  const T all = in[threadIdx.x]; out[threadIdx.x] = all.x + all.y + all.z + all.w;\n"
            "}\n"
            "template <typename T> __global__ void stores(T* out, const int* in) {\n"
            "  const int i = in[threadIdx.x]; out[threadIdx.x] = T{i, i, i, i};\n"
            "}\n"
            "template __global__ void loads<int4>(int*, const int4*);\n"
            "template __global__ void stores<int4>(int4*, const int*);\n"
            "}}\n",
            arch,
        )
        if loads.family != "loads":
            loads, stores = stores, loads
        assert (loads.family, loads.wide_load, loads.wide_store) == ("loads", True, False)
        assert (stores.family, stores.wide_load, stores.wide_store) == ("stores", False, True)
        assert "GLOBAL__N__" not in loads.name


def test_a_store_that_is_cut_would_be_seen(tmp_path: Path) -> None:
    if not toolkit().disassembler:
        pytest.skip("nvdisasm is not here: pip install nvidia-cuda-nvdisasm")
    body = (
        "__global__ void run(float* out, const float4* in, long num_elems) {\n"
        "  const long begin = 4 * threadIdx.x;\n"
        "  const float4 all = in[threadIdx.x];\n"
        "  const float run[4] = {all.x, all.y, all.z, all.w};\n"
        "  STORE\n"
        "}\n"
    )
    stores = {
        False: "if (begin + 4 <= num_elems) *(float4*)(out + begin) = all;",
        True: "*(float2*)(out + begin) = float2{run[0], run[1]};\n"
        "  if (begin + 2 < num_elems) out[begin + 2] = run[2];\n"
        "  if (begin + 3 < num_elems) out[begin + 3] = run[3];",
    }
    for arch in toolkit().newest:
        for cut, store in stores.items():
            (kernel,) = made_of(tmp_path, body.replace("STORE", store), arch)
            assert kernel.cut_store is cut, (arch, store)


def test_more_registers_than_the_budget_are_reported() -> None:
    kernel = Kernel("_ZN1a10hop_kernelIfEEvv", 90, 33, 0, 0, 0)
    budget = {"source": {"hop_kernel": {"sm_90": 32}}}
    (said,) = budgets.differences(budget, "source", [kernel])
    assert said == f"hop_kernel needs 33 registers on sm_90, not 32 ({kernel.name})"
    enough = dataclasses.replace(kernel, registers=32)
    assert budgets.differences(budget, "source", [enough]) == []
    assert budgets.differences({}, "source", [kernel]) == ["hop_kernel is new"]
    assert budgets.differences(budget, "source", []) == ["hop_kernel is gone"]


@pytest.mark.parametrize(
    "source", sorted((ROOT / "tests" / "simt" / "kernels").glob("*.cu")), ids=lambda path: path.stem
)
def test_the_kernels_of_the_emulators_tests_are_cuda(source: Path, tmp_path: Path) -> None:
    """What the emulator accepts in them is what nvcc accepts."""
    harness = ROOT / "tests" / "simt" / "harness"
    command = [toolkit().nvcc, *FLAGS, f"-arch=sm_{toolkit().archs[-1]}", f"-I{harness}", "-cubin"]
    command += [str(source), "-o", str(tmp_path / "kernels.cubin")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
