"""Where ``ringcomm._c10d``, the C++ half of the torch backend, comes from.

It uses torch's C++ interface, which changes with every minor version, so a binary is built for one of
them and says so in a stamp that can be read without loading it. ``pip install ringcomm`` builds it for
the torch that it finds; if it found none, the first use compiles it and keeps it in the cache folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ringcomm import env

__all__ = ["built_for", "load"]

_STAMP = re.compile(rb"ringcomm\._c10d was built for torch ([0-9A-Za-z.+]+)\0")
_PACKAGE = Path(__file__).parent
_loaded: Any = None


def load() -> Any:
    """The module ``ringcomm._c10d``, compiled first if need be. torch must be importable.

    Compiling takes about a minute, once per torch version; ranks of one host wait for the one that does.

    Raises:
        ImportError: built for another torch, or not built and no compiler here. One sentence says what
            to do.
    """
    global _loaded
    if _loaded is None:
        # Beside this file only: another, editable installation may offer its own.
        installed = PathFinder.find_spec("ringcomm._c10d", [str(_PACKAGE)])
        if installed is not None and installed.origin is not None:
            _check_version(Path(installed.origin))
            _loaded = importlib.import_module("ringcomm._c10d")
        else:
            _loaded = _load_file(_compiled())
        import atexit

        atexit.register(_loaded.shutdown_all)
    return _loaded


def built_for(path: Path) -> str:
    """The torch version that a binary was built for, read from its stamp; "" if it has none."""
    found = _STAMP.search(path.read_bytes())
    return found[1].decode() if found else ""


def _check_version(path: Path) -> None:
    import torch

    built, running = built_for(path), torch.__version__
    if built.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"ringcomm's torch backend was built for torch {built or '(unknown)'}, but this is torch {running}: "
            "reinstall ringcomm (pip install --force-reinstall --no-deps --no-build-isolation ringcomm)"
        )


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("ringcomm._c10d", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ringcomm._c10d"] = module
    spec.loader.exec_module(module)
    return module


# ---- compiling on first use ----------------------------------------------------------------------


def _compiled() -> Path:
    """The binary in the cache for this torch, these sources and this Python; made if it is not there."""
    import torch

    source = _source_folder()
    files = [source / "bind" / "c_table.h", *sorted((source / "torch").iterdir())]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]
    folder = (
        _cache_folder() / f"c10d-torch{torch.__version__}-{sys.implementation.cache_tag}-{digest}"
    )
    library = folder / "_c10d.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "ringcomm.lock"):
            if not library.is_file():
                _compile(source, folder, library)
    return library


def _source_folder() -> Path:
    for folder in (_PACKAGE / "_src", _PACKAGE.parent / "csrc"):
        if (folder / "torch" / "module.cpp").is_file():
            return folder
    raise ImportError(
        f"the sources of ringcomm's torch backend are missing in {_PACKAGE}: reinstall ringcomm"
    )


def _cache_folder() -> Path:
    chosen = env.get("RINGCOMM_CACHE_DIR")
    if chosen is not None:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "ringcomm"


def _compile(source: Path, folder: Path, library: Path) -> None:
    env.logger().warning(
        "compiling the torch backend into %s; this takes about a minute, once", folder
    )
    build = folder / "build"
    build.mkdir(exist_ok=True)
    (build / "lock").unlink(missing_ok=True)  # torch's own, if an earlier attempt was killed
    # One translation unit: reading torch's headers is nearly all the work.
    whole = build / "whole.cpp"
    parts = sorted((source / "torch").glob("*.cpp"))
    whole.write_text("".join(f'#include "torch/{part.name}"\n' for part in parts))
    try:
        from torch.utils import cpp_extension

        with _tools_on_path():
            cpp_extension.load(
                name="_c10d",
                sources=[str(whole)],
                extra_include_paths=[str(source)],
                extra_cflags=["-O2", "-fvisibility=hidden"],
                build_directory=str(build),
                is_python_module=False,  # else it would be initialised here, too
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ImportError(
            f"ringcomm's torch backend is not built and could not be compiled ({reason[0]}): install a C++ compiler "
            "and ninja (pip install ninja), or reinstall ringcomm where torch is installed "
            "(pip install --force-reinstall --no-deps --no-build-isolation ringcomm)"
        ) from error
    os.replace(build / "_c10d.so", library)


@contextmanager
def _tools_on_path() -> Iterator[None]:
    """ninja of the Python environment is found even when that is not activated."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock that the kernel drops if this process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
