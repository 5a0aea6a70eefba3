"""Calls into transformers: without its chatter, and whatever it raises becomes one line."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import Any

import transformers

from fastdistil.errors import FastdistilError, UserError, of_a_library, translated


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and reports from our users: what matters in them is raised."""
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub = getLogger("huggingface_hub")  # a line a retry
    hub_level = hub.level
    hub.setLevel(ERROR)
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def library_call(doing: str, problem: str, advice: str) -> Iterator[None]:
    """Turn what transformers and the libraries below it raise into a UserError "`problem`: reason; `advice`".

    Put the call alone inside: an error of our code would be told as a mistake of the user. Memory or disk that runs out while
    `doing`, and missing permissions, stay the errors that they are. Raises FastdistilError.
    """
    with quiet():
        try:
            with translated(doing):
                yield
        except FastdistilError:
            raise
        except BaseException as error:
            if not of_a_library(error):
                raise
            if "trust_remote_code" in str(error):  # the library's advice is a switch that we do not have
                advice = "fastdistil runs no code that comes with a checkpoint: give an architecture of transformers itself"
            raise UserError(f"{problem}: {reason(error)}; {advice}") from error


def reason(error: BaseException) -> str:
    """Return what a library's exception says, on one line."""
    text = textwrap.shorten(str(error), 300, placeholder=" ...").rstrip(".;")
    return f"{type(error).__name__} {text}" if isinstance(error, KeyError) or len(text) < 3 else text
