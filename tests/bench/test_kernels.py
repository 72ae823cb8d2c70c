"""Short runs of bench.kernels: what is in the table, that results are verified, and what is said about times."""

from __future__ import annotations

import contextlib
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import fused, kernels
from bench.devices import Device, Unavailable, device
from bench.fused import bytes_moved
from bench.kernel_cases import CODECS, PERIOD, WHOLE, Setting, Wrong, entries, windows
from ringcomm import _core, env
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
    rows = [row for row in found["rows"] if row["op"] == "all_reduce x4"]
    assert [row["codec"] for row in rows] == ["none", "bf16", "int8"]
    mode = rows[0]["mode"]
    assert all((row["algo"], row["mode"]) == ("two_shot", mode) for row in rows)
    assert f"all_reduce x4: ranks are threads on one device, in mode {mode}" in found["notes"]
    assert found["rows"][:3] == rows
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


def test_of_a_large_array_both_ends_and_what_lies_between_are_compared() -> None:
    setting = Setting(Device(), "float32", WHOLE + 4096)
    assert not setting.whole
    array, expected = setting.put(setting.raw[0], "float32"), setting.raw[0]
    assert not np.array_equal(expected[:4096], expected[PERIOD - 3 :][:4096])  # repeats elsewhere
    setting.expect(array, expected, "copy")
    bytes_of = array.view(np.uint8)
    compared = windows(len(bytes_of), False)
    assert (compared[0].start, compared[-1].stop) == (0, len(bytes_of))
    assert all(a.stop <= b.start and b.start - a.stop < 1 << 20 for a, b in pairwise(compared))
    for at in (0, compared[70].start, compared[-2].stop - 1, len(bytes_of) - 1):
        bytes_of[at] ^= 1
        with pytest.raises(Wrong, match=f"copy: 1 bytes differ from the CPU's, the first is {at}$"):
            setting.expect(array, expected, "copy")
        bytes_of[at] ^= 1
    assert Setting(Device(), "float32", 4096).whole
    assert windows(100, False) == windows(100, True) == [slice(0, 100)]


def test_what_fails_is_noted_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is written after every setting, the largest first."""
    out, measure, written = tmp_path / "kernels.json", kernels.measure, []

    def broken(where: Any, dtype: str, size: int, *rest: Any) -> None:
        written.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)
        if size == 8192:
            raise Wrong("on purpose")
        measure(where, dtype, size, *rest)

    monkeypatch.setattr(kernels, "measure", broken)
    arguments = ["--device", "cpu", "--sizes", "4K", "8K", "16K", "--samples", "1"]
    assert kernels.main([*arguments, "--dtype", "float32", "--json", str(out)]) == 1
    found = json.loads(out.read_text())
    assert [row["size"] for row in found["rows"]] == [16384] * 23 + [4096] * 23
    assert written == [0, 23, 23]
    assert "float32 of 8192 bytes: failed, was not measured: on purpose" in found["notes"]


def test_the_fused_all_reduce_is_measured_in_kernel_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What stands for a GPU here is the CPU, whose communicators have no mode."""
    seen = []
    init = fused.ringcomm.init

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(env.get("RINGCOMM_CUDA_MODE"))
        return init(*args, **options)

    monkeypatch.setattr(fused.ringcomm, "init", watched)
    monkeypatch.setattr(fused, "_own_stream", contextlib.nullcontext)
    monkeypatch.setattr(Device, "name", "cuda")
    for before in ("stepped", None):
        if before is None:
            monkeypatch.delenv("RINGCOMM_CUDA_MODE")
        else:
            monkeypatch.setenv("RINGCOMM_CUDA_MODE", before)
        env.forget()
        with pytest.raises(Wrong, match="runs in mode None, expected in_kernel"):
            list(fused.measure(Device(), 4096, "float32", ["none"], 1, print))
        assert os.environ.get("RINGCOMM_CUDA_MODE") == before
        assert env.get("RINGCOMM_CUDA_MODE") == (before or "auto")
    assert seen == ["in_kernel"] * 8


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
