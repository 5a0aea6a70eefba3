"""Where values that are not finite come from: a model's weight, or the first part of it whose output is not finite.

Nothing here is on a step's path: it is asked once a loss was seen that is not finite, and runs the model on that batch again.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistil.data.batch import Batch
from fastdistil.models import language_model

ROWS = 512
"""Logits of so many rows exist at a time."""
LANGUAGE_MODEL = "module."
"""What language_model.LanguageModel puts before the names of its parts."""


@torch.no_grad()
def first_not_finite(model: Any, batch: Batch | None, precision: str = "fp32") -> str | None:
    """Return what of a model is not finite first, in words that name it as transformers does; None where all of it is finite.

    Weights come first, then outputs on `batch` (None: weights only) in the order in which they are computed. `precision` is
    autocast's.
    """
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return f"its weight {name.removeprefix(LANGUAGE_MODEL)} holds {_value(parameter)}"
    return None if batch is None else _first_output(model, batch, precision)


def _first_output(model: Any, batch: Batch, precision: str) -> str | None:
    findings: list[str] = []

    def look_at(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(part: nn.Module, arguments: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) and output else None
            if not findings and isinstance(tensor, Tensor) and not _is_finite(tensor):
                findings.append(f"the output of its {name.removeprefix(LANGUAGE_MODEL)} holds {_value(tensor)}")

        return look

    handles = [part.register_forward_hook(look_at(name)) for name, part in model.named_modules() if name]
    autocast = torch.autocast(batch.ids_BS.device.type, language_model.DTYPES[precision], enabled=precision != "fp32")
    try:
        with torch.compiler.set_stance("force_eager"), autocast:
            finite = _logits_are_finite(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if finite:  # what is not finite within is masked out further on
        return None
    return findings[0] if findings else "its logits are not finite"


def _logits_are_finite(model: Any, batch: Batch) -> bool:
    hidden_ND = model.hidden(batch)
    if batch.valid_rows is not None:
        hidden_ND = hidden_ND.index_select(0, batch.valid_rows)
    for rows_RD in hidden_ND.split(ROWS):
        logits_RV = model.transform(rows_RD)
        if model.weight is not None:
            logits_RV = F.linear(logits_RV, model.weight, model.bias)
        if bool(logits_RV.isnan().any()) or bool(logits_RV.isposinf().any()):  # models rule tokens out with -inf
            return False
    return True


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _value(tensor: Tensor) -> str:
    return "nan" if bool(tensor.isnan().any()) else "inf"
