"""What transformers logs during a test, as the fixture `said`."""

import logging
from collections.abc import Iterator

import pytest
import transformers


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What transformers logs. (Its own handler writes to the stream that was stderr when it was imported.)"""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    transformers.utils.logging.add_handler(handler)
    yield lines
    transformers.utils.logging.remove_handler(handler)
