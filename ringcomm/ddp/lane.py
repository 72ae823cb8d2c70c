"""In which order the buckets of a device are reduced, besides what torch computes there."""

from types import TracebackType
from typing import Any

import torch

__all__ = ["Lane", "Turn"]


class Lane:
    """A stream of its own on a GPU; on the CPU nothing, because there every call ends before the next.

    What is queued in a :class:`Turn` comes after what was queued on the current stream when the turn was
    made, and after all turns before it.

    Args:
        device: Of the buckets.
    """

    def __init__(self, device: torch.device) -> None:
        self._devices: list[Any] = [device] if device.type == "cuda" else []
        self._stream: Any = None
        if device.type == "cuda":
            cuda: Any = torch.cuda  # whose stubs say little
            self._stream = cuda.Stream(device, priority=-1)  # peers wait for what runs there

    def turn(self, buffer: torch.Tensor) -> "Turn":
        """A turn that uses ``buffer``. Does not block."""
        return Turn(self._stream, buffer)

    def future(self) -> "torch.futures.Future[torch.Tensor]":
        """A future for a turn's result: whoever waits for it lets its stream wait for the turn."""
        return torch.futures.Future(devices=self._devices)

    def join(self) -> None:
        """What is queued on the current stream from now on comes after all turns so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class Turn:
    """A context manager in which calls on a bucket are made, in any thread."""

    __slots__ = ("_ready", "_scope", "_stream")

    def __init__(self, stream: Any, buffer: torch.Tensor) -> None:
        self._stream = stream
        if stream is None:
            return
        self._scope: Any = torch.cuda.stream(stream)
        self._ready = torch.cuda.current_stream(stream.device).record_event()
        strided = buffer.layout == torch.strided
        for tensor in [buffer] if strided else [buffer._indices(), buffer._values()]:
            tensor.record_stream(stream)  # DDP may free it before the turn has come

    def __enter__(self) -> None:
        if self._stream is not None:
            self._scope.__enter__()
            self._stream.wait_event(self._ready)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._scope.__exit__(kind, error, trace)
