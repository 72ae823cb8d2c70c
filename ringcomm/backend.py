"""``torch.distributed``'s backend ``"ringcomm"``.

``dist.init_process_group("ringcomm")`` works without importing this package: torch finds the entry point
``torch.backends`` and calls :func:`_autoload`, which registers a creator and nothing more. The first
group loads ``ringcomm._c10d``, the C++ adapter (csrc/torch), and hands it a communicator of ``_core``.

The adapter fits one minor version of torch. ``pip install`` builds it when it finds torch; otherwise
it is compiled on first use and kept in a cache, see :mod:`ringcomm.adapter`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["register"]

_DEVICES = ["cpu", "cuda"]
_MAX_NAME = 64  # bytes; torch's group names are ASCII


def register() -> None:
    """Registers the backend with ``torch.distributed``. Idempotent; loads nothing else.

    Only needed where torch's autoload is off (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``).
    """
    import torch.distributed as dist

    if dist.is_available() and "RINGCOMM" not in dist.Backend._plugins:
        dist.Backend.register_backend("ringcomm", _create, extended_api=True, devices=_DEVICES)


def _autoload() -> None:
    """What ``import torch`` calls. An exception here would break that import, so none leaves."""
    try:
        register()
    except Exception as error:
        import warnings

        warnings.warn(
            f"ringcomm could not register its torch backend: {error}", RuntimeWarning, stacklevel=2
        )


def _create(options: Any, _backend_options: Any) -> Any:
    """Joins a group; torch calls this on every member of it.

    Args:
        options: torch's ``_DistributedBackendOptions``: store, rank, size, timeout, name and members.
        _backend_options: of another backend when both serve one group ("cpu:ringcomm,cuda:nccl"), else
            None; ringcomm has none.
    """
    from ringcomm import _core, adapter, bootstrap, env

    module = adapter.load()
    comm = bootstrap.init(
        options.group_rank,
        options.group_size,
        store=options.store,
        timeout=options.timeout,
        name=f"torch/{options.group_id}"[:_MAX_NAME],
    )
    return module.Backend(
        _core.c_table(),
        comm.hand_over(),
        options.group_rank,
        options.group_size,
        options.timeout.total_seconds(),
        options.group_id,
        options.global_ranks_in_group or list(range(options.group_size)),
        comm.use_device,
        env.get("RINGCOMM_DEVICE") or "",
    )
