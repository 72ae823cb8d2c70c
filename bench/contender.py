"""What runs an operation: the interface of everything that is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.operations import Buffers, Case

__all__ = ["Contender", "Unsupported"]


class Unsupported(Exception):
    """This contender cannot run this case; the message says why, in words for a person."""


class Contender:
    """One row per case. Made collectively, before anything is timed.

    Attributes:
        name: The row's ``who``.
        facts: What the header says of it: versions, settings.
        baseline: ``peer`` (counts for the best peer), ``copy`` (no collective, nothing to verify) or
            None (ringcomm).
    """

    name = ""
    baseline: str | None = None

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}

    def allocate(self, case: Case) -> Buffers:
        """The arrays that :meth:`prepare` gets; collective."""
        return case.buffers()

    def prepare(self, case: Case, buffers: Buffers) -> Callable[[], Any]:
        """What is timed: called any number of times, in step with the other ranks.

        Raises:
            Unsupported: no such row; raised on all ranks alike.
        """
        raise NotImplementedError

    def describe(self, case: Case) -> dict[str, Any]:
        """Values of the columns ``algo``, ``codec`` and ``wire_bytes``, as far as they mean something."""
        return {}

    def close(self) -> None:
        """Releases what it holds; collective, idempotent."""
