"""Starts the ranks with torchrun and sees them to their end."""

import ctypes
import os
import signal
import sys

from ringcomm.demo.configs import WORLD_SIZE

__all__ = ["die_with_launcher", "launch"]

_PR_SET_PDEATHSIG = 1


def launch(module: str, arguments: list[str]) -> int:
    """Run ``python -m module arguments`` once per rank, under torchrun on a free port.

    What the ranks print goes through. If one fails, the others are ended. Call it from the main
    thread: torchrun installs signal handlers.

    Returns:
        0, or 1 after a line on stderr that says which rank failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ["OMP_NUM_THREADS"] = "1"  # a core per rank
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve
    command = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={WORLD_SIZE}"]
    parsed = parse_args([*command, "--module", module, *arguments])  # type: ignore[no-untyped-call]
    try:
        run(parsed)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"demo: rank {rank} (pid {failure.pid}) failed with exit code {failure.exitcode}; "
            "what it printed is above",
            file=sys.stderr,
        )
        return 1
    except (SignalException, KeyboardInterrupt):
        print("demo: interrupted", file=sys.stderr)
        return 1
    return 0


def die_with_launcher() -> None:
    """For a rank: ask Linux to end it when the launcher is killed, which then cannot do so."""
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:
        sys.exit("the launcher is gone")
