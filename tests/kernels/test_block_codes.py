"""Gradient compression: every path against the specification, and the specification against its invariants and NumPy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdistil.kernels import block_codes_torch, top_k_torch
from fastdistil.kernels.block_codes import bytes_moved, dequantize_int8, dequantize_sum_int8, quantize_int8
from fastdistil.kernels.top_k import scatter_sum, top_k_select

PATHS: list[Any] = ["torch", "triton"]
ALL: list[Any] = ["reference", *PATHS]
# Triton's path has float32.
TYPED = [("torch", torch.float32), ("torch", torch.float64), ("triton", torch.float32)]
ALL_TYPED = [("reference", torch.float32), ("reference", torch.float64), *TYPED]
# One element; a block (of 16) and one; several and a part; several of Triton's tiles and a part.
SIZES = [1, 17, 50, 5003]
INF, NAN = math.inf, math.nan


def gradient(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Of magnitudes from 1e-4 to 1e4."""
    torch.manual_seed(seed)
    return torch.randn(numel, dtype=dtype) * 10 ** (8 * torch.rand(numel, dtype=dtype) - 4)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


def decoded(codes: Tensor, scales: Tensor, like: Tensor, block: int, backend: Any) -> Tensor:
    return dequantize_int8(codes, scales, block=block, out=torch.empty_like(like), backend=backend)


def assert_sent_and_left_make_v(v: Tensor, sent: Tensor, residual: Tensor, backend: str) -> None:
    assert torch.equal(v - sent, residual), backend
    assert float(v.abs().max()) > 0


# ---- int8 ----


@pytest.mark.parametrize(("backend", "dtype"), ALL_TYPED)
@pytest.mark.parametrize("block", [16, 24, 1024])
@pytest.mark.parametrize("numel", SIZES)
def test_what_is_sent_and_what_is_left_make_the_original(numel: int, block: int, dtype: torch.dtype, backend: str) -> None:
    g, residual = gradient(numel, dtype), gradient(numel, dtype, seed=1)
    v, original = g + residual, g.clone()
    coded, scales = quantize_int8(g, residual, block=block, backend=backend)
    sent = decoded(coded, scales, v, block, backend)
    assert_sent_and_left_make_v(v, sent, residual, backend)
    assert torch.equal(g, original), "the gradient was written to"
    if numel > 50:
        assert 1e-4 < float(residual.norm() / v.norm()) < 0.99


@pytest.mark.parametrize(("backend", "dtype"), TYPED)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("block", [16, 24, 1024])
@pytest.mark.parametrize("numel", SIZES)
def test_int8_is_the_specification(numel: int, block: int, with_residual: bool, dtype: torch.dtype, backend: Any) -> None:
    g = gradient(numel, dtype)
    results = []
    for engine in ("reference", backend):
        residual = gradient(numel, dtype, seed=1) if with_residual else None
        codes, scales = quantize_int8(g, residual, block=block, backend=engine)
        results.append((codes, scales, *([residual] if residual is not None else [])))
    assert all(same(a, b) for a, b in zip(*results, strict=True))
    assert int(results[0][0].abs().max()) == 127
    decoded = [dequantize_int8(codes, scales, block=block, backend=engine) for engine in ("reference", backend)]
    assert torch.equal(*decoded)


def test_int8_is_numpys_arithmetic() -> None:
    """The specification, written once more: blocks one by one."""
    g, residual = gradient(1003), gradient(1003, seed=1)
    v = (g + residual).numpy()
    codes, scales = quantize_int8(g, residual, block=100, backend="reference")
    for b in range(11):
        at = slice(100 * b, 100 * b + 100)
        scale = np.abs(v[at]).max() / np.float32(127)
        assert float(scales[b]) == float(scale)
        assert codes[at].tolist() == np.rint(v[at] / scale).astype(int).tolist()
    assert len(scales) == 11
    # The error is half a step at most.
    assert bool((residual.abs() <= 0.501 * scales.repeat_interleave(100)[:1003]).all())


@pytest.mark.parametrize("backend", ALL)
def test_int8_rounds_halves_to_even(backend: Any) -> None:
    v = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    codes, scales = quantize_int8(v, None, block=8, backend=backend)
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("backend", ALL)
def test_a_block_of_zeros(backend: Any) -> None:
    g, residual = gradient(48), torch.zeros(48)
    g[16:32] = 0
    coded, scales = quantize_int8(g, residual, block=16, backend=backend)
    assert float(scales[1]) == 0
    assert float(scales[0]) > 0 < float(scales[2])
    sent = decoded(coded, scales, g, 16, backend)
    assert sent[16:32].abs().tolist() == residual[16:32].abs().tolist() == [0.0] * 16
    assert coded[16:32].tolist() == [0] * 16
    assert torch.equal(g - sent, residual)


@pytest.mark.parametrize(("backend", "dtype"), ALL_TYPED)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_not_hidden_and_does_not_stay(dtype: torch.dtype, bad: float, backend: Any) -> None:
    g, residual = gradient(2100, dtype), gradient(2100, dtype, seed=1)
    g[[20, 2090]] = bad  # in a whole tile of Triton's, and in the last one
    before = residual.clone()
    coded, scales = quantize_int8(g, residual, block=16, backend=backend)
    assert scales.isnan().nonzero().flatten().tolist() == [1, 130]
    assert int(scales.isfinite().sum()) == 130
    sent = decoded(coded, scales, g, 16, backend)
    bad_N = sent.isnan()
    assert bad_N.nonzero().flatten().tolist() == [*range(16, 32), *range(2080, 2096)]
    assert torch.equal(residual[bad_N], before[bad_N])
    assert torch.equal((g + before - sent)[~bad_N], residual[~bad_N])
    expected = quantize_int8(g, before, block=16, backend="reference")
    assert torch.equal(coded, expected[0])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("size", [1e30, 1e-30, 1e-38, 1e-40, 1e-43, 1e-45])
def test_very_large_and_very_small(size: float, backend: Any) -> None:
    """Down to the smallest denormal, whose block has scale 0 and stays in the residual."""
    torch.manual_seed(0)
    v = torch.randn(1024) * size
    v[3] = size
    residual = torch.zeros(1024)
    coded, scales = quantize_int8(v, residual, block=512, backend=backend)
    sent = decoded(coded, scales, v, 512, backend)
    assert_sent_and_left_make_v(v, sent, residual, backend)
    assert bool(scales.isfinite().all())
    reference_residual = torch.zeros(1024)
    expected, wanted_scales = quantize_int8(v, reference_residual, block=512, backend="reference")
    assert torch.equal(coded, expected)
    assert torch.equal(scales, wanted_scales)
    if size > 1e-40:
        assert float(residual.abs().max()) <= 0.51 * float(scales.max())


@pytest.mark.parametrize(("backend", "dtype"), TYPED)
def test_sums_over_ranks_go_in_their_order(backend: Any, dtype: torch.dtype) -> None:
    """Bit by bit the sum of what each rank sent, in order; and not that of the opposite order."""
    numel, block, ranks = 2500, 16, 5
    several = [gradient(numel, dtype, seed=rank) for rank in range(ranks)]

    def add(codes: Tensor, scales: Tensor) -> Tensor:
        return dequantize_sum_int8(codes, scales, block=block, backend=backend, dtype=dtype)

    pairs: Any = [quantize_int8(tensor, None, block=block, backend=backend) for tensor in several]
    sent = [decoded(*pair, several[0], block, "reference") for pair in pairs]
    codes, scales = (torch.stack(column) for column in zip(*pairs, strict=True))
    total = add(codes, scales)
    assert total.dtype == dtype
    assert torch.equal(total, sum(sent[1:], sent[0]))
    assert torch.equal(total, add(codes, scales))
    if dtype == torch.float32:
        assert not torch.equal(total, sum(sent[-2::-1], sent[-1]))
    # Rows within a larger buffer, as they arrive with other things beside them.
    apart_codes, apart_scales = (torch.cat([stacked, stacked], 1)[:, : stacked.shape[1]] for stacked in (codes, scales))
    assert torch.equal(total, add(apart_codes, apart_scales))


# ---- the k largest ----


def top_k_in_python(v: Tensor, k: int) -> list[int]:
    keys = [(-abs(x) if math.isfinite(x) else -INF, i) for i, x in enumerate(v.tolist())]
    return sorted(i for _, i in sorted(keys)[:k])


def assert_top_k(g: Tensor, residual: Tensor | None, k: int, backend: Any) -> None:
    v = g.clone() if residual is None else g + residual
    owed, original = None if residual is None else residual.clone(), g.clone()
    indices, values = top_k_select(g, owed, k, backend=backend)
    assert indices.dtype == torch.int32
    assert indices.tolist() == top_k_in_python(v, k)
    assert same(values, v[indices.long()])
    assert same(g, original), "the gradient was written to"
    if owed is not None:
        expected_owed = v.clone()
        expected_owed[indices.long()] = 0
        assert same(owed, expected_owed)


@pytest.mark.parametrize(("backend", "dtype"), ALL_TYPED)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("numel", [1, 7, 50, 4096, 9001])
def test_top_k(numel: int, with_residual: bool, dtype: torch.dtype, backend: Any) -> None:
    g = gradient(numel, dtype)
    residual = gradient(numel, dtype, seed=1) if with_residual else None
    shares = (100, 10) if numel > 5000 and backend == "triton" else (numel, 100, 2, 1)  # its interpreter is slow
    for k in sorted({max(1, numel // share) for share in shares}):
        assert_top_k(g, residual, k, backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("k", [1, 5, 60, 700])
def test_ties_go_to_the_lower_index(backend: Any, k: int) -> None:
    torch.manual_seed(0)
    v = torch.randint(-3, 4, (700,)).float()
    assert int((v.abs() == 3).sum()) > 60
    assert_top_k(v, None, k, backend)
    assert_top_k(v, torch.zeros(700), k, backend)
    assert_top_k(torch.ones(700), None, k, backend)
    assert_top_k(torch.zeros(700), None, k, backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("k", [1, 3, 4, 6])
def test_what_is_not_finite_goes_first(backend: Any, k: int) -> None:
    v = torch.tensor([1.0, 3e38, NAN, 1e-45, -INF, INF, -2.0, -NAN])
    assert_top_k(v, None, k, backend)
    assert_top_k(v, torch.zeros(8), k, backend)


@pytest.mark.parametrize("backend", ALL)
def test_keys_that_differ_in_any_of_their_bits(backend: Any) -> None:
    """Each bit of a float's key decides once, denormals and neighbours included."""
    bits = [1 << b for b in range(31)] + [(1 << b) + 1 for b in range(31)] + [0x3F800000 + i for i in range(20)]
    v = torch.tensor(bits, dtype=torch.int32).view(torch.float32)[torch.randperm(len(bits))]
    for k in range(1, len(bits), 9):
        assert_top_k(v, None, k, backend)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("case", ["usual", "guess too high", "almost all zero", "all equal"])
def test_whatever_the_sample_says(case: str, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a sample guesses the threshold; also where the guess is wrong, or of no use."""
    monkeypatch.setattr(top_k_torch, "SAMPLE", 64)
    numel, k = 5003, 50
    g, residual = gradient(numel), gradient(numel, seed=1)
    match case:
        case "guess too high":  # the first 20 places of the sample
            stride = next(
                candidate for candidate in range(int(numel * 0.6180339887498949), numel) if math.gcd(candidate, numel) == 1
            )
            g[torch.arange(20) * stride % numel] += 1e6
        case "almost all zero":
            g = torch.where(torch.arange(numel) % 150 == 7, g, 0)
            residual = torch.zeros(numel)
            assert 0 < int(g.count_nonzero()) < k
        case "all equal":
            g, residual = torch.full((numel,), -0.5), torch.zeros(numel)
    v = g + residual
    guess = top_k_torch.guessed_key(g, residual, k)
    reached = int((v.abs().view(torch.int32) >= guess).sum())
    assert int(guess) > 0
    assert (reached < k) == (case in {"guess too high", "almost all zero"})
    if case == "usual":
        assert reached < numel // 4, "the guess is of no use"
    for initial in (residual, None):
        wanted_rest, got_rest = (None if initial is None else initial.clone() for _ in range(2))
        expected = top_k_select(g, wanted_rest, k, backend="reference")
        got = top_k_select(g, got_rest, k, backend=backend)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert initial is None or torch.equal(got_rest, wanted_rest)  # type: ignore[arg-type]


def test_the_sample_is_good_enough() -> None:
    """Of 200 gradients, with rows of widely different size as an embedding has, none needs a second pass."""
    failures, shares = 0, []
    for seed in range(200):
        torch.manual_seed(seed)
        v = (torch.randn(400, 768) * torch.randn(400, 1).exp()).flatten()
        guess = top_k_torch.guessed_key(v, None, 3072)
        reached = int((v.abs().view(torch.int32) >= guess).sum())
        failures += reached < 3072
        shares.append(reached / 3072)
    assert failures == 0
    assert max(shares) < 1.7


def test_sparse_sums() -> None:
    """In the ranks' order, at their places; the same bits every time."""
    numel, several = 5003, [gradient(5003, seed=rank) for rank in range(4)]
    pairs = [top_k_select(tensor, None, 900, backend="torch") for tensor in several]
    indices, values = (torch.stack(column) for column in zip(*pairs, strict=True))
    total = scatter_sum(indices, values, numel)
    expected = np.zeros(numel, np.float32)
    for i, x in pairs:
        expected[i.numpy()] += x.numpy()
    assert total.tolist() == expected.tolist()
    assert torch.equal(total, scatter_sum(indices, values, numel))
    backwards = scatter_sum(indices.flip(0), values.flip(0), numel)
    assert not torch.equal(total, backwards)
    torch.testing.assert_close(total, backwards)


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_numbers_too_large_for_their_code_are_not_hidden(backend: Any) -> None:
    """127 times float32's largest number over 127 may round to infinity; nothing that was owed is lost then."""
    g = torch.full((16,), 1.0)
    g[3] = LARGEST
    residual = torch.zeros(16)
    codes, scales = quantize_int8(g, residual, block=8, backend=backend)
    sent = decoded(codes, scales, g, 8, "reference")
    if sent[:8].isfinite().all():
        assert torch.equal(residual, g - sent)
    else:
        assert scales[0].isnan() and sent[:8].isnan().all() and torch.equal(residual[:8], torch.zeros(8))
    assert torch.equal(residual[8:], g[8:] - sent[8:]) and residual.isfinite().all()


# ---- any input ----

floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
vectors = st.lists(floats, min_size=1, max_size=70)


@settings(max_examples=100)
@given(vectors, st.sampled_from([8, 16, 64]), st.data())
def test_any_values(values: list[float], block: int, data: Any) -> None:
    """The CPU path and the specification agree on everything that a float can be."""
    g = torch.tensor(values)
    residual = torch.tensor(data.draw(st.lists(floats, min_size=len(values), max_size=len(values))))
    v = g + residual
    rests = [residual.clone(), residual.clone()]
    expected, wanted_scales = quantize_int8(g, rests[0], block=block, backend="reference")
    got, scales = quantize_int8(g, rests[1], block=block, backend="torch")
    assert same(scales, wanted_scales)
    assert torch.equal(got, expected)
    sent = decoded(got, scales, v, block, "torch")
    at = sent.isfinite()
    assert bool(v[at].isfinite().all())
    assert torch.equal((v - sent)[at], rests[1][at])
    assert same(rests[1][~at], residual[~at])
    k = data.draw(st.integers(1, len(values)))
    assert_top_k(g, residual, k, "torch")


@settings(max_examples=15)
@given(vectors, st.data())
def test_any_values_in_triton(values: list[float], data: Any) -> None:
    g = torch.tensor(values)
    rests = [torch.zeros(len(values)), torch.zeros(len(values))]
    expected, got = (
        quantize_int8(g, residual, block=16, backend=backend)
        for residual, backend in zip(rests, ("reference", "triton"), strict=True)
    )
    assert torch.equal(got[0], expected[0])
    assert same(got[1], expected[1])
    assert same(*rests)
    assert_top_k(g, torch.zeros(len(values)), data.draw(st.integers(1, len(values))), "triton")


def test_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU path where a gradient is larger than what stays in the cache, and where a block is."""
    unchunked = quantize_int8(gradient(10_003), gradient(10_003, seed=1), block=64, backend="torch")
    monkeypatch.setattr(block_codes_torch, "CHUNK", 1000)
    for block in (64, 2048):
        residual = gradient(10_003, seed=1)
        v = gradient(10_003) + residual
        coded = quantize_int8(gradient(10_003), residual, block=block, backend="torch")
        assert torch.equal(v - decoded(*coded, v, block, "torch"), residual)
        assert block == 2048 or all(same(a, b) for a, b in zip(coded, unchunked, strict=True))
    assert_top_k(gradient(10_003), gradient(10_003, seed=1), 100, "torch")


@pytest.mark.parametrize("backend", ALL)
def test_error_feedback_sends_everything_in_the_end(backend: Any) -> None:
    """A constant gradient: the mean of what was sent approaches it as 1 / updates, whatever the compressor."""
    g = gradient(64) / 1e3
    steps = 12
    for send in (
        lambda r: decoded(*quantize_int8(g, r, block=16, backend=backend), g, 16, backend),
        lambda r: scatter_sum(*(tensor[None] for tensor in top_k_select(g, r, 16, backend=backend)), 64),
    ):
        residual, total = torch.zeros(64), torch.zeros(64, dtype=torch.float64)
        for _ in range(steps):
            total += send(residual)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(total + residual, steps * g.double(), rtol=1e-5, atol=1e-5)
        assert float(residual.norm()) > 0


# ---- mistakes, and the cost ----


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize_int8(torch.zeros(4, 4), None), r"one-dimensional.*\[4, 4\]"),
        (lambda: quantize_int8(torch.zeros(8)[::2], None), r"contiguous.*strides \[2\]"),
        (lambda: quantize_int8(torch.zeros(8).half(), None), "torch.float16"),
        (lambda: quantize_int8(torch.zeros(8).double(), None, backend="triton"), "float32; got torch.float64"),
        (lambda: quantize_int8(torch.zeros(8), torch.zeros(9)), r"the residual.*\[9\]"),
        (lambda: quantize_int8(torch.zeros(8), torch.zeros(8).double()), "the residual.*float64"),
        (lambda: quantize_int8(torch.zeros(8), None, block=0), "block must be a positive.*got 0"),
        (lambda: quantize_int8(torch.zeros(8), None, block=9000, backend="triton"), "up to 8192.*got 9000"),
        (lambda: quantize_int8(torch.zeros(8), None, backend="cuda"), "'cuda'"),  # type: ignore[arg-type]
        (lambda: dequantize_int8(torch.zeros(8, dtype=torch.uint8), torch.zeros(1)), "int8.*got torch.uint8"),
        (lambda: dequantize_int8(torch.zeros(8, dtype=torch.int8), torch.zeros(2)), r"scales must be .*\[1, 1\].*\[1, 2\]"),
        (lambda: dequantize_int8(torch.zeros(8, dtype=torch.int8), torch.zeros(1), out=torch.zeros(7)), "the result"),
        (lambda: top_k_select(torch.zeros(8), None, 9), r"1 \.\.\. 8.*got 9"),
        (lambda: top_k_select(torch.zeros(8), None, 0), r"1 \.\.\. 8.*got 0"),
        (lambda: scatter_sum(torch.zeros(1, 2), torch.zeros(1, 2), 4), "int32"),
    ],
)
def test_mistakes_are_told(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_nothing_is_recorded_for_autograd() -> None:
    g = gradient(50).requires_grad_()
    for backend in ALL:
        assert not quantize_int8(g, None, backend=backend)[1].requires_grad
        assert not top_k_select(g, None, 3, backend=backend)[1].requires_grad


def test_bytes_moved_are_those_of_the_tensors() -> None:
    g, residual = gradient(5003), gradient(5003)

    def size(*tensors: Tensor) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    sources = size(g, residual, residual)
    int8, top = quantize_int8(g, residual), top_k_select(g, residual, 40)
    assert bytes_moved("quantize_int8", 5003) == sources + size(*int8)
    assert bytes_moved("top_k_select", 5003, k=40) == sources + size(*top)
    assert bytes_moved("quantize_int8", 5003, residual=False) == size(g, *int8)
    assert bytes_moved("dequantize_sum_int8", 5003, ranks=3) == size(g) + 3 * size(*int8)
    assert bytes_moved("scatter_sum", 5003, ranks=3, k=40) == size(g) + 3 * size(*top)
    with pytest.raises(ValueError, match="int4"):
        bytes_moved("int4", 3)
