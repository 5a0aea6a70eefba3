"""What a Triton launch consists of, so that every configuration that ships can be compiled ahead of time by a test."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TYPES = {
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "int64": "*i64",
    "int32": "*i32",
    "int8": "*i8",
}


class Launch(NamedTuple):
    name: str
    fn: Any
    """The @triton.jit function."""
    signature: dict[str, Any]
    """Argument -> Triton type, "constexpr" for those in constexprs."""
    constexprs: dict[Any, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    """What the compiler may assume: pointers are multiples of 16 bytes, as torch allocates; so are the integers of tuples."""
    options: dict[str, Any]
    """num_warps and the like."""


def launch(
    name: str,
    fn: Any,
    pointers: Mapping[str, str],
    integers: Sequence[str],
    constexprs: Mapping[str, Any],
    num_warps: int,
    tuples: Mapping[str, Sequence[str | int]] | None = None,
) -> Launch:
    """pointers: argument -> dtype. integers: 32-bit arguments. tuples: argument -> dtypes of pointers, or
    "i32"; or a number, as Triton makes integers of 1 constants.

    Other arguments that are no constexprs are float32.
    """
    types: dict[str, Any] = {name: _TYPES[dtype] for name, dtype in pointers.items()} | dict.fromkeys(integers, "i32")
    constants: dict[Any, Any] = dict(constexprs)
    for argument_name, several in (tuples or {}).items():
        types[argument_name] = tuple("constexpr" if isinstance(kind, int) else _TYPES.get(kind, kind) for kind in several)
        at = fn.arg_names.index(argument_name)
        constants |= {(at, i): kind for i, kind in enumerate(several) if isinstance(kind, int)}
    signature = {name: "constexpr" if name in constexprs else types.get(name, "fp32") for name in fn.arg_names}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for at, argument in enumerate(fn.arg_names):
        inner = [(at, i) for i, kind in enumerate((tuples or {}).get(argument, ())) if not isinstance(kind, int)]
        for place in [(at,)] if argument in pointers else inner:
            attributes[place] = [["tt.divisibility", 16]]
    return Launch(name, fn, signature, constants, attributes, {"num_warps": num_warps})


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the tensor's GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
