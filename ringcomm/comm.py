"""The communicator: collectives and messages of torch tensors, NumPy, CuPy and DLPack arrays of one host."""

import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np

from ringcomm import _core, env
from ringcomm.arguments import (
    PREMUL_SUM,
    Parts,
    equal_parts,
    group_name,
    in_place,
    is_list,
    lookup,
    output,
    parts_to_receive,
    parts_to_send,
    premul_factor,
    readable,
    residual_view,
    row_counts,
    seconds,
    whole_number,
)
from ringcomm.arrays import ArrayView, empty_like, view
from ringcomm.codecs import Codec
from ringcomm.codecs import codec as parse_codec
from ringcomm.descriptors import Endpoints
from ringcomm.device import Devices, device_name
from ringcomm.errors import AbortedError, UsageError
from ringcomm.machine import usable_cores
from ringcomm.meeting import store_among
from ringcomm.plan import Plan, choose, one_shot_limit
from ringcomm.rendezvous import rendezvous
from ringcomm.store import Store
from ringcomm.symmetric import allocate
from ringcomm.tuning import Limits, limits_for
from ringcomm.work import RecvWork, Work

__all__ = ["Communicator", "connect"]

_OPS: dict[str, int] = _core.OPS
_REDUCE_OPS: dict[str, int] = _core.REDUCE_OPS
_PLAIN_REDUCE_OPS = {name: op for name, op in _REDUCE_OPS.items() if name != PREMUL_SUM}
_ALGOS: dict[str | None, int] = {None: -1} | dict(_core.ALGOS.items())
_ALL_REDUCE = _OPS["all_reduce"]
_NUM_BUFFERS = 4  # of staging memory, of a rank
_RECORDER_CALLS = 256
_MAX_TAG = 2**31 - 1
_MIN_MESSAGES = 16


class Communicator:
    """A group of processes on one host. Make one with :func:`ringcomm.init`; close it or use ``with``.

    Every rank must make the same calls in the same order; calls that disagree raise
    :class:`~ringcomm.errors.MismatchError` on all ranks. Results are bit-identical on all ranks.
    Calls block until the result is there, without holding the GIL, and raise after ``timeout``
    seconds at the latest. Any thread may call; calls run one at a time. Inputs are arrays of any
    shape, also non-contiguous or empty, of these dtypes (``op`` says what is reduced):

    - float64, float32, float16, bfloat16: all operators but the bitwise ones
    - int8 to int64, uint8 to uint64: all but ``premul_sum``
    - bool: all but ``avg`` and ``premul_sum``
    - complex64, complex128: ``sum``, ``avg``, ``product``, ``premul_sum``
    - float8_e4m3fn, float8_e5m2, float8_e4m3fnuz, float8_e5m2fnuz, float8_e8m0fnu: moved, not reduced

    :meth:`send` and :meth:`recv` are not part of that order: only the two ranks of a message call
    them, and messages and collectives never wait for each other.

    Arrays may be on GPUs: all arrays of a call on the rank's GPU, and then on all ranks. A communicator
    works on one GPU per rank, that of the first array (or of ``init(device=...)``), and on arrays of the
    CPU beside it. Results are the CPU's bits. Calls come in the order of the stream that is current in the
    array's library. How they run depends on the GPUs (``RINGCOMM_CUDA_MODE``, :meth:`explain`):

    - in_kernel: GPUs that reach each other's memory and run at the same time. Calls return when they are
      queued, and may be captured into a CUDA graph; :meth:`synchronize` waits for the GPU. A failure ends
      kernels that wait, too; what they write is undefined, and the next call raises.
    - stepped: several ranks share a GPU, without MPS. Calls block until they are done.
    - host: GPUs that do not reach each other. Calls go through host memory and block.

    Calls that block raise :class:`~ringcomm.errors.UsageError` on a stream that is being captured, and so do
    messages; the capture goes on.

    Attributes:
        rank: Of this process, 0 to ``world_size - 1``.
        world_size: Number of ranks.
        name: Of the group, as it appears in errors.
        timeout: The deadline of every call, in seconds.
        device: ``"cuda:<index>"`` once the communicator has been set up for arrays on GPUs, else None.
        device_mode: ``"in_kernel"``, ``"stepped"`` or ``"host"``, likewise.
        direct_calls: How many collectives on GPUs have used all ranks' arrays where they are; see :meth:`empty`.
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
        num_cores: int | None = None,
        device: str | None = None,
        device_limits: Limits | None = None,
    ) -> None:
        _core.set_log_sink(_log, env.logger().getEffectiveLevel())
        self.rank = rank
        self.world_size = len(endpoints.pids)
        self.name = name
        self.timeout = timeout
        self._buffer_bytes = buffer_bytes
        self._first_seq = first_seq
        self._num_cores = usable_cores() if num_cores is None else num_cores
        self._limits = endpoints.limits
        self._global_rank = endpoints.global_ranks[rank]
        self._core = _core.Communicator(
            rank=rank,
            world_size=self.world_size,
            name=name,
            timeout_s=timeout,
            buffer_bytes=buffer_bytes,
            num_cores=self._num_cores,
            control_fd=endpoints.control_fd,
            staging_fds=endpoints.staging_fds,
            pidfds=endpoints.pidfds,
            pids=endpoints.pids,
            first_seq=first_seq,
            recorder_calls=_recorder_calls(),
            recorder_file=_recorder_file(self._global_rank),
            global_ranks=endpoints.global_ranks,
            one_shot_limits=endpoints.limits,
        )
        self._collective = self._core.collective
        self._devices = Devices(self, device_limits)
        self._encoded_calls = 0  # the step of stochastic rounding
        # Arrays of asynchronous calls, whatever becomes of the caller's references and Work.
        self._pending: deque[tuple[Any, Sequence[ArrayView]]] = deque()
        self._messages: dict[Any, tuple[Any, ...]] = {}  # the same of send and recv
        self._messages_limit = _MIN_MESSAGES
        self._pending_lock = threading.Lock()
        _open.add(self)
        if env.logger("INIT").isEnabledFor(logging.INFO):
            env.logger("INIT").info("%s", self._start_line())
        if device is not None:
            try:
                self.use_device(device)
            except BaseException:
                self.close()
                raise

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
        factor: float | None = None,
        tag: str = "",
    ) -> Any:
        """Reduces ``x`` over all ranks, in place.

        Args:
            x: The same shape and dtype on every rank. Holds the result afterwards.
            op: ``sum``, ``avg``, ``min``, ``max``, ``product``, ``band``, ``bor``, ``bxor`` (bitwise)
                or ``premul_sum`` (see ``factor``). 16-bit floats accumulate in float32, integers wrap
                around, avg of integers truncates, NaN wins in min and max. bool: sum, max and bor are
                logical or; product, min and band are logical and.
            codec: Such as ``"int8"``: contributions and sums travel encoded (float32, bfloat16 or
                float16; sum and avg). With one rank nothing travels and nothing is encoded.
            algo: ``one_shot``, ``two_shot`` or ``ring``; None lets the table choose (see
                :meth:`explain`). ``ring`` sums in an order that depends on the
                element's place in ``x``, the same on CPUs and GPUs.
            async_op: Return a :class:`Work` at once; do not touch ``x`` until it is done.
            residual: Error feedback for ``codec``: contiguous float32 array with as many elements
                as ``x``, added before encoding; holds afterwards what the encoding lost.
            owner_residual: The same for the sums; a rank touches the elements that it owns.
            step: Counter of stochastic rounding, the same on all ranks; None counts encoded calls.
            factor: For ``premul_sum``, which is the sum of every rank's ``x * factor`` (rounded to
                the dtype of ``x``). A real number that need not be the same on all ranks.
            tag: Up to 24 bytes (UTF-8) that must agree on all ranks and appear in errors.

        Returns:
            ``x``, or a :class:`Work` whose ``wait()`` returns it.

        Raises:
            UsageError: bad arguments; nothing was sent. MismatchError: ranks disagree (with
            ``premul_sum``, ``x`` may be scaled already).
            PeerLostError, DeadlineError, AbortedError: ``x`` is undefined; the communicator is lost.
        """
        if (
            codec is None
            and not async_op
            and residual is None
            and owner_residual is None
            and factor is None
        ):
            target = view(x, writable=True)
            if (
                target.device == self._devices.host
                and target.contiguous
                and op in _PLAIN_REDUCE_OPS
                and algo in _ALGOS
            ):  # the fast path
                self._collective(
                    _ALL_REDUCE,
                    target.ptr,
                    target.ptr,
                    target.num_elems,
                    target.dtype,
                    _PLAIN_REDUCE_OPS[op],
                    -1,
                    _ALGOS[algo],
                    tag,
                )
                return x
        compress = parse_codec("none" if codec is None else codec)
        reduce_op, algo_id = lookup(op, _REDUCE_OPS, "op"), lookup(algo, _ALGOS, "algo")
        scale = premul_factor(op, factor)
        if compress.exact and (residual is not None or owner_residual is not None):
            raise UsageError("a residual needs a codec: nothing is lost in an exact all_reduce")
        target, finish = in_place(x)
        up, owner = (
            residual_view(array, target.num_elems, role)
            for array, role in ((residual, "residual"), (owner_residual, "owner_residual"))
        )
        arrays = [array for array in (target, up, owner) if array is not None]
        stream = self._devices.place(arrays)
        if compress.exact:
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
                scale,
                on_device=stream is not None,
                stream=stream or 0,
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
                0 if up is None else up.ptr,
                0 if owner is None else owner.ptr,
                algo_id,
                tag,
                async_op,
                on_device=stream is not None,
                stream=stream or 0,
            )
        return self._result(core, x, finish, arrays)

    def all_reduce_coalesced(
        self,
        arrays: Sequence[Any],
        op: str = "sum",
        async_op: bool = False,
        *,
        factor: float | None = None,
        tag: str = "",
    ) -> Any:
        """Reduces every array of a list over all ranks, in place: many small ones for little more than one.

        The same bits as :meth:`all_reduce` of each (``algo=None``). Arrays of one dtype travel together,
        packed into one buffer: on CPUs those of up to 16 KiB (32 KiB with more than two ranks), in calls of
        at most 512 KiB; on GPUs up to 2 MiB, at most 16 MiB, also inside a CUDA graph. Larger ones go
        alone, where they are.

        Args:
            arrays: List or tuple of arrays that do not overlap, of any dtypes; shapes and dtypes in the
                same order on every rank. May be empty.
            op: As in :meth:`all_reduce`; for all of them. There is no codec: its result would depend on
                what else is in the list.
            async_op: As in :meth:`all_reduce`.
            factor: As in :meth:`all_reduce`.
            tag: As in :meth:`all_reduce`.

        Returns:
            ``arrays``, or a :class:`Work` whose ``wait()`` returns it.

        Raises:
            MismatchError: also if lists differ in length, in a dtype or in a number of elements. Else as
                :meth:`all_reduce`; in statistics and in the flight recorder the calls are all_reduces.
        """
        if not is_list(arrays):
            raise UsageError(f"arrays must be a list of arrays, not {type(arrays).__name__}")
        reduce_op, scale = lookup(op, _REDUCE_OPS, "op"), premul_factor(op, factor)
        targets = [in_place(array) for array in arrays]
        views = [target for target, _ in targets]
        copies = [finish for _, finish in targets if finish is not None]

        def finish_all() -> None:
            for finish in copies:
                finish()

        stream = self._devices.place(views)
        core = self._core.all_reduce_coalesced(
            [(target.ptr, target.num_elems, target.dtype) for target in views],
            reduce_op,
            tag,
            async_op,
            scale,
            stream is not None,
            stream or 0,
        )
        return self._result(core, arrays, finish_all if copies else None, views)

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
        target, finish = in_place(x, writable=self.rank != root)
        arrays = (target,)
        core = self._issue("broadcast", arrays, target, target.ptr, tag, async_op, root=root)
        return self._result(core, x, finish, arrays)

    def reduce(
        self,
        x: Any,
        root: int = 0,
        op: str = "sum",
        async_op: bool = False,
        *,
        factor: float | None = None,
        tag: str = "",
    ) -> Any:
        """Reduces ``x`` over all ranks into the root's ``x``, in place; the same bits as :meth:`all_reduce`.

        Args:
            x: The same shape and dtype on every rank. Holds the result on the root afterwards; not
                modified elsewhere, where it may be read-only.
            root: Rank that gets the result.
            op: As in :meth:`all_reduce`.
            async_op: As in :meth:`all_reduce`.
            factor: As in :meth:`all_reduce`.
            tag: As in :meth:`all_reduce`.

        Returns:
            ``x`` on the root and None elsewhere, or a :class:`Work`. A small reduce returns before
            the root has read what the others put in.

        Raises:
            As :meth:`all_reduce`.
        """
        self._check_root(root)
        reduce_op, scale = lookup(op, _REDUCE_OPS, "op"), premul_factor(op, factor)
        if self.rank == root:
            array, finish = in_place(x)
            value, target = x, array.ptr
        else:
            array, finish = readable(x), None
            value, target = None, 0
        arrays = (array,)
        core = self._issue(
            "reduce",
            arrays,
            array,
            target,
            tag,
            async_op,
            reduce_op=reduce_op,
            root=root,
            factor=scale,
        )
        return self._result(core, value, finish, arrays)

    def all_gather(self, x: Any, out: Any = None, async_op: bool = False, *, tag: str = "") -> Any:
        """Gathers every rank's ``x`` on every rank.

        Args:
            x: The same shape and dtype on every rank. Not modified.
            out: Contiguous array of ``world_size`` times as many elements and the dtype of ``x``,
                any shape; or a list of ``world_size`` contiguous arrays, each as long as ``x``. None
                makes one array of shape ``(world_size, *x.shape)`` in the library of ``x``. ``x`` may
                be this rank's part of it.
            async_op: As in :meth:`all_reduce`.
            tag: As in :meth:`all_reduce`.

        Returns:
            ``out`` (rank ``r``'s elements are the ``r``-th part), or a :class:`Work`.

        Raises:
            As :meth:`all_reduce`.
        """
        source = readable(x)
        if is_list(out):
            parts = parts_to_receive(out, source, self.world_size)
            arrays = (source, *parts.views)
            core = self._issue("all_gather", arrays, source, 0, tag, async_op, receives=parts.spans)
            return self._result(core, out, None, arrays)
        if out is None:
            out = empty_like(x, (self.world_size, *source.shape))
        target = output(out, source, source.num_elems * self.world_size)
        arrays = (source, target)
        core = self._issue("all_gather", arrays, source, target.ptr, tag, async_op)
        return self._result(core, out, None, arrays)

    def reduce_scatter(
        self,
        x: Any,
        op: str = "sum",
        out: Any = None,
        async_op: bool = False,
        *,
        factor: float | None = None,
        tag: str = "",
    ) -> Any:
        """Reduces over all ranks and leaves one part of the result on each.

        Args:
            x: Array whose first dimension is a multiple of ``world_size``; or a list of
                ``world_size`` equally long arrays, the ``r``-th for rank ``r``. Not modified.
            op: As in :meth:`all_reduce`.
            out: Contiguous array for this rank's part; None makes one of shape
                ``(x.shape[0] // world_size, *x.shape[1:])``, or of the shape of ``x[rank]``. It may
                be this rank's part of ``x``.
            async_op: As in :meth:`all_reduce`.
            factor: As in :meth:`all_reduce`.
            tag: As in :meth:`all_reduce`.

        Returns:
            ``out``: part ``rank`` of the reduced array, or a :class:`Work`.

        Raises:
            As :meth:`all_reduce`.
        """
        reduce_op, scale = lookup(op, _REDUCE_OPS, "op"), premul_factor(op, factor)
        if is_list(x):
            out, parts, target = self._own_part(x, out)
            address, sends, inputs = 0, parts.spans, parts.views
        else:
            source = readable(x)
            rows = equal_parts(source, self.world_size)
            if out is None:
                out = empty_like(x, (rows, *source.shape[1:]))
            target = output(out, source, source.num_elems // self.world_size)
            address, sends, inputs = source.ptr, None, [source]
        arrays = (target, *inputs)
        core = self._issue(
            "reduce_scatter",
            arrays,
            target,
            target.ptr,
            tag,
            async_op,
            source=address,
            reduce_op=reduce_op,
            factor=scale,
            sends=sends,
        )
        return self._result(core, out, None, arrays)

    def gather(
        self, x: Any, root: int = 0, out: Any = None, async_op: bool = False, *, tag: str = ""
    ) -> Any:
        """Gathers every rank's ``x`` on the root.

        Args:
            x: The same dtype on every rank, and as many elements as the root has room for. Not
                modified.
            root: Rank that gets all.
            out: On the root a contiguous array of ``world_size`` times as many elements as ``x``,
                any shape; or a list of ``world_size`` contiguous arrays, the ``r``-th for rank ``r``,
                whose sizes may differ. None makes one array of shape ``(world_size, *x.shape)`` in
                the library of ``x``. The root's ``x`` may be its own part of it. None elsewhere.
            async_op: As in :meth:`all_reduce`.
            tag: As in :meth:`all_reduce`.

        Returns:
            ``out`` on the root and None elsewhere, or a :class:`Work`.

        Raises:
            MismatchError: also if a rank sends more or less than the root expects of it, in this
                call and on all ranks. Else as :meth:`all_reduce`.
        """
        self._check_root(root)
        source = readable(x)
        if self.rank != root:
            if out is not None:
                raise UsageError(f"out: only rank {root}, the root, receives; pass None elsewhere")
            core = self._issue("gather", (source,), source, 0, tag, async_op, root=root)
            return self._result(core, None, None, (source,))
        if out is None:
            out = empty_like(x, (self.world_size, *source.shape))
        if not is_list(out):
            output(out, source, source.num_elems * self.world_size)
        parts = parts_to_receive(out, source, self.world_size)
        arrays = (source, *parts.views)
        core = self._issue(
            "gather", arrays, source, 0, tag, async_op, root=root, receives=parts.spans
        )
        return self._result(core, out, None, arrays)

    def scatter(
        self, x: Any, root: int = 0, out: Any = None, async_op: bool = False, *, tag: str = ""
    ) -> Any:
        """Hands out the parts of the root's ``x``, one to each rank.

        Args:
            x: On the root an array whose first dimension is a multiple of ``world_size``; or a list
                of ``world_size`` arrays, the ``r``-th for rank ``r``, whose sizes may differ. Not
                modified. None elsewhere.
            root: Rank that has the data.
            out: Contiguous array for this rank's part, as long as what the root has for it. The root
                may pass None, which makes one, or its own part of ``x``.
            async_op: As in :meth:`all_reduce`.
            tag: As in :meth:`all_reduce`.

        Returns:
            ``out``, or a :class:`Work`.

        Raises:
            MismatchError: also if a rank has room for more or less than the root sends, in this call
                and on all ranks. Else as :meth:`all_reduce`.
        """
        self._check_root(root)
        if self.rank == root:
            out, source, target = self._own_part(x, out)
            arrays = (target, *source.views)
            core = self._issue(
                "scatter", arrays, target, target.ptr, tag, async_op, root=root, sends=source.spans
            )
            return self._result(core, out, None, arrays)
        if x is not None:
            raise UsageError(f"x: only rank {root}, the root, sends; pass None and out= elsewhere")
        if out is None:
            raise UsageError(
                f"out: pass an array for what rank {self.rank} gets; only the root knows its shape and dtype"
            )
        target = output(out)
        core = self._issue("scatter", (target,), target, target.ptr, tag, async_op, root=root)
        return self._result(core, out, None, (target,))

    def all_to_all(
        self,
        x: Any,
        out: Any = None,
        async_op: bool = False,
        *,
        send_counts: Sequence[int] | None = None,
        receive_counts: Sequence[int] | None = None,
        tag: str = "",
    ) -> Any:
        """Every rank sends a part of ``x`` to every rank, itself included.

        Args:
            x: Array whose parts along the first dimension go to ranks 0, 1, ...; or a list of
                ``world_size`` arrays, whose sizes may differ. The same dtype everywhere. Not modified.
            out: Contiguous array for the parts that come from ranks 0, 1, ..., in this order; or a
                list of ``world_size`` contiguous arrays. None makes what ``receive_counts`` say, else
                the like of ``x``. It may not overlap ``x``.
            async_op: As in :meth:`all_reduce`.
            send_counts: How many rows (elements of the first dimension) of an array ``x`` go to each
                rank; may be 0. None: all the same.
            receive_counts: The same for an array ``out``. None: all the same.
            tag: As in :meth:`all_reduce`.

        Returns:
            ``out``, or a :class:`Work`.

        Raises:
            MismatchError: also if a rank sends another rank more or less than that one expects, in
                this call and on all ranks. Else as :meth:`all_reduce`.
        """
        if send_counts is None and receive_counts is None and not is_list(x) and not is_list(out):
            array = readable(x)
            equal_parts(array, self.world_size)
            if out is None:
                out = empty_like(x, array.shape)
            place = output(out, array, array.num_elems)
            core = self._issue("all_to_all", (array, place), array, place.ptr, tag, async_op)
            return self._result(core, out, None, (array, place))
        source = parts_to_send(x, self.world_size, send_counts)
        if out is None and is_list(x):
            if receive_counts is not None:
                raise UsageError(
                    "receive_counts: x is a list; pass a list of arrays as out instead"
                )
            out = [empty_like(one) for one in x]
        elif out is None:
            shape = source.views[0].shape
            if receive_counts is not None:
                rows = row_counts(receive_counts, self.world_size, "receive_counts")
                shape = (sum(rows), *shape[1:])
            elif send_counts is not None:
                raise UsageError("receive_counts: with send_counts, pass these or a list as out")
            out = empty_like(x, shape)
        target = parts_to_receive(out, source.views[0], self.world_size, receive_counts)
        arrays = (*source.views, *target.views)
        core = self._issue(
            "all_to_all",
            arrays,
            source.views[0],
            0,
            tag,
            async_op,
            count=source.num_elems,
            sends=source.spans,
            receives=target.spans,
        )
        return self._result(core, out, None, arrays)

    def barrier(self, async_op: bool = False, *, tag: str = "") -> Any:
        """Blocks until every rank has called it.

        Returns:
            None, or with ``async_op`` a :class:`Work` that is done once every rank has come.
        """
        core = self._collective(_OPS["barrier"], 0, 0, 0, 0, 0, -1, -1, tag, async_op)
        return self._result(core, None, None, ())

    def monitored_barrier(
        self,
        timeout: float | timedelta | None = None,
        wait_all_ranks: bool = False,
        *,
        tag: str = "",
    ) -> None:
        """A barrier that names every rank that does not come.

        Args:
            timeout: Deadline of this call, in seconds or as timedelta; None: the communicator's.
                Counts from the moment at which a rank begins to wait; may differ between ranks.
            wait_all_ranks: Say of every late rank what it is doing instead, not only of the first.
            tag: As in :meth:`all_reduce`.

        Raises:
            DeadlineError: some did not come: their ranks and process ids, and where they are. The
                same sentence on all ranks, also on those that come later. The communicator is lost:
                nothing can tell whether the late ranks would ever have made the same calls. Else as
                :meth:`barrier`.
        """
        limit = 0.0 if timeout is None else seconds(timeout)
        self._core.monitored_barrier(limit, wait_all_ranks, tag)

    # -- sub-groups --

    def split(
        self, color: int | None, key: int | None = None, *, name: str | None = None
    ) -> "Communicator | None":
        """Makes a communicator of every set of ranks that pass the same ``color``; collective.

        Args:
            color: Which of the new communicators this rank joins; None: none of them, but the call
                is made all the same.
            key: Orders the ranks of a colour; equal keys, and None, by rank in this communicator.
            name: Of the new communicator, for errors; default ``"<name of this one>/<color>"``.

        Returns:
            The communicator, with this one's deadline and its own memory: calls on both, and on
            those of other colours, go on independently, from any threads. Close it yourself. None
            without a colour.

        Raises:
            UsageError: bad arguments on this rank; nothing was sent.
            SystemResourceError: no memory, sockets or descriptors. Else as :meth:`all_reduce`.
        """
        group = None if color is None else whole_number(color, "color")
        order = self.rank if key is None else whole_number(key, "key")
        if name is None:
            name = f"{self.name}/{group}".encode()[-64:].decode(errors="ignore")
        group_name(name)
        rows = self._gather(np.array([group is not None, group or 0, order]), "split colors")
        members = [
            other
            for _, other in sorted((int(rows[r, 2]), r) for r in range(self.world_size))
            if rows[other, 0] and rows[other, 1] == group
        ]
        with store_among(self, members, "split") as store:
            if group is None:
                return None
            return connect(
                store,
                members.index(self.rank),
                len(members),
                prefix="split",
                name=name,
                timeout=self.timeout,
                buffer_bytes=self._buffer_bytes,
                first_seq=self._first_seq,
                num_cores=max(1, self._num_cores * len(members) // self.world_size),
                global_rank=self._global_rank,
                device=self.device,
            )

    # -- memory --

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32", device: Any = None) -> Any:
        """Makes an array in memory that all ranks map; collective.

        all_reduce, reduce, broadcast, all_gather and reduce_scatter on such an array (or on a
        contiguous part of it, also with different parts on different ranks) read and write it where
        it is: each byte is read once and written once. Pass such arrays on all ranks or on none.

        On GPUs the same goes for all_to_all, gather and scatter, and for other arrays, which are registered
        with the peers as they come; arrays of ``empty`` need no registration, and so they are mapped whatever
        allocator the library has. Where one rank's array is not mapped, or ``RINGCOMM_CUDA_DIRECT_KIB`` says
        that it is too small, the call goes through the slabs as any other. Memory comes in pieces of 2 MiB.

        Args:
            shape: The same on all ranks.
            dtype: A torch dtype, for a torch tensor, or a NumPy dtype or name, for a NumPy array (on a GPU: a
                CuPy array).
            device: None for memory of the host, or this rank's GPU as in :meth:`use_device`.

        Returns:
            The array, its values undefined. It may be dropped at any time, and outlives the
            communicator. Memory of a GPU that is dropped is freed when a later array is made.

        Raises:
            UsageError: an unknown dtype, or shapes that differ. SystemResourceError: no memory,
                sockets or descriptors. DeviceError: a GPU has no memory left. Else as :meth:`all_reduce`.
        """
        return allocate(self, shape, dtype, device)

    # -- messages --

    def send(self, x: Any, dst: int, tag: int = 0, async_op: bool = False) -> Any:
        """Sends ``x`` to one rank, which must :meth:`recv` as many bytes with the same tag.

        Messages to one rank with one tag arrive in the order in which they were sent. A message of up
        to 4096 bytes (fewer with more than 8 ranks; at least 256) does not wait for its receive unless
        eight others do already; a longer one is done when the receiver has asked for it and all of it
        is on its way. Any number may be pending with ``async_op=True``: ranks that send to all and
        then receive from all in any order never block each other.

        Arrays on GPUs are copied to the host first, and go to the GPU from there when they have come. These
        copies come in the order of the library's current stream: also after collectives that are queued on it.

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
        source = readable(x)
        host = self._devices.fetch(source)
        address = source.ptr if host is None else host.ctypes.data
        core = self._core.send(address, source.num_bytes, dst, tag, async_op)
        if not async_op:
            return x
        self._keep(core, (x, source, host))
        return Work(core, x, lambda: self._release(core), self._interrupted)

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
        target, finish = in_place(x)
        host = self._devices.room_for(target)
        address = target.ptr if host is None else host.ctypes.data
        core = self._core.recv(address, target.num_bytes, -1 if src is None else src, tag, async_op)

        def bring_home() -> None:
            if host is not None:
                self._devices.deliver(host, target)
            if finish is not None:
                finish()

        if not async_op:
            bring_home()
            return core.source()
        self._keep(core, (x, target, host))

        def complete() -> None:
            bring_home()
            self._release(core)

        return RecvWork(core, None, complete, self._interrupted)

    # -- about --

    def explain(
        self,
        num_bytes: int,
        op: str = "all_reduce",
        codec: str | Codec | None = None,
        *,
        symmetric: bool = False,
        on_device: bool | None = None,
    ) -> Plan:
        """What a call on ``num_bytes`` bytes per rank would do, and why. Sends nothing.

        Args:
            symmetric: The array is one of :meth:`empty`.
            on_device: The array is on a GPU; None: it is if the communicator has been set up for one.

        Raises:
            UsageError: bad arguments, or ``on_device`` before the first array on a GPU.
        """
        compress = parse_codec("none" if codec is None else codec)
        if self._works_on_device(on_device):
            plan = self._devices.explain(op, num_bytes, compress)
            if plan is not None:
                return plan
        plan = choose(
            op,
            num_bytes,
            self.world_size,
            compress,
            self._core.inline_bytes,
            self._limits,
            symmetric,
        )
        if on_device is not False and self._devices.mode == "host":
            plan = replace(plan, reason=f"on GPUs, through the host: {plan.reason}")
        return plan

    def use_device(self, device: Any) -> None:
        """Sets the communicator up for arrays on a GPU now, not when the first one comes; collective.

        Args:
            device: As in :func:`ringcomm.init`. Nothing happens if it is the communicator's already.

        Raises:
            UsageError: the communicator works on another one, or ranks want different things. DeviceError,
            SystemResourceError: one of them cannot have what it needs; the communicator is as it was.
            Else as :meth:`all_reduce`.
        """
        self._devices.use(device_name(device))

    def owned(self, num_elems: int, *, on_device: bool | None = None) -> list[tuple[int, int]]:
        """The parts of an array whose sums this rank encodes in an ``all_reduce`` with a codec.

        Args:
            num_elems: Elements of the array.
            on_device: As in :meth:`explain`.

        Returns:
            Ranges (begin, end) in order; those of ``owner_residual`` that this rank reads and writes.
        """
        return self._core.encoded_sums(num_elems, self._works_on_device(on_device))

    @property
    def device(self) -> str | None:
        return self._devices.name

    @property
    def device_mode(self) -> str | None:
        return self._devices.mode

    @property
    def direct_calls(self) -> int:
        return self._devices.direct_calls

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

    def flight_recorder(self) -> list[dict[str, Any]]:
        """The last calls, oldest first: as many as ``RINGCOMM_FLIGHT_RECORDER`` says (256).

        Returns:
            A dict per call: ``id`` (counts the calls of this rank in this process), ``seq`` (the "#17"
            of errors), ``op``, ``state`` (``scheduled``, ``started``, ``completed`` or ``failed``),
            ``dtype``, ``count`` (elements), ``reduce_op``, ``algo``, ``codec``, ``root``, ``tag``, and
            ``created_ns``, ``started_ns``, ``ended_ns`` (CLOCK_MONOTONIC). None where there is nothing
            to say.
        """
        return self._core.flight_recorder()

    def dump_flight_recorder(self, path: str | os.PathLike[str]) -> None:
        """Writes what all communicators of this process did last, in torch's flight recorder format.

        ``torchfrtrace`` compares such files of all ranks. With ``RINGCOMM_FLIGHT_RECORDER_FILE`` set,
        every rank writes one by itself when a communicator is lost.

        Args:
            path: Of the file. ``torchfrtrace`` expects a common prefix and then the rank.

        Raises:
            SystemResourceError: it cannot be written.
        """
        self._core.dump_flight_recorder(os.fspath(path))

    def synchronize(self) -> None:
        """Blocks until all collectives that this rank has called are done, on its GPU too.

        Not collective. The deadline counts from now on.

        Raises:
            As :meth:`all_reduce`: also what a kernel found since the last call.
        """
        self._devices.synchronize()

    # -- the end --

    def abort(self, reason: str = "abort() was called") -> None:
        """Makes every rank's current and later calls raise ``AbortedError`` now. Never waits."""
        self._core.abort(reason)

    def close(self) -> None:
        """Finishes pending asynchronous calls, then leaves. Idempotent, not collective.

        Also waits for the GPU, which a failure of the group or the deadline keeps from waiting for others.
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

    def hand_over(self) -> Any:
        """The communicator for C code (csrc/bind/c_table.h), which now decides when it closes.

        Returns:
            A capsule with one reference. This object must not be used afterwards.
        """
        _open.discard(self)
        del self._pending  # __del__ leaves the core alone
        return self._core.c_handle()

    def __enter__(self) -> "Communicator":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_pending"):  # else the constructor failed, or the core has another owner
            self.close()

    def __repr__(self) -> str:
        return f"<ringcomm.Communicator '{self.name}' rank {self.rank} of {self.world_size}>"

    def __reduce__(self) -> Any:
        raise UsageError("a communicator cannot be pickled; init() one in each process")

    def _issue(
        self,
        op: str,
        arrays: Sequence[ArrayView],
        array: ArrayView,
        target: int,
        tag: str,
        async_op: bool,
        *,
        source: int | None = None,
        count: int | None = None,
        reduce_op: int = 0,
        root: int = -1,
        factor: float = 1.0,
        sends: list[tuple[int, int]] | None = None,
        receives: list[tuple[int, int]] | None = None,
    ) -> Any:
        """The call on the core: ``array`` is the input and says dtype and count, unless given apart.

        ``arrays``: all that the call reads or writes.
        """
        stream = self._devices.place(arrays)
        return self._collective(
            _OPS[op],
            array.ptr if source is None else source,
            target,
            array.num_elems if count is None else count,
            array.dtype,
            reduce_op,
            root,
            -1,
            tag,
            async_op,
            factor,
            sends,
            receives,
            stream is not None,
            stream or 0,
        )

    def _own_part(self, x: Any, out: Any) -> tuple[Any, Parts, ArrayView]:
        """The parts of ``x``, and ``out`` for the one of this rank, made if it is None."""
        source = parts_to_send(x, self.world_size)
        if out is None and is_list(x):
            out = empty_like(x[self.rank])
        elif out is None:
            rows, *rest = source.views[0].shape
            out = empty_like(x, (rows // self.world_size, *rest))
        return out, source, output(out, source.views[0], source.spans[self.rank][1])

    def _gather(self, row: Any, tag: str) -> Any:
        """all_gather of a NumPy array for what this module does itself: the values are there on return."""
        rows = self.all_gather(row, tag=tag)
        if self._devices.host != "cpu":
            self.synchronize()
        return rows

    def _works_on_device(self, on_device: bool | None) -> bool:
        if on_device and self.device is None:
            raise UsageError(
                "on_device: this communicator has not been set up for arrays on GPUs yet; pass init(device=...)"
            )
        return self.device is not None if on_device is None else on_device

    def _result(self, core: Any, value: Any, finish: Any, keep: Sequence[ArrayView]) -> Any:
        finish = self._devices.after_call(keep, finish)
        if core is not None:
            with self._pending_lock:
                while self._pending and self._pending[0][0].done():  # calls finish in order
                    self._pending.popleft()
                self._pending.append((core, keep))
            stream = None
            if keep and keep[0].device != self._devices.host:
                stream = partial(self._devices.stream_now, keep[0])
            return Work(core, value, finish, self._interrupted, stream)
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
            peer, tag = (
                whole_number(value, f"{what} of a message")
                for value, what in ((peer, role), (tag, "tag"))
            )
        if not 0 <= peer < self.world_size:
            raise UsageError(f"{role} must be 0 to {self.world_size - 1}, not {peer}")
        if not 0 <= tag <= _MAX_TAG:
            raise UsageError(f"the tag of a message must be 0 to {_MAX_TAG}, not {tag}")

    def _start_line(self) -> str:
        """What was chosen for this communicator, and why, in one line for people."""
        n, cores = self.world_size, self._num_cores
        if n == 1:
            return f"group '{self.name}': a single rank has nobody to talk to"
        limits: dict[int, list[str]] = {}
        for op in ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter"):
            limit = one_shot_limit(op, n, self._core.inline_bytes, self._limits)
            limits.setdefault(limit, []).append(op)
        thresholds = ", ".join(
            f"{limit} bytes ({'/'.join(ops)})"
            for limit, ops in sorted(limits.items(), reverse=True)
        )
        return (
            f"group '{self.name}': rank {self.rank} of {n}, shared memory, "
            f"{_NUM_BUFFERS} x {self._buffer_bytes // 1024} KiB staging, {_core.simd_level()} kernels; "
            f"{n} ranks on {cores} cores{'' if n <= cores else ' (they take turns)'}; "
            f"one_shot up to {thresholds}, {'measured by tune' if self._limits else 'built-in limits'}; "
            f"deadline {self.timeout:g} s"
        )

    def _interrupted(self, error: BaseException) -> None:
        with contextlib.suppress(AbortedError):  # closed already
            self._core.abort(
                f"it was interrupted ({type(error).__name__}) while it waited for a call"
            )

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self.world_size:
            raise UsageError(f"root must be 0 to {self.world_size - 1}, not {root}")


def connect(
    store: Store | None,
    rank: int,
    world_size: int,
    *,
    prefix: str,
    name: str,
    timeout: float,
    buffer_bytes: int,
    first_seq: int = 0,
    num_cores: int | None = None,
    global_rank: int | None = None,
    limits: Limits | None = None,
    device: str | None = None,
    device_limits: Limits | None = None,
) -> Communicator:
    """Meets the other ranks through ``store`` and makes the communicator; collective.

    Args:
        num_cores: How many processors these ranks share; None: all that this process may use.
        global_rank: Of this process in the job, for the flight recorder; None: ``rank``.
        limits: Of one_shot, rank 0's for all; None: what :mod:`ringcomm.tuning` finds.
        device: Set up for arrays on this GPU now (:func:`ringcomm.device.device_name`); None: when they come.
        device_limits: As ``limits``, of arrays on GPUs.
        store, rank, world_size, prefix, name, timeout, buffer_bytes, first_seq: as
            :func:`ringcomm.rendezvous.rendezvous`, whose errors it raises.
    """
    with rendezvous(
        store,
        rank,
        world_size,
        prefix=prefix,
        name=name,
        timeout=timeout,
        buffer_bytes=buffer_bytes,
        first_seq=first_seq,
        global_rank=global_rank,
        limits=limits_for(world_size) if limits is None and rank == 0 else limits,
    ) as endpoints:
        return Communicator(
            endpoints,
            rank,
            name=name,
            timeout=timeout,
            buffer_bytes=buffer_bytes,
            first_seq=first_seq,
            num_cores=num_cores,
            device=device,
            device_limits=device_limits,
        )


def _log(level: int, subsystem: str, message: str) -> None:
    """Where the core's messages go."""
    env.logger(subsystem).log(level, "%s", message)


def _recorder_calls() -> int:
    own, of_torch = env.get("RINGCOMM_FLIGHT_RECORDER"), env.get("TORCH_FR_BUFFER_SIZE")
    return next((number for number in (own, of_torch) if number is not None), _RECORDER_CALLS)


def _recorder_file(global_rank: int) -> str:
    prefix = env.get("RINGCOMM_FLIGHT_RECORDER_FILE") or env.get("TORCH_FR_DUMP_TEMP_FILE")
    return f"{prefix}{global_rank}" if prefix else ""


_open: "weakref.WeakSet[Communicator]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for comm in list(_open):
        comm.close()
