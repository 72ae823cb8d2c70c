"""Low-bit, fault-aware collective communication for PyTorch, CuPy and NumPy."""
