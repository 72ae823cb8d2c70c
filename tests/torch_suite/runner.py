"""Runs torch's own DistributedTest on one backend: every test in freshly forked ranks.

    python -m tests.torch_suite.runner BACKEND WORLD_SIZE RESULT_FILE [TEST ...]

torch's test module reads BACKEND when it is imported, hence one process per backend. Ranks are forked
from it, because importing torch for every rank of every test would take most of the time.

BACKEND is ``gloo``, ``ringcomm``, or ``disguised``: ringcomm under the name of gloo, for tests that
ask for a name that they know.
"""

import contextlib
import faulthandler
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SECONDS_PER_TEST = 90.0


@dataclass
class Result:
    test: str
    outcome: str  # "pass", "skip" or "fail"
    reason: str
    seconds: float


def set_up(backend: str, world_size: int) -> None:
    """Before torch's test module is imported."""
    os.environ.update(
        BACKEND="gloo" if backend == "disguised" else backend,
        WORLD_SIZE=str(world_size),
        INIT_METHOD="env://",
        MASTER_ADDR="127.0.0.1",
        OMP_NUM_THREADS="1",
    )
    logging.basicConfig(level=logging.ERROR)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "gloo":
        return
    import ringcomm.backend

    ringcomm.backend.register()
    from torch.testing._internal.common_distributed import DistTestCases

    for feature in ("ddp", "subgroup"):
        DistTestCases.backend_feature[feature].add("ringcomm")
    if backend == "disguised":
        disguise(dist.distributed_c10d)


def disguise(c10d: Any) -> None:
    """From now on ``"gloo"`` makes groups of ringcomm."""
    from torch._C._distributed_c10d import _DistributedBackendOptions

    import ringcomm.adapter
    import ringcomm.backend

    made = ringcomm.adapter.load().Backend

    class Disguised(type):
        def __call__(cls, store: Any, rank: int, size: int, timeout: Any) -> Any:
            options = _DistributedBackendOptions()
            options.store, options.group_rank, options.group_size = store, rank, size
            options.timeout, options.group_id = timeout, "disguised"
            return ringcomm.backend._create(options, None)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, made)

    c10d.ProcessGroupGloo = Disguised("ProcessGroupGloo", (), {})


class Suite:
    """torch's test class and how one of its tests runs."""

    def __init__(self, backend: str, world_size: int) -> None:
        from torch.testing._internal.common_distributed import TEST_SKIPS
        from torch.testing._internal.distributed import distributed_test as theirs

        # Reported to people, not logged by ranks.
        self.theirs = theirs
        # Profiles name the backend, so they are looked at under its own name only.
        for table in (
            theirs.PROFILING_SUPPORTED_BACKENDS,
            theirs.SEND_RECV_PROFILING_SUPPORTED_BACKENDS,
        ):
            if backend == "ringcomm":
                table.append("ringcomm")
            elif backend == "disguised":
                table.clear()
        self.world_size = world_size
        self.skips = {skip.exit_code: skip.message for skip in TEST_SKIPS.values()}

        class DistributedSuite(
            theirs.TestDistBackend,  # type: ignore[misc]
            theirs.DistributedTest._DistTestBase,  # type: ignore[misc]
        ):
            pass

        self.cls = DistributedSuite

    def names(self) -> list[str]:
        return sorted(name for name in dir(self.cls) if name.startswith("test_"))

    def run(self, name: str) -> Result:
        from torch.testing._internal import common_distributed

        start = time.monotonic()
        common_distributed.initialize_temp_directories()
        self.theirs.Barrier.init()
        with tempfile.TemporaryDirectory() as folder:
            pids = [self.fork(name, rank, Path(folder)) for rank in range(self.world_size)]
            codes = wait_for(pids, time.monotonic() + SECONDS_PER_TEST)
            logs = [Path(folder, f"{rank}.log").read_text() for rank in range(self.world_size)]
        common_distributed.cleanup_temp_dir()
        outcome, reason = self.judge(codes, logs)
        return Result(name, outcome, reason, round(time.monotonic() - start, 2))

    def fork(self, name: str, rank: int, folder: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.register(signal.SIGUSR1, file=sys.stderr)
            import torch

            _, pipe = torch.multiprocessing.Pipe()
            self.cls._run(rank, name, str(folder / "init"), pipe)
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def judge(self, codes: list[int | None], logs: list[str]) -> tuple[str, str]:
        if set(codes) == {0}:
            return "pass", ""
        if len(set(codes)) == 1 and codes[0] in self.skips:
            return "skip", self.skips[codes[0]]
        # A rank that is not in the test's group may pass while the others skip.
        if set(codes) <= {0, *self.skips}:
            return "skip", self.skips[next(code for code in codes if code)]  # type: ignore[index]
        text = "\n".join(
            f"rank {rank}: {'hang' if code is None else f'exit {code}'}\n{tidy(log)}"
            for rank, (code, log) in enumerate(zip(codes, logs, strict=True))
            if code not in self.skips and code != 0
        )
        return "fail", text


def tidy(log: str) -> str:
    """The end of a rank's output without torch's log prefixes and advice."""
    lines = [re.sub(r"^\[?[^ ]*E\d{4} .*?\] ?", "", line) for line in log.splitlines()]
    kept = [line for line in lines if line.strip() and "PYTORCH_PRINT_REPRO" not in line]
    return "\n".join(kept[-40:])


def wait_for(pids: list[int], deadline: float) -> list[int | None]:
    """Exit codes; None for one that was killed because it hung."""
    codes: dict[int, int | None] = {}
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGUSR1)  # its Python stacks, into its log
            time.sleep(0.5)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            codes[pid] = None
    return [codes[pid] for pid in pids]


def main() -> None:
    backend, world_size, result_file, *tests = sys.argv[1:]
    set_up(backend, int(world_size))
    suite = Suite(backend, int(world_size))
    with Path(result_file).open("w") as results:
        for name in tests or suite.names():
            results.write(json.dumps(asdict(suite.run(name))) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
