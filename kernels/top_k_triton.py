"""The Triton path of top_k.py: one pass over the gradient, then work on candidates only; nothing waits for the GPU.

    a sample      guesses a key that, but for one time in 30,000, the k-th largest reaches (keys: the bits of |v|)
    candidates    the one pass: v = gradient + residual, written; the numbers of elements at or above the guess, tile by tile
                  in order. Launched once more, with the guess 0, it does nothing where the first found k
    digit         four times: counts the candidates by 8 more bits of their keys, of those that share the k-th's bits so far
    tally, emit   how many of each tile are above the k-th and equal to it, their sums over the tiles, and so each one's place

Counts are integers, so the order in which programs add them makes no difference: the result is the same bits
every time, whatever the sample. In the worst case (everything equal) all elements are candidates, which costs
six passes.

Legend: N elements, K selected, P tiles, S elements worked on at a time.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels.top_k_torch import guessed_key
from fastdistil.kernels.triton_launch import Launch, launch, on_device

_TILE = 4096
# Candidates of a tile worked on at a time; at a density of 1% a tile has about 50.
_STEP = 256
_DIGITS = 4


@triton.jit
def _key(v):
    """Ints in the order of |v|; all that is not finite is the same, above the rest."""
    return tl.minimum(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)


@triton.jit
def candidates_kernel(
    gradient_ptr,
    residual_ptr,
    floor_ptr,
    found_ptr,
    numbers_ptr,
    counts_ptr,
    elements,
    k,
    first,
    HAS_RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """numbers[P, TILE]: of a tile's candidates, in order; counts[P]. found: how many candidates an earlier launch found."""
    if tl.load(found_ptr) < k:
        tile = (tl.program_id(0) + first).to(tl.int64)
        at_S = tile * TILE + tl.arange(0, TILE)
        inside_S = at_S < elements
        if WHOLE:
            v_S = tl.load(gradient_ptr + at_S)
            if HAS_RESIDUAL:
                v_S += tl.load(residual_ptr + at_S)
                tl.store(residual_ptr + at_S, v_S)
            keep_S = _key(v_S) >= tl.load(floor_ptr)
        else:
            v_S = tl.load(gradient_ptr + at_S, inside_S, 0.0)
            if HAS_RESIDUAL:
                v_S += tl.load(residual_ptr + at_S, inside_S, 0.0)
                tl.store(residual_ptr + at_S, v_S, inside_S)
            keep_S = (_key(v_S) >= tl.load(floor_ptr)) & inside_S
        # A candidate's place among its tile's.
        rank_S = tl.cumsum(keep_S.to(tl.int32), 0) - 1
        tl.store(numbers_ptr + tile * TILE + rank_S, at_S.to(tl.int32), keep_S)
        tl.store(counts_ptr + tile, tl.sum(keep_S.to(tl.int32), 0))


@triton.jit
def _narrowed(states_ptr, counts_ptr, k, DIGIT: tl.constexpr):
    """(the bits of the k-th largest key that the first DIGIT digits give, how many are still to be taken of
    those that share them)."""
    prefix = 0
    remaining = k
    if DIGIT > 1:
        prefix = tl.load(states_ptr + 2 * (DIGIT - 1))
        remaining = tl.load(states_ptr + 2 * (DIGIT - 1) + 1)
    if DIGIT > 0:
        digit_256 = tl.arange(0, 256)
        count_256 = tl.load(counts_ptr + 256 * (DIGIT - 1) + digit_256)
        above_256 = tl.sum(count_256, 0) - tl.cumsum(count_256, 0)
        this_256 = (above_256 < remaining) & (above_256 + count_256 >= remaining)
        prefix = prefix | (tl.sum(tl.where(this_256, digit_256, 0), 0) << (32 - 8 * DIGIT))
        remaining = remaining - tl.sum(tl.where(this_256, above_256, 0), 0)
    return prefix, remaining


@triton.jit
def digit_kernel(
    v_ptr, numbers_ptr, counts_ptr, states_ptr, digits_ptr, k, DIGIT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr
):
    """Adds to digits[DIGIT, 256]; digit 0 is bits 31 (clear) to 24. states[DIGIT] gets what the digits before
    give, so that later launches need not go back."""
    tile = tl.program_id(0).to(tl.int64)
    prefix, remaining = _narrowed(states_ptr, digits_ptr, k, DIGIT)
    if tile == 0:
        tl.store(states_ptr + 2 * DIGIT, prefix)
        tl.store(states_ptr + 2 * DIGIT + 1, remaining)
    count = tl.load(counts_ptr + tile)
    total_256 = tl.zeros((256,), tl.int32)
    for start in range(0, count, STEP):
        slot_S = start + tl.arange(0, STEP)
        at_S = tl.load(numbers_ptr + tile * TILE + slot_S, slot_S < count, 0)
        key_S = _key(tl.load(v_ptr + at_S, slot_S < count, 0.0))
        shares_S = slot_S < count
        if DIGIT > 0:
            shares_S = shares_S & ((key_S >> (32 - 8 * DIGIT)) == (prefix >> (32 - 8 * DIGIT)))
        total_256 += tl.histogram((key_S >> (24 - 8 * DIGIT)) & 255, 256, mask=shares_S)
    tl.atomic_add(digits_ptr + 256 * DIGIT + tl.arange(0, 256), total_256, total_256 > 0)


@triton.jit
def tally_kernel(
    v_ptr, numbers_ptr, counts_ptr, states_ptr, digits_ptr, tallies_ptr, tiles, k, TILE: tl.constexpr, STEP: tl.constexpr
):
    """tallies[2, P]: a tile's candidates above the k-th largest key, and those equal to it."""
    tile = tl.program_id(0).to(tl.int64)
    kth, _ = _narrowed(states_ptr, digits_ptr, k, 4)
    count = tl.load(counts_ptr + tile)
    above_S = tl.zeros((STEP,), tl.int32)
    equal_S = tl.zeros((STEP,), tl.int32)
    for start in range(0, count, STEP):
        slot_S = start + tl.arange(0, STEP)
        at_S = tl.load(numbers_ptr + tile * TILE + slot_S, slot_S < count, 0)
        key_S = _key(tl.load(v_ptr + at_S, slot_S < count, 0.0))
        above_S += ((key_S > kth) & (slot_S < count)).to(tl.int32)
        equal_S += ((key_S == kth) & (slot_S < count)).to(tl.int32)
    tl.store(tallies_ptr + tile, tl.sum(above_S, 0))
    tl.store(tallies_ptr + tiles + tile, tl.sum(equal_S, 0))


@triton.jit
def emit_kernel(
    v_ptr,
    numbers_ptr,
    counts_ptr,
    states_ptr,
    digits_ptr,
    tallies_ptr,
    ends_ptr,
    indices_ptr,
    values_ptr,
    tiles,
    k,
    CLEAR: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """The selected elements at their places: all above the k-th key, and the first `remaining` of those equal
    to it. ends[2, P]: the tallies' sums up to and with a tile. CLEAR: v is the residual, where what is sent
    becomes 0."""
    tile = tl.program_id(0).to(tl.int64)
    kth, remaining = _narrowed(states_ptr, digits_ptr, k, 4)
    count = tl.load(counts_ptr + tile)
    # How many above and equal lie in the tiles before this one.
    above = tl.load(ends_ptr + tile) - tl.load(tallies_ptr + tile)
    equal = tl.load(ends_ptr + tiles + tile) - tl.load(tallies_ptr + tiles + tile)
    for start in range(0, count, STEP):
        slot_S = start + tl.arange(0, STEP)
        inside_S = slot_S < count
        at_S = tl.load(numbers_ptr + tile * TILE + slot_S, inside_S, 0)
        v_S = tl.load(v_ptr + at_S, inside_S, 0.0)
        key_S = _key(v_S)
        is_above_S = ((key_S > kth) & inside_S).to(tl.int32)
        is_equal_S = ((key_S == kth) & inside_S).to(tl.int32)
        # Selected ones before each element, of either kind; of the equal ones at most `remaining` are selected.
        above_before_S = above + tl.cumsum(is_above_S, 0) - is_above_S
        equal_before_S = equal + tl.cumsum(is_equal_S, 0) - is_equal_S
        taken_S = (is_above_S == 1) | ((is_equal_S == 1) & (equal_before_S < remaining))
        place_S = above_before_S + tl.minimum(equal_before_S, remaining)
        tl.store(indices_ptr + place_S, at_S, taken_S)
        tl.store(values_ptr + place_S, v_S, taken_S)
        if CLEAR:
            tl.store(v_ptr + at_S, tl.zeros((STEP,), tl.float32), taken_S)
        above += tl.sum(is_above_S, 0)
        equal += tl.sum(is_equal_S, 0)


# ---- launches ----


def _find_candidates(
    v_N: Tensor,
    residual_N: Tensor | None,
    k: int,
    *,
    floor: Tensor,
    count: Tensor,
    numbers_PS: Tensor,
    counts_P: Tensor,
) -> None:
    """Launch candidates_kernel on the tiles that lie within v, then on what remains."""
    numel, full_tiles = v_N.numel(), v_N.numel() // _TILE
    for first, programs, within in ((0, full_tiles, True), (full_tiles, len(counts_P) - full_tiles, False)):
        if programs:
            candidates_kernel[(programs,)](
                v_N,
                v_N if residual_N is None else residual_N,
                floor,
                count,
                numbers_PS,
                counts_P,
                numel,
                k,
                first,
                HAS_RESIDUAL=residual_N is not None,
                WHOLE=within,
                TILE=_TILE,
                num_warps=8,
            )


def top_k_select_triton(gradient_N: Tensor, residual_N: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    tiles = triton.cdiv(gradient_N.numel(), _TILE)
    none, steps = gradient_N.new_zeros((), dtype=torch.int32), {"TILE": _TILE, "STEP": _STEP, "num_warps": 4}
    # Candidates and their number by tile; then the k-th key's digits and the tallies by tile.
    numbers_PS = none.new_empty(tiles, _TILE)
    counts_P, tallies_2P = none.new_empty(tiles), none.new_empty(2, tiles)
    states, digits = none.new_zeros(_DIGITS, 2), none.new_zeros(_DIGITS, 256)
    indices_K, values_K = none.new_empty(k), gradient_N.new_empty(k)
    v_N = gradient_N if residual_N is None else residual_N
    with on_device(gradient_N):
        floor = guessed_key(gradient_N, residual_N, k)
        out = {"numbers_PS": numbers_PS, "counts_P": counts_P}
        _find_candidates(gradient_N, residual_N, k, floor=floor, count=none, **out)
        # Where the guess was too high: once more, with the guess 0.
        _find_candidates(v_N, None, k, floor=none, count=counts_P.sum(dtype=torch.int32), **out)
        for digit in range(_DIGITS):
            digit_kernel[(tiles,)](v_N, numbers_PS, counts_P, states, digits, k, DIGIT=digit, **steps)
        tally_kernel[(tiles,)](v_N, numbers_PS, counts_P, states, digits, tallies_2P, tiles, k, **steps)
        ends_2P = tallies_2P.cumsum(1, dtype=torch.int32)
        emit_kernel[(tiles,)](
            v_N,
            numbers_PS,
            counts_P,
            states,
            digits,
            tallies_2P,
            ends_2P,
            indices_K,
            values_K,
            tiles,
            k,
            CLEAR=residual_N is not None,
            **steps,
        )
    return indices_K, values_K


def shipped_launches() -> list[Launch]:
    launches = []
    floats = dict.fromkeys(("gradient_ptr", "residual_ptr", "v_ptr", "values_ptr"), "float32")

    def add(name: str, fn: Any, integers: tuple[str, ...], warps: int, **constexprs: Any) -> None:
        types = {argument: floats.get(argument, "int32") for argument in fn.arg_names if argument.endswith("_ptr")}
        launches.append(launch(name, fn, types, integers, constexprs, warps))

    for residual in (False, True):
        for in_bounds in (False, True):
            name = f"candidates{' residual' if residual else ''}{' whole' if in_bounds else ''}"
            constexprs = {"HAS_RESIDUAL": residual, "WHOLE": in_bounds, "TILE": _TILE}
            add(name, candidates_kernel, ("elements", "k", "first"), 8, **constexprs)
        add(f"emit{' residual' if residual else ''}", emit_kernel, ("tiles", "k"), 4, CLEAR=residual, TILE=_TILE, STEP=_STEP)
    for digit in range(_DIGITS):
        add(f"digit {digit}", digit_kernel, ("k",), 4, DIGIT=digit, TILE=_TILE, STEP=_STEP)
    add("tally", tally_kernel, ("tiles", "k"), 4, TILE=_TILE, STEP=_STEP)
    return launches
