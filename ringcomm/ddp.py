"""A drop-in communication hook for ``torch.nn.parallel.DistributedDataParallel``.

::

    model = DistributedDataParallel(module)
    state = ringcomm.attach(model, codec="int4")      # or, the same in torch's own words:
    state = HookState(model, codec="int4")
    model.register_comm_hook(state, ringcomm.ddp.hook)

Each gradient bucket becomes the mean over all ranks, with the same bits on every rank:

- Parameters of two or more dimensions and at least ``min_elems`` elements travel through the codec;
  what the encoding loses is kept per parameter (error feedback) and added the next time.
- Everything else goes exact: biases and other 1-D parameters, small ones, sparse, float64 and
  complex gradients, and all of it during the first ``warmup_steps`` steps.
- The mean is always over the full world size, also under ``Join`` with uneven inputs.
- Gradients with NaN or Inf arrive as NaN on every rank, and leave the error feedback untouched.

The hook itself only hands the bucket to a worker thread and returns a future. That thread runs the
buckets strictly in order, over a communicator of its own; nothing ever waits inside a future's
callback. If it fails, ``backward()`` raises the error and the state refuses to go on.

Results depend on the layout of DDP's buckets only through blocks of 32 values: if the sizes of all
compressed parameters are multiples of 32, not at all.
"""

import logging
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ringcomm import _core
from ringcomm.codecs import Codec
from ringcomm.codecs import codec as parse_codec
from ringcomm.ddp_transport import CommTransport, GroupTransport, Transport
from ringcomm.errors import AbortedError, RingcommError, UsageError

__all__ = ["HookState", "attach", "hook"]

_LOG = logging.getLogger("ringcomm.ddp")
_TRANSPORTS = ("auto", "ringcomm", "torch")
_ENCODED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_EXACT_DTYPES = (torch.float64, torch.complex64, torch.complex128)
_DEFAULT_WARMUP_STEPS = 10  # for codecs below 8 bits
_DEFAULT_MIN_ELEMS = 1024
_STATE_FORMAT = 1
_STOP_SECONDS = 5.0


def hook(state: "HookState", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook, for ``ddp_model.register_comm_hook(HookState(...), hook)``.

    Args:
        state: A :class:`HookState` made for the same model.
        bucket: DDP's bucket on the CPU. Its buffer is overwritten with the mean over all ranks.

    Returns:
        A future of ``bucket.buffer()``. Does not block.

    Raises:
        UsageError: the bucket cannot be handled; the message says why.
        AbortedError: an earlier bucket failed.
    """
    if isinstance(bucket, tuple):
        raise UsageError(
            "DDP called the hook with one gradient instead of a bucket: torch.compile runs with "
            "torch._dynamo.config.optimize_ddp = 'python_reducer', which ignores what hooks return. "
            "Set torch._dynamo.config.optimize_ddp = 'ddp_optimizer' (the default) or False"
        )
    if not isinstance(state, HookState):
        raise UsageError(
            f"the hook's state is a {type(state).__name__}, expected a ringcomm.ddp.HookState: "
            "ddp_model.register_comm_hook(HookState(ddp_model, codec='int4'), ringcomm.ddp.hook)"
        )
    return state._submit(bucket)


def attach(
    ddp_model: DistributedDataParallel,
    codec: "str | Codec" = "int4",
    *,
    transport: str = "auto",
    process_group: dist.ProcessGroup | None = None,
    comm: Any = None,
    warmup_steps: int | None = None,
    min_elems: int = _DEFAULT_MIN_ELEMS,
    scaler: Any = None,
    seed: int | None = None,
    timeout: timedelta | None = None,
    log_every: int = 0,
) -> "HookState":
    """Compress the gradient all-reduce of a DDP model. Collective over the model's ranks.

    Call it once, after wrapping and before the first backward, with the same arguments on all
    ranks. Arguments are those of :class:`HookState`.

    Returns:
        The hook's state: statistics, checkpoints, ``close()``.

    Raises:
        UsageError: not a DDP model, a model that has a hook already, parameters on another device
            than the CPU, or bad arguments.
    """
    model = getattr(ddp_model, "_orig_mod", ddp_model)  # a torch.compile wrapper
    if not isinstance(model, DistributedDataParallel):
        raise UsageError(
            f"attach() takes a DistributedDataParallel model, found a {type(ddp_model).__name__}; "
            "wrap it first: model = torch.nn.parallel.DistributedDataParallel(module)"
        )
    if getattr(model, "mixed_precision", None) is not None:
        raise UsageError(
            "this model has DDP's mixed_precision, which installs a communication hook of its own; "
            "use torch.autocast instead, or mixed_precision=None"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in model.parameters()):
        raise UsageError(
            "this model has optimizers applied in the backward pass, which install a communication "
            "hook of their own; step the optimizer after backward() instead"
        )
    if model._comm_hooks:
        names = ", ".join(getattr(h, "__qualname__", repr(h)) for h, _ in model._comm_hooks)
        raise UsageError(
            f"this model has a communication hook already ({names}), and DDP takes one only; "
            "attach() once, on a freshly wrapped model"
        )
    state = HookState(
        model,
        codec,
        transport=transport,
        process_group=process_group,
        comm=comm,
        warmup_steps=warmup_steps,
        min_elems=min_elems,
        scaler=scaler,
        seed=seed,
        timeout=timeout,
        log_every=log_every,
    )
    try:
        model.register_comm_hook(state, hook)
    except BaseException as error:
        state.close()
        if isinstance(error, RuntimeError):
            raise UsageError(f"DDP refuses the hook: {error}") from error
        raise
    return state


class HookState:
    """What the hook keeps between steps: transport, worker thread, residuals and counters.

    Making one is collective over the ranks of the process group.

    Args:
        model: The DDP model, or the module inside it (then the default process group is used).
            Parameters are known by their names in the module.
        codec: What gradients travel as, see :func:`ringcomm.codec`.
        transport: ``"ringcomm"`` (shared memory, ranks of one host), ``"torch"`` (a private copy of
            the process group), or ``"auto"``: the first if all ranks are on one host.
        process_group: Ranks to average over; default the model's.
        comm: An existing ringcomm communicator to use instead. While a backward pass runs, nothing
            else may use it.
        warmup_steps: Steps that are reduced exactly first, while gradients change most. Default 10
            below 8 bits, else 0.
        min_elems: Parameters with fewer elements go exact.
        scaler: The ``torch.amp.GradScaler`` in use. Residuals are in units of its scale: they are
            multiplied when it grows, and dropped when it backs off, since that step was skipped.
        seed: Of stochastic rounding; overrides the codec's.
        timeout: Deadline of each collective; default that of the process group.
        log_every: Log the statistics on rank 0 every so many steps; 0 for never.

    Raises:
        UsageError: bad arguments, or parameters on another device than the CPU.

    Attributes:
        codec: The :class:`~ringcomm.codecs.Codec`.
        step: Optimizer steps so far (backward passes that were reduced).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        codec: "str | Codec" = "int4",
        *,
        transport: str = "auto",
        process_group: dist.ProcessGroup | None = None,
        comm: Any = None,
        warmup_steps: int | None = None,
        min_elems: int = _DEFAULT_MIN_ELEMS,
        scaler: Any = None,
        seed: int | None = None,
        timeout: timedelta | None = None,
        log_every: int = 0,
    ) -> None:
        self.codec = parse_codec(codec)
        if seed is not None:
            self.codec = self.codec.with_options(seed=seed)
        if transport not in _TRANSPORTS:
            raise UsageError(f"transport is {transport!r}, expected one of {_TRANSPORTS}")
        if warmup_steps is None:
            low = not self.codec.exact and _core.bits_per_value(self.codec.up) < 8
            warmup_steps = _DEFAULT_WARMUP_STEPS if low else 0
        if warmup_steps < 0 or min_elems < 0 or log_every < 0:
            raise UsageError("warmup_steps, min_elems and log_every cannot be negative")
        if scaler is not None and not hasattr(scaler, "get_scale"):
            raise UsageError(f"scaler is a {type(scaler).__name__}, expected a torch GradScaler")
        self.step = 0
        self._config = _Config(transport, warmup_steps, min_elems, timeout, log_every)
        self._scaler = scaler
        self._scale: float | None = None  # of the scaler, at the last step
        # Worker residuals and owner residuals by parameter name: views into the plans' arrays.
        self._residuals: dict[str, torch.Tensor] = {}
        self._owner_residuals: dict[str, torch.Tensor] = {}
        self._unpickled: dict[str, Any] | None = None
        self._init_runtime()
        self.bind(model, process_group=process_group, comm=comm)

    def _init_runtime(self) -> None:
        self._names: dict[torch.Tensor, str] = {}
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._group: dist.ProcessGroup | None = None
        self._plans: dict[tuple[str, ...], _Plan] = {}
        self._counters = _Counters()
        self._in_backward: list[_Job] = []
        self._failure: BaseException | None = None
        self._resources = _Resources()
        self._closer = weakref.finalize(self, self._resources.close)

    # ---- life ------------------------------------------------------------------------------------

    def bind(
        self,
        model: torch.nn.Module,
        *,
        process_group: dist.ProcessGroup | None = None,
        comm: Any = None,
    ) -> "HookState":
        """Connect to a model and its ranks, after unpickling or for a rebuilt model. Collective.

        Residuals and counters are kept; those of an unpickled state are taken over as
        :meth:`load_state_dict` does.

        Args:
            model: The DDP model or the module inside it.
            process_group: As in the constructor.
            comm: As in the constructor.

        Returns:
            This state, for ``model.register_comm_hook(state.bind(model), ringcomm.ddp.hook)``.
        """
        self._check_open()
        model = getattr(model, "_orig_mod", model)
        module = model.module if isinstance(model, DistributedDataParallel) else model
        if not isinstance(module, torch.nn.Module):
            raise UsageError(f"model is a {type(model).__name__}, expected the DDP model")
        for name, parameter in module.named_parameters():
            if parameter.device.type not in ("cpu", "meta"):
                raise UsageError(_no_cuda(f"parameter {name}", parameter.device))
        if process_group is None:
            process_group = getattr(model, "process_group", None)
        self._resources.worker.drain()
        self._model = weakref.ref(module)
        self._learn_names()
        self._connect(process_group, comm)
        if self._unpickled is not None:
            unpickled, self._unpickled = self._unpickled, None
            self.load_state_dict(unpickled)
        return self

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that are averaged over. Setting it is collective over the new group.

        Set it together with DDP's ``_update_process_group``, between steps. Residuals are kept;
        those of owners are dealt out anew.
        """
        return self._group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._check_open()
        self._resources.worker.drain()
        self._failure = None  # a new group may outlive the failure of the old one
        self._connect(group, None)

    @property
    def transport(self) -> str:
        """What carries the gradients: ``"ringcomm"`` or ``"torch:<backend>"``."""
        return self._transport().name

    def close(self) -> None:
        """Stop the worker thread and release the communicator. Idempotent, not collective.

        Waits for submitted buckets, a few seconds at most.
        """
        self._closer()

    def __enter__(self) -> "HookState":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _connect(self, group: dist.ProcessGroup | None, comm: Any) -> None:
        if self._resources.transport is not None:
            self._resources.transport.close()
            self._resources.transport = None
        transport, why = _make_transport(self._config, group, comm)
        self._resources.transport = transport
        self._group = group
        self._plans.clear()
        _LOG.info(
            "rank %d of %d: gradients travel as %s over %s (%s), after %d exact steps",
            transport.rank,
            transport.world_size,
            self.codec,
            transport.name,
            why,
            self._config.warmup_steps,
        )

    def _transport(self) -> Transport:
        self._check_open()
        if self._resources.transport is None:
            raise UsageError(
                "this HookState was unpickled and has no model yet: call state.bind(ddp_model) on "
                "all ranks"
            )
        return self._resources.transport

    def _check_open(self) -> None:
        if not self._closer.alive:
            raise UsageError(
                "this HookState is closed; wrap the model in DDP anew and attach() again"
            )

    def _learn_names(self) -> None:
        model = None if self._model is None else self._model()
        if model is not None:
            self._names = {parameter: name for name, parameter in model.named_parameters()}

    # ---- one bucket: the autograd thread ---------------------------------------------------------

    def _submit(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self._transport()
        if self._failure is not None:
            raise AbortedError(
                f"an earlier bucket failed, so the ranks are out of step: {self._failure}. Restart "
                "from a checkpoint, or set state.process_group to a group of the survivors"
            ) from self._failure
        buffer = bucket.buffer()
        if buffer.device.type != "cpu":
            raise UsageError(_no_cuda("this bucket", buffer.device))
        if buffer.dtype not in _ENCODED_DTYPES + _EXACT_DTYPES:
            raise UsageError(
                f"gradients of dtype {buffer.dtype} cannot be averaged; supported are "
                f"{', '.join(map(str, _ENCODED_DTYPES + _EXACT_DTYPES))}"
            )
        rescale = None
        if bucket.index() == 0:
            rescale = self._new_scale()
            self._watch_backward()
        exact = self.codec.exact or self.step < self._config.warmup_steps
        if buffer.layout != torch.strided:
            work = partial(self._reduce_sparse, buffer, exact)
        elif exact or buffer.dtype not in _ENCODED_DTYPES:
            work = partial(self._reduce_exact, buffer, exact)
        else:
            # A counter that no other bucket of the whole run has.
            counter = (self.step << 20) + bucket.index()
            work = partial(self._reduce_encoded, buffer, self._layout(bucket), counter)
        job = _Job(partial(self._run, work, rescale, bucket.is_last(), exact))
        if bucket.is_last():
            self.step += 1
        self._in_backward.append(job)
        # A future that holds an exception must come from a callback: the C++ reducer cannot read
        # one that set_exception() put there.
        result: torch.futures.Future[torch.Tensor] = job.future.then(_unwrap)
        self._resources.worker.submit(job)
        return result

    def _layout(self, bucket: dist.GradBucket) -> "_Layout":
        parameters = bucket.parameters()
        if any(parameter not in self._names for parameter in parameters):
            self._learn_names()
        try:
            return _Layout(
                tuple(self._names[parameter] for parameter in parameters),
                tuple(_is_small(parameter, self._config.min_elems) for parameter in parameters),
                tuple(parameter.numel() for parameter in parameters),
            )
        except KeyError:
            raise UsageError(
                "a bucket has a parameter that the model of this HookState does not have; make the "
                "state from the model on which the hook is registered"
            ) from None

    def _new_scale(self) -> float | None:
        """What the residuals are to be multiplied with because the loss scale changed."""
        if self._scaler is None:
            return None
        old, self._scale = self._scale, float(self._scaler.get_scale())
        if old is None or old == self._scale:
            return None
        backoff = getattr(self._scaler, "get_backoff_factor", lambda: 0.5)()
        if abs(self._scale - old * backoff) <= 1e-6 * old:
            return 0.0  # the last step overflowed and was skipped; so is what it left behind
        return self._scale / old

    def _watch_backward(self) -> None:
        """Let the end of this backward pass raise what the worker raised.

        DDP would raise it too, but as a RuntimeError with our error in its text. Outside of a
        backward pass (``Join``'s shadow of it) there is nothing to hook into.
        """
        self._in_backward = []
        try:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)  # type: ignore[attr-defined]
        except RuntimeError:
            pass

    def _end_backward(self) -> None:
        jobs, self._in_backward = self._in_backward, []
        started = time.perf_counter()
        for job in jobs:
            job.done.wait()
        self._counters.wait_seconds += time.perf_counter() - started
        for job in jobs:
            if job.error is not None:
                raise job.error

    # ---- one bucket: the worker thread -----------------------------------------------------------

    def _run(
        self, work: Callable[[], torch.Tensor], rescale: float | None, last: bool, exact: bool
    ) -> torch.Tensor:
        if self._failure is not None:
            raise AbortedError(f"an earlier bucket failed: {self._failure}") from self._failure
        counters = self._counters
        started = time.perf_counter()
        try:
            if rescale is not None:
                self._rescale(rescale)
            result = work()
        except Exception as error:
            if not isinstance(error, RingcommError):
                wrapped = RingcommError(f"reducing a gradient bucket failed: {error!r}")
                wrapped.__cause__ = error
                error = wrapped
            self._failure = error
            raise error from error.__cause__
        counters.comm_seconds += time.perf_counter() - started
        if last:
            counters.steps += 1
            counters.compressed_steps += not exact
            every = self._config.log_every
            if every and counters.steps % every == 0 and self._transport().rank == 0:
                _LOG.info("step %d: %s", counters.steps, self.stats())
        return result

    def _reduce_exact(self, buffer: torch.Tensor, warmup: bool) -> torch.Tensor:
        transport = self._transport()
        if transport.world_size > 1:
            before = transport.bytes_sent
            transport.all_reduce(
                torch.view_as_real(buffer) if buffer.is_complex() else buffer, "avg"
            )
            self._counters.add_exact(transport.bytes_sent - before, buffer.numel(), warmup)
        return buffer

    def _reduce_sparse(self, gradient: torch.Tensor, warmup: bool) -> torch.Tensor:
        """The exact mean of sparse gradients: everybody gets everybody's indices and values."""
        transport = self._transport()
        if transport.world_size == 1:
            return gradient
        before = transport.bytes_sent
        gradient = gradient.coalesce()
        indices, values = gradient.indices(), gradient.values()
        counts = [int(count) for count in transport.all_gather(torch.tensor([values.shape[0]]))]
        most = max(counts)
        if most == 0:
            return gradient
        wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        padded_indices = indices.new_zeros((most, indices.shape[0]))
        padded_indices[: values.shape[0]] = indices.t()
        padded_values = wide.new_zeros((most, *values.shape[1:]))
        padded_values[: values.shape[0]] = wide
        parts = transport.all_gather(padded_indices)
        all_indices = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        if padded_values.is_complex():
            real = transport.all_gather(torch.view_as_real(padded_values))
            parts = [torch.view_as_complex(part) for part in real]
        else:
            parts = transport.all_gather(padded_values)
        all_values = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        total = torch.sparse_coo_tensor(all_indices.t(), all_values, gradient.shape).coalesce()
        mean = (total.values() / transport.world_size).to(values.dtype)
        self._counters.add_exact(transport.bytes_sent - before, values.numel(), warmup)
        return torch.sparse_coo_tensor(
            total.indices(), mean, gradient.shape, is_coalesced=True
        )

    def _reduce_encoded(
        self, buffer: torch.Tensor, layout: "_Layout", counter: int
    ) -> torch.Tensor:
        transport = self._transport()
        if transport.world_size == 1:
            return buffer
        plan = self._plans.get(layout.names)
        if plan is None:
            plan = self._new_plan(layout)
        counters = self._counters
        before = transport.bytes_sent
        small = torch.cat([buffer[a:b] for a, b in plan.exact]) if plan.exact else None
        if plan.encoded:
            for begin, end in plan.exact:
                buffer[begin:end].zero_()
            with _Unused(buffer, plan):
                transport.all_reduce_encoded(
                    buffer, self.codec, plan.residual, plan.owner_residual, counter
                )
            counters.add_encoded(transport.bytes_sent - before, plan.num_encoded)
            counters.codec_seconds = transport.codec_seconds
        if small is not None:
            before = transport.bytes_sent
            transport.all_reduce(small, "avg")
            counters.add_exact(transport.bytes_sent - before, small.numel(), False)
            sizes = [end - begin for begin, end in plan.exact]
            for (begin, end), part in zip(plan.exact, small.split(sizes), strict=True):
                buffer[begin:end] = part
        return buffer

    def _new_plan(self, layout: "_Layout") -> "_Plan":
        """Plan a bucket that was not seen yet. Collective if the codec keeps owner residuals."""
        plan = _Plan.of(layout)
        stale = set(layout.names)
        self._plans = {
            names: kept for names, kept in self._plans.items() if stale.isdisjoint(names)
        }
        self._plans[layout.names] = plan
        if self.codec.error_feedback and plan.encoded:
            plan.residual = torch.zeros(plan.num_elems)
            _adopt(self._residuals, plan, plan.residual)
        if self.codec.down_codec.error_feedback and plan.encoded:
            transport = self._transport()
            plan.owner_residual = torch.zeros(plan.num_elems)
            held = _adopt(self._owner_residuals, plan, plan.owner_residual)
            # Elements have other owners than before: put the pieces together once, exactly, and
            # keep the own ones. Whether anybody has a piece must be agreed on.
            wanted = torch.tensor([float(held)])
            transport.all_reduce(wanted, "sum")
            if wanted.item() > 0:
                transport.all_reduce(plan.owner_residual, "sum")
                plan.owner_residual[~transport.owned(plan.num_elems, self.codec)] = 0.0
        return plan

    def _rescale(self, factor: float) -> None:
        for residual in (*self._residuals.values(), *self._owner_residuals.values()):
            if factor == 0.0:
                residual.zero_()
            else:
                residual.mul_(factor)

    # ---- figures ---------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters of this rank since the state was made or :meth:`reset_stats`.

        Returns:
            ``steps`` and, of these, ``compressed_steps`` (after the warm-up); ``bytes_sent`` to
            other ranks and, of these, ``exact_bytes_sent``; ``values`` reduced;
            ``bits_per_value`` = 8 bytes_sent / (2 (W-1)/W values), which is 32 for plain float32,
            and ``compressed_bits_per_value``, the same over the steps after the warm-up (with
            their exact parameters); ``comm_seconds`` of the worker thread, ``codec_seconds`` of
            these where known (torch transport), ``wait_seconds`` that backward passes waited for
            it at their end; ``transport``, ``codec``, ``rank``, ``world_size``.
        """
        counters, transport = self._counters, self._transport()
        return {
            "steps": counters.steps,
            "compressed_steps": counters.compressed_steps,
            "bytes_sent": counters.bytes_sent,
            "exact_bytes_sent": counters.exact_bytes_sent,
            "values": counters.values,
            "bits_per_value": _bits(counters.bytes_sent, counters.values, transport.world_size),
            "compressed_bits_per_value": _bits(
                counters.bytes_sent - counters.warmup_bytes_sent,
                counters.values - counters.warmup_values,
                transport.world_size,
            ),
            "comm_seconds": counters.comm_seconds,
            "codec_seconds": counters.codec_seconds - counters.codec_seconds_before,
            "wait_seconds": counters.wait_seconds,
            "transport": transport.name,
            "codec": self.codec.spec,
            "rank": transport.rank,
            "world_size": transport.world_size,
        }

    def reset_stats(self) -> None:
        """Set all counters of :meth:`stats` to zero (not ``step``)."""
        self._resources.worker.drain()
        before = self._transport().codec_seconds
        self._counters = _Counters(codec_seconds=before, codec_seconds_before=before)

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs to go on as if nothing had happened. **One per rank**: save it so.

        Call it between steps; not collective. Loads with ``torch.load(..., weights_only=True)``.

        Returns:
            Copies: ``step``, ``scale``, ``codec``, ``rank``, ``world_size``, ``residuals`` by
            parameter name, and ``owner_residuals``, the element ranges that this rank owns.
        """
        self._resources.worker.drain()
        if self._unpickled is not None:
            return self._unpickled
        transport = self._transport()
        return {
            "format": _STATE_FORMAT,
            "codec": self.codec.spec,
            "rank": transport.rank,
            "world_size": transport.world_size,
            "step": self.step,
            "scale": self._scale,
            "residuals": {name: value.clone() for name, value in self._residuals.items()},
            "owner_residuals": {
                name: {"num_elems": value.numel(), "ranges": _nonzero_ranges(value)}
                for name, value in self._owner_residuals.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any], *, survivor: bool = False) -> None:
        """Take over a state that :meth:`state_dict` of **this rank** returned.

        Not collective by itself, but every rank must load its own before the next backward pass.
        Residuals are in units of the gradient, so a state of another codec fits too.

        Args:
            state: The dictionary.
            survivor: This process carries on with its own state after the ranks were renumbered or
                their number changed: keep the residuals. Without it, the state of another rank or
                world size gives its step only, residuals start at zero, and a warning says so.

        Raises:
            UsageError: not such a dictionary, or of a model with other parameters.
        """
        if not isinstance(state, dict) or state.get("format") != _STATE_FORMAT:
            raise UsageError(
                "state: expected the dictionary of HookState.state_dict(), format "
                f"{_STATE_FORMAT}"
            )
        transport = self._transport()
        sizes = {name: parameter.numel() for parameter, name in self._names.items()}
        held = {name: value.numel() for name, value in state["residuals"].items()}
        held |= {name: value["num_elems"] for name, value in state["owner_residuals"].items()}
        for name, num_elems in held.items():
            if sizes.get(name) != num_elems:
                raise UsageError(
                    f"state: it has {num_elems} residuals of parameter {name!r}, the model has "
                    f"{sizes.get(name, 'no such parameter')}; is it of another model?"
                )
        self._resources.worker.drain()
        self._plans.clear()
        self._residuals = {}
        self._owner_residuals = {}
        self.step = int(state["step"])
        self._scale = state["scale"]
        saved = (state["rank"], state["world_size"])
        if saved != (transport.rank, transport.world_size) and held and not survivor:
            warnings.warn(
                f"this state is of rank {saved[0]} of {saved[1]}, but here is rank {transport.rank} "
                f"of {transport.world_size}: residuals start at zero. Save one state per rank; a "
                "process that lives on with its own passes survivor=True",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._residuals = {name: value.clone() for name, value in state["residuals"].items()}
        for name, value in state["owner_residuals"].items():
            dense = torch.zeros(value["num_elems"])
            for begin, part in value["ranges"]:
                dense[begin : begin + part.numel()] = part
            self._owner_residuals[name] = dense

    def __getstate__(self) -> dict[str, Any]:
        return {
            "codec": self.codec,
            "config": self._config,
            "scaler": None,
            "state": self.state_dict(),
        }

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.codec = pickled["codec"]
        self._config = pickled["config"]
        self._scaler = pickled["scaler"]
        self._scale = pickled["state"]["scale"]
        self.step = pickled["state"]["step"]
        self._residuals = {}
        self._owner_residuals = {}
        self._unpickled = pickled["state"]
        self._init_runtime()

    @property
    def scaler(self) -> Any:
        """The GradScaler, settable; pickling drops it."""
        return self._scaler

    @scaler.setter
    def scaler(self, scaler: Any) -> None:
        self._scaler = scaler

    def __repr__(self) -> str:
        return f"<ringcomm.ddp.HookState codec={self.codec} step={self.step}>"


# ---- what a bucket looks like --------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Parameters of a bucket in the order of its buffer."""

    names: tuple[str, ...]
    small: tuple[bool, ...]  # goes exact
    sizes: tuple[int, ...]


@dataclass
class _Plan:
    """What to do with the ranges of a bucket's buffer, and what was left over last time."""

    num_elems: int
    num_encoded: int
    encoded: list[tuple[str, int, int]]  # parameter name, begin, end
    exact: list[tuple[int, int]]  # begin, end; neighbours are merged
    residual: torch.Tensor | None = None
    owner_residual: torch.Tensor | None = None

    @staticmethod
    def of(layout: _Layout) -> "_Plan":
        encoded: list[tuple[str, int, int]] = []
        exact: list[tuple[int, int]] = []
        begin = 0
        for name, small, size in zip(layout.names, layout.small, layout.sizes, strict=True):
            end = begin + size
            if not small:
                encoded.append((name, begin, end))
            elif exact and exact[-1][1] == begin:
                exact[-1] = (exact[-1][0], end)
            else:
                exact.append((begin, end))
            begin = end
        return _Plan(begin, sum(end - begin for _, begin, end in encoded), encoded, exact)


def _is_small(parameter: torch.Tensor, min_elems: int) -> bool:
    return parameter.dim() < 2 or parameter.numel() < min_elems


def _adopt(kept: dict[str, torch.Tensor], plan: _Plan, flat: torch.Tensor) -> bool:
    """Move residuals by name into a plan's array. Whether there were any."""
    found = False
    for name, begin, end in plan.encoded:
        old = kept.get(name)
        if old is not None:
            flat[begin:end] = old
            found = True
        kept[name] = flat[begin:end]
    return found


class _Unused:
    """Keeps the residuals of parameters whose gradient is all zero on this rank.

    DDP throws away what arrives for a parameter that no rank used, so sending its residual would
    lose it. Such a parameter sends zeros and finds its residual unchanged.
    """

    def __init__(self, buffer: torch.Tensor, plan: _Plan) -> None:
        self._stash: list[tuple[torch.Tensor, torch.Tensor]] = []
        if plan.residual is None:
            return
        ptr, item = buffer.data_ptr(), buffer.element_size()
        for _, begin, end in plan.encoded:
            if _core.is_zero(ptr + begin * item, (end - begin) * item):
                residual = plan.residual[begin:end]
                self._stash.append((residual, residual.clone()))

    def __enter__(self) -> None:
        for residual, _ in self._stash:
            residual.zero_()

    def __exit__(self, *exc_info: object) -> None:
        for residual, kept in self._stash:
            residual.copy_(kept)


def _nonzero_ranges(values: torch.Tensor, gap: int = 64) -> list[tuple[int, torch.Tensor]]:
    """Copies of the stretches that hold all non-zero values, as (first element, values)."""
    found = values.nonzero().flatten()
    if not found.numel():
        return []
    cuts = ((found.diff() > gap).nonzero().flatten() + 1).tolist()
    edges = [0, *cuts, found.numel()]
    ranges = []
    for first, last in zip(edges, edges[1:], strict=False):
        begin, end = int(found[first]), int(found[last - 1]) + 1
        ranges.append((begin, values[begin:end].clone()))
    return ranges


# ---- transports ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    transport: str
    warmup_steps: int
    min_elems: int
    timeout: timedelta | None
    log_every: int


def _make_transport(
    config: _Config, group: dist.ProcessGroup | None, comm: Any
) -> tuple[Transport, str]:
    if comm is not None:
        if config.transport == "torch":
            raise UsageError("comm= is a ringcomm communicator, so transport cannot be 'torch'")
        if dist.is_available() and dist.is_initialized():
            expected = (dist.get_rank(group), dist.get_world_size(group))
            if expected != (comm.rank, comm.world_size):
                raise UsageError(
                    f"comm is rank {comm.rank} of {comm.world_size}, the model's process group is "
                    f"rank {expected[0]} of {expected[1]}; they must be the same ranks"
                )
        return CommTransport(comm, owns_comm=False), "the communicator that was passed"
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError("torch.distributed is not initialised: call init_process_group() first")
    if dist.get_rank(group) < 0:
        raise UsageError("this process is not a member of the process group")
    why = "as asked for"
    if config.transport != "torch":
        from ringcomm.comm import init

        try:
            made = init(
                group=dist.group.WORLD if group is None else group,
                timeout=config.timeout,
                name="ddp",
            )
        except UsageError as error:
            if config.transport == "ringcomm":
                raise
            why = f"not shared memory: {error}"
        else:
            return CommTransport(made, owns_comm=True), "all ranks are on this host"
    return GroupTransport(group, config.timeout), why


def _no_cuda(what: str, device: torch.device) -> str:
    return (
        f"{what} is on {device}: CUDA arrays are not supported by this build, whose transports and "
        "codecs are on the CPU. Train on the CPU, or leave the hook off"
    )


# ---- the worker thread ---------------------------------------------------------------------------


class _Job:
    """One bucket on its way through the worker."""

    __slots__ = ("done", "error", "future", "run")

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self.run: Callable[[], torch.Tensor] | None = run  # None once it has run
        self.future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self.done = threading.Event()
        self.error: Exception | None = None


def _unwrap(future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
    return future.value()


class _Worker:
    """A daemon thread that runs jobs in order. Started by the first one."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: _Job) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._jobs,), name="ringcomm-ddp", daemon=True
            )
            self._thread.start()
        self._jobs.put(job)

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


def _work(jobs: "queue.SimpleQueue[_Job | threading.Event | None]") -> None:
    with torch.no_grad():
        while True:
            job = jobs.get()
            if job is None:
                return
            if isinstance(job, threading.Event):
                job.set()
                continue
            try:
                run, job.run = job.run, None
                assert run is not None
                result = run()
            except Exception as error:
                job.error = error
                job.done.set()
                job.future.set_exception(error)
            else:
                job.done.set()
                job.future.set_result(result)
                del result
            del job, run  # or the last bucket would keep the state alive


class _Resources:
    """What has to be released. Apart from the state, so that it goes when the state goes."""

    def __init__(self) -> None:
        self.worker = _Worker()
        self.transport: Transport | None = None

    def close(self) -> None:
        # A thread that hangs in a collective still uses the transport: leave both to the end of
        # the process.
        if self.worker.stop() and self.transport is not None:
            self.transport.close()


# ---- counters ------------------------------------------------------------------------------------


@dataclass
class _Counters:
    steps: int = 0
    compressed_steps: int = 0
    bytes_sent: int = 0
    exact_bytes_sent: int = 0
    warmup_bytes_sent: int = 0
    values: int = 0
    warmup_values: int = 0
    comm_seconds: float = 0.0
    wait_seconds: float = 0.0
    codec_seconds: float = 0.0
    codec_seconds_before: float = field(default=0.0)

    def add_exact(self, num_bytes: int, num_values: int, warmup: bool) -> None:
        self.bytes_sent += num_bytes
        self.exact_bytes_sent += num_bytes
        self.values += num_values
        if warmup:
            self.warmup_bytes_sent += num_bytes
            self.warmup_values += num_values

    def add_encoded(self, num_bytes: int, num_values: int) -> None:
        self.bytes_sent += num_bytes
        self.values += num_values


def _bits(num_bytes: int, num_values: int, world_size: int) -> float:
    moved = 2 * (world_size - 1) / world_size * num_values
    return 8 * num_bytes / moved if moved else 0.0
