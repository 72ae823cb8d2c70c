"""The handle of an asynchronous call."""

import threading
from collections.abc import Callable
from typing import Any

from ringcomm.errors import RingcommError

__all__ = ["RecvWork", "Work"]


class Work:
    """The handle of an asynchronous call. May be dropped: the call goes on."""

    def __init__(
        self,
        core: Any,
        result: Any,
        finish: Any,
        interrupted: Callable[[BaseException], None],
        stream: Callable[[], int] | None = None,
    ) -> None:
        self._core = core
        self._result = result
        self._finish = finish  # copies a temporary back; runs once, in the first wait()
        self._interrupted = interrupted  # tells the peers that a signal ended the wait
        self._stream = stream  # of arrays on a GPU: the caller's current one
        self._lock = threading.Lock()

    def done(self) -> bool:
        """Whether the call has finished, well or with an error. Never blocks."""
        return bool(self._core.done())

    def wait(self, timeout: float | None = None) -> Any:
        """Blocks until the call has finished and returns what the synchronous call returns.

        Of a call on arrays on GPUs in in-kernel mode it does not block for the GPU: what is queued on the
        library's current stream from now on comes after the call.

        Args:
            timeout: Seconds; None waits for as long as the communicator's own deadline allows.

        Raises:
            TimeoutError: not finished after ``timeout`` seconds; the call goes on.
            RingcommError: what the synchronous call would have raised.
            KeyboardInterrupt: Ctrl-C, or what another signal handler raises; this ends the
                communicator for all ranks, as it does in a synchronous call.
        """
        try:
            finished = self._core.wait(
                -1.0 if timeout is None else timeout,
                None if self._stream is None else self._stream(),
            )
        except RingcommError:
            raise
        except BaseException as error:  # a signal handler raised: KeyboardInterrupt, as a rule
            self._interrupted(error)
            raise
        if not finished:
            raise TimeoutError(f"the call is still running after {timeout:g} s")
        with self._lock:
            if self._finish is not None:
                self._finish()
                self._finish = None
        return self._result


class RecvWork(Work):
    """The handle of an asynchronous receive."""

    def wait(self, timeout: float | None = None) -> int:
        """As :meth:`Work.wait`; returns the rank that sent the message."""
        super().wait(timeout)
        return int(self._core.source())
