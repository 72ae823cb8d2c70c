"""Every error that ringcomm raises.

Each message says operation, sequence number, group, rank, what was expected, what was found and
what to do. Errors of one failure carry the same sentence on all surviving ranks.
"""

__all__ = [
    "AbortedError",
    "DeadlineError",
    "DeviceError",
    "MismatchError",
    "PeerLostError",
    "RingcommError",
    "SystemResourceError",
    "UsageError",
    "WireError",
]


class RingcommError(RuntimeError):
    """Base class. ``rank`` is the rank that caused it, or None if no single rank did."""

    rank: int | None = None


class UsageError(RingcommError, ValueError):
    """A bad argument. Nothing was sent; the communicator stays usable."""


class MismatchError(RingcommError):
    """Ranks called different operations, or one sends another more or less than that one expects.

    Both sides are shown. The communicator is lost.
    """


class PeerLostError(RingcommError, ConnectionError):
    """A peer process died or closed. ``rank`` says which. The communicator is lost."""


class DeadlineError(RingcommError, TimeoutError):
    """A live peer did not arrive within the deadline. ``rank`` says which. The communicator is lost."""


class AbortedError(RingcommError):
    """The communicator was aborted or closed, or belongs to another process (after a fork)."""


class DeviceError(RingcommError):
    """A CUDA call failed."""


class WireError(RingcommError):
    """Bytes that are not what the wire format says."""


class SystemResourceError(RingcommError, OSError):
    """The operating system refused memory, descriptors or another resource."""
