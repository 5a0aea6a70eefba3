"""kernels/cpu.py's product against float64."""

import pytest
import torch

from fastdistil.kernels import cpu
from fastdistil.kernels.cpu import product

PATHS = ["mm", "onednn"] if torch.backends.mkldnn.is_available() else ["mm"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ["new", "bias", "keep"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 7, 1), (5, 16, 37), (37, 16, 5), (33, 1, 33), (0, 4, 9), (20, 64, 20)])
def test_against_float64(m: int, k: int, n: int, case: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_PIECE", 8)
    torch.manual_seed(0)
    bias = torch.randn(2 * n)[::2] if case == "bias" else None
    # As the losses call it: plain and transposed operands, and an out that is a slice of something larger.
    for a in (torch.randn(m, k), torch.randn(k, m).t(), torch.randn(m, k + 3)[:, :k]):
        for b in (torch.randn(k, n), torch.randn(n, k).t()):
            buffer = torch.randn(m + 2, n) if case == "keep" else torch.full((m + 2, n), torch.nan)
            before, out = buffer.clone(), buffer[1:-1]
            expected = a.double() @ b.double() + (0 if bias is None else bias.double())
            if case == "keep":
                expected += out.double()
            assert product(a, b, out, bias_N=bias, keep=case == "keep", path=path) is out
            torch.testing.assert_close(out.double(), expected, atol=1e-5 * k**0.5, rtol=1e-5)
            torch.testing.assert_close(buffer[[0, -1]], before[[0, -1]], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_with_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_onednn_is_faster", lambda: pytest.fail("asked"))
    a, b = torch.ones(3, 4, dtype=dtype), torch.ones(4, 5, dtype=dtype)
    assert (product(a, b, torch.empty(3, 5, dtype=dtype)) == 4).all()


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_which_processors(vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    cpu._onednn_is_faster.cache_clear()
    try:
        assert cpu._onednn_is_faster() == (vendor == "AuthenticAMD")
    finally:
        cpu._onednn_is_faster.cache_clear()
