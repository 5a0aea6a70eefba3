"""Matrix products into a given buffer, by the faster of torch's two libraries.

torch multiplies float32 with MKL, which takes its AVX2 code on AMD processors that have AVX-512 as well. oneDNN, which torch
carries for its half-precision products, does not: on two Zen 5 cores the products of a BERT head took 0.43 to 0.57 of MKL's
time. It has no `out=`, so its results are made in pieces that stay in the cache and are copied.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

# Rows or columns of a result that oneDNN makes at a time.
_PIECE = 1024


def product(
    a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, bias_N: Tensor | None = None, keep: bool = False, path: str = "auto"
) -> Tensor:
    """out = a @ b, plus a bias, or plus what `out` held (`keep`); all of one dtype. Returns out.

    path: "onednn", "mm" (torch.mm), or "auto", the faster.
    """
    assert bias_N is None or not keep
    if path == "onednn" or (path == "auto" and a_MK.dtype == torch.float32 and not a_MK.is_cuda and _onednn_is_faster()):
        linear = torch.ops.mkldnn._linear_pointwise
        rows, columns = out_MN.shape
        if rows >= columns:
            pieces = [slice(first, first + _PIECE) for first in range(0, rows, _PIECE)]
            parts = (linear(a_MK[piece], b_KN.t(), bias_N, "none", [], "") for piece in pieces)
            outs = [out_MN[piece] for piece in pieces]
        else:
            pieces = [slice(first, first + _PIECE) for first in range(0, columns, _PIECE)]
            parts = (
                linear(a_MK, b_KN[:, piece].t(), None if bias_N is None else bias_N[piece], "none", [], "") for piece in pieces
            )
            outs = [out_MN[:, piece] for piece in pieces]
        for out, part in zip(outs, parts, strict=True):
            out.add_(part) if keep else out.copy_(part)
        return out_MN
    if bias_N is not None:
        return torch.addmm(bias_N, a_MK, b_KN, out=out_MN)
    return torch.addmm(out_MN, a_MK, b_KN, beta=int(keep), out=out_MN)


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
