"""Short runs of bench.kernels: what is in the table, that results are verified, and what is said about times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import kernels
from bench.devices import Device, Unavailable, device
from bench.fused import bytes_moved
from bench.kernel_cases import CODECS, Setting, Wrong, entries
from ringcomm import _core
from tests.simt import emulated


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "kernels.json"
    assert kernels.main([*arguments, "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_every_kernel_has_a_row_beside_the_copy(tmp_path: Path) -> None:
    found = run(tmp_path, "--device", "cpu", "--sizes", "64K", "--samples", "2")
    for dtype in ("float32", "bfloat16"):
        rows = [row for row in found["rows"] if row["type"] == dtype]
        ops = {(row["op"], row["codec"]) for row in rows}
        coded = ("encode", "encode+residual", "decode", "decode_add")
        assert {(op, codec) for op in coded for codec in CODECS} < ops
        assert {("pack of 64", None), ("unpack of 64", None)} < ops
        assert {("copy", None), ("reduce of 4", None), ("reduce_hop", None), ("scale", None)} < ops
        assert (("divide", None) in ops) == (dtype == "float32")
        (copy,) = (row for row in rows if row["who"] == "copy")
        assert copy["to_copy"] == 1
        assert copy["moved"] == 2 * 65536
        for row in rows:
            assert row["GB/s"] == pytest.approx(row["moved"] / row["p50_us"] / 1e3, rel=1e-3)
            assert row["to_copy"] == pytest.approx(row["GB/s"] / copy["GB/s"], rel=1e-3)
            assert len(row["samples_us"]) == 2


def test_emulated_gpus_run_the_same_and_the_fused_all_reduce(tmp_path: Path) -> None:
    emulated.require()
    found = run(
        tmp_path, *["--device", "simt", "--sizes", "4K", "--dtype", "float32", "--fused", "64K"]
    )
    assert found["header"]["device"] == "simt"
    assert any("these times mean nothing" in note for note in found["notes"])
    fused = [row for row in found["rows"] if row["op"] == "all_reduce x4"]
    assert [row["codec"] for row in fused] == ["none", "bf16", "int8"]
    assert all(row["algo"] == "two_shot" for row in fused)
    assert len(found["rows"]) == 23 + 3


def test_a_wrong_result_is_noticed() -> None:
    setting = Setting(Device(), "float32", 4096)
    for entry in entries(setting):
        if entry.op == "copy":
            continue
        with pytest.raises(Wrong, match=r"bytes differ from the CPU's"):
            entry.check()  # nothing has been done yet
    array = setting.put(setting.raw[0], "float32")
    setting.expect(array, setting.raw[0], "copy")
    array[7] += 1
    with pytest.raises(
        Wrong, match=r"copy: \d bytes differ from the CPU's, the first is (28|29|30|31)"
    ):
        setting.expect(array, setting.raw[0], "copy")


def test_what_a_fused_all_reduce_moves() -> None:
    # Four ranks, 1024 bytes: in and out, and 3/4 of it four times through the boxes.
    assert bytes_moved(1024, 4, "float32", "none") == 4 * (2 * 1024 + 4 * 768)
    assert bytes_moved(1024, 4, "float32", "bf16") == 4 * (2 * 1024 + 4 * 384)
    assert bytes_moved(1024, 4, "bfloat16", "bf16") == bytes_moved(1024, 4, "bfloat16", "none")
    int8 = 1024 * 8.5 / 32 * 3 / 4
    assert bytes_moved(1024, 4, "float32", "int8") == 4 * (2 * 1024 + 4 * int8)


def test_a_device_that_is_not_here_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    if _core.RUNTIME == "cuda" and _core.cuda_probe().count:
        pytest.skip("there is a GPU here")
    with pytest.raises(Unavailable):
        device("cuda")
    assert kernels.main(["--device", "cuda"]) == 2
    assert "--device cuda: " in capsys.readouterr().err
