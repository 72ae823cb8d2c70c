"""What the demo runs, and the bars that the results must pass."""

from dataclasses import dataclass

__all__ = ["BACKEND", "BASELINE", "EXACT", "WORLD_SIZE", "Bars", "Task", "plan"]

BASELINE = "gloo"
"""Plain DDP on Gloo."""

BACKEND = "backend"
"""Plain DDP on the backend ``"ringcomm"``; every other configuration is the codec of a ringcomm hook."""

EXACT = (BACKEND, "none")
"""What must train exactly as the baseline does."""

WORLD_SIZE = 2


@dataclass(frozen=True)
class Bars:
    """Limits that a task's results must keep. Mapping keys are configurations."""

    metric_at_most: float | None
    """Of the baseline's final metric, where lower is better; None: no limit."""
    metric_at_least: float | None
    """Of every configuration's final metric, where higher is better; None: no limit."""
    difference: dict[str, float]
    """Largest difference of the final metric to the baseline: points, or percent of the loss."""
    bits: dict[str, float]
    """Most bits per value, from bytes sent."""


@dataclass(frozen=True)
class Task:
    """One model on one data set, trained once per configuration and seed."""

    name: str
    title: str
    metric: str
    """``accuracy`` (percent, higher is better) or ``loss`` (nats per character, lower is better)."""
    configs: tuple[str, ...]
    seeds: tuple[int, ...]
    num_steps: int
    batch_per_rank: int
    peak_lr: float
    smooth_steps: int
    """Length of the mean that smooths the training loss; the last one counts as its final value."""
    eval_every: int
    """Steps between evaluations (the last step is always evaluated); 0: only the last step."""
    bars: Bars


def plan(quick: bool) -> list[Task]:
    """The tasks of the full demo, or of the short one.

    The short one's runs are too short to judge a codec finely: it keeps the bars on bytes, and on
    the metric only limits that catch a codec that does not train.
    """
    digits = Task(
        name="digits",
        title="CNN on handwritten digits",
        metric="accuracy",
        configs=(BASELINE, *EXACT, "bf16", "int8", "int4"),
        seeds=(0,) if quick else (0, 1, 2),
        num_steps=150 if quick else 300,
        batch_per_rank=32,
        peak_lr=2e-3,
        smooth_steps=20,
        eval_every=25,
        bars=Bars(
            metric_at_most=None,
            metric_at_least=95.0 if quick else 97.0,
            difference={"int8": 1.0, "int4": 1.0} if quick else {"int8": 0.3, "int4": 0.3},
            bits={},
        ),
    )
    text = Task(
        name="text",
        title="Transformer on Python source text",
        metric="loss",
        configs=(BASELINE, *EXACT, "bf16", "int8", "int4", "int4/4"),
        seeds=(0,),
        num_steps=80 if quick else 400,
        batch_per_rank=4,
        peak_lr=1e-3,
        smooth_steps=10 if quick else 50,
        eval_every=0,
        bars=Bars(
            metric_at_most=3.2 if quick else 2.4,
            metric_at_least=None,
            difference={"int8": 1.0, "int4": 2.0, "int4/4": 2.0}
            if quick
            else {"int8": 0.5, "int4": 1.0},
            bits={"int8": 8.6, "int4": 6.6, "int4/4": 4.6},
        ),
    )
    return [digits, text]
