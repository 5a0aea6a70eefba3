"""Memory and products on the CPU.

The kernel hands out memory page by page as it is first written, at 4 KiB a page, which costs more than the
arithmetic on it. Asked for in huge pages (2 MiB; Linux, where transparent huge pages are `madvise` or
`always`) it does so 512 times less often. A hint: where it is not understood, everything works as before.
"""

import ctypes
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_HUGE_PAGE = 2 * 2**20
_SMALL_PAGE = 4096
_MADV_HUGEPAGE = 14  # <asm-generic/mman-common.h>


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda first, size, advice: int(madvise(first, size, advice))


def buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a tensor as torch.empty does."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cpu" and math.prod(shape) * dtype.itemsize >= 2 * _HUGE_PAGE and (madvise := _madvise()) is not None:
        first = -(-tensor.data_ptr() // _SMALL_PAGE) * _SMALL_PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _SMALL_PAGE * _SMALL_PAGE
        madvise(first, end - first, _MADV_HUGEPAGE)
    return tensor


# Rows or columns of a result that oneDNN makes at a time.
_PIECE = 1024


def product(
    a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, bias_N: Tensor | None = None, keep: bool = False, path: str = "auto"
) -> Tensor:
    """out = a @ b, plus a bias, or plus what `out` held (`keep`); all of one dtype. Returns out.

    path: "onednn", "mm" (torch.mm), or "auto", the faster.
    """
    assert out_MN.shape == (a_MK.shape[0], b_KN.shape[1])
    assert bias_N is None or not keep
    if path == "onednn" or (path == "auto" and a_MK.dtype == torch.float32 and not a_MK.is_cuda and _onednn()):
        by_rows, largest = out_MN.shape[0] >= out_MN.shape[1], max(out_MN.shape)
        if bias_N is not None:
            bias_N = bias_N.contiguous()  # its stride would not be read
        for first in range(0, largest, _PIECE):
            piece = slice(first, first + _PIECE)
            if by_rows:
                a, b, bias, out = a_MK[piece], b_KN, bias_N, out_MN[piece]
            else:
                a, b, bias, out = a_MK, b_KN[:, piece], None if bias_N is None else bias_N[piece], out_MN[:, piece]
            part = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
            out.add_(part) if keep else out.copy_(part)
        return out_MN
    if bias_N is not None:
        return torch.addmm(bias_N, a_MK, b_KN, out=out_MN)
    return torch.addmm(out_MN, a_MK, b_KN, beta=int(keep), out=out_MN)


def _onednn() -> bool:
    return bool(torch.backends.mkldnn.enabled) and _onednn_is_faster()


@functools.cache
def _onednn_is_faster() -> bool:
    return (
        torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _cpuinfo()
    )


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
