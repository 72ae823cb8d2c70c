"""What the backend promises: one function per promise, run on every rank of a "ringcomm" group.

Where Gloo does the same, a Gloo group of the same ranks is the oracle.
"""

import functools
import json
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh

SHORT = timedelta(seconds=1)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@functools.cache
def gloo():
    return dist.new_group(backend="gloo")


def numbers(rank, shape, dtype=torch.float32, seed=0):
    """Values that differ between ranks; whole, so that sums are exact in every order."""
    generator = torch.Generator().manual_seed(100 * rank + seed)
    return torch.randint(0, 8, shape, generator=generator).to(dtype)


def layouts(x):
    """Copies in the memory layouts that tensors come in."""
    padded = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    padded[..., ::2] = x
    return [x.clone(), padded[..., ::2], x.transpose(0, -1).contiguous().transpose(0, -1)]


def raises(kind, call, *words):
    try:
        call()
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in {error}"
        return error
    raise AssertionError(f"nothing was raised; expected {words}")


# ---- collectives ---------------------------------------------------------------------------------


def all_reduce_equals_gloo(rank, world):
    ops = (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT)
    for dtype in (*FLOATS, torch.int8, torch.int32, torch.int64, torch.uint8):
        for op in ops:
            expected = numbers(rank, (5, 7), dtype)
            dist.all_reduce(expected, op, gloo())
            for mine in layouts(numbers(rank, (5, 7), dtype)):
                dist.all_reduce(mine, op)
                torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def operators_that_gloo_lacks(rank, world):
    x = torch.full((3,), float(rank))
    dist.all_reduce(x, dist.ReduceOp.AVG)
    assert (x == (world - 1) / 2).all()
    x = torch.ones(3)
    dist.all_reduce(x, dist._make_nccl_premul_sum(float(rank)))
    assert (x == world * (world - 1) / 2).all()
    x, out = torch.ones(world), torch.empty(1)
    dist.reduce_scatter_tensor(out, x, dist._make_nccl_premul_sum(torch.tensor([2.0])))
    assert out == 2 * world
    for op, combine in (
        (dist.ReduceOp.BAND, torch.bitwise_and),
        (dist.ReduceOp.BOR, torch.bitwise_or),
        (dist.ReduceOp.BXOR, torch.bitwise_xor),
    ):
        for dtype in (torch.uint8, torch.int16, torch.int64, torch.bool):
            x = numbers(rank, (40,)).to(dtype)
            dist.all_reduce(x, op)
            expected = functools.reduce(
                combine, (numbers(r, (40,)).to(dtype) for r in range(world))
            )
            assert torch.equal(x, expected)
        raises(ValueError, functools.partial(dist.all_reduce, torch.ones(2), op), "float32")


def every_type_moves_and_most_are_reduced(rank, world):
    integers = (torch.int16, torch.uint16, torch.uint32, torch.uint64)
    for dtype in (*integers, torch.complex64, torch.complex128):
        x = numbers(rank, (6,)).to(dtype)
        dist.all_reduce(x)
        assert torch.equal(x, sum(numbers(r, (6,)) for r in range(world)).to(dtype))
    x = numbers(rank, (9,)) > 4
    dist.all_reduce(x, dist.ReduceOp.MAX)
    assert torch.equal(x, sum(numbers(r, (9,)) > 4 for r in range(world)) > 0)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.complex64):
        x = numbers(rank, (4, 5)).to(dtype)
        parts = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(parts, x)
        assert all(
            torch.equal(p.float(), numbers(r, (4, 5)).to(dtype).float())
            for r, p in enumerate(parts)
        )
        if world > 1 and rank < 2:
            (dist.send if rank == 0 else dist.recv)(x, 1 - rank)
            assert torch.equal(x.float(), numbers(0, (4, 5)).to(dtype).float())
    x = torch.ones(3, dtype=torch.complex64).mul(1j).conj()
    dist.group.WORLD.broadcast(x, 0).wait()  # dist.broadcast refuses lazily conjugated tensors
    assert (x == -1j).all()
    raises(ValueError, lambda: dist.all_reduce(torch.ones(2).to(torch.float8_e5m2)), "float8")


def sizes_from_nothing_to_large(rank, world):
    for shape in ((), (0,), (1,), (3, 0, 2), (1000003,)):
        x = torch.ones(shape)
        dist.all_reduce(x)
        assert (x == world).all()
        parts = [torch.zeros(shape) for _ in range(world)]
        dist.all_gather(parts, torch.full(shape, float(rank)))
        assert all((part == r).all() for r, part in enumerate(parts))


def one_to_all_and_all_to_one_equal_gloo(rank, world):
    for root in range(world):
        for mine in layouts(numbers(rank, (4, 6))):
            dist.broadcast(mine, root)
            assert torch.equal(mine, numbers(root, (4, 6)))
        mine, theirs = numbers(rank, (9,)), numbers(rank, (9,))
        dist.reduce(mine, root)
        dist.reduce(theirs, root, group=gloo())
        if rank == root:
            assert torch.equal(mine, theirs)
        else:
            assert torch.equal(mine, numbers(rank, (9,)))  # untouched
        into = [torch.empty(2, 3).t() for _ in range(world)] if rank == root else None
        dist.gather(numbers(rank, (3, 2)), into, root)
        if into is not None:
            assert all(torch.equal(into[r], numbers(r, (3, 2))) for r in range(world))
        out = torch.empty(3, 2)
        parts = [numbers(r, (3, 2), seed=root) for r in range(world)] if rank == root else None
        dist.scatter(out, parts, root)
        assert torch.equal(out, numbers(rank, (3, 2), seed=root))


def gathers_and_scatters_of_lists_and_tensors(rank, world):
    flat = torch.empty(world, 4, 3)
    dist.all_gather_into_tensor(flat, numbers(rank, (4, 3)))
    assert all(torch.equal(flat[r], numbers(r, (4, 3))) for r in range(world))
    # What belongs to rank r has r + 1 rows: no other backend for the CPU takes that.
    parts = [torch.empty(r + 1, 2) for r in range(world)]
    dist.all_gather(parts, numbers(rank, (rank + 1, 2)))
    assert all(torch.equal(part, numbers(r, (r + 1, 2))) for r, part in enumerate(parts))

    def total(shape, seed):
        return sum(numbers(r, shape, seed=seed) for r in range(world))

    out = torch.empty(4)
    dist.reduce_scatter(out, [numbers(rank, (4,), seed=r) for r in range(world)])
    assert torch.equal(out, total((4,), rank))
    out = torch.empty(rank + 1)
    dist.reduce_scatter(out, [numbers(rank, (r + 1,), seed=r) for r in range(world)])
    assert torch.equal(out, total((rank + 1,), rank))
    out = torch.empty(5)
    dist.reduce_scatter_tensor(out, numbers(rank, (world * 5,)))
    assert torch.equal(out, total((world * 5,), 0).view(world, 5)[rank])


def all_to_all_even_uneven_and_lists(rank, world):
    out = torch.empty(world * 2, 3)
    x = torch.stack([torch.full((2, 3), float(10 * rank + r)) for r in range(world)]).view(-1, 3)
    dist.all_to_all_single(out, x)
    assert out[::2, 0].tolist() == [10 * r + rank for r in range(world)]
    sent, received = [rank + r for r in range(world)], [rank + r for r in range(world)]
    x = torch.cat([torch.full((n,), float(10 * rank + r)) for r, n in enumerate(sent)])
    out = torch.empty(sum(received))
    dist.all_to_all_single(out, x, received, sent)
    expected = torch.cat([torch.full((n,), float(10 * r + rank)) for r, n in enumerate(received)])
    assert torch.equal(out, expected)
    outs = [torch.empty(rank + r) for r in range(world)]
    dist.all_to_all(outs, [torch.full((rank + r,), float(10 * rank + r)) for r in range(world)])
    assert all((part == 10 * r + rank).all() for r, part in enumerate(outs))


def sparse_sums(rank, world):
    def mine():
        indices = torch.tensor([[0, rank + 1, rank + 1]])
        return torch.sparse_coo_tensor(indices, torch.ones(3, 2) * (rank + 1), (world + 2, 2))

    ours, theirs = mine(), mine()
    dist.all_reduce(ours)
    dist.all_reduce(theirs, group=gloo())
    assert ours.is_coalesced()
    assert torch.equal(ours.to_dense(), theirs.to_dense())


def objects_of_any_size(rank, world):
    gathered = [None] * world
    dist.all_gather_object(gathered, {"rank": rank, "blob": "x" * 100 * rank})
    assert [entry["rank"] for entry in gathered] == list(range(world))
    box = [{"from": 0}] if rank == 0 else [None]
    dist.broadcast_object_list(box, 0)
    assert box == [{"from": 0}]
    out = [None]
    dist.scatter_object_list(out, [f"for {r}" for r in range(world)] if rank == 0 else None, 0)
    assert out == [f"for {rank}"]
    lists = [None] * world if rank == 0 else None
    dist.gather_object((rank,), lists, 0)
    assert lists is None or lists == [(r,) for r in range(world)]


def coalesced_calls(rank, world):
    tensors = [numbers(rank, (n,)) for n in (1, 5, 40000)]
    with dist._coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor)
    for tensor, n in zip(tensors, (1, 5, 40000), strict=True):
        assert torch.equal(tensor, sum(numbers(r, (n,)) for r in range(world)))
    outs = [torch.empty(world * 3) for _ in range(2)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for i, out in enumerate(outs):
            dist.all_gather_into_tensor(out, torch.full((3,), float(rank + i)))
    manager.wait()
    assert all(out[3 * r] == r + i for i, out in enumerate(outs) for r in range(world))
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        x = torch.ones(4)
        dist.broadcast(x, 0, async_op=True)
        dist.all_gather([torch.empty(4) for _ in range(world)], x, async_op=True)
    manager.wait()


def lists_of_tensors_are_reduced_as_one(rank, world):
    shapes = [(1,), (5,), (0,), (7, 3), (256,), (), (9000,)] * 2
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX):
            refused = op == dist.ReduceOp.AVG and dtype == torch.bool
            refused |= op == dist.ReduceOp.MAX and dtype == torch.complex64
            if refused:
                continue
            listed = [numbers(rank, shape, dtype) for shape in shapes]
            listed.append(numbers(rank, (6, 4), dtype).t())  # a copy travels
            single = [tensor.clone() for tensor in listed]
            for async_op in (False, True):
                work = dist.all_reduce_coalesced(listed, op, async_op=async_op)
                if async_op:
                    assert work.wait()
                for tensor in single:
                    dist.all_reduce(tensor, op)
                for one, other in zip(listed, single, strict=True):
                    assert torch.equal(one, other), (dtype, op, one.shape)
    x = torch.ones(4)
    try:
        dist.all_reduce_coalesced([x, x[2:]])
    except ValueError as error:
        assert "arrays 0 and 1 of the list share memory" in str(error), error
    else:
        raise AssertionError("nothing was raised")


def lists_of_tensors_are_gathered_and_scattered_as_one(rank, world):
    """Dtypes in turn; small, empty, large, odd, not contiguous, and in place."""
    group, counts = dist.group.WORLD, (1, 5, 0, 256, 3, 30_000, 77) * 3
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.uint8)
    kinds = [dtypes[k % len(dtypes)] for k in range(len(counts))]
    both = list(zip(counts, kinds, strict=True))
    parts = [numbers(rank, (count,), kind, k) for k, (count, kind) in enumerate(both)]
    parts.append(numbers(rank, (4, 6)).t())
    gathered = [torch.zeros(world * part.numel(), dtype=part.dtype) for part in parts]
    gathered[1][5 * rank : 5 * rank + 5] = parts[1]
    parts[1] = gathered[1][5 * rank : 5 * rank + 5]
    wanted = [torch.empty_like(whole) for whole in gathered]
    for whole, part in zip(wanted, parts, strict=True):
        dist.all_gather_into_tensor(whole, part.contiguous())
    group.allgather_into_tensor_coalesced(gathered, parts).wait()
    assert all(map(torch.equal, gathered, wanted))

    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist._make_nccl_premul_sum(0.5 + rank)):
        floats = [k for k, part in enumerate(parts) if part.dtype != torch.uint8]
        wholes = [wanted[k] * (rank + 1) for k in floats]
        outs = [torch.full((parts[k].numel(),), -1.0, dtype=parts[k].dtype) for k in floats]
        outs[1] = wholes[1].chunk(world)[rank]
        single = [torch.empty_like(out) for out in outs]
        for out, whole in zip(single, wholes, strict=True):
            dist.reduce_scatter_tensor(out, whole.clone(), op)
        options = dist.ReduceScatterOptions()
        options.reduceOp = op
        group.reduce_scatter_tensor_coalesced(outs, wholes, options).wait()
        assert all(map(torch.equal, outs, single)), op


def lists_of_gathers_that_differ_are_refused(rank, world):
    group = dist.new_group()
    ins = [torch.ones(4 + rank), torch.ones(5 - rank)]
    outs = [torch.empty(world * x.numel()) for x in ins]
    try:
        group.allgather_into_tensor_coalesced(outs, ins).wait()
        dist.barrier(group)
    except dist.DistBackendError as error:
        assert "of a list of 2 arrays, sizes #" in str(error), error
    else:
        raise AssertionError("nothing was raised")


def lists_that_differ_are_refused(rank, world):
    group = dist.new_group()
    try:
        dist.all_reduce_coalesced([torch.ones(4 + rank), torch.ones(5 - rank)], group=group)
        dist.barrier(group)
    except dist.DistBackendError as error:
        assert "of a list of 2 arrays, sizes #" in str(error), error
    else:
        raise AssertionError("nothing was raised")


def messages_with_tags_and_any_source(rank, world):
    right, left = (rank + 1) % world, (rank - 1) % world
    operations = [
        dist.P2POp(dist.isend, torch.full((5,), float(rank)), right, tag=1),
        dist.P2POp(dist.isend, torch.full((3,), float(-rank)), right, tag=2),
        dist.P2POp(dist.irecv, torch.empty(3), left, tag=2),
        dist.P2POp(dist.irecv, torch.empty(5), left, tag=1),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert (operations[2].tensor == -left).all()
    assert (operations[3].tensor == left).all()
    if rank == 0:
        x = torch.empty(2, 6)[:, ::2]  # not contiguous
        sources = sorted(dist.recv(x) for _ in range(world - 1))
        assert sources == list(range(1, world))
    else:
        dist.send(torch.ones(2, 3) * rank, 0)
    if world > 1:
        x = torch.full((200000,), float(rank))
        if rank == 0:
            dist.send(x, 1)
        elif rank == 1:
            dist.recv(x, 0)
            assert (x == 0).all()


# ---- work and futures ----------------------------------------------------------------------------


def asynchronous_calls_finish_in_order(rank, world):
    tensors = [torch.full((1000,), float(rank + i)) for i in range(50)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    x = torch.ones(1)
    dist.all_reduce(x)  # waits for its turn
    assert all(work.is_completed() for work in works)
    assert all(work.is_success() for work in works)
    for i, (tensor, work) in enumerate(zip(tensors, works, strict=True)):
        assert work.wait()
        assert (tensor == sum(r + i for r in range(world))).all()
        assert work.result()[0] is tensor or torch.equal(work.result()[0], tensor)
    numbered = (
        [work._get_sequence_number() for work in works]
        if hasattr(works[0], "_get_sequence_number")
        else []
    )
    assert numbered == sorted(numbered)


def callbacks_may_wait_for_collectives(rank, world):
    """PowerSGD does. Every callback holds a thread, so no fixed number of them is enough."""
    depth = 12

    def again(level):
        def callback(future):
            value = future.value()[0]
            if level == depth:
                return value.clone()
            work = dist.all_reduce(value.clone() / world, async_op=True)
            return work.get_future().then(again(level + 1)).wait()

        return callback

    futures = [
        dist.all_reduce(torch.ones(4), async_op=True).get_future().then(again(0)) for _ in range(8)
    ]
    for future in futures:
        assert torch.equal(future.wait(), torch.full((4,), float(world)))


def a_future_asked_for_late_is_complete(rank, world):
    work = dist.all_reduce(torch.ones(2), async_op=True)
    work.wait()
    assert work.get_future().done()
    assert (work.get_future().value()[0] == world).all()
    group = dist.distributed_c10d._get_default_group()
    assert group.allreduce([torch.ones(2)]).get_future().wait()[0][0] == world


def profiles_have_titles_sizes_and_numbers(rank, world):
    with torch.profiler.profile(record_shapes=True) as profile:
        dist.all_reduce(torch.ones(3, 5))
        work = dist.broadcast(torch.ones(7), 0, async_op=True)
        work.wait()
        if world > 1 and rank < 2:
            (dist.send if rank == 0 else dist.recv)(torch.ones(2), 1 - rank)
    names = {event.name for event in profile.events()}
    assert {"ringcomm:all_reduce", "ringcomm:broadcast"} <= names
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        with open(file.name) as trace:
            events = json.load(trace)["traceEvents"]
    found = {
        event["args"]["Collective name"]: event["args"]
        for event in events
        if event.get("name") == "record_param_comms"
    }
    assert found["allreduce"]["In msg nelems"] == 15
    assert found["allreduce"]["dtype"] == "Float"
    assert found["allreduce"]["Group size"] == world
    assert found["broadcast"]["Out msg nelems"] == 7
    assert found["broadcast"]["Seq"] == found["allreduce"]["Seq"] + 1
    if world > 1 and rank < 2:
        assert found["send" if rank == 0 else "recv"]["In msg nelems"] == 2


# ---- groups --------------------------------------------------------------------------------------


def backends_by_name(rank, world):
    assert dist.get_backend() == "ringcomm"
    group = dist.new_group(backend="cpu:ringcomm")
    assert dist.get_backend(group) in ("ringcomm", "custom", "cpu:ringcomm")
    x = torch.ones(2)
    dist.all_reduce(x, group=group)
    assert (x == world).all()
    backend = group._get_backend(torch.device("cpu"))
    assert backend.name() == "ringcomm"
    assert backend.rank() == rank
    assert backend.options.global_ranks_in_group == list(range(world))
    config = dist.distributed_c10d.BackendConfig("cpu:ringcomm,cuda:nccl")
    assert config.get_device_backend_map() == {"cpu": "ringcomm", "cuda": "nccl"}
    assert dist.Backend.default_device_backend_map["cpu"] == "gloo"


def groups_go_in_any_order(rank, world):
    pairs = [dist.new_group([r, (r + 1) % world]) for r in range(world - 1)]
    alone = dist.new_group([0])
    for first, group in enumerate(pairs):
        if rank in (first, (first + 1) % world):
            x = torch.ones(1)
            dist.all_reduce(x, group=group)
            assert x == 2
    if rank == 0:
        x = torch.ones(1)
        dist.all_reduce(x, group=alone)
        dist.barrier(alone)
        assert x == 1
    mine = [group for r, group in enumerate(pairs) if rank in (r, (r + 1) % world)]
    for group in mine if rank % 2 else mine[::-1]:
        dist.destroy_process_group(group)
    dist.barrier()


def meshes(rank, world):
    mesh = init_device_mesh(
        "cpu", (world,), mesh_dim_names=("dp",), backend_override={"dp": "ringcomm"}
    )
    assert dist.get_backend(mesh.get_group("dp")) == "ringcomm"
    x = torch.ones(2)
    dist.all_reduce(x, group=mesh.get_group("dp"))
    assert (x == world).all()


# ---- what goes wrong -----------------------------------------------------------------------------


def wrong_arguments_leave_the_group_usable(rank, world):
    x, group = torch.empty(2), dist.group.WORLD
    wrong = {
        "output tensor size": lambda: dist.all_gather_into_tensor(torch.empty(2 * world + 1), x),
        "invalid tensor type": lambda: group.allgather([[x.int()] * world], [x]),
        "split": lambda: dist.all_to_all_single(
            torch.empty(world), torch.empty(world), [1] * world, [0] * world
        ),
        "single-element": lambda: group.allreduce([x, x]),
        "invalid root rank": lambda: group.broadcast(x, 17),
        "single memory location": lambda: dist.all_reduce(torch.zeros(1).expand(5)),
    }
    for words, call in wrong.items():
        raises((RuntimeError, ValueError), call, words)
    dist.barrier()


def a_late_rank_is_named(rank, world):
    x = torch.ones(3)
    for call in (
        lambda group: dist.barrier(group),
        lambda group: dist.all_reduce(x, group=group, async_op=True).wait(),
        lambda group: dist.all_reduce(x, group=group, async_op=True).get_future().wait(),
    ):
        group = dist.new_group()
        group.set_timeout(SHORT)
        if rank != 0:
            started = time.monotonic()
            raises(dist.DistBackendError, lambda: call(group), "rank 0", "Timed out", "within 1 s")  # noqa: B023
            assert time.monotonic() - started < 10
            # Lost, and says why to everyone who comes later.
            raises(dist.DistBackendError, functools.partial(dist.barrier, group), "rank 0")
        dist.barrier()
        raises(dist.DistBackendError, functools.partial(dist.barrier, group), "within 1 s")
        dist.barrier()


def a_work_waits_no_longer_than_asked(rank, world):
    group = dist.new_group()
    if rank != 0:
        work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
        raises(dist.DistBackendError, lambda: work.wait(timedelta(milliseconds=50)), "timed out")
        assert not work.is_completed()
    dist.barrier()
    if rank == 0:
        work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
    work.wait()
    assert work.is_success()


def abort_ends_everybodys_wait(rank, world):
    group = dist.new_group()
    if rank == 0:
        dist.barrier()
        group.abort()
    else:
        work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
        dist.barrier()
        raises(dist.DistBackendError, work.wait, "rank 0", "abort")
        assert work.exception() is not None
        assert not work.is_success()
    raises(dist.DistBackendError, lambda: dist.barrier(group), "abort")
    dist.destroy_process_group(group)


def different_calls_are_told_apart(rank, world):
    group = dist.new_group()
    size = 3 if rank == 0 else 4
    error = raises(dist.DistBackendError, lambda: dist.all_reduce(torch.ones(size), group=group))
    assert "float32 x 3" in str(error)
    assert "float32 x 4" in str(error)
    dist.destroy_process_group(group)


def functional_collectives(rank, world):
    x = numbers(rank, (4, 2))
    total = sum(numbers(r, (4, 2)) for r in range(world))
    group = dist.group.WORLD
    assert torch.equal(funcol.all_reduce(x, "sum", group) + 0, total)
    gathered = funcol.all_gather_tensor(x, 0, group) + 0
    assert torch.equal(gathered, torch.cat([numbers(r, (4, 2)) for r in range(world)]))
    wide = numbers(rank, (world * 2, 2))
    expected = sum(numbers(r, (world * 2, 2)) for r in range(world))[2 * rank : 2 * rank + 2]
    assert torch.equal(funcol.reduce_scatter_tensor(wide, "sum", 0, group) + 0, expected)
    both = funcol.all_reduce_coalesced([x, x + 1], "sum", group)
    assert torch.equal(both[1] + 0, total + world)
    assert torch.equal(funcol.broadcast(x, 0, group) + 0, numbers(0, (4, 2)))
    moved = (
        funcol.all_to_all_single(x[:world].contiguous(), None, None, group) if world <= 4 else None
    )
    assert moved is None or (moved + 0).shape == (world, 2)
