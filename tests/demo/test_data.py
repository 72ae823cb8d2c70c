from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from ringcomm.demo import data  # noqa: E402


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    pytest.importorskip("sklearn")
    return data.load_digits()


def test_digits_are_split_the_same_way_every_time(digits: data.Digits) -> None:
    again = data.load_digits()
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    assert digits.train_images.shape[1:] == (1, 8, 8)
    assert digits.train_images.min() == -1
    assert digits.train_images.max() == 1
    assert torch.equal(digits.test_images, again.test_images)


def test_ranks_get_disjoint_halves_of_the_batch_that_one_rank_would_get(
    digits: data.Digits,
) -> None:
    whole = data.digit_batches(digits, seed=3, batch_per_rank=64, rank=0, world_size=1)
    halves = [data.digit_batches(digits, 3, 32, rank, 2) for rank in range(2)]
    for _ in range(40):  # more than an epoch
        images, labels = next(whole)
        parts = [next(half) for half in halves]
        assert torch.equal(images, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))


def test_text_is_the_same_every_time_and_holds_out_other_files() -> None:
    text, again = data.load_text(), data.load_text()
    assert text.digest == again.digest
    assert len(text.train) > 10 * len(text.held_out) / 2 > 100_000
    assert text.train.max() < data.VOCABULARY
    assert b"import" in text.train.numpy().tobytes()


def test_targets_are_the_inputs_one_character_further() -> None:
    text = data.load_text()
    inputs, targets = next(data.text_batches(text, 0, 4, 32, rank=1, world_size=2))
    assert inputs.shape == targets.shape == (4, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    other, _ = next(data.text_batches(text, 0, 4, 32, rank=0, world_size=2))
    assert not torch.equal(inputs, other)


def test_the_last_window_can_be_drawn() -> None:
    characters = torch.arange(100, dtype=torch.uint8)
    _, targets = data.windows(characters, torch.tensor([100 - 64 - 1]), 64)
    assert targets[0, -1] == 99


def test_a_standard_library_without_sources_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(
        data.DataError, match=r"holds only 0 characters .* comes with its \.py files"
    ):
        data.load_text(tmp_path)
