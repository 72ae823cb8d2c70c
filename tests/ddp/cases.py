"""What the DDP hook promises, one function per promise, run by every rank of a real group.

Names and order follow the table of cases that a trusted hook must handle: special values, loss
scaling, rebuilt buckets, unused parameters, accumulation, uneven inputs, dtypes, sizes,
checkpoints, world size, equal bits, asynchrony, other collectives, clipping, warm-up, compilation,
refusals.
"""

import copy
import gc
import io
import pickle
import threading
import time
import warnings
import weakref

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

import ringcomm
from ringcomm import reference
from ringcomm.ddp import HookState, attach, hook
from ringcomm.ddp.group_transport import GroupTransport
from ringcomm.ddp.transport import CommTransport
from ringcomm.errors import AbortedError, PeerLostError, RingcommError, UsageError

TRANSPORTS = ("torch", "ringcomm")

# ---- helpers -------------------------------------------------------------------------------------


def rows(rank, step, *shape):
    """A batch that every rank can make for every other."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(*shape, generator=generator)


def same_everywhere(*tensors, group=None):
    """Asserts that all ranks hold the same bits."""
    for tensor in tensors:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        copies = [torch.empty_like(raw) for _ in range(dist.get_world_size(group))]
        dist.all_gather(copies, raw, group=group)
        assert all(torch.equal(copies[0], other) for other in copies)


def linear(inputs=64, outputs=64, **options):
    """One linear layer without bias: its gradient is the sum of its inputs, per output row."""
    torch.manual_seed(0)
    return DDP(nn.Linear(inputs, outputs, bias=False), **options)


def put_gradient(model, gradient):
    """Runs a backward pass in which the weight's local gradient is exactly ``gradient``."""
    model.zero_grad(set_to_none=True)
    weight = next(model.parameters())
    out = model(torch.eye(weight.shape[1]))  # = weight transposed
    (out * gradient.t()).sum().backward()
    return weight.grad


def expected_mean(gradients, spec, residuals=None, owner_residual=None):
    """The reference's all-reduce through a codec."""
    codec = ringcomm.codec(spec)
    names = {value: name for name, value in ringcomm._core.CODECS.items()}
    result = reference.all_reduce(
        [gradient.flatten().numpy() for gradient in gradients],
        "avg",
        names[codec.up],
        names[codec.down],
        residuals,
        owner_residual,
    )
    return torch.from_numpy(result).view_as(gradients[0])


def raises(error, match, call):
    try:
        call()
    except error as caught:
        assert match in str(caught), f"{match!r} is not in {caught}"
        return caught
    raise AssertionError(f"{error.__name__} was not raised")


class Layers(nn.Module):
    """Several weights and biases; every weight has a multiple of 32 elements."""

    def __init__(self, width=64, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def layers(**options):
    torch.manual_seed(0)
    return DDP(Layers(), **options)


def train(model, optimizer, rank, steps):
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        model(rows(rank, step, 8, 64)).square().mean().backward()
        optimizer.step()


def adam(model):
    return torch.optim.Adam(model.parameters(), 1e-3)


# ---- the mean itself -----------------------------------------------------------------------------


def mean_equals_the_reference_bit_for_bit(rank, world):
    for transport in TRANSPORTS:
        for spec in ("bf16", "fp16", "int8", "int4", "int4/4", "int4/16", "int8[ef=1]"):
            model = linear(64, 33)
            codec = ringcomm.codec(spec)
            with attach(model, spec, transport=transport, warmup_steps=0) as state:
                num_elems = 64 * 33
                residuals = (
                    [np.zeros(num_elems, np.float32) for _ in range(world)]
                    if codec.error_feedback
                    else None
                )
                owner = np.zeros(num_elems, np.float32) if codec.down_codec.error_feedback else None
                for step in range(3):
                    gradients = [rows(r, step, 33, 64) for r in range(world)]
                    got = put_gradient(model, gradients[rank])
                    expected = expected_mean(gradients, spec, residuals, owner)
                    assert torch.equal(got, expected), (transport, spec, step)
                    same_everywhere(got)
                if residuals is not None:
                    kept = state.state_dict()["residuals"]["weight"].numpy()
                    assert np.array_equal(kept, residuals[rank])


def transports_give_equal_bits(rank, world):
    for spec in ("int8", "int4", "int4/4", "int4/4[rounding=stochastic,seed=3]", "none"):
        ends = []
        for transport in TRANSPORTS:
            model = layers(bucket_cap_mb=0.02)
            with attach(model, spec, transport=transport, warmup_steps=0) as state:
                assert state.transport == {"torch": "torch:gloo", "ringcomm": "ringcomm"}[transport]
                train(model, torch.optim.SGD(model.parameters(), 0.1), rank, range(4))
            same_everywhere(*model.parameters())
            ends.append([parameter.detach().clone() for parameter in model.parameters()])
        for one, other in zip(*ends, strict=True):
            if world == 2:
                assert torch.equal(one, other), spec
            else:  # biases travel exactly, and Gloo sums them in an order of its own
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def encoded_transports_give_equal_bits_at_every_size(rank, world):
    comm = ringcomm.init(group=dist.group.WORLD)
    transports = [CommTransport(comm, owns_comm=True), GroupTransport()]
    for spec in ("bf16", "int8", "int4/4"):
        codec = ringcomm.codec(spec)
        for num_elems in (0, 1, 31, 32, 33, 95, 1000, 100_003):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = rows(rank, num_elems, num_elems).to(dtype)
                out = []
                for transport in transports:
                    got = x.clone()
                    residual, owner = torch.zeros(num_elems), torch.zeros(num_elems)
                    transport.all_reduce_encoded(got, codec, residual, owner, 5)
                    mask = transport.owned(num_elems, x.device)
                    assert not owner[~mask].any()
                    owners = mask.to(torch.int32)
                    dist.all_reduce(owners)
                    assert (owners == 1).all(), "every element has one owner"
                    dist.all_reduce(owner)
                    out.append((got, residual, owner))
                for one, other in zip(*out, strict=True):
                    assert torch.equal(one, other), (spec, num_elems, dtype)
                same_everywhere(got)
    for transport in transports:
        transport.close()
        transport.close()


# ---- NaN and Inf ---------------------------------------------------------------------------------


def nan_reaches_every_rank_and_spares_the_residual(rank, world):
    for transport in TRANSPORTS:
        model = linear()
        with attach(model, "int4/4", transport=transport, warmup_steps=0) as state:
            put_gradient(model, rows(rank, 0, 64, 64))
            before = state.state_dict()["residuals"]["weight"]
            gradient = rows(rank, 1, 64, 64)
            if rank == world - 1:
                gradient[0, 5] = float("inf")
                gradient[1, 40] = float("nan")
            # Put there, since inf * 0 of a matrix product would spread the NaN.
            handle = next(model.parameters()).register_hook(lambda _, g=gradient: g)
            got = put_gradient(model, gradient)
            handle.remove()
            same_everywhere(torch.isnan(got).to(torch.uint8))
            bad = torch.zeros(64, 64, dtype=torch.bool)
            bad[0, :32] = bad[1, 32:] = True
            assert torch.equal(torch.isnan(got), bad)
            after = state.state_dict()["residuals"]["weight"]
            unchanged = (after == before).view(64, 64)
            if rank == world - 1:
                assert unchanged[bad].all()
            assert not unchanged[~bad].all()
            assert torch.isfinite(after).all()
            assert torch.isfinite(put_gradient(model, rows(rank, 2, 64, 64))).all()


# ---- GradScaler ----------------------------------------------------------------------------------


def residuals_follow_the_loss_scale(rank, world):
    model = linear()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
    with attach(model, "int4/4", transport="torch", warmup_steps=0, scaler=scaler) as state:
        gradient = rows(rank, 0, 64, 64)
        put_gradient(model, gradient)
        before = state.state_dict()
        scaler.scale(torch.ones(1))
        scaler.update(32.0)
        put_gradient(model, torch.zeros(64, 64))  # keeps the residual, rescaled
        after = state.state_dict()
        assert after["scale"] == 32.0
        assert torch.equal(after["residuals"]["weight"], before["residuals"]["weight"] * 4)
        # A back-off says that the step was skipped: what it left behind is dropped.
        scaler.update(32.0 * scaler.get_backoff_factor())
        put_gradient(model, torch.zeros(64, 64))
        assert not state.state_dict()["residuals"]["weight"].any()


def scaled_training_equals_unscaled_training(rank, world):
    ends = []
    for enabled in (False, True):
        model = layers()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0, growth_interval=3)
        with attach(model, "int4", transport="torch", warmup_steps=1, scaler=scaler):
            for step in range(8):
                optimizer.zero_grad()
                scaler.scale(model(rows(rank, step, 8, 64)).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert scaler.get_scale() == 1024.0 * 4
    # Powers of two, so only what falls below the smallest normal scale could differ.
    assert torch.equal(*ends)


# ---- bucket rebuild ------------------------------------------------------------------------------


def residuals_follow_parameters_when_buckets_are_rebuilt(rank, world):
    for spec in ("int4", "int4/4"):
        model = layers(bucket_cap_mb=0.02)
        with attach(model, spec, transport="ringcomm", warmup_steps=0) as state:
            seen = []
            plan_a_bucket = state._residuals.new_plan

            def spy(*bucket, plan_a_bucket=plan_a_bucket, seen=seen):
                plan = plan_a_bucket(*bucket)
                kept = [
                    None if r is None else r.clone() for r in (plan.residual, plan.owner_residual)
                ]
                seen.append((bucket[0].names, plan.encoded, *kept))
                return plan

            state._residuals.new_plan = spy
            model(rows(rank, 0, 8, 64)).square().mean().backward()
            first = state.state_dict()["residuals"]
            owners = {name: value.clone() for name, value in state._residuals.owner.items()}
            old_layouts = {names for names, *_ in seen}
            seen.clear()
            model(rows(rank, 1, 8, 64)).square().mean().backward()
            assert seen
            assert not old_layouts & {names for names, *_ in seen}, "nothing was rebuilt"
            moved = set()
            for _, encoded, residual, owner_residual in seen:
                for name, begin, end in encoded:
                    moved.add(name)
                    assert torch.equal(residual[begin:end], first[name])
                    assert residual[begin:end].any()
                    if spec == "int4/4":
                        old, new = owners[name].clone(), owner_residual[begin:end].clone()
                        dist.all_reduce(old)
                        dist.all_reduce(new)
                        assert torch.equal(old, new)
                        assert old.any()
            assert moved == {f"layers.{i}.weight" for i in range(3)}
            state._residuals.new_plan = plan_a_bucket


# ---- unused parameters ---------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 64, bias=False)
        self.b = nn.Linear(64, 64, bias=False)

    def forward(self, x, use_b):
        return self.b(self.a(x)) if use_b else self.a(x)


def unused_parameters_keep_their_residual(rank, world):
    for transport in TRANSPORTS:
        torch.manual_seed(0)
        model = DDP(Branches(), find_unused_parameters=True)
        with attach(model, "int4", transport=transport, warmup_steps=0) as state:
            model(rows(rank, 0, 8, 64), True).square().mean().backward()
            first = state.state_dict()["residuals"]
            assert first["a.weight"].any()
            assert first["b.weight"].any()
            # b is used by rank 0 only.
            model.zero_grad()
            model(rows(rank, 1, 8, 64), rank == 0).square().mean().backward()
            second = state.state_dict()["residuals"]
            assert torch.equal(second["b.weight"], first["b.weight"]) == (rank != 0)
            assert not torch.equal(second["a.weight"], first["a.weight"])
            same_everywhere(*(p.grad for p in model.parameters()))
            # b is used by nobody: its gradient stays, its residual too.
            model.zero_grad()
            model(rows(rank, 2, 8, 64), False).square().mean().backward()
            third = state.state_dict()["residuals"]
            assert torch.equal(third["b.weight"], second["b.weight"])
            assert model.module.b.weight.grad is None


# ---- accumulation --------------------------------------------------------------------------------


def no_sync_accumulates_and_counts_one_step(rank, world):
    model = linear()
    with attach(model, "int8", transport="ringcomm") as state:
        parts = {r: [rows(r, step, 64, 64) for step in range(3)] for r in range(world)}
        weight = next(model.parameters())
        with model.no_sync():
            for part in parts[rank][:2]:
                (model(torch.eye(64)) * part.t()).sum().backward()
        assert state.step == 0
        (model(torch.eye(64)) * parts[rank][2].t()).sum().backward()
        assert state.step == 1
        assert state.stats()["steps"] == 1
        sums = [parts[r][0] + parts[r][1] + parts[r][2] for r in range(world)]
        assert torch.equal(weight.grad, expected_mean(sums, "int8"))


# ---- Join ----------------------------------------------------------------------------------------


def join_with_uneven_inputs(rank, world):
    for transport in TRANSPORTS:
        model = layers(bucket_cap_mb=0.02)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with attach(model, "int4/4", transport=transport, warmup_steps=1) as state:
            with Join([model]):
                for step in range(2 + 2 * rank):
                    optimizer.zero_grad()
                    model(rows(rank, step, 8, 64)).square().mean().backward()
                    optimizer.step()
                    if rank == 0 and step == 1:
                        before = state.state_dict()["residuals"]
            assert state.step == 2 + 2 * (world - 1)
            if rank == 0:  # zero buckets of a joined rank leave its residuals alone
                after = state.state_dict()["residuals"]
                assert all(torch.equal(after[name], before[name]) for name in before)
        same_everywhere(*model.parameters())


def join_divides_by_the_full_world_size(rank, world):
    model = linear()
    with attach(model, "int8", transport="torch"):
        with Join([model]):
            for step in range(1 + rank):
                got = put_gradient(model, rows(rank, step, 64, 64))
        if rank == world - 1:
            late = [torch.zeros(64, 64)] * (world - 1) + [rows(rank, world - 1, 64, 64)]
            assert torch.equal(got, expected_mean(late, "int8"))


# ---- dtypes --------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.single = nn.Linear(64, 64)
        self.brain = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        self.short = nn.Parameter(torch.randn(64, 64).half())
        self.wide = nn.Linear(64, 64, dtype=torch.float64)
        self.tiny = nn.Parameter(torch.randn(4, 4))
        self.turn = nn.Parameter(torch.randn(64, 64, dtype=torch.complex64))

    def forward(self, x):
        total = self.single(x).square().sum()
        total = total + self.brain(x.bfloat16()).float().square().sum()
        total = total + (self.short.float() @ x.t()).square().sum()
        total = total + self.wide(x.double()).square().sum()
        total = total + (self.tiny.sum() * x).sum()
        return total + (self.turn @ x.t().to(torch.complex64)).abs().square().sum()


def mixed_dtypes_and_exact_parameters(rank, world):
    for transport in TRANSPORTS:
        torch.manual_seed(0)
        module = Mixed()
        alone = copy.deepcopy(module)
        model = DDP(module)
        locals_ = []
        for r in range(world):
            alone.zero_grad()
            alone(rows(r, 0, 8, 64)).backward()
            locals_.append({name: p.grad.clone() for name, p in alone.named_parameters()})
        with attach(model, "int4", transport=transport, warmup_steps=0) as state:
            model(rows(rank, 0, 8, 64)).backward()
            encoded = {"single.weight", "brain.weight", "short"}
            assert set(state.state_dict()["residuals"]) == encoded
            for name, parameter in model.module.named_parameters():
                got = parameter.grad
                same_everywhere(torch.view_as_real(got) if got.is_complex() else got)
                parts = [one[name] for one in locals_]
                if name in encoded:
                    mean = torch.stack([part.float() for part in parts]).mean(0)
                    error = (got.float() - mean).norm() / mean.norm()
                    assert 0.001 < error < 0.2, (name, error)
                else:
                    mean = torch.stack(parts).sum(0) / world
                    torch.testing.assert_close(got, mean)
                    if world == 2:
                        assert torch.equal(got, mean), name


def exact_parameters_do_not_disturb_blocks_that_they_share(rank, world):
    for transport in TRANSPORTS:
        torch.manual_seed(0)
        model = DDP(nn.Linear(65, 33))  # the last weights and the bias share a block
        with attach(model, "int8[ef=1]", transport=transport) as state:
            gradients = [rows(r, 0, 33, 65) for r in range(world)]
            got = put_gradient(model, gradients[rank])
            padded = [torch.cat([g.flatten(), torch.zeros(33)]) for g in gradients]
            residuals = [np.zeros(33 * 66, np.float32) for _ in range(world)]
            expected = expected_mean(padded, "int8", residuals)
            assert torch.equal(got.flatten(), expected[: 33 * 65])
            kept = state.state_dict()["residuals"]["weight"].numpy()
            assert np.array_equal(kept, residuals[rank][: 33 * 65])
            total = torch.stack(gradients).sum(2).sum(0) / world
            torch.testing.assert_close(model.module.bias.grad, total)


def sparse_gradients_go_exact(rank, world):
    for transport in TRANSPORTS:
        torch.manual_seed(0)

        class Words(nn.Module):
            def __init__(self):
                super().__init__()
                self.words = nn.Embedding(50, 32, sparse=True)
                self.head = nn.Linear(32, 64, bias=False)

            def forward(self, ids):
                return self.head(self.words(ids))

        module = Words()
        alone = copy.deepcopy(module)
        model = DDP(module)
        ids = [torch.tensor([1, 2, 2, 7 + r]) for r in range(world)]
        with attach(model, "int4", transport=transport, warmup_steps=0) as state:
            for _ in range(2):
                model.zero_grad()
                model(ids[rank]).square().sum().backward()
            got = model.module.words.weight.grad
            assert got.layout == torch.sparse_coo
            mean = torch.zeros(50, 32)
            for r in range(world):
                alone.zero_grad()
                alone(ids[r]).square().sum().backward()
                mean += alone.words.weight.grad.to_dense()
            torch.testing.assert_close(got.to_dense(), mean / world)
            same_everywhere(got.to_dense())
            assert set(state.state_dict()["residuals"]) == {"head.weight"}


# ---- any size ------------------------------------------------------------------------------------


def odd_sizes(rank, world):
    for transport in TRANSPORTS:
        for shape in ((1, 1), (3, 11), (7, 13), (1, 1025)):
            model = linear(shape[1], shape[0])
            options = {"transport": transport, "warmup_steps": 0, "min_elems": 0}
            with attach(model, "int4/4", **options):
                gradients = [rows(r, 0, *shape) for r in range(world)]
                got = put_gradient(model, gradients[rank])
                zero = [np.zeros(shape[0] * shape[1], np.float32) for _ in range(world + 1)]
                expected = expected_mean(gradients, "int4/4", zero[:-1], zero[-1])
                assert torch.equal(got, expected), shape


# ---- checkpoint ----------------------------------------------------------------------------------


def saving_and_restoring_changes_nothing(rank, world):
    for transport, spec in (("torch", "int4/4"), ("ringcomm", "int4"), ("ringcomm", "int4/4")):
        options = {"transport": transport, "warmup_steps": 5}
        straight = layers(bucket_cap_mb=0.02)
        optimizer = adam(straight)
        with attach(straight, spec, **options):
            train(straight, optimizer, rank, range(50))

        first = layers(bucket_cap_mb=0.02)
        optimizer = adam(first)
        with attach(first, spec, **options) as state:
            train(first, optimizer, rank, range(25))
            file = io.BytesIO()
            torch.save(
                (first.module.state_dict(), optimizer.state_dict(), state.state_dict()), file
            )
        file.seek(0)
        weights, moments, residuals = torch.load(file, weights_only=True)
        assert residuals["step"] == 25
        second = layers(bucket_cap_mb=0.02)
        second.module.load_state_dict(weights)
        optimizer = adam(second)
        optimizer.load_state_dict(moments)
        with attach(second, spec, **options) as state, warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            state.load_state_dict(residuals)
            train(second, optimizer, rank, range(25, 50))
            assert state.step == 50
        for one, other in zip(straight.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other), (transport, spec)


def pickled_states_are_bound_to_a_new_model(rank, world):
    model = layers()
    with attach(model, "int4/4", transport="torch", warmup_steps=0) as state:
        train(model, adam(model), rank, range(3))
        saved = state.state_dict()
        pickled = pickle.dumps(state)
    again = pickle.loads(pickled)
    other = layers()
    other.register_comm_hook(again, hook)
    loss = other(rows(rank, 3, 8, 64)).square().mean()
    raises(UsageError, "call state.bind(ddp_model)", loss.backward)
    other = layers()
    other.register_comm_hook(again.bind(other), hook)
    restored = again.state_dict()
    assert restored["step"] == saved["step"] == 3
    for name, value in saved["residuals"].items():
        assert torch.equal(restored["residuals"][name], value)
    train(other, adam(other), rank, range(3, 5))
    assert again.step == 5
    again.close()


def states_of_other_ranks_are_reset_with_one_warning(rank, world):
    model = layers()
    with attach(model, "int4", transport="torch", warmup_steps=0) as state:
        train(model, adam(model), rank, range(2))
        saved = state.state_dict()
        foreign = {**saved, "rank": rank + 1, "world_size": world + 1}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state.load_state_dict(foreign)
        assert len(caught) == 1
        assert "residuals start at zero" in str(caught[0].message)
        assert state.step == 2
        assert not state.state_dict()["residuals"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state.load_state_dict(foreign, survivor=True)
        kept = state.state_dict()["residuals"]
        assert all(torch.equal(kept[name], saved["residuals"][name]) for name in kept)
        assert len(kept) == 3
        train(model, adam(model), rank, range(2, 3))
        raises(UsageError, "format", lambda: state.load_state_dict({}))
        wrong = {**saved, "residuals": {"layers.9.weight": torch.zeros(3)}}
        raises(UsageError, "of another model", lambda: state.load_state_dict(wrong))


# ---- equal bits on all ranks ---------------------------------------------------------------------


def ranks_stay_bit_identical(rank, world):
    for transport in TRANSPORTS:
        for options in (
            {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.02},
            {"gradient_as_bucket_view": False, "bucket_cap_mb": 0.02},
            {"static_graph": True},
            {"find_unused_parameters": True},
        ):
            model = layers(**options)
            with attach(model, "int4/4", transport=transport, warmup_steps=2) as state:
                train(model, adam(model), rank, range(6))
                assert state.step == 6
                assert set(state.state_dict()["residuals"]) == {
                    f"layers.{i}.weight" for i in range(3)
                }
            same_everywhere(*model.parameters(), *(p.grad for p in model.parameters()))


def the_plain_registration_form_works(rank, world):
    model = layers()
    state = HookState(model, codec="int8")
    model.register_comm_hook(state, ringcomm.ddp.hook)
    train(model, adam(model), rank, range(2))
    same_everywhere(*model.parameters())
    assert state.step == 2
    state.close()
    state.close()


# ---- error feedback ------------------------------------------------------------------------------


def what_is_applied_adds_up_to_what_was_meant(rank, world):
    """With error feedback, errors telescope: the sum of 50 means is off by one step's error only."""
    off = {}
    for spec in ("int4", "int4/4", "int4[ef=0]"):
        model = linear()
        with attach(model, spec, transport="ringcomm", warmup_steps=0):
            applied, meant = torch.zeros(64, 64), torch.zeros(64, 64)
            for step in range(50):
                gradients = [
                    rows(r, 0, 64, 64) + 0.1 * rows(r, step + 1, 64, 64) for r in range(world)
                ]
                applied += put_gradient(model, gradients[rank])
                meant += torch.stack(gradients).mean(0)
            off[spec] = ((applied - meant).norm() / meant.norm()).item() ** 2
    assert off["int4/4"] < 2e-5, off
    assert off["int4"] < 4e-5, off
    assert off["int4[ef=0]"] > 10 * off["int4"], off


# ---- asynchrony ----------------------------------------------------------------------------------


def other_hooks_may_wait_inside_callbacks(rank, world):
    """As PowerSGD does: a collective inside a callback of our future, waited for there."""
    for transport in TRANSPORTS:
        model = layers(bucket_cap_mb=0.02)
        state = HookState(model, "int8", transport=transport)
        group = dist.new_group(backend="gloo")

        def chained(state, bucket, group=group):
            def twice(future):
                mean = future.value()
                dist.all_reduce(mean, group=group, async_op=True).wait()
                return mean

            return hook(state, bucket).then(twice)

        model.register_comm_hook(state, chained)
        train(model, adam(model), rank, range(3))
        same_everywhere(*model.parameters())
        state.close()


def a_hook_around_ours_may_wait_at_once(rank, world):
    """No deadlock, although the last bucket otherwise waits for the end of the backward pass."""
    for transport in TRANSPORTS:
        model = layers(bucket_cap_mb=0.02)
        state = HookState(model, "int8", transport=transport)

        def impatient(state, bucket):
            future = hook(state, bucket)
            future.wait()
            return future

        model.register_comm_hook(state, impatient)
        train(model, adam(model), rank, range(3))
        same_everywhere(*model.parameters())
        state.close()


def the_hook_does_not_block_the_backward_pass(rank, world):
    model = layers(bucket_cap_mb=0.02)
    state = HookState(model, "int8", transport="torch")
    gate = threading.Event()
    transport = state._resources.transport
    slow = transport.all_reduce_encoded

    def held(*arguments):
        assert gate.wait(20)
        slow(*arguments)

    calls = []

    def counting(state, bucket):
        calls.append(bucket.index())
        future = hook(state, bucket)
        if bucket.is_last():
            gate.set()
        elif state.step > 0:
            assert not future.done()
        return future

    model.register_comm_hook(state, counting)
    gate.set()
    train(model, adam(model), rank, [0])
    calls.clear()
    gate.clear()
    transport.all_reduce_encoded = held  # until every bucket was handed over
    train(model, adam(model), rank, [1])
    assert calls == list(range(len(calls)))
    assert len(calls) > 1
    state.close()


def collectives_of_the_user_do_not_cross_ours(rank, world):
    """SyncBN or metrics on the default group, in the middle of backward passes."""
    for transport in TRANSPORTS:
        model = layers(bucket_cap_mb=0.02)
        seen = []

        def metric(gradient, seen=seen):
            value = torch.tensor([float(rank + 1)])
            dist.all_reduce(value)
            seen.append(value.item())
            return gradient

        for parameter in model.parameters():
            parameter.register_hook(metric)
        with attach(model, "int4", transport=transport, warmup_steps=1):
            train(model, adam(model), rank, range(5))
        assert len(seen) == 5 * 6
        assert set(seen) == {world * (world + 1) / 2}
        same_everywhere(*model.parameters())


# ---- clipping, warm-up ---------------------------------------------------------------------------


def clipping_sees_the_same_norm_everywhere(rank, world):
    model = layers()
    with attach(model, "int4", warmup_steps=0):
        for step in range(3):
            model.zero_grad()
            model(rows(rank, step, 8, 64)).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            same_everywhere(norm.reshape(1), *(p.grad for p in model.parameters()))


def warm_up_steps_are_exact(rank, world):
    model = linear()
    with attach(model, "int4", transport="ringcomm", warmup_steps=2) as state:
        for step in range(4):
            gradients = [rows(r, step, 64, 64) for r in range(world)]
            got = put_gradient(model, gradients[rank])
            total = gradients[0].clone()
            for gradient in gradients[1:]:
                total += gradient
            assert torch.equal(got, total / world) == (step < 2)
        assert state.stats()["compressed_steps"] == 2
    model = linear()
    assert attach(model, "int4", transport="torch")._config.warmup_steps == 10
    model = linear()
    assert attach(model, "int8", transport="torch")._config.warmup_steps == 0


def statistics_count_bytes_and_bits(rank, world):
    for transport in TRANSPORTS:
        for spec, bits in (
            ("none", 32),
            ("bf16", 16),
            ("int8", 8.5),
            ("int4", 6.5),
            ("int4/4", 4.5),
        ):
            model = linear(96, 64 * world)  # every chunk is a multiple of 32
            with attach(model, spec, transport=transport, warmup_steps=1) as state:
                for step in range(3):
                    put_gradient(model, rows(rank, step, 64 * world, 96))
                stats = state.stats()
                assert stats["steps"] == 3
                assert stats["values"] == 3 * 64 * 96 * world
                assert abs(stats["compressed_bits_per_value"] - bits) < 0.01, (transport, stats)
                if spec != "none":
                    assert stats["exact_bytes_sent"] == 2 * (world - 1) * 64 * 96 * 4
                state.reset_stats()
                assert state.stats()["bytes_sent"] == 0


# ---- torch.compile -------------------------------------------------------------------------------


def compiled_models_work_and_the_python_reducer_is_refused(rank, world):
    model = layers()
    with attach(model, "int8", transport="torch") as state:
        compiled = torch.compile(model, backend="eager")
        train(compiled, adam(model), rank, range(2))
        assert state.step == 2
        same_everywhere(*model.parameters())
        weight = next(model.parameters())
        raises(UsageError, "optimize_ddp", lambda: hook(state, (weight, weight)))


# ---- world size ----------------------------------------------------------------------------------


def one_rank_needs_no_other(rank, world):
    groups = [dist.new_group([r]) for r in range(world)]
    for transport in (*TRANSPORTS, "auto"):
        model = linear(process_group=groups[rank])
        with attach(model, "int4/4", transport=transport, warmup_steps=0) as state:
            gradient = rows(rank, 0, 64, 64)
            assert torch.equal(put_gradient(model, gradient), gradient)
            assert state.stats()["bits_per_value"] == 0


def survivors_go_on_in_a_smaller_group(rank, world):
    """Worker residuals stay, owner residuals are dealt out anew."""
    assert world == 3
    for transport in TRANSPORTS:
        pair = dist.new_group([0, 1])
        model = layers(bucket_cap_mb=0.02)
        state = attach(model, "int4/4", transport=transport, warmup_steps=0)
        train(model, torch.optim.SGD(model.parameters(), 0.1), rank, range(3))
        before = state.state_dict()["residuals"]
        owners = {name: value.clone() for name, value in state._residuals.owner.items()}
        if rank == 2:
            state.close()
            dist.barrier()
            continue
        model._update_process_group(pair)
        state.process_group = pair
        assert state.process_group is pair
        assert state.stats()["world_size"] == 2
        after = state.state_dict()["residuals"]
        assert all(torch.equal(after[name], before[name]) for name in before)
        seen = []
        plan_a_bucket = state._residuals.new_plan

        def spy(*bucket, plan_a_bucket=plan_a_bucket, seen=seen):
            plan = plan_a_bucket(*bucket)
            seen.append((plan.encoded, plan.owner_residual.clone()))
            return plan

        state._residuals.new_plan = spy
        train(model, torch.optim.SGD(model.parameters(), 0.1), rank, range(3, 5))
        same_everywhere(*model.parameters(), group=pair)
        encoded, residual = seen[0]
        for name, begin, end in encoded:
            old, new = owners[name].clone(), residual[begin:end].clone()
            held = (new != 0).to(torch.int32)
            for value in (old, new, held):
                dist.all_reduce(value, group=pair)
            assert torch.equal(old, new)
            assert held.max() <= 1
        state._residuals.new_plan = plan_a_bucket
        state.close()
        dist.barrier()


# ---- refusals and failures -----------------------------------------------------------------------


def bad_uses_are_refused_with_a_reason(rank, world):
    raises(UsageError, "wrap it first", lambda: attach(nn.Linear(2, 2)))
    raises(UsageError, "did you mean 'int4'", lambda: attach(linear(), "itn4"))
    raises(UsageError, "expected one of", lambda: attach(linear(), transport="nccl"))
    raises(UsageError, "cannot be negative", lambda: attach(linear(), warmup_steps=-1))
    raises(UsageError, "expected a torch GradScaler", lambda: attach(linear(), scaler=1.0))
    raises(UsageError, "no effect", lambda: attach(linear(), "int4", seed=3))
    raises(UsageError, "expected the DDP model", lambda: HookState("model"))

    model = linear()
    state = attach(model, "int8", transport="torch")
    raises(UsageError, "has a communication hook already (hook)", lambda: attach(model))
    state.close()
    raises(UsageError, "is closed", lambda: put_gradient(model, rows(0, 0, 64, 64)))

    model = linear()
    model.register_comm_hook(None, hook)
    raises(
        UsageError,
        "expected a ringcomm.ddp.HookState",
        lambda: put_gradient(model, rows(0, 0, 64, 64)),
    )

    from torch.nn.parallel.distributed import _MixedPrecision

    mixed = DDP(nn.Linear(4, 4), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))
    raises(UsageError, "mixed_precision", lambda: attach(mixed))

    other = linear()
    with HookState(linear(), "int4", transport="torch", warmup_steps=0) as state:
        other.register_comm_hook(state, hook)
        raises(UsageError, "does not have", lambda: put_gradient(other, rows(0, 0, 64, 64)))

    comm = ringcomm.init(0, 1)
    raises(UsageError, "must be the same ranks", lambda: attach(linear(), comm=comm))
    raises(UsageError, "cannot be 'torch'", lambda: attach(linear(), comm=comm, transport="torch"))
    comm.close()


def a_communicator_of_the_user_is_used_and_left_open(rank, world):
    comm = ringcomm.init(group=dist.group.WORLD)
    model = layers()
    with attach(model, "int8", comm=comm) as state:
        train(model, adam(model), rank, range(2))
        assert state.transport == "ringcomm"
    x = torch.ones(3)
    comm.all_reduce(x)
    assert x.tolist() == [world] * 3
    comm.close()


def failures_of_the_worker_are_raised_by_backward(rank, world):
    for transport in TRANSPORTS:
        model = layers(bucket_cap_mb=0.02)
        state = attach(model, "int8", transport=transport)
        train(model, adam(model), rank, range(2))

        def lost(*_):
            raise PeerLostError("rank 1 (pid 7) died")

        def broken(*_):
            raise ZeroDivisionError("a bug")

        carrier = state._resources.transport
        carrier.all_reduce_encoded = lost
        error = raises(PeerLostError, "pid 7", lambda m=model: train(m, adam(m), rank, [2]))
        assert type(error) is PeerLostError
        # The reducer is in the middle of a backward pass, so a second model shows what follows.
        other = layers()
        other.register_comm_hook(state, hook)
        raises(
            AbortedError, "an earlier bucket failed", lambda m=other: train(m, adam(m), rank, [3])
        )
        state.close()

        model = layers()
        state = attach(model, "int8", transport=transport)
        state._resources.transport.all_reduce_encoded = broken
        error = raises(RingcommError, "a bug", lambda m=model: train(m, adam(m), rank, [2]))
        assert isinstance(error.__cause__, ZeroDivisionError)
        state.close()


def failures_reach_join_and_chained_futures_too(rank, world):
    model = layers()
    state = HookState(model, "int8", transport="torch")

    def lost(*_):
        raise PeerLostError("rank 1 (pid 7) died")

    state._resources.transport.all_reduce_encoded = lost
    futures = []

    def remember(state, bucket):
        futures.append(hook(state, bucket))
        return futures[-1]

    model.register_comm_hook(state, remember)
    raises(PeerLostError, "pid 7", lambda: train(model, adam(model), rank, [0]))
    raises(RuntimeError, "PeerLostError: rank 1 (pid 7) died", futures[0].wait)
    state.close()


def a_state_that_is_let_go_stops_its_thread(rank, world):
    def ours():
        return [t for t in threading.enumerate() if t.name == "ringcomm-ddp"]

    gc.collect()
    before = len(ours())
    model = layers(bucket_cap_mb=0.02)  # several buckets: the last one needs no thread
    state = attach(model, "int8", transport="torch")
    train(model, adam(model), rank, range(2))
    assert len(ours()) == before + 1
    alive = weakref.ref(state)
    del model, state
    gc.collect()
    assert alive() is None
    deadline = time.monotonic() + 10
    while len(ours()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(ours()) == before
