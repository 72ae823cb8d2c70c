"""sdist -> pip install in a fresh environment elsewhere -> it works there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Two ranks of this run in the new environment, which has NumPy but no torch.
SMOKE = """
import importlib.metadata, importlib.util, json
import numpy as np
import ringcomm
from ringcomm import _core, info

assert importlib.util.find_spec("torch") is None
probe = _core.cuda_probe()
assert probe.count == 0 and probe.reason == "ringcomm was built without CUDA", probe.reason
with ringcomm.init(timeout=60) as comm:
    exact = np.full(1001, comm.rank + 1, np.float32)
    comm.all_reduce(exact)
    assert (exact == 3).all(), exact
    rough = np.linspace(-1, 1, 1001, dtype=np.float32)
    comm.all_reduce(rough, op="avg", codec="int8")
    assert np.abs(rough - np.linspace(-1, 1, 1001)).max() < 0.02, rough
print(json.dumps({
    "file": ringcomm.__file__,
    "version": importlib.metadata.version("ringcomm"),
    "license": importlib.metadata.metadata("ringcomm")["License-Expression"],
    "requires": importlib.metadata.requires("ringcomm"),
    "installed": [str(path) for path in importlib.metadata.files("ringcomm")],
    "build": info.build_info(),
    "libraries": open("/proc/self/maps").read(),
}))
"""


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=500,
        **options,  # type: ignore[call-overload]
    )
    assert isinstance(finished, subprocess.CompletedProcess)
    return finished


@pytest.fixture
def launcher_variables() -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_the_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(path.relative_to(ROOT))
        for folder, pattern in (
            ("csrc", "*.*"),
            ("ringcomm", "*.py"),
            ("ringcomm", "*.pyi"),
            ("tests", "*.py"),
        )
        for path in (ROOT / folder).rglob(pattern)
    }
    wanted |= {
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "Makefile",
        "requirements-dev.txt",
        "setup.py",
    }
    wanted |= {"pyproject.toml", "ringcomm/py.typed"}
    assert wanted - inside == set()
    assert {name for name in inside if name.endswith((".so", "_build_info.json", ".pyc"))} == set()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_sdist_installs_and_runs_elsewhere(
    sdist: Path,
    tmp_path: Path,
    launcher_variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("RINGCOMM_SKIP_CUDA_BUILD", "1")
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    reach = run(python, "-m", "pip", "download", "--no-deps", "--dest", tmp_path, "pybind11")
    if reach.returncode != 0:
        pytest.skip(f"pip reaches no package index: {reach.stderr.strip().splitlines()[-1]}")

    installed = run(python, "-m", "pip", "install", sdist, cwd=tmp_path)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    ranks = [
        subprocess.Popen(
            [python, "-c", SMOKE],
            cwd=tmp_path,
            env={**os.environ, **launcher_variables, "RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=90) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    facts = json.loads(outputs[0][0].splitlines()[-1])

    assert facts["file"].startswith(str(tmp_path))
    assert facts["license"] == "Apache-2.0"
    assert [need for need in facts["requires"] if "extra ==" not in need] == ["numpy"]
    assert "libtorch" not in facts["libraries"]
    assert facts["build"]["version"] == facts["version"]
    assert facts["build"]["cuda"] == "no: RINGCOMM_SKIP_CUDA_BUILD=1"
    # The wheel is the package and its metadata, nothing else of the tree.
    files = {path for path in facts["installed"] if "__pycache__" not in path}
    assert {path.split("/")[0] for path in files} == {
        "ringcomm",
        f"ringcomm-{facts['version']}.dist-info",
    }
    assert {"ringcomm/py.typed", "ringcomm/_core.pyi", "ringcomm/_build_info.json"} <= files
    sources = {path for path in files if path.startswith("ringcomm/_src/")}
    assert {Path(path).suffix for path in sources} == {".cpp", ".h"}  # of the torch backend
    assert {Path(path).suffix for path in files - sources if path.startswith("ringcomm/")} <= {
        ".py", ".pyi", ".typed", ".so", ".json",
    }  # fmt: skip
