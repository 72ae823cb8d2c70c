"""One rank of a real process group: runs cases by name and writes down how each ended.

    python run_rank.py RANK WORLD_SIZE RENDEZVOUS_FILE RESULT_FILE CASE [CASE ...]

Every case runs on all ranks. A case that fails on any rank fails; later cases still run, unless
the ranks can no longer meet.
"""

import json
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import cases
import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=25)


def main() -> None:
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[3], world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    with Path(sys.argv[4]).open("w") as results:
        for name in sys.argv[5:]:
            started = time.perf_counter()
            torch.manual_seed(0)
            error = ""
            try:
                getattr(cases, name)(rank, world_size)
            except Exception:
                error = f"rank {rank}: {traceback.format_exc()}"
            seconds = time.perf_counter() - started
            results.write(json.dumps({"case": name, "error": error, "seconds": seconds}) + "\n")
            results.flush()
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
