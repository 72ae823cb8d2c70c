"""Tests that Gloo passes and that run another way, or not at all, on ringcomm. Each has its reason."""

_NAME = "asks dist.get_backend() for gloo, mpi or nccl to choose what it tests"
_MONITORED = "dist.monitored_barrier refuses every backend that is not called gloo"

# Run with ringcomm under the name of gloo.
DISGUISED = {
    "test_accumulate_gradients_no_sync": _NAME,
    "test_accumulate_gradients_no_sync_allreduce_hook": _NAME,
    "test_accumulate_gradients_no_sync_allreduce_with_then_hook": _NAME,
    "test_accumulate_gradients_no_sync_grad_is_view": _NAME,
    "test_monitored_barrier_gloo": _MONITORED,
    "test_monitored_barrier_gloo_subgroup": _MONITORED,
}

# Not expected to pass: test -> (smallest world size, reason).
EXCEPTIONS = {
    "test_ddp_logging_data_cpu": (
        2,
        "torch's DDP logger calls every plug-in backend 'custom', and casts whatever is called gloo to "
        "ProcessGroupGloo to log the number of Gloo's threads",
    ),
    "test_monitored_barrier_gloo": (
        3,
        "expects Gloo's sentence about messages from rank 0 on ranks that came; ours says on every rank who "
        "did not come",
    ),
}
