"""Judges the results: one line per bar, kept or missed."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from ringcomm.demo.configs import BASELINE, EXACT, Task
from ringcomm.demo.train import RunResult

__all__ = ["Check", "Summary", "check", "summarise"]


@dataclass(frozen=True)
class Check:
    """One bar: what was promised, what came out."""

    text: str
    kept: bool


@dataclass(frozen=True)
class Summary:
    """One configuration of one task: means over seeds."""

    task: str
    config: str
    num_seeds: int
    metric: float
    difference: float
    """To the baseline: points of accuracy, or percent of the held-out loss."""
    final_train_loss: float
    train_difference: float
    """To the baseline, percent of the smoothed training loss at the end."""
    bits_per_value: float
    bits_measured: bool
    bytes_sent_per_step: float
    comm_ms: float
    step_ms: float
    comm_ratio: float
    step_ratio: float


def summarise(task: Task, runs: Iterable[RunResult]) -> list[Summary]:
    """Means over seeds, in the order of the task's configurations."""
    by_config = {config: [r for r in runs if r.config == config] for config in task.configs}
    exact = by_config[BASELINE]
    summaries = []
    for config, group in by_config.items():
        metric, exact_metric = _mean(group, "metric"), _mean(exact, "metric")
        loss, exact_loss = _mean(group, "final_train_loss"), _mean(exact, "final_train_loss")
        difference = metric - exact_metric
        if task.metric == "loss":
            difference *= 100 / exact_metric
        comm_ms, step_ms = _mean(group, "median_comm_ms"), _mean(group, "median_step_ms")
        summaries.append(
            Summary(
                task=task.name,
                config=config,
                num_seeds=len(group),
                metric=metric,
                difference=difference,
                final_train_loss=loss,
                train_difference=100 * (loss / exact_loss - 1),
                bits_per_value=_mean(group, "bits_per_value"),
                bits_measured=all(r.bits_measured for r in group),
                bytes_sent_per_step=_mean(group, "bytes_sent_per_step"),
                comm_ms=comm_ms,
                step_ms=step_ms,
                comm_ratio=comm_ms / _mean(exact, "median_comm_ms"),
                step_ratio=step_ms / _mean(exact, "median_step_ms"),
            )
        )
    return summaries


def check(task: Task, runs: list[RunResult], summaries: list[Summary]) -> list[Check]:
    """All bars of a task."""
    of = {summary.config: summary for summary in summaries}
    bars = task.bars
    unit = "points" if task.metric == "accuracy" else "%"
    checks = []
    if bars.metric_at_least is not None:
        worst = min(summaries, key=lambda summary: summary.metric)
        checks.append(
            Check(
                f"{task.name}: lowest {task.metric} {worst.metric:.2f} % ({worst.config}), "
                f"bar: more than {bars.metric_at_least:g} %",
                worst.metric > bars.metric_at_least,
            )
        )
    if bars.metric_at_most is not None:
        metric = of[BASELINE].metric
        checks.append(
            Check(
                f"{task.name}: held-out {task.metric} of {BASELINE} {metric:.3f}, "
                f"bar: at most {bars.metric_at_most:g}",
                metric <= bars.metric_at_most,
            )
        )
    for config, most in bars.difference.items():
        found = [("final " + task.metric, of[config].difference)]
        if task.metric == "loss":
            found = [
                ("held-out loss", of[config].difference),
                ("training loss", of[config].train_difference),
            ]
        checks += [
            Check(
                f"{task.name} {config}: {what} {difference:+.2f} {unit} to {BASELINE}, "
                f"bar: within {most:g} {unit}",
                # Differences of shares are not exact in binary: 0.3 points are within 0.3 points.
                abs(difference) <= most + 1e-9,
            )
            for what, difference in found
        ]
    for config, most in bars.bits.items():
        bits = of[config].bits_per_value
        checks.append(
            Check(
                f"{task.name} {config}: {bits:.3f} bits per value sent, bar: at most {most:g}",
                bits <= most,
            )
        )
    checks += [_same_curve(task, runs, config) for config in EXACT]
    unequal = [f"{r.config} seed {r.seed}" for r in runs if not r.replicas_equal]
    checks.append(
        Check(
            f"{task.name}: parameters bit-identical on all ranks after {len(runs)} runs"
            + (f", NOT after {', '.join(unequal)}" if unequal else ""),
            not unequal,
        )
    )
    return checks


def _same_curve(task: Task, runs: list[RunResult], config: str) -> Check:
    """Two ranks, so there is one order of summation: exact means exactly the same curve."""
    losses = {(r.config, r.seed): r.train_losses for r in runs if r.config in (BASELINE, config)}
    for seed in task.seeds:
        pairs = zip(losses[BASELINE, seed], losses[config, seed], strict=True)
        for step, (exact, ours) in enumerate(pairs, start=1):
            if exact != ours:
                return Check(
                    f"{task.name} {config}: training loss leaves that of {BASELINE} at step {step} "
                    f"(seed {seed}): {ours!r}, not {exact!r}; bar: bit-identical",
                    False,
                )
    return Check(f"{task.name} {config}: every training loss bit-identical to {BASELINE}", True)


def _mean(runs: list[RunResult], name: str) -> float:
    return statistics.fmean(getattr(r, name) for r in runs)
