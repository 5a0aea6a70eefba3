"""torch.compile, tried before a run needs it: it looks for a compiler when the first update is under way, and fails there."""

from typing import Any

import torch
from torch import Tensor

from fastdistil.errors import UserError, of_a_library
from fastdistil.recipe import Recipe


def _next_to_nothing(x: Tensor) -> Tensor:
    return x.sin() + 1


def check_compiler(recipe: Recipe) -> None:
    """Refuse loop.compile where torch.compile does not work, by compiling next to nothing with it. Raises UserError."""
    if not recipe.loop.compile:
        return
    on_gpu = recipe.device == "cuda"
    try:
        if not on_gpu:
            from torch._inductor import cpp_builder

            cpp_builder.get_cpp_compiler()  # what is compiled below may lie in the cache, of a day when there was one
        compiled: Any = torch.compile(_next_to_nothing, dynamic=True)
        compiled(torch.ones(8, device=recipe.device))
    except BaseException as error:
        if not of_a_library(error):
            raise
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        compiler = "a C compiler (CC, gcc) and Python's headers" if on_gpu else "a C++ compiler (CXX, g++)"
        raise UserError(
            f"loop.compile: torch.compile does not work on this machine: {first_line[:300]}; install {compiler}, "
            "see `fastdistil doctor`, or set loop.compile=false"
        ) from error
