"""Which implementation of an op computes: the reference, torch's operations or Triton's kernel."""

from typing import Literal

import torch

Backend = Literal["auto", "reference", "triton", "torch"]


def chosen_backend(backend: Backend, device: torch.device | str) -> str:
    """Return "triton" or "torch" for tensors on a device. Raises ValueError for a backend that it has not."""
    kind = torch.device(device).type
    if backend == "torch" or (backend == "auto" and kind != "cuda"):
        return "torch"
    if backend not in ("auto", "triton"):
        raise ValueError(f"the backend must be one of auto, reference, triton, torch; got {backend!r}")
    if not has_triton():
        raise ValueError("triton kernels need the package triton, which is not installed; pip install triton, or say 'torch'")
    if kind != "cuda" and not _interpreted():
        raise ValueError(
            f"triton kernels need tensors on a GPU, these are on {kind}; say 'torch' or 'auto', or for tests set "
            "TRITON_INTERPRET=1 before triton is imported (slow)"
        )
    return "triton"


def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
