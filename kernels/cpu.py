"""Large buffers on the CPU without the price of touching them first.

The kernel hands out memory page by page as it is first written, at 4 KiB a page, which costs more than the arithmetic on it.
Asked for in huge pages (2 MiB; Linux, where transparent huge pages are `madvise` or `always`) it does so 512 times less
often. A hint: where it is not understood, everything works as before.
"""

import ctypes
import functools
import math
import sys
from collections.abc import Callable, Sequence

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
    """As torch.empty."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cpu" and math.prod(shape) * dtype.itemsize >= 2 * _HUGE_PAGE and (madvise := _madvise()) is not None:
        first = -(-tensor.data_ptr() // _SMALL_PAGE) * _SMALL_PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _SMALL_PAGE * _SMALL_PAGE
        madvise(first, end - first, _MADV_HUGEPAGE)
    return tensor
