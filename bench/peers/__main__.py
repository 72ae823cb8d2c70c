"""Says which peers can take part, and gets what can be had: ``python -m bench.peers [--prepare]``.

With ``--prepare`` installs mpi4py where mpirun is installed and compiles DeepSpeed's operator (minutes,
once per version of torch). What fails is said; the benchmarks run without it.
"""

import argparse

from bench.contender import Unsupported
from bench.peers import MODULES, load


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--prepare", action="store_true", help="install and build what can be")
    args = parser.parse_args()
    for name in MODULES:
        peer = load(name)
        try:
            if args.prepare and hasattr(peer, "prepare"):
                said = peer.prepare()
            else:
                said = peer.available() or "available"
        except Unsupported as reason:
            said = f"not available: {reason}"
        print(f"{name}: {said}", flush=True)


if __name__ == "__main__":
    main()
