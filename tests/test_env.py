from __future__ import annotations

import subprocess
import sys
import typing
from collections.abc import Iterator

import pytest

from ringcomm import env
from ringcomm.errors import UsageError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    env.forget()
    yield
    env.forget()


def test_defaults_are_typed() -> None:
    assert env.get("RINGCOMM_TIMEOUT") == 300.0
    assert isinstance(env.get("RINGCOMM_TIMEOUT"), float)
    assert env.get("RINGCOMM_SIMD") is None
    assert env.get("RINGCOMM_DEBUG") == "WARN"
    assert env.get("RANK") is None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("RINGCOMM_TIMEOUT", "2.5", 2.5),
        ("RINGCOMM_SIMD", "AVX2", "avx2"),
        ("RINGCOMM_DEBUG", "trace", "TRACE"),
        ("RINGCOMM_STAGING_KIB", "64", 64),
        ("RANK", " 3 ", 3),
        ("RANK", "", None),
        ("TORCHELASTIC_USE_AGENT_STORE", "True", True),
        ("MASTER_ADDR", "node-1", "node-1"),
    ],
)
def test_values_are_parsed(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    monkeypatch.setenv(name, text)
    assert env.get(name) == value


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("RINGCOMM_TIMEOUT", "soon", "a number > 0"),
        ("RINGCOMM_TIMEOUT", "0", "a number > 0"),
        ("RINGCOMM_TIMEOUT", "nan", "a number > 0"),
        ("RINGCOMM_TIMEOUT", "inf", "a number > 0"),
        ("RINGCOMM_SIMD", "sse9", "baseline | avx2 | avx512"),
        ("RINGCOMM_DEBUG", "loud", "WARN | INFO | TRACE"),
        ("RANK", "-1", "a whole number >= 0"),
        ("WORLD_SIZE", "1.5", "a whole number >= 1"),
        ("TORCHELASTIC_USE_AGENT_STORE", "perhaps", "1 or 0"),
    ],
)
def test_a_bad_value_names_variable_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, allowed: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(UsageError) as caught:
        env.get(name)
    for part in (name, repr(text), allowed):
        assert part in str(caught.value)


def test_a_variable_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.get("RINGCOMM_TIMEOUT") == 300.0
    monkeypatch.setenv("RINGCOMM_TIMEOUT", "7")
    assert env.get("RINGCOMM_TIMEOUT") == 300.0
    env.forget()
    assert env.get("RINGCOMM_TIMEOUT") == 7.0


def test_rank_info_of_each_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.rank_info() == (None, None, None, None)
    for name, value in {"SLURM_PROCID": 5, "SLURM_NTASKS": 8, "SLURM_LOCALID": 1}.items():
        monkeypatch.setenv(name, str(value))
    env.forget()
    assert env.rank_info() == (5, 8, 1, None)
    for name, value in {"RANK": 2, "SIZE": 4, "LOCAL_RANK": 0, "LOCAL_SIZE": 2}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    env.forget()
    assert env.rank_info() == (2, 4, 0, 2)
    monkeypatch.setenv("RANK", "1")
    env.forget()
    assert env.rank_info() == (1, None, None, None), "pieces of two launchers must not mix"
    for name, value in {"WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    env.forget()
    assert env.rank_info() == (1, 2, 1, 2)


def test_a_rank_outside_of_its_world_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK=2 must be below WORLD_SIZE=2"):
        env.rank_info()


def test_the_typed_overloads_agree_with_the_table() -> None:
    types = {"int": int, "float": float, "str": str, "bool": bool}
    checked = 0
    for overload in typing.get_overloads(env.get) if sys.version_info >= (3, 11) else ():
        hints = typing.get_type_hints(overload)
        if typing.get_origin(hints["name"]) is not typing.Literal:
            continue
        for name in typing.get_args(hints["name"]):
            variable = env.VARIABLES[name]
            expected = (
                types[variable.kind] | None if variable.default is None else types[variable.kind]
            )
            assert hints["return"] == expected, name
            checked += 1
    assert checked > 10 or sys.version_info < (3, 11)


@pytest.mark.parametrize(
    ("debug", "expected"),
    [
        ("", ""),
        ("WARN", "[rank3] ringcomm WARNING: careful\n"),
        ("INFO", "[rank3] ringcomm INFO: chosen\n[rank3] ringcomm WARNING: careful\n"),
    ],
)
def test_debug_variable_decides_what_is_logged(debug: str, expected: str) -> None:
    script = (
        "from ringcomm import env\n"
        "log = env.logger(); log = env.logger()\n"
        "log.info('chosen'); log.warning('careful'); log.log(env.TRACE, 'detail')\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env={"RINGCOMM_DEBUG": debug, "RANK": "3"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert finished.stderr == expected
