"""The flags of bench.collectives: what they mean, and what is refused."""

from __future__ import annotations

import argparse

import pytest

from bench.arguments import parse_arguments, parse_size


@pytest.fixture(autouse=True)
def not_under_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1", 1), ("4096", 4096), ("4K", 4096), ("64m", 64 << 20), ("1G", 1 << 30)],
)
def test_sizes_are_bytes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "0", "K", "-4K", "4T", "1.5M", "4 K", "0G", "²"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a size"):
        parse_size(text)


def test_sizes_go_from_b_to_e_by_the_factor() -> None:
    args = parse_arguments(["-b", "1K", "-e", "20K", "-f", "4"])
    assert args.sizes == [1 << 10, 4 << 10, 16 << 10]
    assert parse_arguments(["--sizes", "3", "1K"]).sizes == [3, 1024]


def test_defaults_are_those_of_the_issue() -> None:
    args = parse_arguments([])
    assert (args.n, args.sizes[0], args.sizes[-1]) == (2, 256, 64 << 20)
    assert args.op == ["all_reduce"] and args.dtype == ["float32"] and args.c == 1
    assert args.peers == ["gloo", "openmpi", "deepspeed", "memcpy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "1"], "-n >= 2"),
        (["-f", "1"], "-f >= 2"),
        (["-b", "2K", "-e", "1K"], "-b <= -e"),
        (["-w", "-1"], "-w >= 0"),
        (["--iters", "0"], "--iters >= 1"),
        (["--back-to-back", "0"], "--back-to-back >= 1"),
        (["--seconds", "0"], "--seconds > 0"),
        (["--tries", "0"], "--tries >= 1"),
        (["-n", "2", "--root", "2"], "0 to 1"),
        (["--peers", "nccl"], "'nccl' is none of gloo"),
        (["--codec", "int7"], "--codec: "),
        (["--op", "all_reduce", "everything"], "invalid choice: 'everything'"),
        (["--dtype", "float33"], "invalid choice: 'float33'"),
        (["-c", "2"], "invalid choice: 2"),
    ],
)
def test_senseless_flags_are_refused_with_a_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_under_mpirun_it_says_how_many_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    assert parse_arguments([]).n == 3
    assert parse_arguments(["-n", "3"]).n == 3
    with pytest.raises(SystemExit):
        parse_arguments(["-n", "2"])
    assert "mpirun has started 3 ranks" in capsys.readouterr().err


def test_plots_need_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(SystemExit):
        parse_arguments(["--plot", "out.png"])
    assert "pip install matplotlib" in capsys.readouterr().err
