"""Communicators and arrays on GPUs: which GPU a rank works on, and how the GPUs of a group meet.

Collective on the first call with such an array, or in :func:`ringcomm.init`: every rank says what its GPU
is and which others it reaches, all agree on a mode and on the size of a slab of GPU memory, every rank
allocates one, and maps the peers'. What goes wrong on one rank raises on all of them, and leaves the
communicator as it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ringcomm import _core, env, errors
from ringcomm.arrays import ArrayView, view
from ringcomm.codecs import Codec
from ringcomm.errors import UsageError
from ringcomm.meeting import descriptors_among
from ringcomm.plan import Plan, encoded_wire_bytes, largest
from ringcomm.tuning import Gpus, Limits, device_limits_for, gpus_of

__all__ = ["SIMT", "Devices", "device_name", "index_of"]

SIMT = "simt"
"""The emulated GPU of the build that the tests make. Its arrays are those of the host."""

_CPU = "cpu"
_ROW_BYTES = 1024  # what a rank says to the others in one step
_LENGTH_BYTES = 4
_SIZE_BYTES = 8
_KIB = 1024
_MOST_BYTES = 2**40


def device_name(device: Any) -> str | None:
    """``"cuda:1"`` for what callers pass as ``device``: an index, ``"cuda:1"``, a ``torch.device`` or None.

    Raises:
        UsageError: it is none of these, or this build has no such device.
    """
    if device is None:
        return None
    if isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"
    name = str(device)
    index = name.removeprefix("cuda:")
    if name == SIMT:
        if _core.RUNTIME != SIMT:
            raise UsageError("device='simt' is for the emulated build of ringcomm's tests")
        return name
    if index == name or not index.isdecimal():
        raise UsageError(f"device: {device!r}, expected such as 'cuda:0' or 0")
    if _core.RUNTIME != "cuda":
        raise UsageError(
            f"device: {name}, but this build has no CUDA (see python -m ringcomm.info); leave device=None"
        )
    return f"cuda:{int(index)}"


class Devices:
    """What one communicator knows of its rank's GPU.

    Attributes:
        name: ``"cuda:<index>"`` or ``"simt"``, once the communicator has been set up for it; else None.
    """

    def __init__(self, comm: Any, limits: Limits | None = None) -> None:
        """``limits``: rank 0's hold for all; None: what :mod:`ringcomm.tuning` finds."""
        self._comm = comm
        self._limits = limits
        self._group: Any = None
        self._facts: list[bytes] = []  # of all ranks' GPUs
        self._kept: list[Sequence[ArrayView]] = []  # memory of calls that may be queued
        self._hosts_are_simt = False  # arrays of the host are those of the emulated GPU
        self.name: str | None = None

    # -- the arrays of a call --

    @property
    def host(self) -> str:
        """The device of arrays that are the CPU's business."""
        return "" if self._hosts_are_simt else _CPU

    def place(self, arrays: Sequence[ArrayView]) -> int | None:
        """Where a call runs: None on the CPU, else the stream in whose order its arrays are used.

        Collective for the first arrays on a GPU.

        Raises:
            UsageError: the arrays are on several devices, or not on the communicator's.
        """
        first: ArrayView | None = None
        for array in arrays:
            if first is None:
                first = array
            elif array.device != first.device:
                raise UsageError(
                    f"the arrays of a call are on {first.device} and on {array.device}; all must be on one device"
                )
        if first is None or first.device == self.host:
            return None
        if self._hosts_are_simt:
            return first.stream
        if first.device != self.name:
            self.use(first.device)
        return first.stream

    def stream_now(self, array: ArrayView) -> int:
        """The current stream of the library of ``array``."""
        if array.kind == "dlpack" or self._hosts_are_simt:
            return array.stream
        return view(array.owner, writable=False).stream

    def after_call(
        self, arrays: Sequence[ArrayView], finish: Callable[[], None] | None
    ) -> Callable[[], None] | None:
        """``finish``, which copies a temporary array back, in the order of the call.

        Libraries of GPUs free memory and copy arrays in the order of a stream. NumPy does not.
        """
        if not self._hosts_are_simt:
            return finish
        self._kept.append(arrays)
        if finish is None:
            return None

        def wait_and_finish() -> None:
            self.synchronize()
            finish()

        return wait_and_finish

    def synchronize(self) -> None:
        """See :meth:`ringcomm.comm.Communicator.synchronize`."""
        num_kept = len(self._kept)
        self._comm._core.synchronize()
        del self._kept[:num_kept]

    # -- messages, which go through the host --

    def fetch(self, array: ArrayView) -> np.ndarray[Any, Any] | None:
        """A copy of ``array`` on the host; None if it is there already. Blocks."""
        host = self.room_for(array)
        if host is not None:
            self._copy(host.ctypes.data, array.ptr, array)
        return host

    def room_for(self, array: ArrayView) -> np.ndarray[Any, Any] | None:
        """As many bytes on the host; None if ``array`` is there already."""
        return None if array.device == self.host else np.empty(array.num_bytes, np.uint8)

    def deliver(self, host: np.ndarray[Any, Any], array: ArrayView) -> None:
        """Copies the bytes of ``host`` into ``array``. Blocks."""
        self._copy(array.ptr, host.ctypes.data, array)

    def _copy(self, to: int, source: int, array: ArrayView) -> None:
        name = SIMT if self._hosts_are_simt else array.device
        index = index_of(name, self._comm.rank)
        stream = self.stream_now(array)
        self._comm._core.copy_across(index, to, source, array.num_bytes, stream)

    # -- about --

    def explain(self, op: str, num_bytes: int, codec: Codec) -> Plan | None:
        """The plan of a call on this group's GPUs; None if the CPU runs it."""
        if op not in _core.OPS or self._group is None or self._group.mode == "host":
            return None
        n = self._comm.world_size
        if n == 1 or op.endswith("barrier") or num_bytes < 0:
            return None
        algo, reason, wire_bytes = self._comm._core.choose_device_algo(
            _core.OPS[op], num_bytes, not codec.exact
        )
        if not codec.exact:
            wire_bytes = encoded_wire_bytes(codec, num_bytes, n)
        reason = f"on GPUs, {self._group.mode}: {reason}"
        return Plan(op, num_bytes, n, algo, codec.spec, wire_bytes, reason)

    def built_in_limit(self, op: str) -> int:
        """The largest call, in bytes, that these GPUs run as they run an empty one, if nothing is tuned."""

        def algo(num_bytes: int) -> str:
            found: str = self._comm._core.choose_device_algo(_core.OPS[op], num_bytes, False, [])[0]
            return found

        first = algo(0)
        return largest(lambda num_bytes: algo(num_bytes) == first, _MOST_BYTES)

    def gpus(self) -> Gpus:
        """What the group's speed depends on."""
        return gpus_of(_core.device_ordinals(self._facts), self._group.mode)

    @property
    def reason(self) -> str | None:
        """Why the mode is what it is."""
        return None if self._group is None else self._group.reason

    @property
    def mode(self) -> str | None:
        """``"in_kernel"``, ``"stepped"`` or ``"host"``, once the communicator has been set up."""
        return None if self._group is None else self._group.mode

    @property
    def direct_calls(self) -> int:
        """See :attr:`ringcomm.comm.Communicator.direct_calls`."""
        return 0 if self._group is None else int(self._group.num_direct_calls)

    # -- memory that all ranks map --

    def allocate(self, num_bytes: int, same_size: Callable[[list[int]], None]) -> Any:
        """GPU memory of this rank that all ranks map; collective.

        Args:
            num_bytes: At least 1.
            same_size: Takes what each rank asks for; raises if they differ.

        Returns:
            A ``_core.DeviceRegion``; memory that nobody maps where GPUs do not reach each other.

        Raises:
            DeviceError: a GPU has no memory left. Else as any collective, and ``same_size``.
        """
        comm, group, index = self._comm, self._group, index_of(self.name or "", self._comm.rank)
        with contextlib.ExitStack() as cleanup:
            memory: Any = None
            fd = -1

            def take() -> bytes:
                nonlocal memory, fd
                memory = _core.SharedDeviceMemory(index, num_bytes)
                fd = memory.export_descriptor()
                if fd >= 0:
                    cleanup.callback(os.close, fd)
                handle: bytes = memory.handle
                return bytes([fd >= 0]) + num_bytes.to_bytes(_SIZE_BYTES, "little") + handle

            said = _from_all(comm, "empty", take)
            same_size([int.from_bytes(one[1 : 1 + _SIZE_BYTES], "little") for one in said])
            if group.mode == "host":
                return group.map_region(memory, num_bytes, [], [])
            handles = [one[1 + _SIZE_BYTES :] for one in said]
            region: Any = None

            def map_all() -> bytes:
                nonlocal region
                region = group.map_region(memory, num_bytes, handles, fds)
                return b""

            with _descriptors(comm, fd, [bool(one[0]) for one in said], num_bytes) as fds:
                _from_all(comm, "empty mapping", map_all)
            return region

    # -- set-up --

    def use(self, name: str | None) -> None:
        """See :meth:`ringcomm.comm.Communicator.use_device`."""
        if name is None:
            raise UsageError("device: None, expected such as 'cuda:0'")
        if self.name is None:
            self._attach(name)
        elif name != self.name:
            raise UsageError(
                f"an array on {name}, but rank {self._comm.rank} of group '{self._comm.name}' works on {self.name}; "
                "move the array there, or make another communicator"
            )

    def _attach(self, name: str) -> None:
        comm, index = self._comm, index_of(name, self._comm.rank)
        chosen = env.get("RINGCOMM_CUDA_MODE")
        wanted = None if chosen == "auto" else _core.DEVICE_MODES[chosen]
        slab_bytes = env.get("RINGCOMM_CUDA_SLAB_MIB") * _KIB * _KIB
        direct_kib = env.get("RINGCOMM_CUDA_DIRECT_KIB")
        direct_bytes = direct_kib if direct_kib < 0 else direct_kib * _KIB
        facts = _from_all(
            comm, "device", lambda: _core.device_facts(index, wanted, slab_bytes, direct_bytes)
        )
        reachable = _from_all(
            comm,
            "device peers",
            lambda: _core.reachable_devices(index, facts).to_bytes(4, "little"),
        )
        reached = [int.from_bytes(one, "little") for one in reachable]
        with contextlib.ExitStack() as cleanup:
            group, fd = None, -1

            def allocate() -> bytes:
                nonlocal group, fd
                group = _core.DeviceGroup(comm.rank, index, facts, reached)
                if group.slab_bytes == 0:
                    return b""
                fd = group.export_descriptor()
                if fd >= 0:
                    cleanup.callback(os.close, fd)
                return bytes([fd >= 0]) + group.handle

            said = _from_all(comm, "device memory", allocate)
            assert group is not None
            mode = group.mode
            limits = json.loads(
                _from_all(comm, "device tuning", lambda: self._tuned(facts, mode))[0]
            )
            if group.slab_bytes > 0:
                handles = [one[1:] for one in said]
                with _descriptors(
                    comm, fd, [bool(one[0]) for one in said], group.slab_bytes
                ) as fds:
                    _from_all(comm, "device mapping", lambda: _opened(group, handles, fds))
        comm._core.attach_device(group, limits)
        self._group, self._facts, self.name = group, facts, name
        self._hosts_are_simt = name == SIMT
        if env.logger("INIT").isEnabledFor(logging.INFO):
            env.logger("INIT").info(
                "group '%s': rank %d of %d on %s, %s (%s), %d blocks, %d KiB slab, %s",
                *(comm.name, comm.rank, comm.world_size, name, group.mode, group.reason),
                *(group.num_blocks, group.slab_bytes // _KIB),
                "limits measured by tune" if limits else "built-in limits",
            )

    def _tuned(self, facts: list[bytes], mode: str) -> bytes:
        """The measured limits of this group, in JSON; rank 0's hold for all."""
        limits = self._limits
        if self._comm.rank != 0 or mode != "in_kernel":  # elsewhere nothing depends on them
            limits = []
        elif limits is None:
            limits = device_limits_for(
                lambda: gpus_of(_core.device_ordinals(facts), mode), self._comm.world_size
            )
        return json.dumps(limits).encode()


def _opened(group: Any, handles: list[bytes], fds: list[int]) -> bytes:
    group.open(handles, fds)
    return b""


def index_of(name: str, rank: int) -> int:
    """Of the device among those that this process sees; each rank has an emulated one of its own if there are so many."""
    if name == SIMT:
        return int(rank % getattr(_core, SIMT).device_count())
    return int(name.removeprefix("cuda:"))


@contextlib.contextmanager
def _descriptors(comm: Any, fd: int, has_fd: list[bool], num_bytes: int) -> Iterator[list[int]]:
    """The descriptors of all ranks' memory, -1 for those that have none."""
    if not any(has_fd):
        yield [-1] * len(has_fd)
        return
    with contextlib.ExitStack() as cleanup:
        if fd < 0:  # everybody brings one
            fd = os.open(os.devnull, os.O_RDONLY)
            cleanup.callback(os.close, fd)
        fds = cleanup.enter_context(descriptors_among(comm, fd, num_bytes, "device"))
        yield [one if has else -1 for one, has in zip(fds, has_fd, strict=True)]


def _from_all(comm: Any, what: str, make: Callable[[], bytes]) -> list[bytes]:
    """What ``make()`` returned on every rank; raises everywhere what it raised on the first of them that failed."""
    own: Exception | None = None
    try:
        said = b"\x01" + make()
    except errors.RingcommError as problem:
        own = problem
        text = str(problem).encode()[: _ROW_BYTES - 100].decode(errors="ignore")
        said = b"\x00" + json.dumps([type(problem).__name__, text], ensure_ascii=False).encode()
    row = np.zeros(_ROW_BYTES, np.uint8)
    row[: _LENGTH_BYTES + len(said)] = np.frombuffer(
        len(said).to_bytes(_LENGTH_BYTES, "little") + said, np.uint8
    )
    rows = [bytes(one) for one in comm._gather(row, what)]
    answers = [
        one[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(one[:_LENGTH_BYTES], "little")]
        for one in rows
    ]
    for rank, answer in enumerate(answers):
        if answer[0] == 0:
            kind, text = json.loads(answer[1:])
            same = all(other == answer for other in answers)
            where = "" if same else f"rank {rank} of group '{comm.name}': "
            error = getattr(errors, kind)(f"set-up for arrays on GPUs: {where}{text}")
            error.rank = None if same else rank
            raise error from own
    return [answer[1:] for answer in answers]
