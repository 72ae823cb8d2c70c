"""setup.py's switches: what they choose, and what a wrong one says."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ringcomm_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def fake_nvcc(folder: Path, release: str, archs: str = "80 86 89 90 100 120") -> Path:
    """A CUDA_HOME whose nvcc answers the two questions that setup.py asks."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    lines = "\\n".join(f"compute_{arch}" for arch in archs.split())
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V"\n'
        f"[ \"$1\" = --list-gpu-arch ] && printf '{lines}\\n'\nexit 0\n"
    )
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("8.0;9.0+PTX", "80-real 90-real 90-virtual"),
        ("8.0 9.0", "80-real 90-real"),
        ("9.0a", "90a-real"),
        ("10.0;10.0", "100-real"),
        ("", "80-real 86-real 89-real 90-real 100-real 120-real 120-virtual"),
    ],
)
def test_arch_list_is_translated(
    setup_py: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    expected: str,
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, "12.8")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", spec)
    assert " ".join(setup_py.find_cuda().archs) == expected


def test_nvcc_of_its_python_package_is_the_last_resort(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit = fake_nvcc(tmp_path / "nvidia" / "cu13", "13.0")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(tmp_path))
    # Nothing on PATH, nothing in /usr/local/cuda.
    monkeypatch.setattr(
        setup_py.shutil,
        "which",
        lambda name, path=None, which=shutil.which: (
            which(name, path=path.split(":", 1)[1]) if path else None
        ),
    )
    assert setup_py.find_nvcc().nvcc == str(toolkit / "bin" / "nvcc")
    # Its libraries lie where nvcc does not look.
    monkeypatch.setenv("LIBRARY_PATH", "/elsewhere")
    setup_py.add_library_path(toolkit)
    assert os.environ["LIBRARY_PATH"] == "/elsewhere"
    (toolkit / "lib").mkdir()
    (toolkit / "lib" / "libcudart_static.a").touch()
    setup_py.add_library_path(toolkit)
    assert os.environ["LIBRARY_PATH"] == f"{toolkit / 'lib'}:/elsewhere"


def test_default_arch_list_leaves_out_what_an_older_toolkit_does_not_know(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, "12.4", "80 86 89 90")))
    archs = setup_py.find_cuda().archs
    assert archs == ["80-real", "86-real", "89-real", "90-real", "90-virtual"]


def test_native_asks_the_driver(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = fake_nvcc(tmp_path, "13.0") / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n8.0\\n9.0\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    assert setup_py.find_cuda().archs == ["80-real", "90-real"]


def test_cuda_is_left_out_with_a_reason(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.find_cuda().reason == f"no nvcc in bin/ of CUDA_HOME={tmp_path}"
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "old", "11.8")))
    assert "CUDA 11.8, older than 12.4" in setup_py.find_cuda().reason
    monkeypatch.setenv("RINGCOMM_SKIP_CUDA_BUILD", "1")
    assert setup_py.find_cuda().reason == "RINGCOMM_SKIP_CUDA_BUILD=1"


def test_jobs_are_bounded_by_cores_and_memory(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 1 <= setup_py.job_count() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(setup_py, "BYTES_PER_JOB", 10**15)
    assert setup_py.job_count() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup_py.job_count() == 7


def test_cc_implies_its_cxx(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("g++-99", "clang++"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CC", "gcc-99")
    assert setup_py.find_cxx() == "g++-99"
    monkeypatch.setenv("CC", str(tmp_path / "clang"))
    assert setup_py.find_cxx() == str(tmp_path / "clang++")
    monkeypatch.setenv("CXX", "g++-99")
    assert setup_py.find_cxx() == "g++-99"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"FORCE_CUDA": "1", "CUDA_HOME": "/nonexistent"},
            "FORCE_CUDA=1, but CUDA cannot be built: no nvcc in bin/ of CUDA_HOME=/nonexistent",
        ),
        ({"FORCE_CUDA": "1", "RINGCOMM_SKIP_CUDA_BUILD": "1"}, "contradict each other"),
        (
            {"TORCH_CUDA_ARCH_LIST": "Hoper", "CUDA_HOME": "FAKE"},
            "'Hoper' is not an architecture; write them like '8.0;9.0+PTX', or 'native'",
        ),
        (
            {"TORCH_CUDA_ARCH_LIST": "3.5", "CUDA_HOME": "FAKE"},
            "'3.5' is unknown to CUDA 13.0",
        ),
        ({"CXX": "no-such-g++"}, "the C++ compiler 'no-such-g++' (from CXX) was not found"),
        ({"CC": "/opt/no/gcc"}, "the C++ compiler '/opt/no/g++' (from CC) was not found"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS must be a whole number >= 1, not 'many'"),
        ({"DEBUG": "perhaps"}, "DEBUG must be 1 or 0, not 'perhaps'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_switch_says_what_is_wrong(
    source_tree: Path, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    cuda = fake_nvcc(tmp_path / "cuda", "13.0")
    variables = {name: value.replace("FAKE", str(cuda)) for name, value in variables.items()}
    finished = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")],
        cwd=source_tree,
        env={**os.environ, "RINGCOMM_SKIP_CUDA_BUILD": "", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode != 0
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "lib").exists()


def test_a_module_deleted_since_the_last_build_does_not_reach_the_wheel(
    source_tree: Path, tmp_path: Path
) -> None:
    stale = tmp_path / "lib" / "ringcomm" / "gone.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")],
        cwd=source_tree,
        check=True,
        timeout=60,
    )
    assert (stale.parent / "env.py").is_file()
    assert not stale.exists()
