"""The CUDA toolkit that kernels are judged with: the one that setup.py builds with, for the same architectures."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]

# GPUs share the front end's output (PTX) with the first of their row: it differs in nothing but its name, because
# no source asks for the architecture (tests/simt/test_sources.py).
FIRST_BLACKWELL = 100


@functools.cache
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ringcomm_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


class Toolkit:
    """nvcc, what it compiles for by default, and the disassembler.

    Attributes:
        nvcc: Its path; "" where there is none, and then ``reason`` says why.
        release: Such as ``"13.0"``.
        archs: Numbers such as 90, ascending.
        disassembler: Path of nvdisasm, or "".
    """

    def __init__(self) -> None:
        setup = setup_py()
        found = setup.find_nvcc()
        self.nvcc: str = found.nvcc
        self.reason: str = found.reason
        self.release = ".".join(map(str, found.version))
        self.archs: list[int] = []
        if self.nvcc:
            defaults = setup.cuda_archs("", found)
            self.archs = sorted({int(name.partition("-")[0]) for name in defaults})
        self.disassembler = find_disassembler(self.nvcc)

    def front_end_of(self, arch: int) -> int:
        """The architecture whose PTX becomes the code for ``arch``."""
        return min(a for a in self.archs if (a < FIRST_BLACKWELL) == (arch < FIRST_BLACKWELL))

    @property
    def front_ends(self) -> list[int]:
        return sorted({self.front_end_of(arch) for arch in self.archs})

    @property
    def newest(self) -> list[int]:
        """The last architecture of every front end."""
        return [max(a for a in self.archs if self.front_end_of(a) == f) for f in self.front_ends]


@functools.cache
def toolkit() -> Toolkit:
    return Toolkit()


def find_disassembler(nvcc: str) -> str:
    """nvdisasm of the toolkit, else that of the package nvidia-cuda-nvdisasm."""
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [*([Path(nvcc).parent] if nvcc else []), *sorted(site.glob("*/bin"), reverse=True)]
    for folder in folders:
        path = shutil.which("nvdisasm", path=str(folder))
        if path is not None:
            return path
    return shutil.which("nvdisasm") or ""
