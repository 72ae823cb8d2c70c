"""The interface of ``cupyx.distributed`` over a ringcomm communicator.

::

    import ringcomm.cupyx as distributed          # instead of cupyx.distributed

    comm = distributed.init_process_group(n_devices, rank)
    comm.all_reduce(array, out)

Methods and arguments are those of CuPy's ``NCCLBackend``, so programs that use it change one import.
Arrays are CuPy's; NumPy arrays and torch tensors work too, all of one call on one device. What is
more than there: ``op`` may be any of :meth:`ringcomm.Communicator.all_reduce`, which also takes a
``codec``; calls have a deadline; and errors say what is wrong. What is less: sparse matrices are
refused, and all ranks are on one host.

Neither CuPy nor NCCL is imported.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from ringcomm import env
from ringcomm.arrays import ArrayView, contiguous_copy, copy_back, view
from ringcomm.bootstrap import init
from ringcomm.codecs import Codec
from ringcomm.comm import Communicator
from ringcomm.errors import UsageError
from ringcomm.store import TCPStore, shared_store

__all__ = ["RingBackend", "init_process_group"]

# As in CuPy.
_DEFAULT_HOST = "127.0.0.1"
_DEFAULT_PORT = 13333
_OPS = {"prod": "product"}


def init_process_group(
    n_devices: int,
    rank: int,
    *,
    backend: str = "ringcomm",
    host: str | None = None,
    port: int | None = None,
    use_mpi: bool = False,
) -> "RingBackend":
    """Joins a communicator; collective over its ranks.

    Make the rank's GPU current (``cupy.cuda.Device(i).use()``) before, as with CuPy.

    Args:
        n_devices: Number of ranks.
        rank: Of this process, 0 to ``n_devices - 1``.
        backend: ``"ringcomm"``; ``"nccl"`` is taken for the same.
        host: Where rank 0 serves the rendezvous; default ``CUPYX_DISTRIBUTED_HOST``, else 127.0.0.1.
        port: Its port; default ``CUPYX_DISTRIBUTED_PORT``, else 13333.
        use_mpi: Meet through mpi4py's ``COMM_WORLD`` instead; ``host`` and ``port`` are not used.

    Returns:
        The backend; :meth:`RingBackend.stop` it, or use it in a ``with`` statement.

    Raises:
        UsageError: bad arguments, or no mpi4py. Else as :func:`ringcomm.init`.
    """
    if backend not in ("ringcomm", "nccl"):
        raise UsageError(f"backend must be 'ringcomm' or 'nccl', not {backend!r}")
    return RingBackend(
        n_devices,
        rank,
        host=env.get("CUPYX_DISTRIBUTED_HOST") or _DEFAULT_HOST if host is None else host,
        port=env.get("CUPYX_DISTRIBUTED_PORT") or _DEFAULT_PORT if port is None else port,
        use_mpi=use_mpi,
    )


class RingBackend:
    """What ``cupyx.distributed.NCCLBackend`` does, over a :class:`ringcomm.Communicator`.

    Collectives on GPU arrays are queued on ``stream``, or CuPy's current one; results are there when
    that stream has passed them. Where ranks cannot run kernels at the same time, and on the CPU, calls
    return when the result is there. Results are bit-identical on all ranks.

    Making one is collective; arguments as in :func:`init_process_group`, but for ``timeout`` and
    ``device``, which are those of :func:`ringcomm.init`.

    Attributes:
        rank: Of this process.
        comm: The communicator, for what CuPy's interface does not have.
    """

    def __init__(
        self,
        n_devices: int,
        rank: int,
        host: str = _DEFAULT_HOST,
        port: int = _DEFAULT_PORT,
        use_mpi: bool = False,
        *,
        timeout: float | timedelta | None = None,
        device: Any = None,
    ) -> None:
        if n_devices <= 0:
            raise UsageError(f"n_devices must be 1 or more, not {n_devices}")
        if not 0 <= rank < n_devices:
            raise UsageError(f"rank must be 0 to {n_devices - 1}, not {rank}")
        seconds = env.get("RINGCOMM_TIMEOUT")
        store: TCPStore | None = None
        if n_devices > 1 and use_mpi:
            store = _store_through_mpi(rank, seconds)
        elif n_devices > 1:
            store = shared_store(host, port, is_server=rank == 0, timeout=seconds)
        try:
            self.comm: Communicator = init(
                rank, n_devices, store=store, timeout=timeout, name="cupyx", device=device
            )
        finally:
            if use_mpi and store is not None:  # nobody else uses it
                store.close()
        self.rank = rank

    # -- reductions --

    def all_reduce(
        self,
        in_array: Any,
        out_array: Any,
        op: str = "sum",
        stream: Any = None,
        *,
        codec: str | Codec | None = None,
    ) -> None:
        """Reduces ``in_array`` over all ranks into everybody's ``out_array``.

        Args:
            in_array: The same size and dtype on every rank. Not modified.
            out_array: As many elements of the same dtype; may be ``in_array``.
            op: ``sum``, ``prod``, ``min``, ``max``, or another operator of
                :meth:`ringcomm.Communicator.all_reduce`.
            stream: CuPy stream to run on; None: the current one.
            codec: As in :meth:`ringcomm.Communicator.all_reduce`.

        Raises:
            UsageError: bad arguments; nothing was sent. Else as the communicator's method.
        """
        with _on(stream, in_array, out_array):
            _copy(in_array, out_array)
            self.comm.all_reduce(out_array, _OPS.get(op, op), codec)

    def reduce(
        self, in_array: Any, out_array: Any, root: int = 0, op: str = "sum", stream: Any = None
    ) -> None:
        """Reduces ``in_array`` over all ranks into the root's ``out_array``.

        Args:
            in_array: As in :meth:`all_reduce`.
            out_array: As in :meth:`all_reduce`, on the root; not used elsewhere.
            root: Rank that gets the result.
            op: As in :meth:`all_reduce`.
            stream: As in :meth:`all_reduce`.

        Raises:
            As :meth:`all_reduce`.
        """
        with _on(stream, in_array, out_array):
            array = in_array
            if self.rank == root:
                _copy(in_array, out_array)
                array = out_array
            self.comm.reduce(array, root, _OPS.get(op, op))

    def reduce_scatter(
        self, in_array: Any, out_array: Any, count: int, op: str = "sum", stream: Any = None
    ) -> None:
        """Reduces over all ranks and leaves ``count`` elements of the result on each.

        Args:
            in_array: ``n_devices * count`` elements of any shape, the first ``count`` for rank 0; what
                is longer is ignored. Not modified.
            out_array: Contiguous, of ``count`` elements or more.
            count: Elements for each rank.
            op: As in :meth:`all_reduce`.
            stream: As in :meth:`all_reduce`.

        Raises:
            As :meth:`all_reduce`.
        """
        with _on(stream, in_array, out_array):
            self.comm.reduce_scatter(
                _front(in_array, self.comm.world_size * count, "in_array"),
                _OPS.get(op, op),
                _front(out_array, count, "out_array", writable=True),
            )

    # -- moves --

    def broadcast(self, in_out_array: Any, root: int = 0, stream: Any = None) -> None:
        """Copies the root's array into everybody's.

        Args:
            in_out_array: The same size and dtype on every rank.
            root: Rank that has the data.
            stream: As in :meth:`all_reduce`.

        Raises:
            As :meth:`all_reduce`.
        """
        with _on(stream, in_out_array):
            self.comm.broadcast(in_out_array, root)

    def all_gather(self, in_array: Any, out_array: Any, count: int, stream: Any = None) -> None:
        """Gathers ``count`` elements of every rank on every rank.

        Args:
            in_array: ``count`` elements or more, of any shape. Not modified.
            out_array: Contiguous, of ``n_devices * count`` elements or more.
            count: Elements of each rank.
            stream: As in :meth:`all_reduce`.

        Raises:
            As :meth:`all_reduce`.
        """
        with _on(stream, in_array, out_array):
            self.comm.all_gather(
                _front(in_array, count, "in_array"),
                _front(out_array, self.comm.world_size * count, "out_array", writable=True),
            )

    def scatter(self, in_array: Any, out_array: Any, root: int = 0, stream: Any = None) -> None:
        """Hands out the rows of the root's ``in_array``, one to each rank.

        Args:
            in_array: On the root, of shape ``(n_devices, ...)``; not used elsewhere.
            out_array: Contiguous, for one row.
            root: Rank that has the data.
            stream: As in :meth:`all_reduce`.

        Raises:
            As :meth:`all_reduce`.
        """
        with _on(stream, out_array):
            rows = self._rows(in_array, "in_array") if self.rank == root else None
            self.comm.scatter(rows, root, out_array)

    def gather(self, in_array: Any, out_array: Any, root: int = 0, stream: Any = None) -> None:
        """Gathers every rank's ``in_array`` in the rows of the root's ``out_array``.

        Args:
            in_array: The same size and dtype on every rank. Not modified.
            out_array: On the root, contiguous, of shape ``(n_devices, ...)``; not used elsewhere.
            root: Rank that gets the data.
            stream: As in :meth:`all_reduce`.

        Raises:
            As :meth:`all_reduce`.
        """
        with _on(stream, in_array):
            rows = self._rows(out_array, "out_array") if self.rank == root else None
            self.comm.gather(in_array, root, rows)

    def all_to_all(self, in_array: Any, out_array: Any, stream: Any = None) -> None:
        """Row ``r`` of everybody's ``in_array`` goes to rank ``r``, whose row ``s`` comes from rank ``s``.

        Args:
            in_array: Of shape ``(n_devices, ...)``. Not modified.
            out_array: Contiguous, of the same shape; does not overlap ``in_array``.
            stream: As in :meth:`all_reduce`.

        Raises:
            As :meth:`all_reduce`.
        """
        with _on(stream, in_array, out_array):
            self.comm.all_to_all(
                self._rows(in_array, "in_array"), self._rows(out_array, "out_array")
            )

    # -- messages --

    def send(self, array: Any, peer: int, stream: Any = None) -> None:
        """Sends ``array`` to ``peer``, which must :meth:`recv` it.

        Args:
            array: Any array. Not modified.
            peer: Rank to send to.
            stream: As in :meth:`all_reduce`.

        Raises:
            As :meth:`ringcomm.Communicator.send`.
        """
        with _on(stream, array):
            self.comm.send(array, peer)

    def recv(self, out_array: Any, peer: int, stream: Any = None) -> None:
        """Receives what ``peer`` sends into ``out_array``.

        Args:
            out_array: Of as many bytes as the message.
            peer: Rank to receive from.
            stream: As in :meth:`all_reduce`.

        Raises:
            As :meth:`ringcomm.Communicator.recv`.
        """
        with _on(stream, out_array):
            self.comm.recv(out_array, peer)

    def send_recv(self, in_array: Any, out_array: Any, peer: int, stream: Any = None) -> None:
        """Sends to ``peer`` and receives from it, which does the same.

        Args:
            in_array: Is sent. Not modified.
            out_array: Gets what comes; does not overlap ``in_array``.
            peer: The other rank.
            stream: As in :meth:`all_reduce`.

        Raises:
            As :meth:`send` and :meth:`recv`.
        """
        with _on(stream, in_array, out_array):
            sending = self.comm.send(in_array, peer, async_op=True)
            self.comm.recv(out_array, peer)
            sending.wait()

    # -- the group --

    def barrier(self) -> None:
        """Blocks until every rank has called it. GPUs are not waited for.

        Raises:
            As :meth:`ringcomm.Communicator.barrier`.
        """
        self.comm.barrier()

    def stop(self) -> None:
        """Leaves the group. Idempotent, not collective."""
        self.comm.close()

    def __enter__(self) -> "RingBackend":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<ringcomm.cupyx.RingBackend rank {self.rank} of {self.comm.world_size}>"

    def _rows(self, x: Any, role: str) -> Any:
        shape = tuple(getattr(x, "shape", ()))
        if not shape or shape[0] != self.comm.world_size:
            raise UsageError(
                f"{role}: shape {shape}, expected ({self.comm.world_size}, ...), a row for each rank"
            )
        return x


@contextlib.contextmanager
def _on(stream: Any, *arrays: Any) -> Iterator[None]:
    """Makes ``stream`` CuPy's current one, from which the communicator takes it."""
    if stream is None:
        yield
        return
    if not hasattr(stream, "ptr") or not hasattr(stream, "__enter__"):
        raise UsageError(f"stream: a {type(stream).__name__}, expected a cupy.cuda.Stream")
    for x in arrays:
        kind = view(x, writable=False).kind
        if kind != "cupy":
            raise UsageError(
                f"stream: only CuPy arrays go by CuPy's streams, found a {kind} array; make the stream current "
                "in its library instead"
            )
    with stream:
        yield


def _copy(in_array: Any, out_array: Any) -> None:
    """``out_array`` gets the elements of ``in_array``, unless it is the same array."""
    source = view(in_array, writable=False, role="in_array")
    target = view(out_array, writable=True, role="out_array")
    if (source.num_elems, source.dtype) != (target.num_elems, target.dtype):
        raise UsageError(
            f"out_array: {target.num_elems} elements of {target.dtype_name}, expected {source.num_elems} of "
            f"{source.dtype_name} like in_array"
        )
    if source.device != target.device:
        raise UsageError(f"out_array: on {target.device}, expected {source.device} like in_array")
    if _same(source, target):
        return
    if tuple(source.shape) != tuple(target.shape):
        if not target.contiguous:
            raise UsageError(
                f"out_array: a non-contiguous array of shape {tuple(target.shape)}, expected a contiguous one or "
                f"shape {tuple(source.shape)} like in_array"
            )
        out_array = out_array.reshape(source.shape)
    copy_back(in_array, out_array)


def _same(one: ArrayView, other: ArrayView) -> bool:
    return one.ptr == other.ptr and one.contiguous and other.contiguous


def _front(x: Any, count: int, role: str, writable: bool = False) -> Any:
    """The first ``count`` elements as a flat array; of a copy if ``x`` is not contiguous."""
    described = view(x, writable=writable, role=role)
    if described.num_elems < count:
        raise UsageError(f"{role}: {described.num_elems} elements, expected {count} or more")
    if not described.contiguous:
        if writable:
            raise UsageError(f"{role}: must be contiguous")
        x = contiguous_copy(x)
    return x.reshape(-1)[:count]


def _store_through_mpi(rank: int, seconds: float) -> TCPStore:
    """A store that rank 0 serves; MPI carries its port."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UsageError(
            "use_mpi=True needs the package mpi4py; leave it out to meet at host and port"
        ) from error
    server = TCPStore(is_server=True, timeout=seconds) if rank == 0 else None
    # Ranks may be numbered otherwise than MPI's.
    ports = MPI.COMM_WORLD.allgather(server.port if server else None)
    if server is not None:
        return server
    return TCPStore(port=next(p for p in ports if p is not None), is_server=False, timeout=seconds)
