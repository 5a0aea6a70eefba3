"""PowerSGD: exact up to its rank, each matrix by itself, nearer with every update, and what it leaves whole."""

import math

import pytest
import torch
from torch import Tensor

from fastdistil.gradients.compressor import BucketLayout
from fastdistil.gradients.powersgd import PowerSGD, orthonormal
from tests.gradients.simulated_ranks import compressors, simulate


def low_rank(rank: int, rows: int, columns: int, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    factor = torch.randn(rows, rank, generator=draws, dtype=torch.float64)
    return factor @ torch.randn(rank, columns, generator=draws, dtype=torch.float64)


def power(
    ranks: int,
    rank: int,
    pieces: tuple[tuple[int, tuple[int, ...]], ...],
    numel: int,
    grads: list[Tensor],
) -> Tensor:
    layout = BucketLayout(numel, pieces, 0)
    members = compressors("powersgd", ranks, rank=rank, min_compression_rate=1.0)
    states = [member.start(layout, torch.zeros(0, dtype=torch.float64)) for member in members]
    results, _, _, _ = simulate(
        [m.exchange(g.clone(), s, layout) for m, g, s in zip(members, grads, states, strict=True)],
    )
    return results[0]


@pytest.mark.parametrize("scale", [1.0, 1e-12])
@pytest.mark.parametrize("of_rank", [1, 2, 3])
def test_powersgd_is_exact_up_to_its_rank(of_rank: int, scale: float) -> None:
    """At once, for several matrices of one shape, also where the matrices have a lower rank than the factors."""
    shapes = ((0, (20, 30)), (600, (30, 20)), (1200, (20, 30)), (1800, (7,)))
    grads = []
    for number in range(2):
        parts = [low_rank(of_rank if number == 0 else 0, rows, columns, rows) for rows, columns in ((20, 30), (30, 20))]
        # The second of the shape is another matrix, a million times smaller.
        other = 1e-6 * low_rank(of_rank if number == 0 else 0, 20, 30, 99)
        grads.append(
            scale * torch.cat([*(part.flatten() for part in (*parts, other)), torch.arange(7.0).double()]),
        )
    result, truth = power(2, 3, shapes, 1807, grads), grads[0] + grads[1]
    for first, end in ((0, 600), (600, 1200), (1200, 1800), (1800, 1807)):
        error = (result[first:end] - truth[first:end]).abs().max()
        assert float(error) < 1e-11 * float(truth[first:end].abs().max())


def test_powersgd_of_rank_1_takes_each_matrix_by_itself() -> None:
    """Divided by the norm of the whole batch, two matrices of one shape would come out too small."""
    grad = torch.cat([low_rank(1, 8, 12, 1).flatten(), 100 * low_rank(1, 8, 12, 2).flatten()])
    result = power(1, 1, ((0, (8, 12)), (96, (8, 12))), 192, [grad])
    torch.testing.assert_close(result, grad, rtol=1e-10, atol=1e-12)


def test_powersgd_of_nothing_is_nothing_and_goes_on() -> None:
    layout = BucketLayout(600, ((0, (20, 30)),), 0)
    (member,) = compressors("powersgd", 1, rank=3)
    state = member.start(layout, torch.zeros(0))
    started = state["q"].clone()
    results, states, _, _ = simulate([member.exchange(torch.zeros(600), state, layout)])
    assert torch.equal(results[0], torch.zeros(600))
    assert torch.equal(states[0]["q"], started)
    gradient = low_rank(3, 20, 30, 5).float().flatten()
    results, _, _, _ = simulate([member.exchange(gradient.clone(), states[0], layout)])
    torch.testing.assert_close(results[0], gradient, rtol=1e-4, atol=1e-4)


def test_powersgd_gets_nearer_with_every_update() -> None:
    """The warm start: of one matrix again and again, without feedback, the best of its rank is found."""
    layout = BucketLayout(2400, ((0, (40, 60)),), 0)
    draws = torch.Generator().manual_seed(3)
    u, _, v = torch.linalg.svd(torch.randn(40, 60, generator=draws, dtype=torch.float64), full_matrices=False)
    values = 0.7 ** torch.arange(40, dtype=torch.float64)
    matrix = u * values @ v
    best = float(values[2:].norm())
    (member,) = compressors("powersgd", 1, rank=2, error_feedback=False)
    state = member.start(layout, matrix)
    errors = []
    for _ in range(20):
        results, states, _, _ = simulate([member.exchange(matrix.flatten().clone(), state, layout)])
        state = states[0]
        errors.append(float((results[0].view(40, 60) - matrix).norm()))
    assert errors[0] > 1.2 * best
    assert errors[-1] < 1.001 * best


def test_orthonormal_columns() -> None:
    draws = torch.Generator().manual_seed(4)
    matrices = torch.randn(5, 30, 4, generator=draws)
    matrices[1, :, 2] = matrices[1, :, 0] + 1e-4 * matrices[1, :, 3]  # nearly dependent
    matrices[2, :, 1] = -2 * matrices[2, :, 0]  # dependent
    matrices[3] *= 1e-15
    matrices[4] = 0.0
    basis = orthonormal(matrices)
    product = basis.mT @ basis
    for number in (0, 1, 3):
        torch.testing.assert_close(product[number], torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(product[2], torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0])), rtol=0, atol=1e-5)
    assert torch.equal(basis[4], torch.zeros(30, 4))
    matrices[0, 0, 0] = math.nan
    assert not bool(orthonormal(matrices)[0].isfinite().any())
    assert bool(orthonormal(matrices)[1:].isfinite().all())


def test_what_powersgd_leaves_whole() -> None:
    """Vectors, padding, and matrices whose factors would not be small enough."""
    (member,) = compressors("powersgd", 1, rank=4, min_compression_rate=2.0)
    assert isinstance(member, PowerSGD)
    # 16 x 16 by 4 columns: 256 against 128, just enough. 15 x 16: 240 against 124, too little.
    layout = BucketLayout(
        1000,
        ((0, (16, 16)), (256, (15, 16)), (496, (40,)), (544, (16, 4, 4)), (800, (12,))),
        0,
    )
    plan = member.plan(layout)
    assert [(group.rows, group.columns, group.rank, group.firsts) for group in plan.groups] == [
        (16, 16, 4, (0, 544)),
    ]
    assert plan.rest == ((256, 544), (800, 1000))
    assert member.requests(BucketLayout(40, ((0, (40,)),), 0)) == 1
    assert member.whole_parameters
