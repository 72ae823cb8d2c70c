"""Low-bit, fault-aware collective communication for PyTorch, CuPy and NumPy.

Importing this package loads nothing else: no torch, no threads, no environment variables. Names
below are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ringcomm import errors as errors
from ringcomm._version import __version__ as __version__

if TYPE_CHECKING:
    from ringcomm.bootstrap import init as init
    from ringcomm.codecs import Codec as Codec
    from ringcomm.codecs import codec as codec
    from ringcomm.comm import Communicator as Communicator
    from ringcomm.ddp import attach as attach
    from ringcomm.work import Work as Work

__all__ = ["Codec", "Communicator", "Work", "__version__", "attach", "codec", "errors", "init"]

# Public name -> the module that defines it.
_LAZY = {
    "Codec": "ringcomm.codecs",
    "Communicator": "ringcomm.comm",
    "Work": "ringcomm.work",
    "attach": "ringcomm.ddp",
    "codec": "ringcomm.codecs",
    "init": "ringcomm.bootstrap",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ringcomm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
