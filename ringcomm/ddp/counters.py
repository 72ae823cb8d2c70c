"""What a hook state counts."""

from dataclasses import dataclass

__all__ = ["Counters", "bits_per_value"]


@dataclass
class Counters:
    steps: int = 0
    compressed_steps: int = 0
    bytes_sent: int = 0
    exact_bytes_sent: int = 0
    warmup_bytes_sent: int = 0
    values: int = 0
    warmup_values: int = 0
    comm_seconds: float = 0.0
    wait_seconds: float = 0.0
    codec_seconds: float = 0.0
    codec_seconds_before: float = 0.0

    def add_exact(self, num_bytes: int, num_values: int, warmup: bool) -> None:
        self.bytes_sent += num_bytes
        self.exact_bytes_sent += num_bytes
        self.values += num_values
        if warmup:
            self.warmup_bytes_sent += num_bytes
            self.warmup_values += num_values

    def add_encoded(self, num_bytes: int, num_values: int) -> None:
        self.bytes_sent += num_bytes
        self.values += num_values


def bits_per_value(num_bytes: int, num_values: int, world_size: int) -> float:
    moved = 2 * (world_size - 1) / world_size * num_values
    return 8 * num_bytes / moved if moved else 0.0
