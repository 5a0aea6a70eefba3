"""The Triton path of block_codes.py: one pass over the gradient, which adds the residual, encodes and writes
what is left; one pass over the codes of all ranks, which decodes and sums.

A program takes some whole blocks, each in one row of its tile. Tiles that lie within the gradient are loaded
without a mask (one on N would load element by element where N is no multiple of 16); what remains is a launch
of its own.

No product is fused into a sum: the residual is v less what the decoder gets, which rounds the product.

Legend: N elements, S elements of a block (columns of a tile), C blocks of a tile, B blocks, R ranks.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels.triton_launch import Launch, launch, on_device

# Elements of a program's tile: 16 a thread.
_TILE = 2048
_LARGEST = 8192


@triton.jit
def _load(ptr, at, inside, WHOLE: tl.constexpr):
    if WHOLE:
        loaded = tl.load(ptr + at)
    else:
        loaded = tl.load(ptr + at, inside, 0)
    return loaded


@triton.jit
def _store(ptr, at, values, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(ptr + at, values)
    else:
        tl.store(ptr + at, values, inside)


@triton.jit
def _tile(elements, first, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(blocks of the program [C], numbers of its elements [C, S], which of them exist)."""
    block_C = (tl.program_id(0) + first).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s_S = tl.arange(0, COLUMNS)
    at_CS = block_C[:, None] * BLOCK + s_S[None, :]
    return block_C, at_CS, (s_S < BLOCK)[None, :] & (at_CS < elements)


@triton.jit
def _store_residual(residual_ptr, at_CS, left_CS, scale_C, inside_CS, WHOLE: tl.constexpr):
    """But for blocks whose scale is nan."""
    finite_CS = tl.broadcast_to((scale_C == scale_C)[:, None], at_CS.shape)
    if WHOLE:
        tl.store(residual_ptr + at_CS, left_CS, finite_CS)
    else:
        tl.store(residual_ptr + at_CS, left_CS, finite_CS & inside_CS)


@triton.jit
def quantize_int8_kernel(
    gradient_ptr,
    residual_ptr,
    codes_ptr,
    scales_ptr,
    elements,
    first,
    HAS_RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block_C, at_CS, inside_CS = _tile(elements, first, BLOCK, ROWS, COLUMNS)
    v_CS = _load(gradient_ptr, at_CS, inside_CS, WHOLE)
    if HAS_RESIDUAL:
        v_CS += _load(residual_ptr, at_CS, inside_CS, WHOLE)
    # As integers, which order nan above inf above the rest; a maximum of floats may lose nan.
    largest_C = tl.max(v_CS.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    scale_C = tl.div_rn(largest_C.to(tl.float32, bitcast=True), tl.full((ROWS,), 127.0, tl.float32))
    scale_C = tl.where((largest_C < 0x7F800000) & (scale_C * 127.0 < float("inf")), scale_C, float("nan"))
    some_C = scale_C > 0
    x_CS = tl.div_rn(v_CS, tl.broadcast_to(tl.where(some_C, scale_C, 1.0)[:, None], v_CS.shape))
    # The clamp is for denormal scales, which have few digits. 1.5 * 2**23: what is added to it is rounded to integers.
    x_CS = tl.minimum(tl.maximum(x_CS, -127.0), 127.0)
    x_CS = tl.where(some_C[:, None], (x_CS + 12582912.0) - 12582912.0, 0.0)
    _store(codes_ptr, at_CS, x_CS.to(tl.int8), inside_CS, WHOLE)
    tl.store(scales_ptr + block_C, scale_C, block_C * BLOCK < elements)
    if HAS_RESIDUAL:
        _store_residual(residual_ptr, at_CS, v_CS - x_CS * scale_C[:, None], scale_C, inside_CS, WHOLE)


@triton.jit
def dequantize_sum_int8_kernel(
    codes_ptr,
    scales_ptr,
    out_ptr,
    elements,
    ranks,
    codes_row_stride,
    scales_row_stride,
    first,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block_C, at_CS, inside_CS = _tile(elements, first, BLOCK, ROWS, COLUMNS)
    total_CS = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(ranks):
        scale_C = tl.load(scales_ptr + block_C, block_C * BLOCK < elements, 0.0)
        total_CS += _load(codes_ptr, at_CS, inside_CS, WHOLE).to(tl.float32) * scale_C[:, None]
        codes_ptr += codes_row_stride
        scales_ptr += scales_row_stride
    _store(out_ptr, at_CS, total_CS, inside_CS, WHOLE)


# ---- launches ----


def tile(block: int) -> tuple[int, int, int]:
    """(blocks of a program, columns of its tile, warps)."""
    columns = max(8, triton.next_power_of_2(block))
    rows = max(1, _TILE // columns)
    return rows, columns, max(4, rows * columns // 512)


def _constexprs(block: int, in_bounds: bool, residual: bool | None = None) -> dict[str, Any]:
    rows, columns, _ = tile(block)
    values: dict[str, Any] = {"WHOLE": in_bounds, "BLOCK": block, "ROWS": rows, "COLUMNS": columns}
    return values if residual is None else {"HAS_RESIDUAL": residual, **values}


def _launches(numel: int, block: int) -> Iterator[tuple[int, int, bool]]:
    """(the first program, how many, whether all their elements exist)."""
    if block > _LARGEST:
        raise ValueError(f"blocks have up to {_LARGEST} elements in the Triton path, got {block}; choose a smaller block")
    rows, columns, _ = tile(block)
    programs = triton.cdiv(numel, rows * block)
    full_programs = numel // (rows * block) if columns == block else 0
    if full_programs:
        yield 0, full_programs, True
    if programs > full_programs:
        yield full_programs, programs - full_programs, False


def quantize_int8_triton(gradient_N: Tensor, residual_N: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    codes_N = torch.empty_like(gradient_N, dtype=torch.int8)
    scales_B = gradient_N.new_empty(-(-gradient_N.numel() // block))
    with on_device(gradient_N):
        for first, programs, in_bounds in _launches(gradient_N.numel(), block):
            quantize_int8_kernel[(programs,)](
                gradient_N,
                gradient_N if residual_N is None else residual_N,
                codes_N,
                scales_B,
                gradient_N.numel(),
                first,
                **_constexprs(block, in_bounds, residual_N is not None),
                num_warps=tile(block)[2],
                enable_fp_fusion=False,
            )
    return codes_N, scales_B


def dequantize_sum_int8_triton(codes_RN: Tensor, scales_RB: Tensor, block: int, out_N: Tensor) -> None:
    with on_device(out_N):
        for first, programs, in_bounds in _launches(out_N.numel(), block):
            dequantize_sum_int8_kernel[(programs,)](
                codes_RN,
                scales_RB,
                out_N,
                out_N.numel(),
                codes_RN.shape[0],
                codes_RN.stride(0),
                scales_RB.stride(0),
                first,
                **_constexprs(block, in_bounds),
                num_warps=tile(block)[2],
                enable_fp_fusion=False,
            )


def shipped_launches() -> list[Launch]:
    """Blocks of 8 to 8192 elements, of which one is no power of 2."""
    launches = []
    fields = {"codes_ptr": "int8", "scales_ptr": "float32"}
    encoded, decoded = {**fields, "gradient_ptr": "float32", "residual_ptr": "float32"}, {**fields, "out_ptr": "float32"}
    integers = ("elements", "ranks", "first", "codes_row_stride", "scales_row_stride")
    for block in (8, 1000, 1024, 8192):
        warps = tile(block)[2]
        for in_bounds in (False, True) if tile(block)[1] == block else (False,):
            name = f"S={block}{' whole' if in_bounds else ''}"
            for residual in (False, True) if block == 1024 else (True,):
                constexprs = _constexprs(block, in_bounds, residual)
                label = f"quantize_int8_kernel {name}{' residual' if residual else ''}"
                launches.append(launch(label, quantize_int8_kernel, encoded, ("elements", "first"), constexprs, warps))
            label, constexprs = f"dequantize_sum_int8_kernel {name}", _constexprs(block, in_bounds)
            launches.append(launch(label, dequantize_sum_int8_kernel, decoded, integers, constexprs, warps))
    return [entry._replace(options={**entry.options, "enable_fp_fusion": False}) for entry in launches]
