"""The data: scikit-learn's handwritten digits, and the standard library's source text.

Both are found on the machine; nothing is downloaded. Every rank loads the same data and draws the
same batches, of which it takes its own part.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = [
    "VOCABULARY",
    "DataError",
    "Digits",
    "Text",
    "digit_batches",
    "load_digits",
    "load_text",
    "text_batches",
    "windows",
]

VOCABULARY = 128
"""Characters are ASCII codes; others are read as a question mark."""

# Large enough together, part of every Python, and written as plain modules.
_PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
_MAX_CHARACTERS = 3_000_000
_MIN_CHARACTERS = 200_000
_HELD_OUT = 10  # every tenth file


class DataError(RuntimeError):
    """The data cannot be had on this machine. The message says why."""


@dataclass(frozen=True)
class Digits:
    """Images are float32 (n, 1, 8, 8) in [-1, 1], labels int64 (n,)."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


@dataclass(frozen=True)
class Text:
    """Characters as uint8 (n,), below :data:`VOCABULARY`."""

    train: torch.Tensor
    held_out: torch.Tensor
    num_files: int
    digest: str
    """SHA-256 of all characters: runs are comparable where it is the same."""


def load_digits() -> Digits:
    """The 1797 digits, two thirds to train on, one third to test; the same split every time."""
    from sklearn.datasets import load_digits as load_bunch
    from sklearn.model_selection import train_test_split

    images, labels = load_bunch(return_X_y=True)
    parts = train_test_split(images, labels, test_size=1 / 3, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = (torch.as_tensor(part) for part in parts)
    return Digits(
        train_images.float().view(-1, 1, 8, 8) / 8 - 1,
        train_labels.long(),
        test_images.float().view(-1, 1, 8, 8) / 8 - 1,
        test_labels.long(),
    )


def load_text(root: Path | None = None) -> Text:
    """Source files of the standard library in the order of their names.

    Args:
        root: Of the standard library; None asks Python.

    Raises:
        DataError: hardly any source files are there.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    train, held_out = bytearray(), bytearray()
    num_files = 0
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace")
            characters = text.encode("ascii", errors="replace")
            (held_out if num_files % _HELD_OUT == _HELD_OUT - 1 else train).extend(characters)
            num_files += 1
            if len(train) + len(held_out) >= _MAX_CHARACTERS:
                break
        if len(train) + len(held_out) >= _MAX_CHARACTERS:
            break
    if len(train) + len(held_out) < _MIN_CHARACTERS or not held_out:
        raise DataError(
            f"the demo reads the standard library's source files, but {root} holds only "
            f"{len(train) + len(held_out)} characters of them ({', '.join(_PACKAGES[:3])}, ...); "
            "use a Python that comes with its .py files"
        )
    return Text(
        torch.frombuffer(train, dtype=torch.uint8),
        torch.frombuffer(held_out, dtype=torch.uint8),
        num_files,
        hashlib.sha256(train + held_out).hexdigest(),
    )


def digit_batches(
    digits: Digits, seed: int, batch_per_rank: int, rank: int, world_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless shuffled batches of (images, labels); ranks get disjoint parts of each batch."""
    generator = torch.Generator().manual_seed(seed)
    batch = batch_per_rank * world_size
    while True:
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for begin in range(0, len(order) - batch + 1, batch):
            first = begin + rank * batch_per_rank
            chosen = order[first : first + batch_per_rank]
            yield digits.train_images[chosen], digits.train_labels[chosen]


def text_batches(
    text: Text, seed: int, batch_per_rank: int, length: int, rank: int, world_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of (characters, next characters), int64 (batch_per_rank, length)."""
    generator = torch.Generator().manual_seed(seed)
    high = len(text.train) - length
    while True:
        starts = torch.randint(high, (world_size, batch_per_rank), generator=generator)
        yield windows(text.train, starts[rank], length)


def windows(
    characters: torch.Tensor, starts: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``length`` characters from each start on, and those one place further."""
    chosen = characters[starts[:, None] + torch.arange(length + 1)].long()
    return chosen[:, :-1], chosen[:, 1:]
