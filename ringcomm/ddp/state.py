"""What the hook keeps between steps, and what it does with a bucket."""

import logging
import time
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from ringcomm import _core
from ringcomm.codecs import Codec
from ringcomm.codecs import codec as parse_codec
from ringcomm.ddp.averaging import average_encoded, average_exact, average_sparse
from ringcomm.ddp.bucket import Layout, is_small, num_values
from ringcomm.ddp.counters import Counters, bits_per_value
from ringcomm.ddp.lane import Lane
from ringcomm.ddp.residuals import Residuals
from ringcomm.ddp.transport import CHOICES, Config, Transport, check_device, make_transport
from ringcomm.ddp.worker import Job, Resources, unwrap
from ringcomm.errors import AbortedError, RingcommError, UsageError

__all__ = ["DEFAULT_MIN_ELEMS", "HookState"]

DEFAULT_MIN_ELEMS = 1024

_LOG = logging.getLogger("ringcomm.ddp")
_ENCODED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_EXACT_DTYPES = (torch.float64, torch.complex64, torch.complex128)
_DEFAULT_WARMUP_STEPS = 10  # for codecs below 8 bits
_STATE_FORMAT = 1


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
            multiplied when it grows, and dropped when it backs off, since that step was skipped. On a GPU
            reading the scale makes the host wait once a step, as the scaler itself does.
        seed: Of stochastic rounding; overrides the codec's.
        timeout: Deadline of each collective; default that of the process group.
        log_every: Log the statistics on rank 0 every so many steps; 0 for never.

    Raises:
        UsageError: bad arguments, or parameters on a device that is neither the CPU nor a GPU of this
            build.

    Attributes:
        codec: The :class:`~ringcomm.codecs.Codec`.
        step: Optimizer steps so far (backward passes that were reduced).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        codec: str | Codec = "int4",
        *,
        transport: str = "auto",
        process_group: dist.ProcessGroup | None = None,
        comm: Any = None,
        warmup_steps: int | None = None,
        min_elems: int = DEFAULT_MIN_ELEMS,
        scaler: Any = None,
        seed: int | None = None,
        timeout: timedelta | None = None,
        log_every: int = 0,
    ) -> None:
        self.codec = parse_codec(codec)
        if seed is not None:
            self.codec = self.codec.with_options(seed=seed)
        if transport not in CHOICES:
            raise UsageError(f"transport is {transport!r}, expected one of {CHOICES}")
        if warmup_steps is None:
            low = not self.codec.exact and _core.bits_per_value(self.codec.up) < 8
            warmup_steps = _DEFAULT_WARMUP_STEPS if low else 0
        if warmup_steps < 0 or min_elems < 0 or log_every < 0:
            raise UsageError("warmup_steps, min_elems and log_every cannot be negative")
        if scaler is not None and not hasattr(scaler, "get_scale"):
            raise UsageError(f"scaler is a {type(scaler).__name__}, expected a torch GradScaler")
        self.step = 0
        self._config = Config(transport, warmup_steps, min_elems, timeout, log_every)
        self._scaler = scaler
        self._scale: float | None = None  # of the scaler, at the last step
        self._residuals = Residuals(self.codec)
        self._unpickled: dict[str, Any] | None = None
        self._init_runtime()
        self.bind(model, process_group=process_group, comm=comm)

    def _init_runtime(self) -> None:
        self._names: dict[torch.Tensor, str] = {}
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._ddp_model: weakref.ref[torch.nn.Module] | None = None  # around it, if we were told
        self._group: dist.ProcessGroup | None = None
        self._lanes: dict[torch.device, Lane] = {}
        self._on_gpu = False  # the model is
        self._counters = Counters()
        self._in_backward: list[Job] = []
        self._last: Job | None = None  # the bucket that the end of this backward pass reduces
        self._finishes_last = False  # it will; else the worker thread does
        self._failure: BaseException | None = None
        self._resources = Resources()
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
            check_device(f"parameter {name}", parameter.device)
        if process_group is None:
            process_group = getattr(model, "process_group", None)
        self._drain()
        self._on_gpu = any(parameter.is_cuda for parameter in module.parameters())
        self._model = weakref.ref(module)
        self._ddp_model = None if module is model else weakref.ref(model)
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
        self._drain()
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
        transport, why = make_transport(self._config, group, comm, self._on_gpu)
        self._resources.transport = transport
        self._group = group
        self._residuals.forget_plans()
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

    def _drain(self) -> None:
        """Waits for what was submitted; on a GPU the current stream does."""
        self._resources.worker.drain()
        for lane in self._lanes.values():
            lane.join()

    def _learn_names(self) -> None:
        model = None if self._model is None else self._model()
        if model is not None:
            self._names = {parameter: name for name, parameter in model.named_parameters()}

    # ---- one bucket: the autograd thread ---------------------------------------------------------

    def submit(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        self._check_open()
        if self._failure is not None:
            if bucket.index() > 0:
                raise self._failure  # of this very backward pass
            raise AbortedError(
                f"an earlier bucket failed, so the ranks are out of step: {self._failure}. Restart "
                "from a checkpoint, or set state.process_group to a group of the survivors"
            ) from self._failure
        buffer = bucket.buffer()
        check_device("this bucket", buffer.device)
        if buffer.dtype not in _ENCODED_DTYPES + _EXACT_DTYPES:
            raise UsageError(
                f"gradients of dtype {buffer.dtype} cannot be averaged; supported are "
                f"{', '.join(map(str, _ENCODED_DTYPES + _EXACT_DTYPES))}"
            )
        rescale = None
        if bucket.index() == 0:
            rescale = self._new_scale()
            self._watch_backward()
        warmup = self.step < self._config.warmup_steps
        exact = warmup or self.codec.exact
        transport = self._transport()
        if buffer.layout != torch.strided:
            work = partial(average_sparse, transport, buffer, self._counters, warmup)
        elif exact or buffer.dtype not in _ENCODED_DTYPES:
            work = partial(average_exact, transport, buffer, self._counters, warmup)
        else:
            # A counter that no other bucket of the whole run has.
            counter = (self.step << 20) + bucket.index()
            work = partial(self._average_encoded, buffer, self._layout(bucket), counter)
        lane = self._lanes.get(buffer.device)
        if lane is None:
            lane = self._lanes[buffer.device] = Lane(buffer.device)
        job = Job(
            partial(self._run, work, rescale, bucket.is_last(), exact),
            lane.turn(buffer),
            lane.future(),
        )
        if bucket.is_last():
            self.step += 1
        self._in_backward.append(job)
        # A future that holds an exception must come from a callback: the C++ reducer cannot read
        # one that set_exception() put there.
        result: torch.futures.Future[torch.Tensor] = job.future.then(unwrap)
        if bucket.is_last() and self._finishes_last:
            self._last = job
        else:
            self._resources.worker.submit(job)
        return result

    def _layout(self, bucket: GradBucket) -> Layout:
        parameters = bucket.parameters()
        if any(parameter not in self._names for parameter in parameters):
            self._learn_names()
        try:
            names = tuple(self._names[parameter] for parameter in parameters)
        except KeyError:
            raise UsageError(
                "a bucket has a parameter that the model of this HookState does not have; make the "
                "state from the model on which the hook is registered"
            ) from None
        layout = Layout(
            names,
            tuple(is_small(parameter, self._config.min_elems) for parameter in parameters),
            tuple(num_values(parameter) for parameter in parameters),
        )
        if sum(layout.sizes) != bucket.buffer().numel():
            raise UsageError(
                f"a bucket of {bucket.buffer().numel()} values holds parameters of "
                f"{sum(layout.sizes)}: {', '.join(names)}"
            )
        return layout

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
        """Let the end of this backward pass reduce its last bucket and raise what failed.

        The last bucket has nothing left to overlap with, so it needs no other thread, and the end
        of the pass is the one place where waiting for the other ranks cannot keep them from
        getting here. DDP would raise errors too, but as a RuntimeError with ours in its text.
        Outside of a backward pass (``Join``'s shadow of it) there is nothing to hook into.
        """
        self._in_backward = []
        self._last = None
        self._finishes_last = self._may_finish_last()
        try:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        except RuntimeError:
            self._finishes_last = False

    def _may_finish_last(self) -> bool:
        """Whether nobody waits for the last bucket before the end of the backward pass.

        DDP itself does in the first pass of a static graph, where it calls the hook after the pass
        and not from a gradient; and a hook of the user's that calls ours may.
        """
        from ringcomm.ddp.entry import hook

        ddp_model = None if self._ddp_model is None else self._ddp_model()
        registered = getattr(ddp_model, "_comm_hooks", ())
        in_gradient = torch._C._current_autograd_node() is not None
        return in_gradient and any(h is hook and state is self for h, state in registered)

    def _end_backward(self) -> None:
        jobs, self._in_backward = self._in_backward, []
        last, self._last = self._last, None
        started = time.perf_counter()
        if last is not None:
            self._resources.worker.run_here(last)
        for job in jobs:
            job.done.wait()
        self._counters.wait_seconds += time.perf_counter() - started
        for job in jobs:
            if job.error is not None:
                raise job.error

    # ---- one bucket: the worker thread, or the end of backward -----------------------------------

    def _run(
        self, work: Callable[[], torch.Tensor], rescale: float | None, last: bool, exact: bool
    ) -> torch.Tensor:
        if self._failure is not None:
            raise AbortedError(f"an earlier bucket failed: {self._failure}") from self._failure
        counters = self._counters
        started = time.perf_counter()
        try:
            if rescale is not None:
                self._residuals.rescale(rescale)
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

    def _average_encoded(self, buffer: torch.Tensor, layout: Layout, counter: int) -> torch.Tensor:
        transport = self._transport()
        if transport.world_size == 1:
            return buffer
        plan = self._residuals.plan(layout, buffer.device, transport)
        return average_encoded(
            transport, buffer, plan, self.codec, counter, self._counters, self._may_be_unused()
        )

    def _may_be_unused(self) -> bool:
        """Whether DDP may reduce parameters that this step does not use."""
        model = None if self._ddp_model is None else self._ddp_model()
        if model is None:
            return True
        return bool(
            getattr(model, "find_unused_parameters", True) or getattr(model, "static_graph", True)
        )

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
            "bits_per_value": bits_per_value(
                counters.bytes_sent, counters.values, transport.world_size
            ),
            "compressed_bits_per_value": bits_per_value(
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
        self._drain()
        before = self._transport().codec_seconds
        self._counters = Counters(codec_seconds=before, codec_seconds_before=before)

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs to go on as if nothing had happened. **One per rank**: save it so.

        Call it between steps; not collective. Loads with ``torch.load(..., weights_only=True)``.

        Returns:
            Copies: ``step``, ``scale``, ``codec``, ``rank``, ``world_size``, ``residuals`` by
            parameter name, and ``owner_residuals``, the element ranges that this rank owns.
        """
        self._drain()
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
            **self._residuals.state_dict(),
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
                f"state: expected the dictionary of HookState.state_dict(), format {_STATE_FORMAT}"
            )
        transport = self._transport()
        sizes = {name: parameter.numel() for parameter, name in self._names.items()}
        held = self._residuals.check(state, sizes)
        self._drain()
        self._residuals.clear()
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
        self._residuals.load(state)

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
        self._residuals = Residuals(self.codec)
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
