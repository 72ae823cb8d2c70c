"""Fixtures of all tests, and the check that a session leaves nothing behind."""

import os
from collections.abc import Iterator

import pytest

from ringcomm import _core, errors
from tests.worlds import Worlds


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
