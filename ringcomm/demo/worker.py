"""One rank of the demo; started by torchrun, see ``__main__``."""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringcomm.demo.configs import Task, plan
from ringcomm.demo.data import Digits, Text, load_digits, load_text
from ringcomm.demo.launch import die_with_launcher
from ringcomm.demo.train import RunResult, run

__all__ = ["main"]

_PEER_TIMEOUT = timedelta(seconds=120)


def main() -> None:
    """Run the whole plan; rank 0 writes the results to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    die_with_launcher()
    torch.set_num_threads(1)
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
    results = []
    for seed in task.seeds:
        for config in task.configs:
            name = f"{task.name} {config}" + (f" seed {seed}" if len(task.seeds) > 1 else "")
            progress = _Progress(name, task.num_steps)
            result = run(task, config, seed, data, progress.step)
            unit = " %" if task.metric == "accuracy" else ""
            progress.close(
                f"{name:<20} {task.metric} {result.metric:.4g}{unit}, "
                f"{result.bits_per_value:.2f} bits/value, comm {result.median_comm_ms:.1f} ms, "
                f"step {result.median_step_ms:.1f} ms, {result.seconds:.1f} s"
            )
            results.append(result)
    return results


class _Progress:
    """A bar on rank 0 while a run is on, if somebody watches, and a line at its end."""

    def __init__(self, name: str, num_steps: int) -> None:
        self._bar: Any = None
        self._speaks = dist.get_rank() == 0
        if self._speaks and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=num_steps, desc=name, unit="step", leave=False)

    def step(self, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self._bar.update()

    def close(self, line: str) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._speaks:
            print(line, flush=True)


if __name__ == "__main__":
    main()
