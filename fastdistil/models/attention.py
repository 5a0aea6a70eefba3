"""Attention for sequences laid end to end: every token sees its own sequence and nothing else.

A packed batch is one row of T tokens. transformers hands the keyword `packing` through every model to the attention function,
so one function serves all architectures and no model is forked. On a GPU in half precision it is one variable-length flash
attention call; elsewhere the sequences of a batch are sorted by length, and each group of equal length is one ordinary call.

Legend: T tokens, H query heads, K key/value heads, d head width, G sequences of one group, L their length.
"""

from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackingLayout(Protocol):
    """What attention needs to know of a packed batch (`batch.Packing`)."""

    cu_seqlens: Tensor
    max_seqlen: int
    groups: tuple[tuple[int, int, int], ...]
    """(length, first row, sequences): sequences of one length lie side by side."""


def packed_attention(
    module: nn.Module,
    query_1HTd: Tensor,
    key_1KTd: Tensor,
    value_1KTd: Tensor,
    packing: PackingLayout,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention confined to each sequence of a packed row. Returns [1, T, H, d], as transformers' attention functions do.

    `sliding_window` w lets a token see others less than w positions away (before it, when causal).
    """
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    key_1KTd, value_1KTd = (_per_query_head(x, query_1HTd) for x in (key_1KTd, value_1KTd))
    # torch's variable-length attention knows neither dropout nor fp32; both go the other way, which computes the same function.
    if dropout == 0.0 and _has_varlen(query_1HTd):
        return _varlen(query_1HTd, key_1KTd, value_1KTd, packing, scaling, causal, sliding_window)
    out: Tensor = _grouped(query_1HTd, key_1KTd, value_1KTd, packing, dropout, scaling, causal, sliding_window)
    return out


def _has_varlen(query: Tensor) -> bool:
    """Return whether torch's flash attention takes such heads on this device: varlen_attn has no other implementation."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    width = query.shape[-1]
    return width % 8 == 0 and width <= 256 and (torch.version.hip is not None or _capability(query.device) >= (8, 0))


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def padded_attention(
    module: nn.Module,
    query_BHSd: Tensor,
    key_BKSd: Tensor,
    value_BKSd: Tensor,
    tokens_B11S: Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention to the places that hold tokens (tokens_B11S, bool), not to padding. Returns [B, S, H, d].

    transformers would look at the mask on the host in every forward, to see whether it can be left out; this never waits.
    """
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    key_BKSd, value_BKSd = (_per_query_head(x, query_BHSd) for x in (key_BKSd, value_BKSd))
    mask = tokens_B11S
    length = query_BHSd.shape[2]
    near = _near(length, causal, sliding_window, query_BHSd.device)
    if near is not None:
        # Padding in front of a causal sequence sees nothing; let it see itself, so that no row is without any place.
        itself = torch.eye(length, dtype=torch.bool, device=query_BHSd.device)
        mask = (mask & near) | itself
    out = F.scaled_dot_product_attention(query_BHSd, key_BKSd, value_BKSd, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2)


def _per_query_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values [B, K, S, d] as many times as query heads share them: [B, H, S, d]."""
    repeats = query.shape[1] // x.shape[1]
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


def _near(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """bool [S, S]: the places each place may see for their distance; None: all."""
    if not causal and (window is None or length <= window):
        return None
    position = torch.arange(length, device=device)
    ahead = position[None, :] - position[:, None]
    near = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return near if window is None else near & (ahead.abs() < window)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: PackingLayout, scaling: float | None, causal: bool, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # not needed, and not always there, without a GPU

    reach = -1 if window is None else window - 1
    out_THd = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).contiguous(),
        value[0].transpose(0, 1).contiguous(),
        packing.cu_seqlens,
        packing.cu_seqlens,
        packing.max_seqlen,
        packing.max_seqlen,
        scale=scaling,
        window_size=(reach, 0 if causal else reach),
    )
    assert isinstance(out_THd, Tensor)
    unpacked: Tensor = out_THd.unsqueeze(0)
    return unpacked


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the groups differ from batch to batch: compiling them would compile every batch anew
def _grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: PackingLayout,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    heads, width = query.shape[1], query.shape[3]
    # split, not slices: the gradient of a slice is as large as the whole row, that of a split is one concatenation.
    sizes = [length * count for length, _, count in packing.groups]
    parts = zip(*(torch.split(x[0], sizes, dim=1) for x in (query, key, value)), strict=True)
    outs = []
    for (length, _, count), part in zip(packing.groups, parts, strict=True):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in part)  # [G, H, L, d]
        mask = _near(length, causal, window, query.device) if window is not None and length > window else None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scaling
        )
        outs.append(out.transpose(1, 2).reshape(length * count, heads, width))
    return torch.cat(outs).unsqueeze(0)
