"""A short run of every kind of kernel, for compute-sanitizer: ``python -m tests.gpu.short_run``.

Results are compared, so that what it watches is known to have run. RINGCOMM_CUDA_MODE=stepped is needed where kernels
of several ranks may not run at the same time.
"""

from __future__ import annotations

import os
import sys

from tests.comm import test_coalesced, test_codec, test_exact, test_exchange
from tests.gpu import places
from tests.gpu.conftest import why_no_cuda
from tests.gpu.test_kernels import check_codec, check_packing, check_reductions, check_residual
from tests.worlds import threads_with_communicators

RANKS = 2
SIZES = (33, 1003)
BODIES = (
    (test_exact.check_reduce_of_views, ()),
    (test_exchange.check_uneven, (0,)),
    (test_coalesced.check_ops, ("float32",)),
    (test_codec.check_non_finite, ()),
    (test_codec.check_codec, ("int8", True, "float32")),
)


def main() -> int:
    if not places.is_emulated() and (reason := why_no_cuda()):
        print(reason, file=sys.stderr)
        return 1
    with places.own_stream():
        for spec in ("bf16", "fp16", "int8", "int4"):
            for dtype in ("float32", "bfloat16"):
                check_codec(spec, dtype, SIZES)
                check_residual(spec, dtype, SIZES)
        check_packing()
        check_reductions([("float32", "sum"), ("bfloat16", "avg"), ("int64", "max")], SIZES)
        places.synchronize()
    print("kernels: done", flush=True)
    mode = os.environ.get("RINGCOMM_CUDA_MODE")
    for body, args in BODIES:
        threads_with_communicators(RANKS, places.mirrored, (mode, body, *args), timeout=50.0)
        print(f"{body.__name__}: done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
