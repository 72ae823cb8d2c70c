"""DeepSpeed's shared-memory all_reduce for CPUs: one operator out of its source distribution.

``prepare()`` takes the sources of an installed deepspeed, else of its sdist on PyPI, and compiles that
operator alone, with DeepSpeed's own flags, into ``build/peers`` (ignored by git). It waits by spinning
without a deadline, so it is slow wherever there are more ranks than cores.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.contender import Contender, Unsupported
from bench.operations import Buffers, Case

__all__ = ["available", "connect", "prepare"]

VERSION = "0.19.8"
NAME = "deepspeed_shm_comm"
SOURCES = ("shm_interface.cpp", "shm.cpp")
FLAGS = ["-O2", "-fopenmp"]
ADDRESS = "ringcomm-bench"  # part of the names of its files in /dev/shm
BUILT = Path(__file__).parents[2] / "build" / "peers" / f"deepspeed-torch{torch.__version__}"
LEVELS = {"float32": 1, "bfloat16": 2, "float16": 2}  # dtype -> vector_kernel_level() that it needs


def available() -> str | None:
    if not (BUILT / f"{NAME}.so").exists():
        return f"its operator is not built for torch {torch.__version__} (python -m bench.peers --prepare)"
    try:
        _module()
    except ImportError as error:
        return f"its operator cannot be loaded ({error})"
    return None


def connect(rank: int, n: int, port: int) -> Contender:
    module = _module()
    own = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{ADDRESS}_{port}_{rank}")
    try:
        with _environment(LOCAL_SIZE=str(n), MASTER_ADDR=ADDRESS, MASTER_PORT=str(port)):
            module.initialize(n, rank)
        dist.barrier()  # everybody has mapped everybody's
    finally:
        own.unlink(missing_ok=True)
    return DeepSpeed(module.vector_kernel_level())


def prepare() -> str:
    """Compiles the operator; returns what was done.

    Raises:
        Unsupported: no sources, or they do not compile.
    """
    if available() is None:
        return f"built: {BUILT.name}"
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(prefix="ringcomm-bench-") as scratch:
        sources, version = _sources(Path(scratch))
        BUILT.mkdir(parents=True, exist_ok=True)
        try:
            cpp_extension.load(
                NAME,
                [str(sources / name) for name in SOURCES],
                extra_cflags=FLAGS,
                extra_ldflags=["-fopenmp"],
                build_directory=str(BUILT),
            )
        except (RuntimeError, OSError) as error:
            raise Unsupported(f"deepspeed {version} does not compile here: {error}") from None
        (BUILT / "version").write_text(version)
    return f"built the operator of deepspeed {version}"


class DeepSpeed(Contender):
    name = "deepspeed"
    baseline = "peer"

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level
        self.facts = {"deepspeed": f"{(BUILT / 'version').read_text()} (shm op)"}

    def prepare(self, case: Case, buffers: Buffers) -> Callable[[], Any]:
        if case.op != "all_reduce" or case.redop != "sum":
            raise Unsupported("its operator is an all_reduce of sums")
        if self._level < LEVELS.get(case.dtype_name, 9):
            raise Unsupported(f"its operator does not add {case.dtype_name} (here)")
        if case.num_bytes >= 1 << 31:
            raise Unsupported("its operator counts bytes in 32 bits")
        operator = torch.ops.deepspeed.inference_all_reduce_.default
        return lambda: operator(buffers.target)


def _module() -> Any:
    if NAME in sys.modules:
        return sys.modules[NAME]
    spec = importlib.util.spec_from_file_location(NAME, BUILT / f"{NAME}.so")
    assert spec is not None and spec.loader is not None
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sources(scratch: Path) -> tuple[Path, str]:
    """The folder of the operator's sources, and DeepSpeed's version."""
    installed = importlib.util.find_spec("deepspeed")
    if installed is not None and installed.origin is not None:
        from importlib.metadata import version

        folder = Path(installed.origin).parent / "ops" / "csrc" / "cpu" / "comm"
        if (folder / SOURCES[0]).exists():
            return folder, version("deepspeed")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    pip += ["--no-build-isolation", "--no-binary", "deepspeed", "--dest", str(scratch)]
    pip += ["--retries", "1", "--timeout", "15", f"deepspeed=={VERSION}"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    found = list(scratch.glob("deepspeed-*.tar.gz"))
    if done.returncode != 0 or not found:
        error = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise Unsupported(f"its sdist cannot be downloaded: {error}")
    with tarfile.open(found[0]) as archive:
        archive.extractall(scratch, filter="data")
    return scratch / f"deepspeed-{VERSION}" / "csrc" / "cpu" / "comm", VERSION


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
