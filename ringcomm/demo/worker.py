"""One rank of the demo; started by torchrun, see ``__main__``."""

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ringcomm.backend
from ringcomm.demo.configs import Task, plan
from ringcomm.demo.data import Digits, Text, load_digits, load_text
from ringcomm.demo.launch import die_with_launcher
from ringcomm.demo.train import Run, RunResult

__all__ = ["main"]

_STEPS_PER_TURN = 10
_PEER_TIMEOUT = timedelta(seconds=120)


def main() -> None:
    """Run the whole plan; rank 0 writes the results to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    die_with_launcher()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no traceback from every rank
    torch.set_num_threads(1)
    ringcomm.backend.register()  # torch does it by itself where ringcomm is installed
    dist.init_process_group("gloo", timeout=_PEER_TIMEOUT)
    runs, facts = [], {}
    for task in plan(options.quick):
        if task.name in options.task:
            data, facts[task.name] = _load(task)
            runs += _run_task(task, data)
    if dist.get_rank() == 0:
        results = {"data": facts, "runs": [asdict(result) for result in runs]}
        options.results.write_text(json.dumps(results))
    dist.destroy_process_group()
    # Not through the interpreter's end: a Gloo thread that drops its last work there, and with it a
    # reference to a Python tensor, ends the process with "terminate called without an active exception".
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _load(task: Task) -> tuple[Digits | Text, dict[str, Any]]:
    if task.name == "digits":
        digits = load_digits()
        return digits, {
            "train_images": len(digits.train_labels),
            "test_images": len(digits.test_labels),
        }
    text = load_text()
    return text, {
        "files": text.num_files,
        "train_characters": len(text.train),
        "held_out_characters": len(text.held_out),
        "sha256": text.digest,
    }


def _run_task(task: Task, data: Digits | Text) -> list[RunResult]:
    """All configurations of a seed take turns, so that they meet the same state of the machine."""
    results = []
    for seed in task.seeds:
        runs = [Run(task, config, seed, data) for config in task.configs]
        suffix = f" seed {seed}" if len(task.seeds) > 1 else ""
        names = [f"{task.name} {config}{suffix}" for config in task.configs]
        bars = [_Progress(name, task.num_steps, row) for row, name in enumerate(names)]
        left = True
        while left:
            for run, bar in zip(runs, bars, strict=True):
                left = run.advance(_STEPS_PER_TURN, bar.step)
        for bar in bars:
            bar.close()
        for name, run in zip(names, runs, strict=True):
            results.append(run.finish())
            if dist.get_rank() == 0:
                print(f"{name:<20} {_outcome(task, results[-1])}", flush=True)
    return results


def _outcome(task: Task, result: RunResult) -> str:
    if task.metric == "accuracy":
        metric = f"test accuracy {result.metric:.2f} %"
    else:
        metric = f"held-out loss {result.metric:.4f}"
    return (
        f"{metric}, {result.bits_per_value:.2f} bits/value, comm {result.median_comm_ms:.1f} ms, "
        f"step {result.median_step_ms:.1f} ms, {result.seconds:.1f} s"
    )


class _Progress:
    """A bar on rank 0, if somebody watches."""

    def __init__(self, name: str, num_steps: int, row: int) -> None:
        self._bar: Any = None
        if dist.get_rank() == 0 and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(
                total=num_steps, desc=f"{name:<20}", unit="step", position=row, leave=False
            )

    def step(self, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    main()
