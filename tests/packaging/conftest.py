from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_VARIABLES = (
    "CC", "CXX", "CXXFLAGS", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "FORCE_CUDA", "DEBUG",
    "MAX_JOBS", "NVCC_THREADS", "RINGCOMM_SKIP_CUDA_BUILD", "RINGCOMM_FORCE_BUILD",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_build_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of switches start from none, whatever the caller's shell has set."""
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist made from a copy of this tree that has nothing built or cached in it."""
    work = tmp_path_factory.mktemp("sdist")
    built = (
        "build",
        "dist",
        "*.egg-info",
        "*.so",
        "_build_info.json",
        "__pycache__",
        "demo_results",
    )
    shutil.copytree(ROOT, work / "clone", ignore=shutil.ignore_patterns(".*", *built))
    # What a clone has and the pattern above left out.
    shutil.copy(ROOT / ".clang-format", work / "clone")
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", script, str(work)],
        cwd=work / "clone",
        check=True,
        timeout=60,
        stdout=subprocess.DEVNULL,
    )
    (archive,) = work.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def source_tree(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist: a place to run setup.py in that is not this checkout."""
    work = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(work)
    (tree,) = work.iterdir()
    return tree
