"""Low-bit, fault-aware collective communication for PyTorch, CuPy and NumPy.

Importing this package loads nothing else: no torch, no threads, no environment variables. Names
below are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ringcomm import errors as errors

if TYPE_CHECKING:
    from ringcomm.codec import Codec as Codec
    from ringcomm.codec import codec as codec
    from ringcomm.ddp import attach as attach

__all__ = ["Codec", "attach", "codec", "errors"]

# Public name -> the module that defines it.
_LAZY = {
    "Codec": "ringcomm.codec",
    "attach": "ringcomm.ddp",
    "codec": "ringcomm.codec",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ringcomm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
