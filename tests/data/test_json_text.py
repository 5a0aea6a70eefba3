"""Records of JSON: lines however long, and the elements of an array."""

import base64
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistil.data.json_text import array_elements, whole_lines
from fastdistil.errors import UserError
from tests.data.text_records import LINES, TEXTS, read

# Long lines


def test_an_endless_line_of_json_is_refused_in_constant_memory() -> None:
    chunk, served = b"a" * 10_000, 0

    def chunks(start: bytes) -> Iterator[bytes]:
        nonlocal served
        served = 0
        yield start
        while served < 100_000:
            served += 1
            yield chunk

    for split, start, limit in (
        (whole_lines, b'{"text": "', 3_000_000),
        (array_elements, b'[{"text": "', 3_000_000),
    ):
        tracemalloc.start()
        with pytest.raises(UserError, match="of more than 2 MB"):
            list(split(chunks(start), limit, Path("a.json")))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert served <= 2 * limit // len(chunk)
        assert peak < 5 * limit


class Chunk(bytes):
    """Bytes that count how many of them are copied by joins from either side."""

    copied = 0

    def __add__(self, other: bytes) -> "Chunk":
        Chunk.copied += len(self) + len(other)
        return Chunk(bytes(self) + other)

    def __radd__(self, other: bytes) -> "Chunk":
        Chunk.copied += len(self) + len(other)
        return Chunk(other + bytes(self))


def test_a_long_line_is_copied_once_not_once_a_chunk() -> None:
    Chunk.copied = 0
    chunks = [Chunk(b"a" * 1000) for _ in range(1000)]
    assert list(whole_lines([*chunks, b"\n"], 10**9, Path("a"))) == [b"a" * 10**6]
    assert Chunk.copied == 0  # joined once, at its end


# JSON arrays


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text('a"\\[]{},\n\u00e9', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"]', max_size=2), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.lists(VALUES, max_size=8), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 30))
def test_elements_are_those_of_the_array(
    values: list[Any],
    indent: int | None,
    ascii_only: bool,
    size: int,
) -> None:
    data = f" \n{json.dumps(values, indent=indent, ensure_ascii=ascii_only)}\n ".encode()
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    elements = [element for element in array_elements(chunks, 10**6, Path("a")) if element.strip()]
    assert [json.loads(element) for element in elements] == values
    for cut in range(data.index(b"[") + 1, data.rindex(b"]")):
        with pytest.raises(UserError, match="truncated or corrupt"):
            list(array_elements([data[:cut]], 10**6, Path("a")))
    with pytest.raises(UserError, match="does not end where its JSON array does"):
        list(array_elements([*chunks, b"[1]"], 10**6, Path("a")))


def test_bad_elements_are_set_aside_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(
        b'[{"text": "one"}, {"text": 2}, "three",\n {"text": "\xe9"}, {"text": four}, {"text": "five"}]',
    )
    documents, reader = read(path, tmp_path, max_bad_fraction=0.9)
    assert documents == ["one", "five"]
    entries = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [2, 3, 4, 5]
    assert base64.b64decode(entries[2]["bytes_base64"]).strip() == b'{"text": "\xe9"}'
    assert reader.records == 6


def test_an_array_in_a_file_of_json_lines_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'["a"]\n' + LINES)
    documents, reader = read(tmp_path / "a.jsonl", tmp_path)
    assert documents == TEXTS
    assert "a list, wanted an object" in reader.first_reason
