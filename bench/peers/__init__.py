"""What ringcomm is measured against, where it is installed.

A peer is a module with

    available() -> None, or in words why it cannot take part in this process
    connect(rank, n, port) -> its Contender; collective. ``port`` is a TCP port that no other run has

and, if something can be fetched or built for it, ``prepare()``, which ``python -m bench.peers --prepare``
calls. ``--peers`` of bench.collectives takes names from ``MODULES`` and dotted paths of other modules.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["MODULES", "load"]

MODULES = {
    "gloo": "bench.peers.gloo",
    "openmpi": "bench.peers.openmpi",
    "deepspeed": "bench.peers.deepspeed",
    "memcpy": "bench.peers.memcpy",
}


def load(name: str) -> ModuleType:
    """The module of a peer. Importing it loads none of the peer's own libraries."""
    return importlib.import_module(MODULES.get(name, name))
