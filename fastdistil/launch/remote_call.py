"""A Python call on its way to ranks, and its answer on the way back: files in a folder that `launch_function` makes.

Written with cloudpickle, so that functions and classes of a notebook or script travel by value; read back with tensors on
the CPU, for the reader may have no GPU, or another one.
"""

import importlib
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fastdistil.errors import FastdistilError, RankLost, UserError, translated

CALL, RESULT = "call.pt", "result.pt"


def _cloudpickle() -> ModuleType:
    try:
        return importlib.import_module("cloudpickle")
    except ModuleNotFoundError as error:
        raise UserError("starting ranks from Python needs cloudpickle; run: pip install cloudpickle") from error


def _write(path: Path, value: object) -> None:
    import torch

    with translated("handing objects between processes", path):
        torch.save(value, path, pickle_module=_cloudpickle())


def _read(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=False)


def write_call(folder: Path, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises UserError for arguments that cannot travel."""
    try:
        _write(folder / CALL, (function, dict(arguments)))
    except FastdistilError:
        raise
    except Exception as error:  # whatever an object's own code raises
        kinds = ", ".join(f"{name} ({type(value).__qualname__})" for name, value in arguments.items())
        raise UserError(f"one of {kinds} cannot be sent to other processes: {error}; give paths or plain objects") from error


def answer_call(folder: Path, rank: int) -> int:
    """Make the call, in a rank, and return the exit code; rank 0 writes the call's result, any rank its error."""
    try:
        function, arguments = _read(folder / CALL)
        result = function(**arguments)
        if rank == 0:
            _write(folder / RESULT, result)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:  # noqa: BLE001 - it is raised again where the call came from
        code = error.exit_code if isinstance(error, FastdistilError) else 1
        if not isinstance(error, FastdistilError):
            error.add_note(f"On rank {rank}:\n{''.join(traceback.format_exception(error)).rstrip()}")
        _write_error(folder / f"error-{rank}.pt", error)
        return code
    return 0


def _write_error(path: Path, error: BaseException) -> None:
    try:
        _write(path, error)
        _read(path)
    except Exception:  # noqa: BLE001 - an error that cannot travel is told by its text
        _write(path, RuntimeError("".join(traceback.format_exception(error))))


def read_answer(folder: Path, code: int, rank: int, why: str | None) -> Any:
    """Rank 0's result, or the error of `rank`, the one that the command's exit code comes from."""
    if code == 0:
        return _read(folder / RESULT)
    if code == 130:
        raise KeyboardInterrupt
    path = folder / f"error-{rank}.pt"
    if path.exists():
        raise _read(path)
    raise RankLost(why or f"rank {rank} ended with exit code {code} and left no error; what it printed is above")
