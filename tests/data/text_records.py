"""Twenty texts as plain text and as JSON lines, and how a file of them is read."""

import json
from pathlib import Path
from typing import Any

from fastdistil.data.text_files import Reading
from fastdistil.data.text_inputs import find_inputs

TEXTS = [f"record {number} about dogs" for number in range(20)]
PLAIN = "".join(f"{text}\n" for text in TEXTS).encode()
LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS).encode()


def read(path: Path, out: Path, read_as: Any = None, **changes: Any) -> tuple[list[str], Reading]:
    values = {
        "documents": "line",
        "text_field": "text",
        "strip_gutenberg": False,
        "max_bad_fraction": 0.5,
        **changes,
    }
    reader = Reading(
        find_inputs([str(path)], out, read_as).sources,
        quarantine=out / "quarantine.jsonl",
        **values,
    )
    return [document for block in reader.blocks() for document in block.documents], reader
