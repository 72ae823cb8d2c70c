"""The emulator, built once per session."""

import shutil
from collections.abc import Iterator

import pytest

from tests.simt import build, emulated
from tests.simt.communicators import MODES, SLAB, Pools
from tests.simt.emulator import Emulator
from tests.worlds import Worlds


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds before the first test begins: it takes longer than tests may."""
    users = [
        item for item in session.items if "built_emulator" in getattr(item, "fixturenames", ())
    ]
    if users and not session.config.option.collectonly and shutil.which(build.COMPILER) is not None:
        build.library()


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


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Rank processes whose groups choose the mode."""
    emulated.require()
    made: dict[str, Worlds] = {}

    def pool(mode: str) -> Worlds:
        if mode not in made:
            made[mode] = Worlds(package=emulated.PACKAGE, **MODES[mode], **SLAB)
        return made[mode]

    yield pool
    for worlds in made.values():
        left = worlds.leftovers()
        worlds.close()
        assert left == []
