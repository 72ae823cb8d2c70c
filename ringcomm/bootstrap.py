"""How a process becomes a rank: who it is, where the others are, and a communicator with them."""

import sys
import threading
import weakref
from datetime import timedelta
from typing import Any

from ringcomm import _core, env
from ringcomm.arguments import group_name
from ringcomm.arguments import seconds as in_seconds
from ringcomm.comm import Communicator, connect
from ringcomm.device import device_name
from ringcomm.errors import UsageError
from ringcomm.rendezvous import boot_id
from ringcomm.store import Store, TCPStore, shared_store

__all__ = ["init"]

DEFAULT_BUFFER_KIB = 512
"""Size of one staging buffer; a rank has four, and room for what is small and for messages (3 MiB in all)."""

_NUM_BUFFERS = 4
_DEFAULT_PORT = 29433
_first_seq = 0
"""Where the wrapping counters of new groups start. Tests let them wrap around early."""

_counters: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()
_counters_lock = threading.Lock()


def init(
    rank: int | None = None,
    world_size: int | None = None,
    *,
    store: Store | None = None,
    group: Any = None,
    timeout: float | timedelta | None = None,
    name: str = "world",
    device: Any = None,
) -> Communicator:
    """Joins a communicator; collective over its ranks, which must all be on this host.

    Ranks find each other through, in this order: ``store``; ``group``; torch.distributed's default
    group if it is initialised; torchrun's store; a store of ours that rank 0 serves at
    ``MASTER_ADDR:MASTER_PORT`` (default 127.0.0.1:29433).

    Args:
        rank: Of this process; default from the launcher (torchrun, mpirun, srun), else 0.
        world_size: Number of processes; default from the launcher, else 1.
        store: Shared key-value store: a torch ``Store``, :class:`ringcomm.store.TCPStore`, or anything
            with ``set`` and a blocking ``get``. Communicators over one store must be made in the same
            order on all ranks.
        group: A torch process group whose ranks become this communicator's, in its order.
        timeout: Deadline of set-up and of every call, in seconds or as timedelta; default
            ``RINGCOMM_TIMEOUT`` (300).
        name: Appears in errors; at most 64 bytes of UTF-8.
        device: The GPU of this rank (``"cuda:1"``, its index or a ``torch.device``) whose arrays the
            communicator is to take, set up now. None: that of the first array on a GPU, set up when it
            comes; arrays on the CPU are taken in any case. The same choice on all ranks.

    Returns:
        The communicator, to be closed or used in a ``with`` statement.

    Raises:
        UsageError: bad arguments, a taken port, ranks on several hosts or that disagree.
        DeadlineError: a rank did not come. PeerLostError: one died during set-up.
        SystemResourceError: no shared memory or descriptors. DeviceError: no such GPU.
    """
    own_device = device_name(device)
    seconds = in_seconds(env.get("RINGCOMM_TIMEOUT") if timeout is None else timeout)
    buffer_bytes = _buffer_bytes()
    simd = env.get("RINGCOMM_SIMD")
    if simd is not None:
        _core.set_simd_level(simd)
    if store is None and group is None and rank is None and world_size is None:
        group = _default_torch_group()
    if group is not None:
        if store is not None or rank is not None or world_size is not None:
            raise UsageError(
                "with group=, leave out store, rank and world_size: the group has them"
            )
        rank, world_size, store = _meet_through_group(group, seconds)
    else:
        info = env.rank_info()
        rank = info.rank if rank is None else rank
        world_size = info.world_size if world_size is None else world_size
        if (rank is None) != (world_size is None):
            raise UsageError(
                f"rank is {rank} and world_size is {world_size}: pass both, or set both RANK and WORLD_SIZE"
            )
        rank, world_size = rank or 0, 1 if world_size is None else world_size
    if not 1 <= world_size <= _core.MAX_RANKS:
        raise UsageError(f"world_size must be 1 to {_core.MAX_RANKS}, not {world_size}")
    if not 0 <= rank < world_size:
        raise UsageError(f"rank must be 0 to {world_size - 1}, not {rank}")
    group_name(name)
    if world_size == 1:
        store = None
    elif store is None:
        store = _default_store(rank, world_size, seconds)
    comm = connect(
        store,
        rank,
        world_size,
        prefix=_next_prefix(store),
        name=name,
        timeout=seconds,
        buffer_bytes=buffer_bytes,
        first_seq=_first_seq,
        global_rank=env.rank_info().rank,
        device=own_device,
    )
    if store is not None and store in _group_stores:  # every rank has read it
        _group_stores.remove(store)
        store.close()
    return comm


def _buffer_bytes() -> int:
    kib = env.get("RINGCOMM_STAGING_KIB")
    return (DEFAULT_BUFFER_KIB if kib is None else max(4, kib // _NUM_BUFFERS)) * 1024


def _next_prefix(store: Any) -> str:
    """A key prefix that no other communicator and no earlier start of this job has used."""
    if store is None:
        return ""
    with _counters_lock:
        try:
            number = _counters[store] = _counters.get(store, 0) + 1
        except TypeError:  # a store that cannot be weakly referenced
            number = getattr(store, "_ringcomm_groups", 0) + 1
            store._ringcomm_groups = number
    return f"ringcomm/{env.get('TORCHELASTIC_RESTART_COUNT')}/{number}"


def _default_torch_group() -> Any:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.group.WORLD


def _meet_through_group(group: Any, seconds: float) -> tuple[int, int, Store | None]:
    """A store of ours, served by the group's first rank; its address travels through the group."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise UsageError("this process is not a member of the group")
    if world_size == 1:
        return 0, 1, None
    server = TCPStore(is_server=True, timeout=seconds) if rank == 0 else None
    offers: list[Any] = [None] * world_size
    dist.all_gather_object(offers, (boot_id(), server.port if server else 0), group=group)
    hosts = [host for host, _ in offers]
    if len(set(hosts)) > 1:
        other = next(r for r in range(world_size) if hosts[r] != hosts[0])
        raise UsageError(
            f"the ranks of this group are on several hosts (rank 0 and rank {other} differ); a communicator lives "
            "inside one host. Use ringcomm.attach(model, transport='torch') across hosts"
        )
    if server is not None:
        _group_stores.append(server)  # serves until every rank has met, or one failed
        return rank, world_size, server
    return rank, world_size, TCPStore(port=offers[0][1], is_server=False, timeout=seconds)


_group_stores: list[TCPStore] = []


def _default_store(rank: int, world_size: int, seconds: float) -> Store:
    host = env.get("MASTER_ADDR") or "127.0.0.1"
    port = env.get("MASTER_PORT") or _DEFAULT_PORT
    if env.get("TORCHELASTIC_USE_AGENT_STORE"):
        # torchrun's agent serves a torch store at this address already.
        import torch.distributed as dist

        key = (host, port)
        if key not in _agent_stores:
            _agent_stores[key] = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, world_size, is_master=False, timeout=timedelta(seconds=seconds)
            )
        agent_store: Store = _agent_stores[key]
        return agent_store
    return shared_store(host, port, is_server=rank == 0, timeout=seconds)


_agent_stores: dict[tuple[str, int], Any] = {}
