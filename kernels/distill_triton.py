"""The Triton path of distill.py: one launch that reads both logits once and writes the gradient once, for every vocabulary.

A row is cut into K segments of BLOCK columns, one program each. A program keeps its segment of both sides in
registers, adds up what it knows of the row (maxima, sums of exponentials, the divergence's mean), publishes
that, waits for the row's other programs, combines all K parts in one fixed order, and writes the gradient of
its segment from registers. No row is too long, no program holds more than BLOCK columns, and 3 N V elements
move.

Waiting is safe because work is numbered by a ticket and not by the program's index. Tickets are drawn when a
program starts, so the K programs of the first unfinished row have all started as soon as K programs fit on
the device together: each publishes before it waits, so that row ends, and with it, one after another, all
rows. The launcher checks K against the number of multiprocessors. Which program gets which ticket changes
nothing in the result.

Where that cannot be had (the interpreter runs programs one after another; AMD, whose scheduler has not been
tried; a K beyond the multiprocessors) the same kernel is launched once for each exchange and reads its
segment anew: 5 N V elements, 7 for JSD.

Legend: N rows, V vocabulary, K segments of a row, B columns of a segment.
"""

# Conditions known to the compiler stand apart from those of the device.
# ruff: noqa: SIM102
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels.distill_options import DistillOptions, Divergence, Targets
from fastdistil.kernels.triton_launch import Launch, launch, on_device

DIVERGENCES: dict[Divergence, int] = {"forward-kl": 0, "reverse-kl": 1, "jsd": 2}
# Stages of a launch: all of it, or up to one of the exchanges.
FUSED, FIRST, SECOND, LAST = 0, 1, 2, 3
# Per segment: max and sum of exponentials of student / T, teacher / T and student, the divergence's
# unnormalised mean, the label's logit; then JSD's two sums.
PARTS = 10
INTEGERS = (
    *("student_row_stride", "teacher_row_stride", "grad_row_stride"),
    *("rows", "width", "segments", "ignore_index"),
)


def tile(width: int) -> tuple[int, int]:
    """(columns of a segment, warps): 8 columns a thread, which are one 16-byte load of bfloat16.

    That leaves registers for two or three programs on a multiprocessor, some of which move data while another
    waits. Rows beyond 2^16 columns take segments twice as long: each of K programs reads K parts.
    """
    return (2048, 8) if width <= 2**16 else (4096, 16)


@triton.jit
def capped(x, scale, cap, HAS_CAP: tl.constexpr):
    x = x * scale
    if HAS_CAP:
        # cap tanh(x / cap), finite for infinite x.
        x = cap * (1.0 - 2.0 / (tl.exp(2.0 * x / cap) + 1.0))
    return x


@triton.jit
def _finite(largest):
    """What a segment's numbers are taken relative to: its largest, or 0 where all are -inf."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _exp_sum(x_B):
    """(max, sum exp(x - max)); (-inf, 0) where all are -inf."""
    largest = tl.max(x_B, 0)
    return largest, tl.sum(tl.exp(x_B - _finite(largest)), 0)


@triton.jit
def _combined(largest_K, sum_K):
    """(max, sum exp(x - max), the factors that bring each part to that max) of the parts of a row."""
    largest = tl.max(largest_K, 0)
    factor_K = tl.where(largest_K == float("-inf"), 0.0, tl.exp(largest_K - largest))
    return largest, tl.sum(sum_K * factor_K, 0), factor_K


@triton.jit
def _wait(counter_ptr, published):
    """Publish what this program stored, and wait until `published` programs have."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < published:
        pass
    tl.debug_barrier()


@triton.jit
def distill_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    weights_ptr,
    terms_ptr,
    grad_ptr,
    parts_ptr,
    counters_ptr,
    student_row_stride,
    teacher_row_stride,
    grad_row_stride,
    rows,
    width,
    segments,
    ignore_index,
    temperature,
    beta,
    soft,
    hard,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    DIVERGENCE: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    STAGE: tl.constexpr,
    SEGMENTS_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    SINGLE: tl.constexpr = SEGMENTS_POW2 == 1
    if STAGE == 0 and not SINGLE:
        number = tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")
    else:
        number = tl.program_id(0)
    row = (number // segments).to(tl.int64)
    segment = number % segments

    label = ignore_index.to(tl.int64)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
    weight = tl.full((), 1.0, WIDE)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row).to(WIDE)
    labelled = label != ignore_index
    weighed = weight != 0
    if not HAS_TEACHER:
        weighed = False

    # Columns of a segment begin where 16-byte loads may: rows need not (V = 30522 in bfloat16). So the first
    # segment of a row begins up to 7 columns before it, and `column` of those is negative.
    start = row * student_row_stride
    aligned = start // 8 * 8 + segment.to(tl.int64) * BLOCK
    lane_B = tl.arange(0, BLOCK)
    before = (start - start // 8 * 8).to(tl.int32)
    column_B = segment * BLOCK - before + lane_B
    inside_B = (column_B >= 0) & (column_B < width)
    inner = (segment * BLOCK >= before) & ((segment + 1) * BLOCK - before <= width)
    if SAME_STRIDES:
        teacher_at = aligned
        grad_at = aligned
    else:
        teacher_at = row * teacher_row_stride + segment.to(tl.int64) * BLOCK - before
        grad_at = row * grad_row_stride + segment.to(tl.int64) * BLOCK - before

    if labelled | weighed:
        # Masked loads are not vectorised, and few segments need them.
        if inner:
            x_B = tl.load(student_ptr + aligned + lane_B).to(WIDE)
        else:
            x_B = tl.load(student_ptr + aligned + lane_B, inside_B, 0.0).to(WIDE)
        x_B = tl.where(inside_B, capped(x_B, student_scale, student_cap, HAS_STUDENT_CAP), float("-inf"))
        a_B = x_B / temperature
        b_B = a_B
        if HAS_TEACHER:
            if inner:
                b_B = tl.load(teacher_ptr + teacher_at + lane_B).to(WIDE)
            else:
                b_B = tl.load(teacher_ptr + teacher_at + lane_B, inside_B, 0.0).to(WIDE)
            b_B = capped(b_B, teacher_scale, teacher_cap, HAS_TEACHER_CAP) / temperature
            b_B = tl.where(inside_B, b_B, float("-inf"))

        # What this segment knows of its row.
        max_a, sum_a = _exp_sum(a_B)
        max_b, sum_b = _exp_sum(b_B)
        max_1, sum_1 = max_a, sum_a
        if HAS_LABELS and not UNIT_TEMPERATURE:
            if labelled:
                max_1, sum_1 = _exp_sum(x_B)
        label_x = tl.max(tl.where(column_B == label, x_B, float("-inf")), 0)
        mean = sum_a * 0.0
        # Each side less its largest before the difference: b - a would round away the digits that an offset
        # between the sides takes.
        if DIVERGENCE == 0:
            d_B = b_B - _finite(max_b)
            e_B = tl.exp(d_B)
            mean = tl.sum(tl.where(e_B > 0, e_B * (d_B - (a_B - _finite(max_a))), 0.0), 0)
        elif DIVERGENCE == 1:
            d_B = a_B - _finite(max_a)
            e_B = tl.exp(d_B)
            mean = tl.sum(tl.where(e_B > 0, e_B * (d_B - (b_B - _finite(max_b))), 0.0), 0)

        # The row: what all its segments know.
        k_K = tl.arange(0, SEGMENTS_POW2)
        exists_K = k_K < segments
        own_ptr = parts_ptr + (row * segments + segment) * 10
        all_ptr = parts_ptr + (row * segments + k_K) * 10
        if not SINGLE:
            if STAGE == 0 or STAGE == 1:
                tl.store(own_ptr + 0, max_a)
                tl.store(own_ptr + 1, sum_a)
                tl.store(own_ptr + 2, max_b)
                tl.store(own_ptr + 3, sum_b)
                tl.store(own_ptr + 4, max_1)
                tl.store(own_ptr + 5, sum_1)
                tl.store(own_ptr + 6, mean)
                tl.store(own_ptr + 7, label_x)
            if STAGE == 0:
                _wait(counters_ptr + 1 + row, segments)
        if SINGLE or STAGE != 1:
            if SINGLE:
                if DIVERGENCE == 0:
                    mean = mean / sum_b
                elif DIVERGENCE == 1:
                    mean = mean / sum_a
            else:
                # Volatile: the first-level cache may hold older lines of the workspace.
                max_a_K = tl.load(all_ptr + 0, exists_K, float("-inf"), volatile=True)
                sum_a_K = tl.load(all_ptr + 1, exists_K, 0.0, volatile=True)
                max_b_K = tl.load(all_ptr + 2, exists_K, float("-inf"), volatile=True)
                sum_b_K = tl.load(all_ptr + 3, exists_K, 0.0, volatile=True)
                max_a, sum_a, factor_a_K = _combined(max_a_K, sum_a_K)
                max_b, sum_b, factor_b_K = _combined(max_b_K, sum_b_K)
                max_1, sum_1, _ = _combined(
                    tl.load(all_ptr + 4, exists_K, float("-inf"), volatile=True),
                    tl.load(all_ptr + 5, exists_K, 0.0, volatile=True),
                )
                mean_K = tl.load(all_ptr + 6, exists_K, 0.0, volatile=True)
                label_x = tl.max(tl.load(all_ptr + 7, exists_K, float("-inf"), volatile=True), 0)
                # From the segments' largest logits to the row's. A segment too small to count may hold an infinite mean.
                shift_K = (_finite(max_b_K) - max_b) - (_finite(max_a_K) - max_a)
                if DIVERGENCE == 0:
                    mean_K = (mean_K + sum_b_K * shift_K) * factor_b_K
                    mean = tl.sum(tl.where(factor_b_K > 0, mean_K, 0.0), 0) / sum_b
                elif DIVERGENCE == 1:
                    mean_K = (mean_K - sum_a_K * shift_K) * factor_a_K
                    mean = tl.sum(tl.where(factor_a_K > 0, mean_K, 0.0), 0) / sum_a

            # Largest and logarithm apart: a common offset of the logits takes no digits of their differences.
            log_a, log_b = tl.log(sum_a), tl.log(sum_b)
            # nan where a side has no distribution.
            broken = (max_a + log_a) - (max_a + log_a) + ((max_b + log_b) - (max_b + log_b))
            # Not exp(a - lse): the rounding of a logarithm of ten is ten times that of a probability.
            q_B = tl.exp(a_B - max_a) * (1.0 / sum_a)
            if DIVERGENCE == 0:
                value = mean + (log_a - log_b) + broken
                g_B = q_B - tl.exp(b_B - max_b) * (1.0 / sum_b)
            elif DIVERGENCE == 1:
                value = mean + (log_b - log_a) + broken
                g_B = tl.where(q_B > 0, q_B * (((a_B - max_a) - (b_B - max_b)) - mean), 0.0) + broken
            else:
                p_B = tl.exp(b_B - max_b) * (1.0 / sum_b)
                log_m_B = tl.log(beta * p_B + (1.0 - beta) * q_B)
                student_B = tl.where(q_B > 0, (a_B - max_a - log_a) - log_m_B, 0.0)
                student_mean = tl.sum(q_B * student_B, 0)
                teacher_mean = tl.sum(p_B * tl.where(p_B > 0, (b_B - max_b - log_b) - log_m_B, 0.0), 0)
                if not SINGLE:
                    if STAGE == 0 or STAGE == 2:
                        tl.store(own_ptr + 8, student_mean)
                        tl.store(own_ptr + 9, teacher_mean)
                    if STAGE == 0:
                        _wait(counters_ptr + 1 + rows + row, segments)
                    if STAGE != 2:
                        student_mean = tl.sum(tl.load(all_ptr + 8, exists_K, 0.0, volatile=True), 0)
                        teacher_mean = tl.sum(tl.load(all_ptr + 9, exists_K, 0.0, volatile=True), 0)
                value = beta * teacher_mean + (1.0 - beta) * student_mean + broken
                g_B = (1.0 - beta) * q_B * (student_B - student_mean) + broken

            if SINGLE or STAGE != 2:
                if segment == 0:
                    soft_value = tl.where(weighed, weight * temperature * temperature * value, 0.0)
                    tl.store(terms_ptr + row * 2, soft_value)
                    tl.store(terms_ptr + row * 2 + 1, tl.where(labelled, max_1 - label_x + tl.log(sum_1), 0.0))
                if HAS_GRAD:
                    counts = weighed & (soft != 0)
                    g_B = tl.where(counts, g_B * (weight * soft * temperature), 0.0)
                    if HAS_LABELS:
                        if labelled & (hard != 0):
                            q_1_B = q_B
                            if not UNIT_TEMPERATURE:
                                q_1_B = tl.exp(x_B - max_1) * (1.0 / sum_1)
                            g_B += q_1_B * hard - tl.where(column_B == label, hard, 0.0)
                    if HAS_STUDENT_CAP:
                        # d cap tanh(x / cap) = 1 - tanh^2; what is out stays out, where x may be nan.
                        g_B = tl.where(g_B == 0, 0.0, g_B * (1.0 - (x_B / student_cap) * (x_B / student_cap)))
                    g_B = (g_B * student_scale).to(grad_ptr.dtype.element_ty)
                    if inner:
                        tl.store(grad_ptr + grad_at + lane_B, g_B)
                    else:
                        tl.store(grad_ptr + grad_at + lane_B, g_B, inside_B)
    elif SINGLE or STAGE == 0 or STAGE == 3:
        if segment == 0:
            tl.store(terms_ptr + row * 2 + tl.arange(0, 2), tl.zeros((2,), WIDE))
        if HAS_GRAD:
            tl.store(grad_ptr + grad_at + lane_B, tl.zeros((BLOCK,), grad_ptr.dtype.element_ty), inside_B)


@triton.jit
def scale_kernel(tensor_ptr, factor_ptr, elements, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    factor = tl.load(factor_ptr).to(WIDE)
    if factor != 1.0:
        at_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside_B = at_B < elements
        x_B = tl.load(tensor_ptr + at_B, inside_B, 0.0).to(WIDE) * factor
        tl.store(tensor_ptr + at_B, x_B.to(tensor_ptr.dtype.element_ty), inside_B)


def distill_rows_triton(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    targets: Targets,
    options: DistillOptions,
    *,
    terms_N2: Tensor,
    grad_NV: Tensor | None,
    block: int | None = None,
    fused: bool | None = None,
) -> None:
    """Compute what distill_rows_torch does.

    block: columns of a segment. fused: exchange within one launch; None: where that is safe.
    """
    rows = student_NV.shape[0]
    width = options.width(student_NV.shape[1], student_NV.shape[1] if teacher_NV is None else teacher_NV.shape[1])
    if grad_NV is not None and width < grad_NV.shape[1]:
        grad_NV[:, width:].zero_()
    if rows == 0:
        return
    # K segments a row: one more where a row begins up to 7 columns before a 16-byte load may.
    chosen, warps = tile(width)
    block = block or chosen
    segments = triton.cdiv(width + (7 if width > block or student_NV.stride(0) % 8 else 0), block)
    programs = rows * segments
    if programs >= 2**31:
        raise ValueError(f"{rows} rows of {width} columns are more than one launch can number; give fewer rows at a time")
    if fused is None:
        fused = segments > 1 and _can_wait(student_NV.device, segments)
    # What the programs of a row tell each other, and the counters (the ticket, two a row) by which they wait.
    wide = terms_N2.dtype
    shape = (rows, segments, PARTS) if segments > 1 else (1,)
    parts = torch.empty(shape, dtype=wide, device=student_NV.device)
    counters = torch.zeros(1 + 2 * rows if fused else 1, dtype=torch.int32, device=student_NV.device)
    labels, weights = (None if tensor is None else tensor.contiguous() for tensor in targets)
    # One launch for all, or one for each exchange.
    stages = [FUSED] if fused or segments == 1 else [FIRST, SECOND, LAST] if options.divergence == "jsd" else [FIRST, LAST]
    strides = [tensor.stride(0) for tensor in (student_NV, teacher_NV, grad_NV) if tensor is not None]
    constexprs = _constexprs(options, wide, block, segments, len(set(strides)) == 1)
    # What is absent is compiled out; its pointer is any other tensor's and is never read.
    present = {
        "HAS_TEACHER": teacher_NV is not None,
        "HAS_LABELS": labels is not None,
        "HAS_WEIGHTS": weights is not None,
        "HAS_GRAD": grad_NV is not None,
    }
    with on_device(student_NV):
        for stage in stages:
            distill_kernel[(programs,)](
                student_NV,
                student_NV if teacher_NV is None else teacher_NV,
                counters if labels is None else labels,
                terms_N2 if weights is None else weights,
                terms_N2,
                student_NV if grad_NV is None else grad_NV,
                parts,
                counters,
                student_NV.stride(0),
                0 if teacher_NV is None else teacher_NV.stride(0),
                0 if grad_NV is None else grad_NV.stride(0),
                rows,
                width,
                segments,
                options.ignore_index,
                options.temperature,
                options.beta,
                options.soft,
                options.hard,
                options.student_scale,
                options.teacher_scale,
                options.student_softcap or 1.0,
                options.teacher_softcap or 1.0,
                STAGE=stage,
                **present,
                **constexprs,
                num_warps=warps,
            )


def _constexprs(options: DistillOptions, wide: torch.dtype, block: int, segments: int, same_strides: bool) -> dict[str, Any]:
    return {
        "DIVERGENCE": DIVERGENCES[options.divergence],
        "HAS_STUDENT_CAP": options.student_softcap is not None,
        "HAS_TEACHER_CAP": options.teacher_softcap is not None,
        "UNIT_TEMPERATURE": options.temperature == 1.0,
        "SAME_STRIDES": same_strides,
        "SEGMENTS_POW2": triton.next_power_of_2(segments),
        "BLOCK": block,
        "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
    }


def _can_wait(device: torch.device, segments: int) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or triton.knobs.runtime.interpret:
        return False
    return segments <= torch.cuda.get_device_properties(device).multi_processor_count


def scale_triton_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor (0-dimensional) in float32 or wider; a contiguous tensor of any size. Untouched where factor is 1."""
    block, elements = 4096, tensor.numel()
    assert tensor.is_contiguous(), tensor.stride()
    if elements == 0:
        return
    wide = tl.float64 if tensor.dtype == torch.float64 else tl.float32
    with on_device(tensor):
        scale_kernel[(triton.cdiv(elements, block),)](tensor, factor, elements, BLOCK=block, WIDE=wide, num_warps=8)


def shipped_launches() -> list[Launch]:
    """Every configuration that ships, but for mixtures of options that only leave code out."""
    launches = []
    sides = [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"), ("bfloat16", "float32")]
    cases: list[tuple[str, str, Divergence, int, float | None]] = [
        (student, teacher, "forward-kl", width, None) for student, teacher in sides for width in (1024, 30522, 128256)
    ]
    cases += [("bfloat16", "bfloat16", divergence, width, None) for divergence in DIVERGENCES for width in (30522, 262144)]
    cases += [("bfloat16", "bfloat16", "jsd", 1024, None), ("bfloat16", "bfloat16", "jsd", 262144, 30.0)]
    for student, teacher, divergence, width, cap in dict.fromkeys(cases):
        block, warps = tile(width)
        options = DistillOptions(temperature=2.0, divergence=divergence, student_softcap=cap, teacher_softcap=cap)
        constexprs = _constexprs(options, torch.float32, block, triton.cdiv(width, block), student == teacher)
        constexprs |= dict.fromkeys(("HAS_TEACHER", "HAS_LABELS", "HAS_WEIGHTS", "HAS_GRAD"), True) | {"STAGE": FUSED}
        types = {
            "student_ptr": student,
            "teacher_ptr": teacher,
            "grad_ptr": student,
            "labels_ptr": "int64",
            **dict.fromkeys(("weights_ptr", "terms_ptr", "parts_ptr"), "float32"),
            "counters_ptr": "int32",
        }
        name = f"distill {divergence} {student} {teacher} V={width}{' softcap' if cap else ''}"
        launches.append(launch(name, distill_kernel, types, INTEGERS, constexprs, warps))
    for dtype in ("bfloat16", "float16", "float32"):
        constexprs = {"BLOCK": 4096, "WIDE": tl.float32}
        types = {"tensor_ptr": dtype, "factor_ptr": "float32"}
        launches.append(launch(f"scale {dtype}", scale_kernel, types, ("elements",), constexprs, 8))
    return launches
