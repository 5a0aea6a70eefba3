"""The Triton path of sparse_distill.py: one program a row, two sweeps over its columns.

The first sweep adds up the student's exponentials, at T over the unlisted columns and, for a labelled row, at
1 over all. The second writes the gradient of the unlisted columns. The K listed ones are gathered at the
start and written at the end; no column is written twice, so the order of a program's writes does not matter.
Which columns are listed stands in a bit mask [N, V / 32] that the program fills first (subtracting the listed
from the sum of all would cancel).

The second read comes from the second-level cache while the rows in flight fit there: 2 N V elements move, 3 where they do not.

Legend: N rows, V vocabulary, K listed tokens, B columns of a block.
"""

# Conditions known to the compiler stand apart from those of the device.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels.distill_options import DistillOptions, SparseTeacher, Targets
from fastdistil.kernels.distill_triton import capped
from fastdistil.kernels.triton_launch import Launch, launch, on_device

_BLOCK, _WARPS = 2048, 8
_LARGEST = 4096
_INTEGERS = ("student_row_stride", "grad_row_stride", "rows", "width", "listed", "words", "ignore_index")


@triton.jit
def _added(largest, total, x_B):
    """(max, sum exp(x - max)) with one more block."""
    new = tl.maximum(largest, tl.max(x_B, 0))
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(largest - shift) + tl.sum(tl.exp(x_B - shift), 0)


@triton.jit
def _log_sum(a, b):
    """log(exp a + exp b)."""
    largest = tl.maximum(a, b)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    return largest + tl.log(tl.exp(a - shift) + tl.exp(b - shift))


@triton.jit
def _finished(g, x, column, label, lse_1, hard, student_scale, student_cap, HAS_STUDENT_CAP: tl.constexpr):
    """The soft term's gradient with the hard one added, in the logits before cap and scale."""
    g += tl.where(hard == 0, 0.0, tl.exp(x - lse_1) * hard)
    g -= tl.where(column == label, hard, 0.0)
    if HAS_STUDENT_CAP:
        # d cap tanh(x / cap) = 1 - tanh^2; what is out stays out, where x may be nan.
        g = tl.where(g == 0, 0.0, g * (1.0 - (x / student_cap) * (x / student_cap)))
    return g * student_scale


@triton.jit
def sparse_kernel(
    student_ptr,
    indices_ptr,
    log_probabilities_ptr,
    tail_ptr,
    labels_ptr,
    weights_ptr,
    terms_ptr,
    grad_ptr,
    mask_ptr,
    student_row_stride,
    grad_row_stride,
    rows,
    width,
    listed,
    words,
    ignore_index,
    temperature,
    soft,
    hard,
    student_scale,
    student_cap,
    HAS_TAIL: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_STUDENT_CAP: tl.constexpr,
    LISTED_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_row_stride
    grad_ptr += row * grad_row_stride
    mask_ptr += row * words
    label = ignore_index.to(tl.int64)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
    weight = tl.full((), 1.0, WIDE)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row).to(WIDE)
    labelled = label != ignore_index

    k_K = tl.arange(0, LISTED_POW2)
    log_p_K = tl.load(log_probabilities_ptr + row * listed + k_K, k_K < listed, float("-inf")).to(WIDE)
    index_K = tl.load(indices_ptr + row * listed + k_K, k_K < listed, 0).to(tl.int32)
    used_K = log_p_K != float("-inf")
    # A token outside of the vocabulary makes the row's terms nan; it must not be read or written.
    stray = tl.max(tl.where(used_K & ((index_K < 0) | (index_K >= width)), 1, 0), 0)
    used_K = used_K & (index_K >= 0) & (index_K < width)
    tl.atomic_or(mask_ptr + index_K // 32, tl.full((LISTED_POW2,), 1, tl.int32) << (index_K % 32), used_K, sem="relaxed")
    x_K = capped(tl.load(student_ptr + index_K, used_K, 0.0).to(WIDE), student_scale, student_cap, HAS_STUDENT_CAP)
    a_K = tl.where(used_K, x_K / temperature, float("-inf"))

    # The teacher, renormalised.
    largest_p = tl.max(log_p_K, 0)
    log_total = largest_p + tl.log(tl.sum(tl.exp(log_p_K - tl.where(largest_p == float("-inf"), 0.0, largest_p)), 0))
    tail = log_total * 0.0
    if HAS_TAIL:
        log_tail = tl.log(tl.load(tail_ptr + row).to(WIDE))
        log_total = _log_sum(log_total, log_tail)
        tail = tl.exp(log_tail - log_total)
    log_p_K = log_p_K - log_total
    p_K = tl.exp(log_p_K)
    # The mask is complete before any thread reads it.
    tl.debug_barrier()

    largest_rest = tl.full((), float("-inf"), WIDE)
    sum_rest = tl.full((), 0.0, WIDE)
    largest_1 = tl.full((), float("-inf"), WIDE)
    sum_1 = tl.full((), 0.0, WIDE)
    label_x = tl.full((), float("-inf"), WIDE)
    for start in range(0, width, BLOCK):
        v_B = start + tl.arange(0, BLOCK)
        x_B = capped(tl.load(student_ptr + v_B, v_B < width, 0.0).to(WIDE), student_scale, student_cap, HAS_STUDENT_CAP)
        x_B = tl.where(v_B < width, x_B, float("-inf"))
        in_list_B = (tl.load(mask_ptr + v_B // 32, v_B < width, 0, volatile=True) >> (v_B % 32)) & 1
        rest_B = tl.where(in_list_B == 0, x_B / temperature, float("-inf"))
        largest_rest, sum_rest = _added(largest_rest, sum_rest, rest_B)
        if HAS_LABELS:
            largest_1, sum_1 = _added(largest_1, sum_1, x_B)
            label_x = tl.maximum(label_x, tl.max(tl.where(v_B == label, x_B, float("-inf")), 0))

    # From here on less `offset`, so that a common offset of the logits takes no digits of their differences.
    empty = largest_rest == float("-inf")
    offset = tl.where(empty, 0.0, largest_rest)
    lse_rest = tl.where(empty, float("-inf"), largest_rest - offset + tl.log(sum_rest))
    a_K -= offset
    largest_a = tl.max(a_K, 0)
    lse_listed = largest_a + tl.log(tl.sum(tl.exp(a_K - tl.where(largest_a == float("-inf"), 0.0, largest_a)), 0))
    lse = _log_sum(lse_rest, lse_listed)
    lse += lse - lse  # nan for a logit of +inf, or -inf in all columns
    lse_1 = largest_1 + tl.log(sum_1)
    log_q_K = a_K - lse
    log_q_rest = lse_rest - lse
    value = tl.sum(tl.where(p_K > 0, p_K * (log_p_K - log_q_K), 0.0), 0)
    if HAS_TAIL:
        value += tl.where(tail > 0, tail * (tl.log(tail) - log_q_rest), 0.0)
    value += (lse + log_total) * 0.0
    value = tl.where(stray != 0, float("nan"), value)
    weighed = weight != 0
    tl.store(terms_ptr + row * 2, tl.where(weighed, weight * temperature * temperature * value, 0.0))
    tl.store(terms_ptr + row * 2 + 1, tl.where(labelled, largest_1 - label_x + tl.log(sum_1), 0.0))

    if HAS_GRAD:
        factor = weight * soft * temperature
        counts = weighed & (soft != 0)
        hard = tl.where(labelled, hard, 0.0)
        for start in range(0, width, BLOCK):
            v_B = start + tl.arange(0, BLOCK)
            x_B = capped(tl.load(student_ptr + v_B, v_B < width, 0.0).to(WIDE), student_scale, student_cap, HAS_STUDENT_CAP)
            in_list_B = (tl.load(mask_ptr + v_B // 32, v_B < width, 0, volatile=True) >> (v_B % 32)) & 1
            of_rest_B = tl.exp(x_B / temperature - offset - tl.where(empty, 0.0, lse_rest))
            g_B = tl.where(counts, of_rest_B * (tl.exp(log_q_rest) - tail) * factor, 0.0)
            g_B = _finished(g_B, x_B, v_B, label, lse_1, hard, student_scale, student_cap, HAS_STUDENT_CAP)
            tl.store(grad_ptr + v_B, g_B.to(grad_ptr.dtype.element_ty), (v_B < width) & (in_list_B == 0))
        g_K = tl.where(counts, (tl.exp(log_q_K) - p_K) * factor, 0.0)
        g_K = _finished(g_K, x_K, index_K, label, lse_1, hard, student_scale, student_cap, HAS_STUDENT_CAP)
        tl.store(grad_ptr + index_K, g_K.to(grad_ptr.dtype.element_ty), used_K)


def sparse_distill_rows_triton(
    student_NV: Tensor,
    teacher: SparseTeacher,
    targets: Targets,
    options: DistillOptions,
    *,
    terms_N2: Tensor,
    grad_NV: Tensor | None,
) -> None:
    """Compute what distill_torch.distill_rows_torch does.

    A token listed outside of the vocabulary makes the row's soft term nan here.
    """
    rows, width = student_NV.shape[0], options.width(student_NV.shape[1], student_NV.shape[1])
    listed, (labels_N, weights_N) = teacher.indices_NK.shape[1], targets
    if listed > _LARGEST:
        raise ValueError(f"the Triton path takes up to {_LARGEST} listed tokens a row, got {listed}; use backend='torch'")
    if grad_NV is not None and width < grad_NV.shape[1]:
        grad_NV[:, width:].zero_()
    if rows == 0:
        return
    # A bit a column: whether it is listed.
    words = triton.cdiv(width, 32)
    mask = torch.zeros(rows, words, dtype=torch.int32, device=student_NV.device)
    # What is absent is compiled out; its pointer is any other tensor's and is never read.
    present = {
        "HAS_TAIL": teacher.tail_N is not None,
        "HAS_LABELS": labels_N is not None,
        "HAS_WEIGHTS": weights_N is not None,
        "HAS_GRAD": grad_NV is not None,
    }
    with on_device(student_NV):
        sparse_kernel[(rows,)](
            student_NV,
            teacher.indices_NK.contiguous(),
            teacher.log_probabilities_NK.contiguous(),
            terms_N2 if teacher.tail_N is None else teacher.tail_N.contiguous(),
            mask if labels_N is None else labels_N.contiguous(),
            terms_N2 if weights_N is None else weights_N.contiguous(),
            terms_N2,
            student_NV if grad_NV is None else grad_NV,
            mask,
            student_NV.stride(0),
            0 if grad_NV is None else grad_NV.stride(0),
            rows,
            width,
            listed,
            words,
            options.ignore_index,
            options.temperature,
            options.soft,
            options.hard,
            options.student_scale,
            options.student_softcap or 1.0,
            **present,
            **_constexprs(options, listed, terms_N2.dtype),
            num_warps=_WARPS,
        )


def _constexprs(options: DistillOptions, listed: int, wide: torch.dtype) -> dict[str, Any]:
    return {
        "HAS_STUDENT_CAP": options.student_softcap is not None,
        "LISTED_POW2": triton.next_power_of_2(listed),
        "BLOCK": _BLOCK,
        "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
    }


def shipped_launches() -> list[Launch]:
    """Lists of 32 tokens, and the longest; with everything switched on."""
    launches = []
    for dtype, listed in (("bfloat16", 32), ("float16", 32), ("float32", 32), ("bfloat16", _LARGEST)):
        options = DistillOptions(temperature=2.0, student_softcap=30.0 if listed == 32 else None)
        present = dict.fromkeys(("HAS_TAIL", "HAS_LABELS", "HAS_WEIGHTS", "HAS_GRAD"), True)
        types = {"student_ptr": dtype, "grad_ptr": dtype, "indices_ptr": "int64", "labels_ptr": "int64", "mask_ptr": "int32"}
        types |= dict.fromkeys(("log_probabilities_ptr", "tail_ptr", "weights_ptr", "terms_ptr"), "float32")
        constexprs = present | _constexprs(options, listed, torch.float32)
        launches.append(launch(f"sparse {dtype} K={listed}", sparse_kernel, types, _INTEGERS, constexprs, _WARPS))
    return launches
