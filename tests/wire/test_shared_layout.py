"""The bytes that ranks share: golden sizes and offsets, and no two things in one place."""

import mmap
import os
import re
import resource
import struct
import time
from itertools import pairwise
from pathlib import Path

import pytest

from ringcomm import _core
from ringcomm.errors import SystemResourceError, UsageError, WireError
from tests.faults import control_page
from tests.worlds import Worlds

ROOT = Path(__file__).resolve().parents[2]
CACHE_LINE = 64
PAGE = 4096


def test_golden_sizes_and_offsets() -> None:
    """Change these numbers only together with SHARED_LAYOUT_VERSION."""
    assert _core.SHARED_LAYOUT_VERSION == 5
    assert _core.shared_layout(2, 256 * 1024) == {
        "descriptor_bytes": 48,
        "descriptor_count": 16,
        "descriptor_tag": 24,
        "slot_header_bytes": 64,
        "slot_descriptor": 16,
        "fault": 64,
        "fault_bytes": 1024,
        "fault_text": 64,
        "ranks": 1088,
        "rank_bytes": 192,
        "rank_lifecycle": 64,
        "rank_pid": 68,
        "rank_entered_seq": 72,
        "rank_completed_seq": 76,
        "rank_handover_votes": 128,
        "control_bytes": 1472,
        "inline_bytes": 32768,
        "buffer_bytes": 262144,
        "slots": (0, 36864),
        "inputs": (73728, 335872),
        "results": (598016, 860160),
        "doorbell": 1122304,
        "mailbox_bytes": 128,
        "mailbox_taken": 64,
        "mailboxes": (1122368, 1122496),
        "message_header_bytes": 16,
        "message_slots": 8,
        "message_slots_of": (1122624, 1155904),
        "eager_bytes": 4096,
        "stream_buffers": 4,
        "chunk_bytes": 65536,
        "streams": (1191936, 1257472, 1323008, 1388544),
        "staging_bytes": 1454080,
    }


@pytest.mark.parametrize("buffer_bytes", [1, 4096, 4097, 65536, 256 * 1024, 3_000_000])
def test_parts_of_a_staging_slab_never_overlap(buffer_bytes: int) -> None:
    table = _core.shared_layout(4, buffer_bytes)
    header = table["slot_header_bytes"]
    parts = [(start, start + header + table["inline_bytes"]) for start in table["slots"]]
    parts += [(start, start + table["buffer_bytes"]) for start in table["inputs"]]
    parts += [(start, start + table["buffer_bytes"]) for start in table["results"]]
    assert table["buffer_bytes"] >= buffer_bytes
    for (_, end), (start, _) in pairwise(sorted(parts)):
        assert end <= start
    assert parts[-1][1] <= table["doorbell"] < _core.staging_bytes(buffer_bytes, 4)
    assert all(start % PAGE == 0 for start, _ in parts)
    # A ring uses the two input buffers, and the two result buffers, as one.
    for first, second in (table["inputs"], table["results"]):
        assert second == first + table["buffer_bytes"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 9, 33, 128])
@pytest.mark.parametrize("buffer_bytes", [4096, 65536, 512 * 1024, 8 << 20])
def test_parts_for_messages_never_overlap_and_stay_small(
    buffer_bytes: int, world_size: int
) -> None:
    table = _core.shared_layout(world_size, buffer_bytes)
    slot_bytes = table["message_header_bytes"] + table["eager_bytes"]
    parts = [(table["doorbell"], table["doorbell"] + CACHE_LINE)]
    parts += [(start, start + table["mailbox_bytes"]) for start in table["mailboxes"]]
    parts += [
        (start, start + table["message_slots"] * slot_bytes) for start in table["message_slots_of"]
    ]
    parts += [(start, start + table["chunk_bytes"]) for start in table["streams"]]
    assert table["doorbell"] >= table["results"][1] + table["buffer_bytes"]
    for (_, end), (start, _) in pairwise(parts):
        assert end <= start
    assert parts[-1][1] == table["staging_bytes"] == _core.staging_bytes(buffer_bytes, world_size)
    assert len(table["mailboxes"]) == len(table["message_slots_of"]) == world_size
    # What peers poll has cache lines of its own, by writer.
    assert all(part[0] % CACHE_LINE == 0 for part in parts)
    assert table["mailbox_taken"] == CACHE_LINE
    assert all(start % PAGE == 0 for start in table["streams"])
    for number in (table["message_slots"], table["stream_buffers"]):
        assert number & (number - 1) == 0, "counters wrap around at a power of two"
    assert 256 <= table["eager_bytes"] <= 4096
    assert table["streams"][0] - table["doorbell"] <= 512 * 1024
    assert table["chunk_bytes"] * table["stream_buffers"] <= min(
        512 * 1024, 4 * table["buffer_bytes"]
    )


def test_a_formatted_slab_counts_messages_from_first_seq() -> None:
    table = _core.shared_layout(3, 4096)
    fd = _core.create_segment("golden", table["staging_bytes"])
    _core.format_staging(fd, 4096, 3, 0xFFFFFFF0)
    with mmap.mmap(fd, table["staging_bytes"]) as slab:
        for mailbox in table["mailboxes"]:
            words = struct.unpack_from("<32I", slab, mailbox)
            counters = {0, 1, 16, 17, 18}  # posted, streamed; taken, granted, drained
            assert words == tuple(0xFFFFFFF0 if i in counters else 0 for i in range(32))
        first = table["message_slots_of"][0]
        assert slab[first:] == bytes(table["staging_bytes"] - first)
        assert slab[table["doorbell"] : table["mailboxes"][0]] == bytes(CACHE_LINE)
    os.close(fd)


@pytest.mark.parametrize("world_size", [1, 2, 3, 128])
def test_every_rank_has_cache_lines_of_its_own_in_the_control_page(world_size: int) -> None:
    table = _core.shared_layout(world_size, 4096)
    assert table["fault"] + table["fault_bytes"] <= table["ranks"]
    assert table["ranks"] % CACHE_LINE == 0
    assert table["rank_bytes"] % CACHE_LINE == 0
    # What others spin on is not in the line of what is written for diagnosis.
    assert table["rank_lifecycle"] >= CACHE_LINE
    assert table["control_bytes"] == table["ranks"] + world_size * table["rank_bytes"]
    assert table["control_bytes"] == _core.control_bytes(world_size)


def test_the_fault_tests_use_the_same_offsets() -> None:
    table = _core.shared_layout(2, 4096)
    assert table["fault"] == control_page.FAULT_STATE
    assert table["ranks"] == control_page.RANKS
    assert table["rank_bytes"] == control_page.RANK_BYTES
    assert table["rank_entered_seq"] == control_page.ENTERED_SEQ


def test_a_formatted_control_page_byte_for_byte() -> None:
    fd = _core.create_segment("golden", _core.control_bytes(3))
    _core.format_control(fd, 3, 0xFFFFFFF0)
    with mmap.mmap(fd, _core.control_bytes(3)) as page:
        assert page[:16] == b"RCCOMM01" + struct.pack("<II", 5, 3)
        assert page[16:1088] == bytes(1072)
        for rank in range(3):
            line = page[1088 + 192 * rank : 1088 + 192 * (rank + 1)]
            assert struct.unpack_from("<II", line) == (0xFFFFFFF0, 0)
            assert struct.unpack_from("<IiII", line, 64) == (0, 0, 0xFFFFFFF0, 0xFFFFFFF0)
    os.close(fd)


def communicator(control_fd: int, staging_fd: int, world_size: int = 1) -> object:
    return _core.Communicator(
        rank=0,
        world_size=world_size,
        name="wire",
        timeout_s=1,
        buffer_bytes=4096,
        num_cores=2,
        control_fd=control_fd,
        staging_fds=[staging_fd] * world_size,
        pidfds=[-1] * world_size,
        pids=[os.getpid()] * world_size,
    )


def test_a_control_page_of_another_version_or_group_is_refused() -> None:
    staging = _core.create_segment("staging", _core.staging_bytes(4096, 2))
    control = _core.create_segment("control", _core.control_bytes(2))
    with pytest.raises(WireError, match="layout version 0 for 0 ranks, expected version 5"):
        communicator(control, staging)
    _core.format_control(control, 2)
    with pytest.raises(WireError, match="for 2 ranks, expected version 5 for 1"):
        communicator(control, staging)
    os.pwrite(control, struct.pack("<I", 99), 8)
    with pytest.raises(WireError, match="layout version 99"):
        communicator(control, staging, 2)
    os.close(control)
    os.close(staging)


def test_segments_that_are_too_short_are_refused_before_they_are_touched() -> None:
    control = _core.create_segment("control", _core.control_bytes(1))
    _core.format_control(control, 1)
    staging = _core.create_segment("staging", _core.staging_bytes(4096, 1) - 4096)
    with pytest.raises(WireError, match="RINGCOMM_STAGING_KIB"):
        communicator(control, staging)
    with pytest.raises(WireError, match="expected at least"):
        communicator(os.memfd_create("empty"), staging)
    os.close(control)
    os.close(staging)


def test_segments_are_private_sealed_and_nameless() -> None:
    fd = _core.create_segment("sealed", 8192)
    try:
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert not os.get_inheritable(fd)
        assert os.fstat(fd).st_blocks * 512 >= 8192  # allocated now: no SIGBUS later
        for size in (0, 4096, 16384):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    finally:
        os.close(fd)


def allocate_beyond_a_limit(limit: int) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(OSError, match="RINGCOMM_STAGING_KIB") as caught:
        _core.create_segment("large", 2 * limit)
    return str(caught.value)


def test_memory_that_cannot_be_had_is_an_error_with_the_amount(worlds: Worlds) -> None:
    with pytest.raises(SystemResourceError, match=f"could not allocate {1 << 60} bytes of shared"):
        _core.create_segment("huge", 1 << 60)
    process = worlds.take()
    process.start(allocate_beyond_a_limit, 1 << 20)
    outcome = process.outcome(time.monotonic() + 20)
    worlds.give_back(process, False)
    assert f"could not allocate {2 << 20} bytes of shared memory (File too large)" in outcome.value


def test_ids_of_operations_and_algorithms_never_change() -> None:
    assert _core.OPS == {
        "barrier": 0,
        "all_reduce": 1,
        "broadcast": 2,
        "all_gather": 3,
        "reduce_scatter": 4,
        "reduce": 5,
        "gather": 6,
        "scatter": 7,
        "all_to_all": 8,
        "monitored_barrier": 9,
    }
    assert _core.ALGOS == {"one_shot": 0, "two_shot": 1, "ring": 2, "staged": 3, "direct": 4}


def test_nothing_outside_the_wire_room_computes_an_offset_of_shared_memory() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.parent.name in ("wire", "bind") or path.suffix not in (".h", ".cpp"):
            continue
        assert not re.search(
            r"offsetof|sizeof\((SlotHeader|RankLine|FaultRecord|Mailbox|Doorbell)\) [*+]",
            path.read_text(),
        ), path


def test_ids_that_do_not_exist_are_a_usage_error() -> None:
    for op in (-1, len(_core.OPS), 99):
        with pytest.raises(UsageError, match="operation id must be in 0..9, not"):
            _core.choose_algo(op, 100, 2, False, False, 100)
