"""One training run: one task, one configuration, one seed, on every rank."""

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional

import ringcomm.ddp
from ringcomm.demo.configs import BACKEND, BASELINE, Task
from ringcomm.demo.data import Digits, Text, digit_batches, text_batches, windows
from ringcomm.demo.models import CONTEXT, CharTransformer, DigitsNet, num_parameters
from ringcomm.demo.timing import TimedDDP

__all__ = ["Run", "RunResult"]

_Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
# Adds up (sum of the metric, number of things judged) over this rank's part of the held-out data.
_Judge = Callable[[nn.Module], tuple[float, int]]

_WARMUP_SHARE = 0.05  # of the steps, learning rate rises
_UNTIMED_STEPS = 5  # DDP rebuilds its buckets, memory is touched first
_HELD_OUT_WINDOWS = 256
_BASELINE_BITS = 32.0


@dataclass(frozen=True)
class RunResult:
    """What one run gave. Lists of times have one value per step."""

    task: str
    config: str
    seed: int
    metric: float
    """Final accuracy in percent, or final loss on held-out text in nats per character."""
    evaluations: list[tuple[int, float]]
    """(steps done, metric)."""
    train_losses: list[float]
    """Per step, mean over ranks."""
    final_train_loss: float
    """Mean over the last steps."""
    num_parameters: int
    bits_per_value: float
    bits_measured: bool
    """False: computed, for a ring all-reduce of float32."""
    bytes_sent_per_step: float
    comm_ms: list[float]
    """Time with a bucket under way, of the rank that came later and so waited less."""
    longest_comm_ms: list[float]
    """The same of the rank that came first."""
    step_ms: list[float]
    """Of the slower rank."""
    median_comm_ms: float
    median_step_ms: float
    worker_comm_ms: float | None
    """The ringcomm hook's own count: mean time its worker thread was busy with a step."""
    seconds: float
    """The whole run, evaluation and set-up included."""
    replicas_equal: bool
    """Whether all ranks ended with the same bits in every parameter."""


class Run:
    """A run that can be stopped and resumed, so that runs to be compared can take turns.

    Making one, :meth:`advance` and :meth:`finish` are collective: every rank does the same.

    Args:
        task: What to train.
        config: ``"gloo"``, ``"backend"``, or the codec of a ringcomm hook.
        seed: Of the initial weights and of the order of the data; the same for every ``config``.
        data: Of the task.
    """

    def __init__(self, task: Task, config: str, seed: int, data: Digits | Text) -> None:
        started = time.perf_counter()
        self.task = task
        self.config = config
        self.seed = seed
        torch.manual_seed(seed)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._model, self._batches, self._judge = _set_up(task, seed, data, rank, world_size)
        group = dist.new_group(backend="ringcomm") if config == BACKEND else None
        self._ddp_model = TimedDDP(self._model, process_group=group)
        self._state: ringcomm.ddp.HookState | None = None
        if config in (BASELINE, BACKEND):
            # DDP's own averaging, as a hook so that it is timed like ours.
            self._ddp_model.register_comm_hook(group, allreduce_hook)
        else:
            self._state = ringcomm.attach(self._ddp_model, codec=config, warmup_steps=0)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=task.peak_lr, betas=(0.9, 0.99), fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: _rate(step, task.num_steps)
        )
        self._losses: list[float] = []
        self._step_ms: list[float] = []
        self._comm_ms: list[float] = []
        self._evaluations: list[tuple[int, float]] = []
        self._seconds = time.perf_counter() - started

    def advance(self, num_steps: int, on_step: Callable[[float], None]) -> bool:
        """Train for ``num_steps`` more steps, or to the end.

        ``on_step`` is called after every step with this rank's loss.

        Returns:
            Whether steps are left.
        """
        started = time.perf_counter()
        last = min(self.task.num_steps, len(self._losses) + num_steps)
        while len(self._losses) < last:
            self._step()
            on_step(self._losses[-1])
        self._seconds += time.perf_counter() - started
        return last < self.task.num_steps

    def _step(self) -> None:
        begin = time.perf_counter()
        inputs, targets = next(self._batches)
        logits = self._ddp_model(inputs)
        loss = functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self._losses.append(loss.item())
        self._step_ms.append((time.perf_counter() - begin) * 1e3)
        self._comm_ms.append(self._ddp_model.comm_timer.take() * 1e3)
        step, every = len(self._losses), self.task.eval_every
        if step == self.task.num_steps or (every and step % every == 0):
            self._evaluations.append((step, _evaluate(self._model, self._judge)))

    def finish(self) -> RunResult:
        """Gather what the ranks found, after the last step."""
        world_size = dist.get_world_size()
        count = num_parameters(self._model)
        sent = 2 * (world_size - 1) / world_size * count * 4  # a ring all-reduce of float32
        bits, worker_ms = _BASELINE_BITS, None
        if self._state is not None:
            stats = self._state.stats()
            bits, sent = stats["bits_per_value"], stats["bytes_sent"] / stats["steps"]
            worker_ms = stats["comm_seconds"] / stats["steps"] * 1e3
            self._state.close()
        losses = _over_ranks(self._losses, dist.ReduceOp.SUM)
        losses = [loss / world_size for loss in losses]
        step_ms = _over_ranks(self._step_ms, dist.ReduceOp.MAX)
        comm_ms = _over_ranks(self._comm_ms, dist.ReduceOp.MIN)
        longest_comm_ms = _over_ranks(self._comm_ms, dist.ReduceOp.MAX)
        return RunResult(
            task=self.task.name,
            config=self.config,
            seed=self.seed,
            metric=self._evaluations[-1][1],
            evaluations=self._evaluations,
            train_losses=losses,
            final_train_loss=statistics.fmean(losses[-self.task.smooth_steps :]),
            num_parameters=count,
            bits_per_value=bits,
            bits_measured=self._state is not None,
            bytes_sent_per_step=sent,
            comm_ms=comm_ms,
            longest_comm_ms=longest_comm_ms,
            step_ms=step_ms,
            median_comm_ms=statistics.median(comm_ms[_UNTIMED_STEPS:]),
            median_step_ms=statistics.median(step_ms[_UNTIMED_STEPS:]),
            worker_comm_ms=worker_ms,
            seconds=self._seconds,
            replicas_equal=_replicas_equal(self._model),
        )


def _set_up(
    task: Task, seed: int, data: Digits | Text, rank: int, world_size: int
) -> tuple[nn.Module, _Batches, _Judge]:
    batch = task.batch_per_rank
    if isinstance(data, Digits):
        digits = data
        images = digits.test_images[rank::world_size]
        labels = digits.test_labels[rank::world_size]

        def count_right(model: nn.Module) -> tuple[float, int]:
            right = (model(images).argmax(dim=1) == labels).sum()
            return 100.0 * right.item(), len(labels)

        return DigitsNet(), digit_batches(digits, seed, batch, rank, world_size), count_right

    text = data
    starts = torch.linspace(0, len(text.held_out) - CONTEXT - 1, _HELD_OUT_WINDOWS).long()
    inputs, targets = windows(text.held_out, starts[rank::world_size], CONTEXT)

    def add_losses(model: nn.Module) -> tuple[float, int]:
        total = 0.0
        for part, wanted in zip(torch.split(inputs, 32), torch.split(targets, 32), strict=True):
            logits = model(part).flatten(0, 1)
            total += functional.cross_entropy(logits, wanted.flatten(), reduction="sum").item()
        return total, targets.numel()

    return CharTransformer(), text_batches(text, seed, batch, CONTEXT, rank, world_size), add_losses


def _rate(step: int, num_steps: int) -> float:
    """Share of the peak learning rate: a linear rise, then half a cosine down to zero."""
    rise = max(1, round(_WARMUP_SHARE * num_steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, num_steps - rise))


def _evaluate(model: nn.Module, judge: _Judge) -> float:
    model.eval()
    with torch.no_grad():
        total = torch.tensor(judge(model), dtype=torch.float64)
    model.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def _over_ranks(series: list[float], op: dist.ReduceOp.RedOpType) -> list[float]:
    values = torch.tensor(series, dtype=torch.float64)
    dist.all_reduce(values, op=op)
    reduced: list[float] = values.tolist()
    return reduced


def _replicas_equal(model: nn.Module) -> bool:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    return len(set(digests)) == 1
