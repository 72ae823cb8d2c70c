"""Where _c10d comes from: torch's autoload, the stamp, compiling on first use, and what is said if not."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import ringcomm  # noqa: E402
from ringcomm import adapter  # noqa: E402

PACKAGE = Path(ringcomm.__file__).parent
ENTRY_POINT = "[torch.backends]\nringcomm = ringcomm.backend:_autoload\n"
USE = """
import sys
import torch, torch.distributed as dist
early = sorted(name for name in sys.modules if name.startswith("ringcomm"))
assert early == ["ringcomm", "ringcomm._version", "ringcomm.backend", "ringcomm.errors"], early
dist.init_process_group("ringcomm", store=dist.HashStore(), rank=0, world_size=1)
x = torch.ones(3)
dist.all_reduce(x)
print("sum", x.sum().item(), dist.get_backend())
"""


def built_adapter():
    found = sorted(PACKAGE.glob("_c10d*.so"))
    if not found:
        pytest.skip("this build has no _c10d")
    return found[0]


@pytest.fixture
def installation(tmp_path):
    """A copy of the package with its entry point, as an environment of its own would have it."""
    site = tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__", "demo")
    shutil.copytree(PACKAGE, site / "ringcomm", ignore=ignored)
    if not (site / "ringcomm" / "_src").exists():
        for room in ("bind", "torch"):
            shutil.copytree(PACKAGE.parent / "csrc" / room, site / "ringcomm" / "_src" / room)
    info = site / "ringcomm-0.0.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ringcomm\nVersion: 0.0.0\n")
    return site


def run(site, script=USE, **variables):
    environment = {**os.environ, "PYTHONPATH": str(site), "RINGCOMM_DEBUG": "INFO", **variables}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=site,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_no_import_is_needed_and_import_torch_loads_nothing(installation):
    built_adapter()
    finished = run(installation)
    assert "sum 3.0 ringcomm" in finished.stdout, finished.stderr


def test_a_broken_installation_does_not_break_import_torch(installation):
    for library in (installation / "ringcomm").glob("*.so"):
        library.write_bytes(b"no library")
    script = "import torch; print('fine')"
    assert "fine" in run(installation, script).stdout
    (installation / "ringcomm" / "errors.py").write_text("raise RuntimeError('broken')")
    backend = installation / "ringcomm" / "backend.py"
    backend.write_text(
        backend.read_text().replace(
            "    import torch.distributed", "    1 / 0\n    import torch.distributed", 1
        )
    )
    (installation / "ringcomm" / "__init__.py").write_text("")
    finished = run(installation, script)
    assert "fine" in finished.stdout, finished.stderr
    assert "ringcomm could not register its torch backend: division by zero" in finished.stderr


def test_the_stamp_is_read_without_loading(installation):
    version = adapter.built_for(built_adapter())
    assert torch.__version__.startswith(version)
    assert adapter.built_for(Path(__file__)) == ""


def test_another_torch_gives_one_sentence(installation):
    name = built_adapter().name
    library = installation / "ringcomm" / name
    built = adapter.built_for(library).encode()
    library.write_bytes(
        library.read_bytes().replace(b"for torch " + built, b"for torch 1" + built[1:])
    )
    last = run(installation).stderr.strip().splitlines()[-1]
    expected = f"ImportError: ringcomm's torch backend was built for torch 1{built.decode()[1:]}, but this is torch"
    assert last.startswith(expected)
    assert "reinstall ringcomm" in last


def without_adapter(site):
    for library in (site / "ringcomm").glob("_c10d*.so"):
        library.unlink()
    return site


def test_without_a_compiler_the_way_out_is_named(installation, tmp_path):
    finished = run(
        without_adapter(installation),
        RINGCOMM_CACHE_DIR=str(tmp_path / "cache"),
        CXX="/nowhere/c++",
    )
    last = finished.stderr.strip().splitlines()[-1]
    assert "ImportError: ringcomm's torch backend is not built and could not be compiled" in last
    assert "pip install ninja" in last


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_first_use_compiles_once_for_all_ranks_and_keeps_the_result(installation, tmp_path):
    site, cache = without_adapter(installation), tmp_path / "cache"
    ended = []
    ranks = [
        threading.Thread(
            target=lambda: ended.append(run(site, RINGCOMM_CACHE_DIR=str(cache), MAX_JOBS="4"))
        )
        for _ in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert ["sum 3.0 ringcomm" in rank.stdout for rank in ended] == [True, True], [
        rank.stderr for rank in ended
    ]
    assert sum("compiling the torch backend" in rank.stderr for rank in ended) == 1
    (library,) = cache.rglob("_c10d.so")
    assert torch.__version__.startswith(adapter.built_for(library))
    again = run(site, RINGCOMM_CACHE_DIR=str(cache), CXX="/nowhere/c++")
    assert "sum 3.0 ringcomm" in again.stdout, again.stderr
