"""What a compressor of gradients is: (gradient, state) -> (payload, state), and the collectives in between.

Legend: N elements of a bucket (in names of tensors), R ranks, C elements of a rank's part of it, B blocks of
a scale, K selected elements. A bucket's last parts are shorter than C, or empty.
"""

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, assert_never

import torch
from torch import Tensor

CompressionState = dict[str, Tensor]
"""The tensors that one bucket keeps between updates; {} where there are none."""
StateKind = Literal["rank", "chunk", "shared"]
"""rank: each rank has its own, and their sum is what matters. chunk: rank r has part r of a whole, [B of the
part, elements of a block]. shared: the same on all ranks."""


class Request(NamedTuple):
    """One collective that an exchange waits for; it is sent the answer."""

    kind: Literal["allreduce", "all_to_all", "all_gather"]
    tensor: Tensor
    """1-D, contiguous. allreduce: the answer is the same tensor, summed. all_to_all, [R * c]: part i goes to
    rank i, and part j of the answer is from rank j. all_gather, [c]: the answer is [R * c], in rank order."""


CompressionSteps = Generator[Request, Tensor, tuple[Tensor, CompressionState]]
"""Returns the sum over ranks [N], perhaps in the gradient's memory, and the new state."""


@dataclass(frozen=True)
class BucketLayout:
    """What a bucket holds."""

    numel: int
    pieces: tuple[tuple[int, tuple[int, ...]], ...]
    """(first element, shape) of every parameter in it. What lies between them is padding."""
    index: int
    """The bucket's number: for seeds."""


class Compressor(Protocol):
    """`exchange` may overwrite `gradient` and the tensors of `state`. Nothing in it waits for the device."""

    linear: ClassVar[bool] = True
    """True if payloads can be summed on the way: they travel by allreduce, else by all-to-all and all-gather."""
    whole_parameters: ClassVar[bool] = False
    """True if a parameter must not be cut by the border of a bucket."""

    @property
    def state_kinds(self) -> Mapping[str, StateKind]:
        return {}

    def start(self, layout: BucketLayout, like: Tensor) -> CompressionState:
        """The state before the first update, on the device and in the dtype of `like`."""
        return {}

    def exchange(self, gradient_N: Tensor, state: CompressionState, layout: BucketLayout) -> CompressionSteps: ...

    def observe(self, summed_N: Tensor, state: CompressionState, layout: BucketLayout) -> CompressionState:
        """Return the state with what can be learnt from the sum over ranks, after an update that was sent uncompressed."""
        return state

    def wire_bytes(self, layout: BucketLayout) -> int:
        """Bytes that one rank sends for float32 gradients, with ring algorithms."""
        ...

    def requests(self, layout: BucketLayout) -> int:
        """Collectives that it makes for a bucket."""
        return 1

    def touched_bytes(self, layout: BucketLayout) -> int:
        """Bytes of memory that compressing and decompressing float32 gradients reads and writes, of what `auto` may choose."""
        return 0


@dataclass(frozen=True)
class Feedback(Compressor):
    """What was not sent waits in `residual`."""

    ranks: int
    error_feedback: bool

    @property
    def state_kinds(self) -> Mapping[str, StateKind]:
        return {"residual": "rank"} if self.error_feedback else {}

    def start(self, layout: BucketLayout, like: Tensor) -> CompressionState:
        return {"residual": like.new_zeros(layout.numel)} if self.error_feedback else {}

    def touched_bytes(self, layout: BucketLayout) -> int:
        """Bytes of the residual before the update, in float32: it is copied, and what holds is chosen (Buckets.settle)."""
        return (2 + 3) * 4 * layout.numel if self.error_feedback else 0


def part_numel(numel: int, ranks: int, unit: int) -> int:
    """C: a multiple of `unit`."""
    return -(-numel // (ranks * unit)) * unit


def ring_allreduce_bytes(ranks: int, nbytes: int) -> int:
    """That a rank sends."""
    return -(-2 * (ranks - 1) * nbytes // ranks)


def poison(gradient_N: Tensor) -> Tensor:
    """0-dimensional: 0, or nan where an element is not finite. For payloads, which may leave that element out."""
    largest: Tensor = torch.linalg.vector_norm(gradient_N, math.inf)
    return largest * 0.0


def chosen_numel(density: float, layout: BucketLayout) -> int:
    """K"""
    return max(1, round(density * layout.numel))


def redistribute(
    kinds: Mapping[str, StateKind], states: list[CompressionState], layout: BucketLayout, ranks: int
) -> list[CompressionState]:
    """Return the states of `ranks` new ranks, made from those of all old ones, in order.

    Residuals keep their sum. Ranks share memory.
    """
    new: list[CompressionState] = [{} for _ in range(ranks)]
    for name, kind in kinds.items():
        old = [state[name] for state in states]
        parts: list[Tensor]
        match kind:
            case "rank":
                parts = [sum(old[1:], start=old[0]) / ranks] * ranks
            case "chunk":
                unit = old[0].shape[1]
                part = part_numel(layout.numel, ranks, unit)
                flat = old[0].new_zeros(ranks * part)
                flat[: layout.numel] = torch.cat([tensor.reshape(-1) for tensor in old])[: layout.numel]
                parts = list(flat.view(ranks, -1, unit))
            case "shared":
                parts = [old[0]] * ranks
            case other:
                assert_never(other)
        for state, tensor in zip(new, parts, strict=True):
            state[name] = tensor
    return new
