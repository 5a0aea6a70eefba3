"""Sentences of few words, and how they are prepared."""

from pathlib import Path
from typing import Any

from fastdistil.data.prepare import PrepareOptions

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards boxed quietly, then slept"
WORDS = TEXT.split()
SENTENCES = [" ".join(WORDS[i % len(WORDS)] for i in range(start, start + 5 + start % 23)) + "." for start in range(120)]


def options(tokenizer: Path, **changes: Any) -> PrepareOptions:
    return PrepareOptions(
        **{"tokenizer": str(tokenizer), "max_length": 16, "documents": "line", "workers": 1, **changes},
    )
