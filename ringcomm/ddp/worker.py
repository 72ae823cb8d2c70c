"""Who reduces the buckets: a worker thread, strictly in order, or the caller after it."""

import queue
import threading
from collections.abc import Callable

import torch

from ringcomm.ddp.lane import Turn
from ringcomm.ddp.transport import Transport

__all__ = ["Job", "Resources", "Worker", "unwrap"]

_STOP_SECONDS = 5.0


class Job:
    """One bucket on its way through the worker. ``done``: reduced, or on a GPU queued to be."""

    __slots__ = ("done", "error", "future", "run", "turn")

    def __init__(
        self,
        run: Callable[[], torch.Tensor],
        turn: Turn,
        future: "torch.futures.Future[torch.Tensor]",
    ) -> None:
        self.run: Callable[[], torch.Tensor] | None = run  # None once it has run
        self.turn = turn
        self.future = future
        self.done = threading.Event()
        self.error: Exception | None = None


def unwrap(future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
    return future.value()


class Worker:
    """A daemon thread that runs jobs in order. Started by the first one."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Job | None = None

    def submit(self, job: Job) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._jobs,), name="ringcomm-ddp", daemon=True
            )
            self._thread.start()
        self._last = job
        self._jobs.put(job)

    def run_here(self, job: Job) -> None:
        """Run a job on the calling thread, after everything that was submitted."""
        if self._last is not None:
            self._last.done.wait()
        with torch.no_grad():
            _run(job)

    def drain(self) -> None:
        """Wait until everything submitted so far is done."""
        if self._thread is not None and self._thread.is_alive():
            reached = threading.Event()
            self._jobs.put(reached)
            reached.wait()

    def stop(self) -> bool:
        """Let the thread finish. Whether it did, within a few seconds."""
        if self._thread is None:
            return True
        self._jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(_STOP_SECONDS)
            return not self._thread.is_alive()
        return True


def _work(jobs: "queue.SimpleQueue[Job | threading.Event | None]") -> None:
    with torch.no_grad():
        while True:
            job = jobs.get()
            if job is None:
                return
            if isinstance(job, threading.Event):
                job.set()
            else:
                _run(job)
            del job  # or the last bucket would keep the state alive


def _run(job: Job) -> None:
    run, job.run = job.run, None
    assert run is not None
    with job.turn:  # also when the future learns of the result: that is when a GPU has come here
        try:
            result = run()
        except Exception as error:
            job.error = error
            job.done.set()
            job.future.set_exception(error)  # type: ignore[arg-type]  # wrong in torch's stub
        else:
            job.done.set()
            job.future.set_result(result)


class Resources:
    """What has to be released. Apart from the state, so that it goes when the state goes."""

    def __init__(self) -> None:
        self.worker = Worker()
        self.transport: Transport | None = None

    def close(self) -> None:
        # A thread that hangs in a collective still uses the transport: leave both to the end of
        # the process.
        if self.worker.stop() and self.transport is not None:
            self.transport.close()
