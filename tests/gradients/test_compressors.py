"""Compressors, run by ranks simulated in one process: what arrives, what is left, what is refused.

The truth is the plain sum of the ranks' gradients in float64.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistil.errors import UserError
from fastdistil.gradients.compressor import BucketLayout, CompressionState, Compressor, redistribute
from fastdistil.gradients.compressors import make_compressor, starts_at
from fastdistil.recipe import Compression
from tests.gradients.simulated_ranks import compressors, simulate

KINDS = ("none", "fp16", "bf16", "int8", "top-k", "powersgd")
PIECES = ((0, (12, 20)), (240, (20,)), (264, (12, 20)), (504, (8, 5, 6)), (744, (3,)))
ODD = BucketLayout(747, PIECES, 3)  # with a gap of 4 between two parameters
LAYOUTS = [
    ODD,
    BucketLayout(1, ((0, (1,)),), 0),
    BucketLayout(17, ((0, (17,)),), 1),
    BucketLayout(256, ((0, (16, 16)),), 2),
]


def gradients(
    ranks: int,
    layout: BucketLayout,
    update: int,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Of a typical size for this trainer, with something in common, and some exact zeros."""
    draws = torch.Generator().manual_seed(1000 * update + layout.index)
    common = torch.randn(layout.numel, generator=draws, dtype=torch.float64)
    flats = []
    for _ in range(ranks):
        gradient = common + torch.randn(layout.numel, generator=draws, dtype=torch.float64)
        gradient[layout.numel // 2 :: 5] = 0.0
        covered = torch.zeros(layout.numel, dtype=torch.bool)
        for first, shape in layout.pieces:
            covered[first : first + math.prod(shape)] = True
        flats.append((1e-4 * gradient * covered).to(dtype))
    return flats


def run(
    kind: str, ranks: int, layout: BucketLayout, updates: int, dtype: torch.dtype = torch.float64, **more: Any
) -> tuple[Tensor, list[CompressionState], Tensor]:
    """(everything received, the last states, the true sum)"""
    members = compressors(kind, ranks, **more)
    states = [member.start(layout, torch.zeros(0, dtype=dtype)) for member in members]
    received = truth = torch.zeros(layout.numel, dtype=dtype)
    for update in range(updates):
        grads = gradients(ranks, layout, update, dtype)
        truth = truth + torch.stack(grads).sum(0)
        exchanges = [m.exchange(g.clone(), s, layout) for m, g, s in zip(members, grads, states, strict=True)]
        results, states, sent, collectives = simulate(exchanges)
        for result in results[1:]:
            assert torch.equal(result, results[0])
        assert results[0].dtype == dtype
        assert results[0].shape == (layout.numel,)
        assert collectives == members[0].requests(layout)
        if dtype == torch.float32:
            assert sent == members[0].wire_bytes(layout)
        received = received + results[0]
    return received, states, truth


def still_owed(
    members: Sequence[Compressor],
    states: Sequence[CompressionState],
    layout: BucketLayout,
) -> Tensor:
    """What is still owed, over all ranks."""
    total = torch.zeros(layout.numel, dtype=torch.float64)
    for name, kind in members[0].state_kinds.items():
        if kind == "rank":
            total += torch.stack([state[name].double() for state in states]).sum(0)
        if kind == "chunk":
            total += torch.cat([state[name].double().view(-1) for state in states])[: layout.numel]
    return total


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.numel))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost(kind: str, ranks: int, layout: BucketLayout) -> None:
    """Received + residuals = the true sum. Only sums in 16 bits on the way are rounded where nobody keeps the rest."""
    received, states, truth = run(kind, ranks, layout, 6)
    owed = still_owed(compressors(kind, ranks), states, layout)
    rounding = {"fp16": 2**-11, "bf16": 2**-8}.get(kind, 0.0) if ranks > 1 else 0.0
    bound = 1e-12 + 6 * ranks * rounding
    assert float((received + owed - truth).abs().max()) <= bound * float(truth.abs().max() + owed.abs().max())
    if layout is ODD:
        assert kind == "none" or float(owed.abs().max()) > 1e-3 * 1e-4 * (0.01 if kind == "fp16" else 1)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_wire_bytes_and_collectives_are_as_declared(kind: str, ranks: int) -> None:
    """In float32, over odd sizes (asserted in `run`)."""
    for layout in LAYOUTS:
        run(kind, ranks, layout, 2, torch.float32)
        run(kind, ranks, layout, 2, torch.float32, error_feedback=False)


# ---- states ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_all_that_continues(kind: str) -> None:
    """Copied in between, as a checkpoint does, into a start's tensors: the same bits come out."""
    members = compressors(kind, 3)

    def updates(states: list[CompressionState], numbers: range) -> tuple[list[CompressionState], Tensor]:
        results = [torch.zeros(0)]
        for update in numbers:
            grads = gradients(3, ODD, update, torch.float32)
            exchanges = [m.exchange(g, s, ODD) for m, g, s in zip(members, grads, states, strict=True)]
            results, states, _, _ = simulate(exchanges)
        return states, results[0]

    begun = [member.start(ODD, torch.zeros(0)) for member in members]
    assert all(state.keys() == members[0].state_kinds.keys() for state in begun)
    states, _ = updates(begun, range(4))
    copies = [member.start(ODD, torch.zeros(0)) for member in members]
    for copy, state in zip(copies, states, strict=True):
        assert copy.keys() == state.keys()
        for name, value in state.items():
            assert copy[name].shape == value.shape
            assert copy[name].dtype == value.dtype
            copy[name].copy_(value)
    _, straight = updates(states, range(4, 6))
    _, continued = updates(copies, range(4, 6))
    assert torch.equal(straight, continued)


@pytest.mark.parametrize("new", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_ranks_owes_the_same(kind: str, new: int) -> None:
    old = compressors(kind, 3)
    _, states, _ = run(kind, 3, ODD, 3)
    members = compressors(kind, new)
    shared = redistribute(old[0].state_kinds, states, ODD, new)
    assert len(shared) == new
    shared = [{name: value.clone() for name, value in state.items()} for state in shared]  # processes share no memory
    before, after = still_owed(old, states, ODD), still_owed(members, shared, ODD)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-15)
    for state, member in zip(shared, members, strict=True):
        begun = member.start(ODD, torch.zeros(0, dtype=torch.float64))
        assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in begun.items()}
        for name, state_kind in member.state_kinds.items():
            if state_kind == "shared":
                assert torch.equal(state[name], states[0][name])
    # And they go on with it.
    grads = gradients(new, ODD, 9)
    truth = torch.stack(grads).sum(0) + before
    results, last, _, _ = simulate(
        [m.exchange(g, s, ODD) for m, g, s in zip(members, grads, shared, strict=True)],
    )
    rounding = {"fp16": 2**-11, "bf16": 2**-8}.get(kind, 0.0) * new
    error = (results[0] + still_owed(members, last, ODD) - truth).abs().max()
    assert float(error) <= (1e-12 + rounding) * float(truth.abs().max())


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_seen_and_forgotten(kind: str, value: float, feedback: bool) -> None:
    """On every rank, in the sum; and the states stay finite, also with more bad elements than are selected."""
    for bad_elements in (
        slice(5, 6),
        slice(0, 300),
        slice(746, 747),
        slice(373, 374),
    ):  # the last never had a gradient
        members = compressors(kind, 3, error_feedback=feedback)
        states = [member.start(ODD, torch.zeros(0)) for member in members]
        for update in range(4):
            grads = gradients(3, ODD, update, torch.float32)
            if update == 0:
                assert all(gradient[373] == 0 for gradient in grads)
                states = [m.observe(sum(grads, torch.zeros(())), s, ODD) for m, s in zip(members, states, strict=True)]
                continue
            if update == 2:
                grads[1][bad_elements] = value
            exchanges = [m.exchange(g, s, ODD) for m, g, s in zip(members, grads, states, strict=True)]
            results, states, _, _ = simulate(exchanges)
            for result in results:
                assert bool(result.isfinite().all()) == (update != 2)
            observed = [m.observe(torch.full((747,), value), s, ODD) for m, s in zip(members, states, strict=True)]
            for state in (*states, *observed):
                assert all(bool(tensor.isfinite().all()) for tensor in state.values())


# ---- fp16 ----


@pytest.mark.parametrize("size", [1e-20, 1e-9, 1e-4, 1e6])
@pytest.mark.parametrize("ranks", [2, 7, 512])
def test_float16_keeps_digits_at_any_size(size: float, ranks: int) -> None:
    """Plain rounding of 1e-9 gives 0, of 1e6 infinity."""
    layout = BucketLayout(64, ((0, (64,)),), 0)
    member = compressors("fp16", ranks)[0]
    draws = torch.Generator().manual_seed(0)
    gradient = size * (1 + torch.rand(64, generator=draws))
    state = member.observe(ranks * gradient, member.start(layout, gradient), layout)
    exchange = member.exchange(gradient.clone(), state, layout)
    request = exchange.send(None)  # type: ignore[arg-type]
    assert request.tensor.dtype == torch.float16
    summed = torch.zeros(64, dtype=torch.float16)
    for _ in range(ranks):
        summed += request.tensor
    with pytest.raises(StopIteration) as ended:
        exchange.send(summed)
    result, _ = ended.value.value
    # A running sum in 16 bits is rounded with every rank.
    torch.testing.assert_close(result, ranks * gradient, rtol=2**-10 + ranks * 2**-12, atol=0)


def test_float16_never_overflows_by_growth() -> None:
    """A gradient a million times the last one, and then the last one again: cut off, kept, sent later; nothing is lost."""
    layout = BucketLayout(64, ((0, (64,)),), 0)
    members = compressors("fp16", 4)
    states = [member.start(layout, torch.zeros(0, dtype=torch.float64)) for member in members]
    received = truth = torch.zeros(64, dtype=torch.float64)
    largest = []
    for update, size in enumerate([1e-5, 1e-5, 10.0, *[1e-5] * 30]):
        grads = [size * grad for grad in gradients(4, layout, update)]
        truth = truth + torch.stack(grads).sum(0)
        results, states, _, _ = simulate(
            [m.exchange(g, s, layout) for m, g, s in zip(members, grads, states, strict=True)],
        )
        assert bool(results[0].isfinite().all())
        received = received + results[0]
        largest.append(float(still_owed(members, states, layout).abs().max()))
    assert largest[2] > 0.1 * float(truth.abs().max())
    assert largest[-1] < 1e-3 * float(truth.abs().max())
    torch.testing.assert_close(received, truth, rtol=0, atol=2e-3 * float(truth.abs().max()))


# ---- what is refused, and when it starts ----


def make(ranks: int = 2, engine: str = "torch", **values: Any) -> Compressor:
    return make_compressor(Compression(**values), ranks=ranks, rank=0, engine=engine, seed=0)


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"compression.kind=fp16 .*world.engine=torch"):
        make(kind="bf16", engine="horovod")
    with pytest.raises(
        UserError,
        match=r"\(512 - 1\) \* 10,000 \* 8 = 40.9 MB, uncompressed 2 \* 511/512 \* 4 = 8.0 MB",
    ):
        make(kind="top-k", ranks=512)
    make(kind="top-k", ranks=100)
    make(kind="top-k", ranks=512, density=0.00195)
    with pytest.raises(UserError, match=r"at most 0\.0099"):
        make(kind="top-k", ranks=101)


def test_top_k_is_refused_just_where_it_sends_more() -> None:
    for ranks in (2, 10, 100):
        layout = BucketLayout(1_000_000, (), 0)
        sent = make(kind="top-k", ranks=ranks, density=1 / ranks).wire_bytes(layout)
        assert sent == make(ranks=ranks).wire_bytes(layout)


def test_when_compression_starts() -> None:
    assert starts_at(Compression(kind="none")) == 0
    assert starts_at(Compression(kind="int8")) == 10
    assert starts_at(Compression(kind="int8", warmup_updates=0)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_travels_by_allreduce_alone_is_what_is_declared_linear(kind: str) -> None:
    compressor = compressors(kind, 2, density=0.01, block=64, rank=2)[0]
    layout = LAYOUTS[0]
    gradient = torch.randn(layout.numel)
    exchange = compressor.exchange(gradient, compressor.start(layout, gradient), layout)
    assert (next(exchange).kind == "allreduce") is compressor.linear


def test_what_compressors_declare() -> None:
    # Volume against float32 at 64 ranks, as comparisons of methods have it.
    layout = BucketLayout(2**26, ((0, (2**13, 2**13)),), 0)
    volume = {
        kind: compressors(kind, 64, density=0.01, block=1024, rank=4)[0].wire_bytes(layout) / (4 * layout.numel)
        for kind in KINDS
    }
    expected_shares = {"none": 1.97, "fp16": 0.98, "bf16": 0.98, "int8": 0.494, "top-k": 1.26}
    for kind, share in expected_shares.items():
        assert volume[kind] == pytest.approx(share, rel=0.01)
    assert volume["powersgd"] == pytest.approx(1.97 * 4 * 2 / 2**13, rel=0.01)


# ---- learning ----


REGRESSION = BucketLayout(260, ((0, (12, 20)), (240, (20,))), 0)


@functools.cache
def fitted(kind: str, optimizer: str, **more: Any) -> float:
    """Loss after 150 updates of a linear regression whose rows lie on three ranks, relative to the loss at the start."""
    draws = torch.Generator().manual_seed(0)
    inputs = [torch.randn(40, 12, generator=draws) * torch.logspace(0, -1, 12) for _ in range(3)]
    truth = torch.randn(12, 20, generator=draws)
    targets = [x @ truth + 0.5 + 0.01 * torch.randn(40, 20, generator=draws) for x in inputs]
    weights = torch.zeros(260, requires_grad=True)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (x @ weights[:240].view(12, 20) + weights[240:] - y).square().sum() / 120

    steps: torch.optim.Optimizer
    steps = torch.optim.SGD([weights], lr=0.1) if optimizer == "sgd" else torch.optim.AdamW([weights], lr=0.02, weight_decay=0)
    members = compressors(kind, 3, **more)
    states = [member.start(REGRESSION, weights.detach()) for member in members]
    begun = float(sum(loss(x, y) for x, y in zip(inputs, targets, strict=True)).detach())  # type: ignore[union-attr]
    for update in range(150):
        grads = [torch.autograd.grad(loss(x, y), weights)[0] for x, y in zip(inputs, targets, strict=True)]
        exchanges = [m.exchange(g, s, REGRESSION) for m, g, s in zip(members, grads, states, strict=True)]
        results, states, _, _ = simulate(exchanges)
        weights.grad = results[0]
        for group in steps.param_groups:
            group["lr"] = (0.1 if optimizer == "sgd" else 0.02) * (1 - update / 150)
        steps.step()
    ended = float(sum(loss(x, y) for x, y in zip(inputs, targets, strict=True)).detach())  # type: ignore[union-attr]
    return ended / begun


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_with_error_feedback_sgd_ends_where_it_would_uncompressed(kind: str) -> None:
    plain = fitted("none", "sgd")
    assert plain < 0.03
    assert fitted(kind, "sgd", density=0.1) < 1.03 * plain
    if kind in ("top-k", "powersgd"):  # else this test would pass on anything
        assert fitted(kind, "sgd", density=0.1, error_feedback=False) > 3 * plain


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
def test_rounding_does_not_disturb_adamw(kind: str) -> None:
    assert fitted(kind, "adamw") == pytest.approx(fitted("none", "adamw"), rel=0.01)
