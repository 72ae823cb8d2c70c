"""The C++ core. Hand-written; `make lint` compares it with the built module (stubtest).

Pointers are addresses as integers; dtypes, operators, codecs and algorithms are the integers of the
tables below. Nothing here checks that an address is valid: the Python modules on top do.
"""

from collections.abc import Callable, Sequence
from typing import Any

# -- kernels --
#
# stream: None for memory of the CPU, and the call returns when the work is done; the handle of a CUDA stream (0: the
# default one) for memory of a GPU, and it returns when the work is queued. DeviceError: there is no GPU, or no CUDA in
# this build.

CODEC_FORMAT_VERSION: int
CODECS: dict[str, int]
DTYPES: dict[str, int]
DTYPE_BYTES: dict[str, int]
REDUCE_OPS: dict[str, int]

def codec_name(codec: int) -> str: ...
def bits_per_value(codec: int) -> float: ...
def wire_bytes(codec: int, num_elems: int) -> int: ...
def encode(
    codec: int,
    input_ptr: int,
    input_dtype: int,
    num_elems: int,
    wire_ptr: int,
    residual_ptr: int = 0,
    stochastic: bool = False,
    seed: int = 0,
    step: int = 0,
    rank: int = 0,
    first_elem: int = 0,
    stream: int | None = None,
) -> None: ...
def decode(
    codec: int,
    wire_ptr: int,
    num_elems: int,
    output_ptr: int,
    output_dtype: int,
    stream: int | None = None,
) -> None: ...
def decode_add(
    codec: int,
    wire_ptr: int,
    num_elems: int,
    accumulator_ptr: int,
    first: bool = False,
    stream: int | None = None,
) -> None: ...
def divide(values_ptr: int, num_elems: int, divisor: float, stream: int | None = None) -> None: ...
def reduce(
    dtype: int,
    op: int,
    input_ptrs: Sequence[int],
    num_elems: int,
    output_ptr: int,
    copy_ptrs: Sequence[int] = ...,
    stream: int | None = None,
) -> None: ...
def reduce_hop(
    dtype: int,
    op: int,
    accumulator_in_ptr: int,
    input_ptr: int,
    accumulator_ptr: int,
    num_elems: int,
    stream: int | None = None,
) -> None: ...
def finish_hops(
    dtype: int,
    op: int,
    accumulator_ptr: int,
    num_inputs: int,
    output_ptr: int,
    num_elems: int,
    stream: int | None = None,
) -> None: ...
def scale(
    dtype: int,
    input_ptr: int,
    factor: float,
    output_ptr: int,
    num_elems: int,
    stream: int | None = None,
) -> None: ...
def pack(pieces: Sequence[tuple[int, int]], buffer_ptr: int, stream: int | None = None) -> None: ...
def unpack(
    pieces: Sequence[tuple[int, int]], buffer_ptr: int, stream: int | None = None
) -> None: ...
def is_zero(ptr: int, num_bytes: int) -> bool: ...

# -- arrays of other libraries --

def dlpack_view(
    capsule: Any,
) -> tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], bool, bool, int, int]: ...
def array_viewer(
    exchange_api: Any,
    view_type: type,
    dtypes: Sequence[tuple[int, int, int]],
    library: str,
    cuda_devices: list[str],
    fallback: Callable[[Any, bool, str], Any],
) -> Callable[[Any, bool, str], Any]: ...
def array_struct_view(capsule: Any) -> tuple[int, int]: ...

# -- the GPUs of a communicator --

DEVICE_MODES: dict[str, int]
MAX_DEVICE_RANKS: int

def device_facts(device: int, mode: int | None, slab_bytes: int, direct_bytes: int) -> bytes: ...
def reachable_devices(device: int, facts: Sequence[bytes]) -> int: ...
def device_ordinals(facts: Sequence[bytes]) -> list[int]: ...

class SharedDeviceMemory:
    def __init__(self, device: int, num_bytes: int) -> None: ...
    @property
    def handle(self) -> bytes: ...
    def export_descriptor(self) -> int: ...

class DeviceRegion:
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class DeviceGroup:
    def __init__(
        self, rank: int, device: int, facts: Sequence[bytes], reachable: Sequence[int]
    ) -> None: ...
    @property
    def mode(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def slab_bytes(self) -> int: ...
    @property
    def handle(self) -> bytes: ...
    def export_descriptor(self) -> int: ...
    def open(self, handles: Sequence[bytes], fds: Sequence[int]) -> None: ...
    def map_region(
        self,
        own: SharedDeviceMemory,
        num_bytes: int,
        handles: Sequence[bytes],
        fds: Sequence[int],
    ) -> DeviceRegion: ...
    @property
    def num_direct_calls(self) -> int: ...

# -- communicator --

OPS: dict[str, int]
ALGOS: dict[str, int]
MAX_RANKS: int
INLINE_BYTES: int
SHARED_LAYOUT_VERSION: int

def control_bytes(world_size: int) -> int: ...
def staging_bytes(buffer_bytes: int, world_size: int) -> int: ...
def create_segment(name: str, num_bytes: int) -> int: ...
def shared_layout(world_size: int, buffer_bytes: int) -> dict[str, Any]: ...
def format_control(control_fd: int, world_size: int, first_seq: int = 0) -> None: ...
def format_staging(
    staging_fd: int, buffer_bytes: int, world_size: int, first_seq: int = 0
) -> None: ...
def choose_algo(
    op: int,
    num_bytes: int,
    world_size: int,
    has_codec: bool,
    symmetric: bool,
    inline_bytes: int,
    one_shot_limits: Sequence[tuple[int, int]] = ...,
) -> tuple[str, str, int]: ...
def exchange_layout(
    send_counts: Sequence[int], elem_bytes: int, rank: int, inline_bytes: int, buffer_bytes: int
) -> tuple[bool, list[tuple[int, list[tuple[int, int]]]]]: ...

class SymmetricRegion:
    @property
    def id(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Work:
    def done(self) -> bool: ...
    def source(self) -> int: ...
    def wait(self, timeout: float = -1.0, stream: int | None = None) -> bool: ...

class Communicator:
    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        name: str,
        timeout_s: float,
        buffer_bytes: int,
        num_cores: int,
        control_fd: int,
        staging_fds: Sequence[int],
        pidfds: Sequence[int],
        pids: Sequence[int],
        first_seq: int = 0,
        recorder_calls: int = 256,
        recorder_file: str = "",
        global_ranks: Sequence[int] = ...,
        one_shot_limits: Sequence[tuple[int, int]] = ...,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def inline_bytes(self) -> int: ...
    def collective(
        self,
        op: int,
        input: int,
        output: int,
        count: int,
        dtype: int,
        reduce_op: int = 0,
        root: int = -1,
        algo: int = -1,
        tag: str = "",
        async_op: bool = False,
        factor: float = 1.0,
        sends: Sequence[tuple[int, int]] | None = None,
        receives: Sequence[tuple[int, int]] | None = None,
        on_device: bool = False,
        stream: int = 0,
    ) -> Work | None: ...
    def monitored_barrier(self, timeout_s: float, wait_all_ranks: bool, tag: str = "") -> None: ...
    def all_reduce_encoded(
        self,
        input: int,
        output: int,
        count: int,
        dtype: int,
        reduce_op: int,
        up: int,
        down: int,
        stochastic: bool = False,
        seed: int = 0,
        step: int = 0,
        residual: int = 0,
        owner_residual: int = 0,
        algo: int = -1,
        tag: str = "",
        async_op: bool = False,
        on_device: bool = False,
        stream: int = 0,
    ) -> Work | None: ...
    def all_reduce_coalesced(
        self,
        arrays: Sequence[tuple[int, int, int]],
        reduce_op: int,
        tag: str = "",
        async_op: bool = False,
        factor: float = 1.0,
        on_device: bool = False,
        stream: int = 0,
    ) -> Work | None: ...
    def send(
        self, data: int, num_bytes: int, dst: int, tag: int, async_op: bool = False
    ) -> Work: ...
    def recv(
        self, data: int, num_bytes: int, src: int, tag: int, async_op: bool = False
    ) -> Work: ...
    def stats(self) -> dict[str, dict[str, float]]: ...
    def encoded_sums(self, num_elems: int, on_device: bool = False) -> list[tuple[int, int]]: ...
    def attach_device(
        self, group: DeviceGroup, limits: Sequence[tuple[int, int]] = ...
    ) -> None: ...
    def choose_device_algo(
        self,
        op: int,
        num_bytes: int,
        has_codec: bool,
        limits: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[str, str, int]: ...
    def synchronize(self) -> None: ...
    def copy_across(
        self, device: int, to: int, from_: int, num_bytes: int, stream: int
    ) -> None: ...
    def map_symmetric(self, num_bytes: int, fds: Sequence[int]) -> SymmetricRegion: ...
    def reset_stats(self) -> None: ...
    def c_handle(self) -> Any: ...
    def flight_recorder(self) -> list[dict[str, Any]]: ...
    def dump_flight_recorder(self, path: str) -> None: ...
    def abort(self, reason: str) -> None: ...
    def close(self) -> None: ...

# -- for other extension modules: csrc/bind/c_table.h --

C_TABLE_VERSION: int

def c_table() -> Any: ...

# -- this machine --

def set_log_sink(sink: Callable[[int, str, str], None], level: int) -> None: ...
def simd_level() -> str: ...
def best_simd_level() -> str: ...
def set_simd_level(name: str) -> None: ...

class DeviceInfo:
    """One CUDA device."""

    @property
    def name(self) -> str: ...
    @property
    def compute_capability(self) -> tuple[int, int]: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def num_multiprocessors(self) -> int: ...

class DeviceProbe:
    """What :func:`cuda_probe` found; versions are 1000 * major + 10 * minor, 0 for none."""

    @property
    def count(self) -> int: ...
    @property
    def reason(self) -> str: ...
    @property
    def driver_version(self) -> int: ...
    @property
    def runtime_version(self) -> int: ...
    @property
    def devices(self) -> list[DeviceInfo]: ...

RUNTIME: str
"""What runs kernels: "cuda", "none" (built without CUDA) or "simt" (the tests' emulated GPUs)."""

def cuda_probe() -> DeviceProbe:
    """The CUDA devices of this process. Never raises; initialises the driver but creates no context."""

def current_device() -> int:
    """The CUDA device that is current in this thread."""

def device_of(address: int) -> int:
    """The CUDA device whose memory this is; -1: it is the host's."""

def link_between(device: int, peer: int) -> tuple[str, str]:
    """How CUDA devices are linked, and how that is known.

    The first is "same", "NVLink", "PCIe" (any other peer access) or "none"; the second "NVML", "CUDA", or a sentence
    that says why it is a guess. Raises DeviceError if there is no such device.
    """
