"""Fixtures of all tests, and the check that a session leaves nothing behind."""

import os
from collections.abc import Iterator

import pytest

from tests.worlds import Worlds


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
