"""Where models compute, and in which precision."""

import torch

from fastdistil.errors import UserError
from fastdistil.profiling.device import has_fast_bf16


def resolve_device(device: str, precision: str, advice: str) -> tuple[torch.device, str]:
    """Return the device and precision that `auto` stands for on this machine, others as they are.

    `advice`: how to ask for a CPU. Raises UserError where the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is cuda and torch finds no GPU; {advice}, or see `fastdistil doctor`")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(resolved) else "fp32"
    return resolved, precision


def indexed_device(name: str) -> torch.device:
    """Return a device as the things that need one of several GPUs take it: "cuda" is the current one."""
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
