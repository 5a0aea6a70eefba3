"""fastdistil distils a large language model (the teacher) into a small one (the student).

    from fastdistil import distil

    result = distil("distilbert", teacher=..., corpus=..., student=...)

Importing this package is cheap: torch and transformers are loaded when `distil` is first asked for.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "distil"]

if TYPE_CHECKING:
    from fastdistil.api import distil
else:

    def __getattr__(name: str) -> object:
        if name == "distil":
            from fastdistil.api import distil

            return distil
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
