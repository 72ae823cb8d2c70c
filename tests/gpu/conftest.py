"""Tests that need a GPU, or take the emulated one. Every fixture says why it skips."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.simt import emulated
from tests.worlds import ROOT, Worlds

Pools = Callable[..., Worlds]


def why_no_cuda() -> str:
    """Why nothing can run on a real GPU here, or ""."""
    from ringcomm import _core

    if _core.RUNTIME != "cuda":
        return "this ringcomm was built without CUDA"
    probe = _core.cuda_probe()
    if probe.count == 0:
        return f"no CUDA device: {probe.reason}"
    try:
        import torch
    except ImportError:
        return "torch makes the arrays of these tests and is not installed"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


@pytest.fixture(scope="session")
def cuda() -> None:
    """A real GPU."""
    if reason := why_no_cuda():
        pytest.skip(reason)


@pytest.fixture(params=["cuda", "simt"])
def device(request: pytest.FixtureRequest) -> str:
    """A GPU, real or emulated."""
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    else:
        emulated.require()
    return str(request.param)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """pools(device, **variables): rank processes that see this GPU."""
    with contextlib.ExitStack() as cleanup:
        made: dict[object, Worlds] = {}

        def pool(device: str, **variables: str) -> Worlds:
            key = (device, *sorted(variables.items()))
            if key not in made:
                package = emulated.PACKAGE if device == "simt" else ROOT
                # A kernel of torch that is loaded while one of ringcomm waits for this rank could wait for that one.
                # Of 8 hardware queues, the default, two ranks that are threads may get the same for their streams: then
                # one's kernel would come after the other's that waits for it.
                given = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
                given["RINGCOMM_CUDA_SLAB_MIB"] = "4"
                variables = {**given, **variables}
                made[key] = cleanup.enter_context(Worlds(package=package, **variables))
            return made[key]

        yield pool


@pytest.fixture(scope="session")
def mps(cuda: None) -> Iterator[dict[str, str]]:
    """Environment variables of processes whose kernels share the GPU, with a daemon of our own."""
    if shutil.which("nvidia-cuda-mps-control") is None:
        pytest.skip("nvidia-cuda-mps-control is not here")
    with tempfile.TemporaryDirectory(prefix="rc-mps-") as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        environment = {**os.environ, **variables}
        control = ["nvidia-cuda-mps-control"]
        started = subprocess.run(
            [*control, "-d"], env=environment, capture_output=True, text=True, timeout=20
        )
        if started.returncode != 0:
            pytest.skip(
                f"the MPS daemon does not start: {(started.stderr or started.stdout)[:200]}"
            )
        try:
            works = subprocess.run(
                [sys.executable, "-c", "import torch; torch.zeros(1).cuda()"],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
            )
            if works.returncode != 0:
                logs = "".join(p.read_text()[-300:] for p in Path(folder).glob("*.log"))
                pytest.skip(f"no process can use the GPU under MPS: {logs or works.stderr[-300:]}")
            yield variables
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(control, input="quit\n", env=environment, text=True, timeout=20)
