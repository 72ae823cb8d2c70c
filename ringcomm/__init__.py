"""Low-bit, fault-aware collective communication for PyTorch, CuPy and NumPy."""

from ringcomm._version import __version__

__all__ = ["__version__"]
