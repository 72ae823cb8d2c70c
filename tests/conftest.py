"""Fixtures of all tests, and the check that a session leaves nothing behind."""

import contextlib
import os
from collections.abc import Iterator

import pytest

from ringcomm import _core, errors
from tests.worlds import Worlds


def uses_emulation(test: pytest.Function) -> bool:
    if test.path.parent.name == "gpu":  # the same tests take real GPUs
        return "simt" in test.name
    return "pools" in test.fixturenames or hasattr(test.module, "emulated")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds ringcomm with emulated GPUs before the first test that uses it begins: it takes longer than tests may.

    A compiler that is missing or refuses is left to the tests: they skip, or say what it said.
    """
    tests = [item for item in session.items if isinstance(item, pytest.Function)]
    if not any(map(uses_emulation, tests)) or session.config.option.collectonly:
        return
    from tests.simt import emulated

    if not emulated.missing_tool():
        with contextlib.suppress(RuntimeError):
            emulated.package()


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test at every SIMD level that this processor has."""
    before = _core.simd_level()
    try:
        _core.set_simd_level(request.param)
    except errors.UsageError as error:
        pytest.skip(str(error))
    yield request.param
    _core.set_simd_level(before)


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """Rank processes for the session; see tests/worlds.py."""
    with Worlds() as pool:
        yield pool
        left = pool.leftovers()
    alive = [pid for pid in pool.spawned if os.path.exists(f"/proc/{pid}")]
    assert not left, f"left behind: {left}"
    assert not os.path.exists(pool.directory)
    assert not alive, f"processes left behind: {alive}"


@pytest.fixture
def deadline() -> float:
    """Seconds after which a test calls ranks that do not answer a hang."""
    return 60.0
