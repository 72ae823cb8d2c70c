"""Bars, table and pictures, on made-up results."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from ringcomm.demo import __main__ as command
from ringcomm.demo import report
from ringcomm.demo.bars import check, summarise
from ringcomm.demo.configs import Task, plan
from ringcomm.demo.train import RunResult

DIGITS, TEXT = plan(quick=False)
BITS = {
    "gloo": 32.0,
    "backend": 32.0,
    "none": 32.0,
    "bf16": 16.0,
    "int8": 8.53,
    "int4": 6.53,
    "int4/4": 4.53,
}


def good_runs(task: Task) -> list[RunResult]:
    metric = 98.5 if task.metric == "accuracy" else 2.0
    losses = [4.0 / (1 + 0.01 * step) for step in range(task.num_steps)]
    return [
        RunResult(
            task=task.name,
            config=config,
            seed=seed,
            metric=metric,
            evaluations=[(task.num_steps // 2, metric / 2), (task.num_steps, metric)],
            train_losses=losses,
            final_train_loss=losses[-1],
            num_parameters=2_000_000,
            bits_per_value=BITS[config],
            bits_measured=config not in ("gloo", "backend"),
            bytes_sent_per_step=1e6,
            comm_ms=[1.0] * task.num_steps,
            longest_comm_ms=[1.0] * task.num_steps,
            step_ms=[10.0] * task.num_steps,
            median_comm_ms=1.0,
            median_step_ms=10.0,
            worker_comm_ms=None,
            seconds=1.0,
            replicas_equal=True,
        )
        for config in task.configs
        for seed in task.seeds
    ]


def missed(task: Task, runs: list[RunResult]) -> list[str]:
    return [bar.text for bar in check(task, runs, summarise(task, runs)) if not bar.kept]


def change(runs: list[RunResult], config: str, **fields: object) -> list[RunResult]:
    return [replace(r, **fields) if r.config == config else r for r in runs]  # type: ignore[arg-type]


@pytest.mark.parametrize("task", [DIGITS, TEXT], ids=lambda task: task.name)
def test_good_results_keep_every_bar(task: Task) -> None:
    assert missed(task, good_runs(task)) == []


@pytest.mark.parametrize(
    ("task", "config", "fields", "message"),
    [
        (DIGITS, "int8", {"metric": 98.15}, "digits int8: final accuracy -0.35 points"),
        (DIGITS, "int4", {"metric": 98.85}, "digits int4: final accuracy +0.35 points"),
        (DIGITS, "bf16", {"metric": 97.0}, "digits: lowest accuracy 97.00 % (bf16)"),
        (TEXT, "int8", {"metric": 2.011}, "text int8: held-out loss +0.55 %"),
        (TEXT, "int4", {"metric": 1.978}, "text int4: held-out loss -1.10 %"),
        (TEXT, "int4", {"final_train_loss": 0.9}, "text int4: training loss"),
        (TEXT, "int8", {"bits_per_value": 8.61}, "text int8: 8.610 bits"),
        (TEXT, "int4", {"bits_per_value": 6.61}, "text int4: 6.610 bits"),
        (TEXT, "int4/4", {"bits_per_value": 4.61}, "text int4/4: 4.610 bits"),
        (TEXT, "bf16", {"replicas_equal": False}, "NOT after bf16 seed 0"),
        (TEXT, "none", {"train_losses": [4.0] * 400}, "text none: training loss leaves"),
        (TEXT, "backend", {"train_losses": [4.0] * 400}, "text backend: training loss leaves"),
    ],
)
def test_each_bar_can_be_missed(
    task: Task, config: str, fields: dict[str, object], message: str
) -> None:
    (text,) = missed(task, change(good_runs(task), config, **fields))
    assert message in text


def test_a_difference_of_just_the_bar_is_within_it() -> None:
    assert missed(DIGITS, change(good_runs(DIGITS), "int8", metric=98.5 + 0.3)) == []


def write(tmp_path: Path, runs: list[RunResult]) -> int:
    results = {"data": {}, "runs": [vars(r) for r in runs]}
    return command._report([DIGITS, TEXT], False, tmp_path, json.loads(json.dumps(results)), 1.0)


def test_report_writes_json_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    assert write(tmp_path, good_runs(DIGITS) + good_runs(TEXT)) == 0
    record = json.loads((tmp_path / "demo.json").read_text())
    assert len(record["runs"]) == len(DIGITS.configs) * 3 + len(TEXT.configs)
    assert record["environment"]["ranks"] == 2
    for name in ("loss_curves.png", "table.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "int4/4" in printed
    assert "MISS" not in printed


def test_a_missed_bar_makes_the_command_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    runs = change(good_runs(TEXT), "int4", bits_per_value=7.0)
    assert write(tmp_path, good_runs(DIGITS) + runs) == 1
    out, err = capsys.readouterr()
    assert "MISS  text int4: 7.000 bits" in out
    assert "1 of" in err


def test_plain_table_has_aligned_columns(capsys: pytest.CaptureFixture[str]) -> None:
    parts = [report.table_rows(task, summarise(task, good_runs(task))) for task in (DIGITS, TEXT)]
    report._print_plain(parts)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) == 1 + len(DIGITS.configs) + len(TEXT.configs)
    assert len({line.index("98.50 %") for line in lines if "98.50 %" in line}) == 1
