import pytest

pytest.importorskip("torch")

from ringcomm.demo import timing


def test_overlapping_buckets_count_once_and_gaps_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    timer = timing.CommTimer()
    for at, event in [
        (1, "begin"),
        (2, "begin"),
        (4, "end"),
        (7, "end"),
        (10, "begin"),
        (11, "end"),
    ]:
        now = float(at)
        getattr(timer, event)()
    assert timer.take() == 7.0
    assert timer.take() == 0.0
