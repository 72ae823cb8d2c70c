"""Gloo, torch's default on CPU: TCP over the loopback device, also inside a host."""

from __future__ import annotations

import torch.distributed as dist

from bench.torch_distributed import TorchDistributed

__all__ = ["available", "connect"]


def available() -> str | None:
    return None if dist.is_gloo_available() else "this torch was built without Gloo"


def connect(_rank: int, _n: int, _port: int) -> TorchDistributed:
    """The default group, which the bench has made for its own bookkeeping already."""
    return TorchDistributed("gloo", "peer", without=("avg",))
