"""Packed attention against softmax(q k / sqrt(d)) v written out for each sequence alone, float64."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdistil.data.batch import Packing
from fastdistil.models.attention import packed_attention

LENGTHS = (1, 1, 3, 7, 7, 7, 12)
HEADS, WIDTH, TOKENS = 4, 6, sum(LENGTHS)


@dataclass(frozen=True)
class ByHand:
    """A packing that owes nothing to batch.Packing.of."""

    cu_seqlens: Tensor
    max_seqlen: int
    groups: tuple[tuple[int, int, int], ...]


PACKING = ByHand(
    torch.tensor([0, 1, 2, 5, 12, 19, 26, 38], dtype=torch.int32), 12, ((1, 0, 2), (3, 2, 1), (7, 5, 3), (12, 26, 1))
)


def inputs(key_heads: int = HEADS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(1, heads, TOKENS, WIDTH, dtype=torch.float64, generator=generator)
        for heads in (HEADS, key_heads, key_heads)
    )


def literal(query: Tensor, key: Tensor, value: Tensor, causal: bool, window: int | None, scaling: float) -> Tensor:
    """One token, one head at a time: what it sees, and the mean of it. [1, T, H, d]"""
    out = torch.zeros(1, TOKENS, HEADS, WIDTH, dtype=torch.float64)
    starts = np.cumsum([0, *LENGTHS])
    shared = HEADS // key.shape[1]
    for start, end in itertools.pairwise(starts):
        for token in range(start, end):
            visible = [
                other
                for other in range(start, end)
                if (not causal or other <= token) and (window is None or abs(token - other) < window)
            ]
            for head in range(HEADS):
                scores = key[0, head // shared, visible] @ query[0, head, token] * scaling
                out[0, token, head] = scores.softmax(0) @ value[0, head // shared, visible]
    return out


def test_the_packing_of_batches_is_the_one_written_by_hand() -> None:
    packing = Packing.of(np.array(LENGTHS))
    assert torch.equal(packing.cu_seqlens, PACKING.cu_seqlens)
    assert (packing.max_seqlen, packing.groups) == (PACKING.max_seqlen, PACKING.groups)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 40])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_each_sequence_attends_to_itself(causal: bool, window: int | None, key_heads: int) -> None:
    query, key, value = inputs(key_heads)
    scaling = 0.3
    out = packed_attention(nn.Module(), query, key, value, PACKING, scaling=scaling, is_causal=causal, sliding_window=window)
    truth = literal(query, key, value, causal, window, scaling)
    assert out.shape == (1, TOKENS, HEADS, WIDTH)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    if window is not None and window < 7:  # otherwise the window would not have been tested
        assert (truth - literal(query, key, value, causal, None, scaling)).abs().max() > 0.1


def test_scaling_defaults_to_the_width() -> None:
    query, key, value = inputs()
    out = packed_attention(nn.Module(), query, key, value, PACKING)
    torch.testing.assert_close(out, literal(query, key, value, False, None, WIDTH**-0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attribute", [False, True])
def test_the_module_says_whether_it_is_causal_unless_told(attribute: bool) -> None:
    query, key, value = inputs()
    module = nn.Module()
    module.is_causal = attribute
    by_attribute = packed_attention(module, query, key, value, PACKING)
    by_argument = packed_attention(module, query, key, value, PACKING, is_causal=not attribute)
    torch.testing.assert_close(by_attribute, literal(query, key, value, attribute, None, WIDTH**-0.5), rtol=0, atol=1e-12)
    torch.testing.assert_close(by_argument, literal(query, key, value, not attribute, None, WIDTH**-0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_those_of_the_literal_formula(window: int | None) -> None:
    ours, truth = ([x.requires_grad_() for x in inputs(2)] for _ in range(2))
    weights = torch.randn(1, TOKENS, HEADS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out = packed_attention(nn.Module(), *ours, PACKING, is_causal=True, sliding_window=window)
    (out * weights).sum().backward()
    (literal(*truth, True, window, WIDTH**-0.5) * weights).sum().backward()
    for a, b in zip(ours, truth, strict=True):
        assert b.grad.abs().max() > 0.1
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_no_gradient_crosses_a_border() -> None:
    query, key, value = (x.requires_grad_() for x in inputs())
    out = packed_attention(nn.Module(), query, key, value, PACKING)
    out[0, 5:12].square().sum().backward()  # the first sequence of seven
    inside = torch.zeros(TOKENS, dtype=torch.bool)
    inside[5:12] = True
    for tensor in (query, key, value):
        per_token = tensor.grad.abs().amax((0, 1, 3))
        assert (per_token[inside] > 0).all()
        assert (per_token[~inside] == 0).all()


def test_dropout_drops_and_scales_probabilities() -> None:
    """With equal scores and one-hot values the output is the row of probabilities itself."""
    length, p = 48, 0.25
    packing = ByHand(torch.tensor([0, length, 2 * length], dtype=torch.int32), length, ((length, 0, 2),))
    zeros = torch.zeros(1, 1, 2 * length, length, dtype=torch.float64)
    one_hot = torch.eye(length, dtype=torch.float64).repeat(2, 1)[None, None]
    torch.manual_seed(0)
    out = packed_attention(nn.Module(), zeros, zeros, one_hot, packing, dropout=p)
    nonzero = out != 0
    torch.testing.assert_close(out[nonzero], torch.full_like(out[nonzero], 1 / (length * (1 - p))), rtol=1e-12, atol=0)
    assert 0.7 < nonzero.double().mean() < 0.8
    again = packed_attention(nn.Module(), zeros, zeros, one_hot, packing, dropout=p)
    assert not torch.equal(nonzero, again != 0)
    torch.testing.assert_close(
        packed_attention(nn.Module(), zeros, zeros, one_hot, packing), torch.full_like(out, 1 / length), rtol=1e-12, atol=0
    )
