"""The communicator: collectives and messages of torch tensors, NumPy and DLPack arrays of one host."""

import atexit
import contextlib
import operator
import os
import threading
import weakref
from collections import deque
from typing import Any

from ringcomm import _core
from ringcomm.arrays import ArrayView, contiguous_copy, copy_back, empty_like, view
from ringcomm.codecs import Codec
from ringcomm.codecs import codec as parse_codec
from ringcomm.descriptors import Endpoints
from ringcomm.errors import AbortedError, RingcommError, UsageError
from ringcomm.plan import Plan, choose

__all__ = ["Communicator", "Work"]

_OPS: dict[str, int] = _core.OPS
_REDUCE_OPS: dict[str, int] = _core.REDUCE_OPS
_ALGOS: dict[str | None, int] = {None: -1} | dict(_core.ALGOS.items())
_FLOAT32: int = _core.DTYPES["float32"]
_ALL_REDUCE = _OPS["all_reduce"]
_MAX_TAG = 2**31 - 1
_MIN_MESSAGES = 16


class Work:
    """The handle of an asynchronous call. May be dropped: the call goes on."""

    def __init__(self, comm: "Communicator", core: Any, result: Any, finish: Any) -> None:
        self._comm = comm
        self._core = core
        self._result = result
        self._finish = finish  # copies a temporary back; runs once, in the first wait()
        self._lock = threading.Lock()

    def done(self) -> bool:
        """Whether the call has finished, well or with an error. Never blocks."""
        return bool(self._core.done())

    def wait(self, timeout: float | None = None) -> Any:
        """Blocks until the call has finished and returns what the synchronous call returns.

        Args:
            timeout: Seconds; None waits for as long as the communicator's own deadline allows.

        Raises:
            TimeoutError: not finished after ``timeout`` seconds; the call goes on.
            RingcommError: what the synchronous call would have raised.
            KeyboardInterrupt: Ctrl-C, or what another signal handler raises; this ends the
                communicator for all ranks, as it does in a synchronous call.
        """
        try:
            finished = self._core.wait(-1.0 if timeout is None else timeout)
        except RingcommError:
            raise
        except BaseException as error:  # a signal handler raised: KeyboardInterrupt, as a rule
            self._comm._interrupted(error)
            raise
        if not finished:
            raise TimeoutError(f"the call is still running after {timeout:g} s")
        with self._lock:
            if self._finish is not None:
                self._finish()
                self._finish = None
        return self._result


class _RecvWork(Work):
    """The handle of an asynchronous receive."""

    def wait(self, timeout: float | None = None) -> int:
        """As :meth:`Work.wait`; returns the rank that sent the message."""
        super().wait(timeout)
        return int(self._core.source())


class Communicator:
    """A group of processes on one host. Make one with :func:`ringcomm.init`; close it or use ``with``.

    Every rank must make the same calls in the same order; calls that disagree raise
    :class:`~ringcomm.errors.MismatchError` on all ranks. Results are bit-identical on all ranks.
    Calls block until the result is there, without holding the GIL, and raise after ``timeout``
    seconds at the latest. Any thread may call; calls run one at a time. Inputs are arrays of any
    shape, also non-contiguous or empty, of float32, float64, float16, bfloat16, int32, int64, uint8.

    :meth:`send` and :meth:`recv` are not part of that order: only the two ranks of a message call
    them, and messages and collectives never wait for each other.

    Attributes:
        rank: Of this process, 0 to ``world_size - 1``.
        world_size: Number of ranks.
        name: Of the group, as it appears in errors.
        timeout: The deadline of every call, in seconds.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        rank: int,
        *,
        name: str,
        timeout: float,
        buffer_bytes: int,
        first_seq: int = 0,
    ) -> None:
        self.rank = rank
        self.world_size = len(endpoints.pids)
        self.name = name
        self.timeout = timeout
        self._core = _core.Communicator(
            rank=rank,
            world_size=self.world_size,
            name=name,
            timeout_s=timeout,
            buffer_bytes=buffer_bytes,
            num_cores=len(os.sched_getaffinity(0)),
            control_fd=endpoints.control_fd,
            staging_fds=endpoints.staging_fds,
            pidfds=endpoints.pidfds,
            pids=endpoints.pids,
            first_seq=first_seq,
        )
        self._collective = self._core.collective
        self._encoded_calls = 0  # the step of stochastic rounding
        # Arrays of asynchronous calls, whatever becomes of the caller's references and Work.
        self._pending: deque[tuple[Any, tuple[Any, ...]]] = deque()
        self._messages: dict[Any, tuple[Any, ...]] = {}  # the same of send and recv
        self._messages_limit = _MIN_MESSAGES
        self._pending_lock = threading.Lock()
        _open.add(self)

    # -- collectives --

    def all_reduce(
        self,
        x: Any,
        op: str = "sum",
        codec: str | Codec | None = None,
        algo: str | None = None,
        async_op: bool = False,
        *,
        residual: Any = None,
        owner_residual: Any = None,
        step: int | None = None,
        tag: str = "",
    ) -> Any:
        """Reduces ``x`` over all ranks, in place.

        Args:
            x: The same shape and dtype on every rank. Holds the result afterwards.
            op: ``sum``, ``avg``, ``min``, ``max`` or ``product``. 16-bit floats accumulate in
                float32, integers wrap around, avg of integers truncates, NaN wins in min and max.
            codec: Such as ``"int8"``: contributions and sums travel encoded (float32, bfloat16 or
                float16; sum and avg). With one rank nothing travels and nothing is encoded.
            algo: ``one_shot``, ``two_shot`` or ``ring``; None lets the table choose (see
                :meth:`explain`). ``ring`` sums in an order that depends on the element's place.
            async_op: Return a :class:`Work` at once; do not touch ``x`` until it is done.
            residual: Error feedback for ``codec``: contiguous float32 array with as many elements
                as ``x``, added before encoding; holds afterwards what the encoding lost.
            owner_residual: The same for the sums; a rank touches the elements that it owns.
            step: Counter of stochastic rounding, the same on all ranks; None counts encoded calls.
            tag: Up to 24 bytes (UTF-8) that must agree on all ranks and appear in errors.

        Returns:
            ``x``, or a :class:`Work` whose ``wait()`` returns it.

        Raises:
            UsageError: bad arguments; nothing was sent. MismatchError: ranks disagree.
            PeerLostError, DeadlineError, AbortedError: ``x`` is undefined; the communicator is lost.
        """
        if codec is None and not async_op and residual is None and owner_residual is None:
            target = view(x, writable=True)
            if target.contiguous and op in _REDUCE_OPS and algo in _ALGOS:  # the fast path
                self._collective(
                    _ALL_REDUCE,
                    target.ptr,
                    target.ptr,
                    target.num_elems,
                    target.dtype,
                    _REDUCE_OPS[op],
                    -1,
                    _ALGOS[algo],
                    tag,
                )
                return x
        compress = parse_codec("none" if codec is None else codec)
        reduce_op, algo_id = _lookup(op, _REDUCE_OPS, "op"), _lookup(algo, _ALGOS, "algo")
        target, finish = _in_place(x)
        if compress.exact:
            if residual is not None or owner_residual is not None:
                raise UsageError("a residual needs a codec: nothing is lost in an exact all_reduce")
            core = self._collective(
                _ALL_REDUCE,
                target.ptr,
                target.ptr,
                target.num_elems,
                target.dtype,
                reduce_op,
                -1,
                algo_id,
                tag,
                async_op,
            )
        else:
            if step is None:
                step = self._encoded_calls = self._encoded_calls + 1
            core = self._core.all_reduce_encoded(
                target.ptr,
                target.ptr,
                target.num_elems,
                target.dtype,
                reduce_op,
                compress.up,
                compress.down,
                compress.rounding == "stochastic",
                compress.seed,
                step,
                _residual_pointer(residual, target.num_elems, "residual"),
                _residual_pointer(owner_residual, target.num_elems, "owner_residual"),
                algo_id,
                tag,
                async_op,
            )
        return self._result(core, x, finish, (target, residual, owner_residual))

    def broadcast(self, x: Any, root: int = 0, async_op: bool = False, *, tag: str = "") -> Any:
        """Copies the root's ``x`` into everybody's ``x``, in place.

        Args:
            x: The same shape and dtype on every rank; may be read-only on the root.
            root: Rank that has the data.
            async_op: As in :meth:`all_reduce`.
            tag: As in :meth:`all_reduce`.

        Returns:
            ``x``, or a :class:`Work`. A small broadcast returns on the root before the others have
            read it.

        Raises:
            As :meth:`all_reduce`.
        """
        self._check_root(root)
        target, finish = _in_place(x, writable=self.rank != root)
        core = self._collective(
            _OPS["broadcast"],
            target.ptr,
            target.ptr,
            target.num_elems,
            target.dtype,
            0,
            root,
            -1,
            tag,
            async_op,
        )
        return self._result(core, x, finish, (target,))

    def all_gather(self, x: Any, out: Any = None, async_op: bool = False, *, tag: str = "") -> Any:
        """Gathers every rank's ``x`` on every rank.

        Args:
            x: The same shape and dtype on every rank. Not modified.
            out: Contiguous array of ``world_size`` times as many elements and the dtype of ``x``,
                any shape; None makes one of shape ``(world_size, *x.shape)`` in the library of ``x``.
            async_op: As in :meth:`all_reduce`.
            tag: As in :meth:`all_reduce`.

        Returns:
            ``out`` (rank ``r``'s elements are the ``r``-th part), or a :class:`Work`.

        Raises:
            As :meth:`all_reduce`.
        """
        source = _readable(x)
        if out is None:
            out = empty_like(x, (self.world_size, *source.shape))
        target = _output(out, source, source.num_elems * self.world_size)
        core = self._collective(
            _OPS["all_gather"],
            source.ptr,
            target.ptr,
            source.num_elems,
            source.dtype,
            0,
            -1,
            -1,
            tag,
            async_op,
        )
        return self._result(core, out, None, (source, target))

    def reduce_scatter(
        self, x: Any, op: str = "sum", out: Any = None, async_op: bool = False, *, tag: str = ""
    ) -> Any:
        """Reduces over all ranks and leaves one part of the result on each.

        Args:
            x: Array whose first dimension is a multiple of ``world_size``. Not modified.
            op: As in :meth:`all_reduce`.
            out: Contiguous array for this rank's part; None makes one of shape
                ``(x.shape[0] // world_size, *x.shape[1:])``.
            async_op: As in :meth:`all_reduce`.
            tag: As in :meth:`all_reduce`.

        Returns:
            ``out``: part ``rank`` of the reduced array, or a :class:`Work`.

        Raises:
            As :meth:`all_reduce`.
        """
        reduce_op = _lookup(op, _REDUCE_OPS, "op")
        source = _readable(x)
        if not source.shape or source.shape[0] % self.world_size:
            raise UsageError(
                f"x: shape {tuple(source.shape)} cannot be split into {self.world_size} equal parts; the first "
                "dimension must be a multiple of the world size (pad it)"
            )
        if out is None:
            out = empty_like(x, (source.shape[0] // self.world_size, *source.shape[1:]))
        target = _output(out, source, source.num_elems // self.world_size)
        core = self._collective(
            _OPS["reduce_scatter"],
            source.ptr,
            target.ptr,
            target.num_elems,
            source.dtype,
            reduce_op,
            -1,
            -1,
            tag,
            async_op,
        )
        return self._result(core, out, None, (source, target))

    def barrier(self, *, tag: str = "") -> None:
        """Blocks until every rank has called it."""
        self._collective(_OPS["barrier"], 0, 0, 0, 0, 0, -1, -1, tag)

    # -- messages --

    def send(self, x: Any, dst: int, tag: int = 0, async_op: bool = False) -> Any:
        """Sends ``x`` to one rank, which must :meth:`recv` as many bytes with the same tag.

        Messages to one rank with one tag arrive in the order in which they were sent. A message of up
        to 4096 bytes (fewer with more than 8 ranks; at least 256) does not wait for its receive unless
        eight others do already; a longer one is done when the receiver has asked for it and all of it
        is on its way. Any number may be pending with ``async_op=True``: ranks that send to all and
        then receive from all in any order never block each other.

        Args:
            x: Any array that the collectives take. Not modified; do not change it until the call,
                or the :class:`Work`, is done.
            dst: Rank to send to. To send to this very rank, call ``recv`` with ``async_op=True``
                first, or use ``async_op=True`` here.
            tag: Which messages the receiver can tell apart: 0 to 2**31 - 1. Not the ``tag`` of
                collectives, which is a label for errors.
            async_op: Return a :class:`Work` at once. Its deadline runs from now on.

        Returns:
            ``x``, or a :class:`Work` whose ``wait()`` returns it.

        Raises:
            UsageError: bad arguments; nothing was sent. MismatchError: the receive is of another size.
            PeerLostError, DeadlineError, AbortedError: the communicator is lost.
        """
        self._check_message(dst, "dst", tag)
        source = _readable(x)
        core = self._core.send(source.ptr, source.num_bytes, dst, tag, async_op)
        if not async_op:
            return x
        self._keep(core, (x, source))
        return Work(self, core, x, lambda: self._release(core))

    def recv(self, x: Any, src: int | None = None, tag: int = 0, async_op: bool = False) -> Any:
        """Receives a message into ``x``.

        Receives match messages in the order in which they are called. Tags may be received in
        another order than they were sent.

        Args:
            x: Array of as many bytes as the message. Undefined until the call, or the first
                ``wait()`` of the :class:`Work`, has returned.
            src: Rank to receive from; None takes the message with this tag that comes first.
            tag: As in :meth:`send`.
            async_op: As in :meth:`send`.

        Returns:
            The rank that sent the message, or a :class:`Work` whose ``wait()`` returns it.

        Raises:
            As :meth:`send`. MismatchError: the message has another size than ``x``.
        """
        self._check_message(0 if src is None else src, "src", tag)
        target, finish = _in_place(x)
        core = self._core.recv(
            target.ptr, target.num_bytes, -1 if src is None else src, tag, async_op
        )
        if not async_op:
            if finish is not None:
                finish()
            return core.source()
        self._keep(core, (x, target))

        def complete() -> None:
            if finish is not None:
                finish()
            self._release(core)

        return _RecvWork(self, core, None, complete)

    # -- about --

    def explain(
        self, num_bytes: int, op: str = "all_reduce", codec: str | Codec | None = None
    ) -> Plan:
        """What a call on ``num_bytes`` bytes per rank would do, and why. Sends nothing."""
        compress = parse_codec("none" if codec is None else codec)
        return choose(op, num_bytes, self.world_size, compress, self._core.inline_bytes)

    def owned(self, num_elems: int) -> list[tuple[int, int]]:
        """The parts of an array whose sums this rank encodes in an ``all_reduce`` with a codec.

        Args:
            num_elems: Elements of the array.

        Returns:
            Ranges (begin, end) in order; those of ``owner_residual`` that this rank reads and writes.
        """
        return self._core.encoded_sums(num_elems)

    def stats(self) -> dict[str, dict[str, float]]:
        """Counters per operation since :func:`ringcomm.init`, or the last :meth:`reset_stats`.

        Returns:
            ``{"all_reduce": {"calls", "bytes", "bytes_sent", "seconds"}, ...}``: ``bytes`` of the
            caller's arrays, ``bytes_sent`` handed to peers, ``seconds`` inside calls, waiting included.
            ``send`` and ``recv`` count messages that are done; ``seconds`` from call to done.
        """
        return self._core.stats()

    def reset_stats(self) -> None:
        """Sets all counters to zero."""
        self._core.reset_stats()

    # -- the end --

    def abort(self, reason: str = "abort() was called") -> None:
        """Makes every rank's current and later calls raise ``AbortedError`` now. Never waits."""
        self._core.abort(reason)

    def close(self) -> None:
        """Finishes pending asynchronous calls, then leaves. Idempotent, not collective.

        A pending receive for which no message has come ends with ``AbortedError``. What this rank has
        sent can still be received.

        A peer that still needs this rank gets a ``PeerLostError`` that says so.
        """
        _open.discard(self)
        try:
            self._core.close()
        finally:
            with self._pending_lock:
                self._pending.clear()
                self._messages.clear()

    def __enter__(self) -> "Communicator":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_pending"):  # else the constructor failed
            self.close()

    def __repr__(self) -> str:
        return f"<ringcomm.Communicator '{self.name}' rank {self.rank} of {self.world_size}>"

    def __reduce__(self) -> Any:
        raise UsageError("a communicator cannot be pickled; init() one in each process")

    def _result(self, core: Any, value: Any, finish: Any, keep: tuple[Any, ...]) -> Any:
        if core is not None:
            with self._pending_lock:
                while self._pending and self._pending[0][0].done():  # calls finish in order
                    self._pending.popleft()
                self._pending.append((core, keep))
            return Work(self, core, value, finish)
        if finish is not None:
            finish()
        return value

    def _keep(self, core: Any, arrays: tuple[Any, ...]) -> None:
        """Keeps the arrays of a message until it is done. Messages finish in any order."""
        with self._pending_lock:
            if len(self._messages) >= self._messages_limit:
                for done in [work for work in self._messages if work.done()]:
                    del self._messages[done]
                self._messages_limit = max(_MIN_MESSAGES, 2 * len(self._messages))
            self._messages[core] = arrays

    def _release(self, core: Any) -> None:
        with self._pending_lock:
            self._messages.pop(core, None)

    def _check_message(self, peer: int, role: str, tag: int) -> None:
        if type(peer) is not int or type(tag) is not int:
            peer, tag = _whole(peer, role), _whole(tag, "tag")
        if not 0 <= peer < self.world_size:
            raise UsageError(f"{role} must be 0 to {self.world_size - 1}, not {peer}")
        if not 0 <= tag <= _MAX_TAG:
            raise UsageError(f"the tag of a message must be 0 to {_MAX_TAG}, not {tag}")

    def _interrupted(self, error: BaseException) -> None:
        with contextlib.suppress(AbortedError):  # closed already
            self._core.abort(
                f"it was interrupted ({type(error).__name__}) while it waited for a call"
            )

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self.world_size:
            raise UsageError(f"root must be 0 to {self.world_size - 1}, not {root}")


_open: "weakref.WeakSet[Communicator]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for comm in list(_open):
        comm.close()


# ---- arguments -----------------------------------------------------------------------------------


def _lookup(name: str | None, table: dict[Any, int], what: str) -> int:
    value = table.get(name)
    if value is None:
        known = ", ".join(repr(key) for key in table)
        raise UsageError(f"{what} must be one of {known}, not {name!r}")
    return value


def _whole(value: Any, role: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise UsageError(
            f"{role} of a message must be a whole number, not {value!r} (labels are for collectives)"
        ) from error


def _in_place(x: Any, writable: bool = True) -> tuple[ArrayView, Any]:
    """The memory to work on, and what copies the result back into ``x`` (None: it is ``x``)."""
    target = view(x, writable=writable)
    if target.contiguous:
        return target, None
    copy = contiguous_copy(x)
    return view(copy, writable=True), (lambda: copy_back(copy, x)) if writable else None


def _readable(x: Any) -> ArrayView:
    source = view(x, writable=False)
    if source.contiguous:
        return source
    return view(contiguous_copy(x), writable=False)._replace(shape=source.shape)


def _output(out: Any, source: ArrayView, num_elems: int) -> ArrayView:
    target = view(out, writable=True, role="out")
    if not target.contiguous:
        raise UsageError("out: must be contiguous")
    if target.dtype != source.dtype:
        raise UsageError(f"out: dtype {target.dtype_name}, expected {source.dtype_name} like x")
    if target.num_elems != num_elems:
        raise UsageError(f"out: {target.num_elems} elements, expected {num_elems}")
    return target


def _residual_pointer(residual: Any, num_elems: int, role: str) -> int:
    if residual is None:
        return 0
    target = view(residual, writable=True, role=role)
    if target.dtype != _FLOAT32 or not target.contiguous or target.num_elems != num_elems:
        raise UsageError(
            f"{role}: {target.num_elems} elements of {target.dtype_name}, expected a contiguous float32 array of "
            f"{num_elems} elements, as many as x has"
        )
    return target.ptr
