"""What tests/gpu/places.py promises its tests, where no GPU is needed to see it."""

from __future__ import annotations

import contextlib

import pytest

from tests.gpu import places


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_capture_ends_whatever_is_raised_in_it(
    monkeypatch: pytest.MonkeyPatch, spoilt: bool
) -> None:
    """And the error of the body is the one that is seen."""
    torch = pytest.importorskip("torch")
    calls: list[str] = []

    class Graph:
        def capture_begin(self, capture_error_mode: str) -> None:
            calls.append(capture_error_mode)

        def capture_end(self) -> None:
            calls.append("end")
            if spoilt:
                raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    with pytest.raises(AssertionError, match="of the body"), places.captured("global"):
        raise AssertionError("of the body")
    assert calls == ["global", "end"]
    with pytest.raises(RuntimeError) if spoilt else contextlib.nullcontext(), places.captured():
        calls.append("work")
    assert calls[2:] == ["thread_local", "work", "end"]
