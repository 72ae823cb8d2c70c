"""The order of buckets on a GPU, with streams that only write down what is asked of them."""

import contextlib
import types

import pytest

torch = pytest.importorskip("torch")

from ringcomm.ddp.lane import Lane  # noqa: E402  # torch may be missing

GPU = torch.device("cuda:1")


class Stream:
    """Current on its device unless it is another's."""

    def __init__(self, log, name):
        self.log, self.name, self.device = log, name, GPU

    def record_event(self):
        self.log.append(f"event on {self.name}")
        return f"event of {self.name}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, stream):
        self.log.append(f"{self.name} waits for {stream.name}")


class Buffer:
    def __init__(self, log, name="buffer", layout=torch.strided):
        self.log, self.name, self.layout = log, name, layout

    def record_stream(self, stream):
        self.log.append(f"{self.name} is used on {stream.name}")

    def _indices(self):
        return Buffer(self.log, "indices")

    def _values(self):
        return Buffer(self.log, "values")


@pytest.fixture
def log(monkeypatch):
    log = []

    @contextlib.contextmanager
    def stream(side):
        log.append(f"{side.name} is current")
        try:
            yield
        finally:
            log.append(f"{side.name} is current no more")

    def make(device, priority):
        assert device == GPU
        return Stream(log, "side")

    def current_stream(device):
        assert device == GPU
        return Stream(log, "main")

    fake = types.SimpleNamespace(Stream=make, current_stream=current_stream, stream=stream)
    monkeypatch.setattr(torch, "cuda", fake)
    return log


def test_a_turn_comes_after_what_was_queued_when_it_was_made(log):
    lane = Lane(GPU)
    turn = lane.turn(Buffer(log))
    assert log == ["event on main", "buffer is used on side"]
    log.clear()
    with turn:
        log.append("work")
    assert log == [
        "side is current",
        "side waits for event of main",
        "work",
        "side is current no more",
    ]


def test_a_sparse_buffer_is_its_two_tensors(log):
    Lane(GPU).turn(Buffer(log, layout=torch.sparse_coo))
    assert log[1:] == ["indices is used on side", "values is used on side"]


def test_join_orders_the_current_stream_behind_the_lane(log):
    Lane(GPU).join()
    assert log == ["main waits for side"]


def test_an_error_leaves_the_stream(log):
    with pytest.raises(ZeroDivisionError), Lane(GPU).turn(Buffer(log)):
        raise ZeroDivisionError
    assert log[-1] == "side is current no more"


def test_on_the_cpu_there_is_nothing_to_order(log):
    lane = Lane(torch.device("cpu"))
    with lane.turn(torch.zeros(3)):
        pass
    lane.join()
    future = lane.future()
    future.set_result(torch.ones(2))
    assert future.wait().tolist() == [1, 1]
    assert log == []
