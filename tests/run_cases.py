"""One rank of a real torch process group: runs cases by name and writes down how each ended.

    python -m tests.run_cases BACKEND CASES_FILE RANK WORLD_SIZE RENDEZVOUS_FILE RESULT_FILE CASE [CASE ...]

Every case, a function ``case(rank, world_size)`` of the file, runs on all ranks. A case that fails on
any rank fails; later cases still run, unless the ranks can no longer meet.
"""

import importlib
import json
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import ringcomm.backend

TIMEOUT = timedelta(seconds=25)


def main() -> None:
    backend, file, rank, world_size = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5])
    sys.path.insert(0, str(file.parent))
    cases = importlib.import_module(file.stem)
    torch.set_num_threads(1)
    if backend == "ringcomm":
        ringcomm.backend.register()  # torch's autoload, which has a test of its own, may be off
    store = dist.FileStore(sys.argv[5], world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    with Path(sys.argv[6]).open("w") as results:
        for name in sys.argv[7:]:
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
