"""The Triton path of cosine.py: all layers in one launch, one pass over the states.

A program takes R rows of one layer; a row fits a block, so it is read once and its gradient written once. The
layers' pointers are a tuple: the program finds its own in a chain that the compiler unrolls.

Legend: L layers, M rows that count, D width, R rows of a program.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels.triton_launch import Launch, launch, on_device

# Elements of a program's block, a side: 16 a thread.
_BLOCK = 2048
_LARGEST = 8192


@triton.jit
def cosine_kernel(
    student_ptrs,
    teacher_ptrs,
    grad_ptrs,
    rows_ptr,
    weights_ptr,
    terms_ptr,
    student_row_strides,
    teacher_row_strides,
    widths,
    rows,
    cosine,
    mse,
    epsilon,
    LAYERS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    layer = tl.program_id(1)
    student_ptr = student_ptrs[0]
    teacher_ptr = teacher_ptrs[0]
    grad_ptr = grad_ptrs[0]
    # Cast, as an argument that is 1 comes as a constant and a large one in 64 bits: layers may differ.
    student_row_stride = tl.cast(student_row_strides[0], tl.int64)
    teacher_row_stride = tl.cast(teacher_row_strides[0], tl.int64)
    width = tl.cast(widths[0], tl.int32)
    for i in tl.static_range(1, LAYERS):
        if layer == i:
            student_ptr = student_ptrs[i]
            teacher_ptr = teacher_ptrs[i]
            grad_ptr = grad_ptrs[i]
            student_row_stride = tl.cast(student_row_strides[i], tl.int64)
            teacher_row_stride = tl.cast(teacher_row_strides[i], tl.int64)
            width = tl.cast(widths[i], tl.int32)
    # The program's rows: m_R among those that count, row_R in the states.
    m_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists_R = m_R < rows
    row_R = m_R
    if HAS_ROWS:
        row_R = tl.load(rows_ptr + m_R, exists_R, 0)
    d_D = tl.arange(0, BLOCK_D)
    inside_RD = exists_R[:, None] & (d_D < width)[None, :]
    s_RD = tl.load(student_ptr + (row_R * student_row_stride)[:, None] + d_D[None, :], inside_RD, 0.0).to(WIDE)
    t_RD = tl.load(teacher_ptr + (row_R * teacher_row_stride)[:, None] + d_D[None, :], inside_RD, 0.0).to(WIDE)
    ss_R = tl.sum(s_RD * s_RD, 1) + epsilon
    tt_R = tl.sum(t_RD * t_RD, 1) + epsilon
    st_R = tl.sum(s_RD * t_RD, 1)
    # Root by root: the product of squared norms overflows long before either does.
    scale_R = 1.0 / (tl.sqrt(ss_R) * tl.sqrt(tt_R))
    # From the difference: |s|^2 + |t|^2 - 2 s.t would cancel.
    difference_RD = s_RD - t_RD
    cosine_R = 1.0 - st_R * scale_R
    mse_R = tl.sum(difference_RD * difference_RD, 1) / width
    weight_R = tl.full((BLOCK_R,), 1.0, WIDE)
    if HAS_WEIGHTS:
        weight_R = tl.load(weights_ptr + m_R, exists_R, 0.0).to(WIDE)
        cosine_R = tl.where(weight_R == 0, 0.0, cosine_R * weight_R)
        mse_R = tl.where(weight_R == 0, 0.0, mse_R * weight_R)
    at_R = (layer.to(tl.int64) * rows + m_R) * 2
    tl.store(terms_ptr + at_R, cosine_R, exists_R)
    tl.store(terms_ptr + at_R + 1, mse_R, exists_R)
    if HAS_GRAD:
        # In (s, t): the cosine's -scale t + scale (s.t) / |s|^2 s, the mean square's 2/D (s - t).
        of_s_R = cosine * scale_R * st_R / ss_R
        of_t_R = -cosine * scale_R
        g_RD = of_s_R[:, None] * s_RD + of_t_R[:, None] * t_RD + (2.0 * mse / width) * difference_RD
        if HAS_WEIGHTS:
            g_RD = tl.where((weight_R == 0)[:, None], 0.0, g_RD * weight_R[:, None])
        tl.store(grad_ptr + (row_R * width)[:, None] + d_D[None, :], g_RD.to(grad_ptr.dtype.element_ty), inside_RD)


def tile(width: int) -> tuple[int, int, int]:
    """(rows of a program, columns of its block, warps)."""
    columns = triton.next_power_of_2(width)
    rows = max(1, _BLOCK // columns)
    return rows, columns, max(4, min(16, rows * columns // 512))


def cosine_rows_triton(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    rows_M: Tensor | None,
    weights_M: Tensor | None,
    *,
    cosine: float,
    mse: float,
    epsilon: float,
    terms_LM2: Tensor,
    grads: Sequence[Tensor],
) -> None:
    """Write each row's (1 - cosine, mean square) and the gradient of its part of the total. grads: contiguous, or empty."""
    layers, rows = terms_LM2.shape[:2]
    widest = max(state.shape[1] for state in student_states)
    if widest > _LARGEST:
        raise ValueError(f"hidden states are up to {_LARGEST} wide in the Triton path, got {widest}; use backend='torch'")
    if rows == 0 or widest == 0:
        terms_LM2.zero_()
        return
    assert all(grad.is_contiguous() for grad in grads)
    # Rows by layers; an absent tensor's pointer is any other's and is never read.
    block_rows, _, warps = tile(widest)
    with on_device(terms_LM2):
        cosine_kernel[(triton.cdiv(rows, block_rows), layers)](
            tuple(student_states),
            tuple(teacher_states),
            tuple(grads) if grads else tuple(student_states),
            terms_LM2 if rows_M is None else rows_M.contiguous(),
            terms_LM2 if weights_M is None else weights_M.contiguous(),
            terms_LM2,
            tuple(state.stride(0) for state in student_states),
            tuple(state.stride(0) for state in teacher_states),
            tuple(state.shape[1] for state in student_states),
            rows,
            cosine,
            mse,
            epsilon,
            **_constexprs(layers, rows_M is not None, weights_M is not None, bool(grads), widest, terms_LM2.dtype),
            num_warps=warps,
        )


def _constexprs(layers: int, rows: bool, weights: bool, grad: bool, width: int, wide: torch.dtype) -> dict[str, Any]:
    block_rows, columns, _ = tile(width)
    return {
        "LAYERS": layers,
        "HAS_ROWS": rows,
        "HAS_WEIGHTS": weights,
        "HAS_GRAD": grad,
        "BLOCK_R": block_rows,
        "BLOCK_D": columns,
        "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
    }


def shipped_launches() -> list[Launch]:
    """Widths of one to 8192 columns, one and twelve layers."""
    launches = []
    for dtype in ("bfloat16", "float16", "float32"):
        for width, layers in ((64, 1), (768, 1), (768, 12), (4096, 1), (8192, 2)):
            types = {"rows_ptr": "int64", "weights_ptr": "float32", "terms_ptr": "float32"}
            tuples = dict.fromkeys(("student_ptrs", "teacher_ptrs", "grad_ptrs"), (dtype,) * layers)
            tuples |= dict.fromkeys(("student_row_strides", "teacher_row_strides", "widths"), ("i32",) * layers)
            for rows in (False, True) if width == 768 else (False,):
                constexprs = _constexprs(layers, rows, rows, True, width, torch.float32)
                name = f"cosine {dtype} D={width} L={layers}{' rows' if rows else ''}"
                launches.append(launch(name, cosine_kernel, types, ("rows",), constexprs, tile(width)[2], tuples))
    # Layers of different widths, one of which comes as a constant.
    mixed: dict[str, tuple[str | int, ...]] = dict.fromkeys(("student_ptrs", "teacher_ptrs", "grad_ptrs"), ("bfloat16",) * 2)
    mixed |= {"student_row_strides": ("i64", 1), "teacher_row_strides": ("i32", 1), "widths": ("i32", 1)}
    constexprs = _constexprs(2, False, False, True, 768, torch.float32)
    types = {"rows_ptr": "int64", "weights_ptr": "float32", "terms_ptr": "float32"}
    launches.append(launch("cosine mixed widths", cosine_kernel, types, ("rows",), constexprs, tile(768)[2], mixed))
    return launches
