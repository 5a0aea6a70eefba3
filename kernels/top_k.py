"""The k entries of largest magnitude of a gradient, with error feedback, and their sum over ranks.

    v = gradient + residual            the k largest |v|, ties to the lower index, as (index, value)
    residual = v where nothing was selected, 0 elsewhere

inf and nan are taken before anything finite. Source: Stich et al. 2018. Legend: N elements, R ranks, K selected.
"""

import torch
from torch import Tensor

from fastdistil.kernels.backend import Backend
from fastdistil.kernels.block_codes import check_gradient, chosen_backend_or_reference
from fastdistil.kernels.block_codes_reference import with_residual
from fastdistil.kernels.cpu import buffer


@torch.no_grad()
def top_k_select(gradient_N: Tensor, residual_N: Tensor | None, k: int, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """(indices_K int32, ascending; values_K) of exactly k elements; residual_N becomes v with zeros in their places."""
    chosen = chosen_backend_or_reference(backend, gradient_N.device)
    check_gradient(gradient_N, residual_N, chosen)
    if not 1 <= k <= gradient_N.numel() < 2**31:
        raise ValueError(f"k must lie in 1 ... {gradient_N.numel()}, the gradient's size (below 2**31); got {k}")
    if chosen == "triton":
        from fastdistil.kernels.top_k_triton import top_k_select_triton

        return top_k_select_triton(gradient_N, residual_N, k)
    if chosen == "torch":
        from fastdistil.kernels.top_k_torch import top_k_select_torch

        return top_k_select_torch(gradient_N, residual_N, k)
    indices_K, values_K, left_N = _top_k_select_reference(gradient_N, residual_N, k)
    if residual_N is not None:
        residual_N.copy_(left_N)
    return indices_K, values_K


@torch.no_grad()
def scatter_sum(indices_RK: Tensor, values_RK: Tensor, numel: int) -> Tensor:
    """Return the ranks' selected elements at their places, summed in the ranks' order, [N]; a rank names no place twice.

    One index_add_ a rank on every device: its places differ, so that no two of its additions meet, in whatever order.
    """
    if indices_RK.shape != values_RK.shape or indices_RK.ndim != 2 or indices_RK.dtype != torch.int32:
        raise ValueError(
            f"indices must be int32 [R, K] and values [R, K]; got {indices_RK.dtype} {list(indices_RK.shape)} and "
            f"{list(values_RK.shape)}"
        )
    total_N = buffer((numel,), values_RK.dtype, values_RK.device).zero_()
    for indices_K, values_K in zip(indices_RK, values_RK, strict=True):
        total_N.index_add_(0, indices_K, values_K)
    return total_N


def _top_k_select_reference(gradient_N: Tensor, residual_N: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(indices_K int32, ascending; values_K; the new residual_N)."""
    v_N, _ = with_residual(gradient_N, residual_N)
    magnitudes_N = v_N.abs().where(v_N.isfinite(), torch.inf)
    indices_K = magnitudes_N.sort(descending=True, stable=True).indices[:k].sort().values
    return indices_K.int(), v_N[indices_K], v_N.index_fill(0, indices_K, 0.0)
