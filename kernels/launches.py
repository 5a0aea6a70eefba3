"""What a Triton launch consists of, so that every configuration that ships can be compiled ahead of time by a test."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int64": "*i64", "int32": "*i32"}


class Launch(NamedTuple):
    name: str
    fn: Any
    """The @triton.jit function."""
    signature: dict[str, Any]
    """Argument -> Triton type, "constexpr" for those in constexprs."""
    constexprs: dict[str, Any]
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
    tuples: Mapping[str, Sequence[str]] | None = None,
) -> Launch:
    """pointers: argument -> dtype. integers: 32-bit arguments. tuples: argument -> dtypes of pointers, or "i32".

    Other arguments that are no constexprs are float32.
    """
    types: dict[str, Any] = {name: _TYPES[dtype] for name, dtype in pointers.items()} | dict.fromkeys(integers, "i32")
    types |= {name: tuple(_TYPES.get(each, each) for each in several) for name, several in (tuples or {}).items()}
    signature = {name: "constexpr" if name in constexprs else types.get(name, "fp32") for name in fn.arg_names}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for at, argument in enumerate(fn.arg_names):
        inner = [(at, i) for i in range(len((tuples or {}).get(argument, ())))]
        for place in [(at,)] if argument in pointers else inner:
            attributes[place] = [["tt.divisibility", 16]]
    return Launch(name, fn, signature, dict(constexprs), attributes, {"num_warps": num_warps})
