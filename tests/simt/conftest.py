"""The emulator, built once per session."""

import shutil
from collections.abc import Iterator

import pytest

from tests.simt import build
from tests.simt.emulator import Emulator


@pytest.fixture(scope="session")
def built_emulator() -> Emulator:
    if shutil.which(build.COMPILER) is None:
        pytest.skip(f"{build.COMPILER} is not here: it compiles the CUDA sources for the CPU")
    return Emulator(build.library())


@pytest.fixture
def simt(built_emulator: Emulator) -> Iterator[Emulator]:
    """The emulator with no memory in use."""
    yield built_emulator
    built_emulator.release_all()
