"""Peers that are missing say why; they are never silently left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import peers
from bench.contender import Unsupported
from bench.operations import Case
from bench.peers import deepspeed, openmpi


def test_every_peer_has_the_two_functions() -> None:
    for name in peers.MODULES:
        module = peers.load(name)
        assert callable(module.available) and callable(module.connect)


def test_open_mpi_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    assert "mpirun was not found" in str(openmpi.available())
    with pytest.raises(Unsupported, match="mpirun was not found"):
        openmpi.prepare()
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "mpi4py cannot be imported" in str(openmpi.available())
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    assert "not started by Open MPI's mpirun" in str(openmpi.available())


def test_deepspeed_says_that_it_is_not_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(deepspeed, "BUILT", tmp_path)
    assert "is not built for torch" in str(deepspeed.available())


@pytest.mark.parametrize(
    ("op", "dtype", "redop"),
    [
        ("broadcast", "float32", "sum"),
        ("all_reduce", "float64", "sum"),
        ("all_reduce", "float32", "max"),
    ],
)
def test_deepspeed_refuses_what_its_operator_does_not_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, op: str, dtype: str, redop: str
) -> None:
    monkeypatch.setattr(deepspeed, "BUILT", tmp_path)
    (tmp_path / "version").write_text("0")
    case = Case(op, dtype, 1024, 0, 2, redop, 0)
    with pytest.raises(Unsupported, match="its operator"):
        deepspeed.DeepSpeed(level=2).prepare(case, case.buffers())


def test_gloo_has_no_avg() -> None:
    case = Case("all_reduce", "float32", 1024, 0, 2, "avg", 0)
    with pytest.raises(Unsupported, match="no avg"):
        peers.load("gloo").connect(0, 2, 0).prepare(case, case.buffers())
