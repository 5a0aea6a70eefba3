"""A parquet file's column of text, whatever type its writer gave it, row by row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastdistil.data.text_inputs import reading
from fastdistil.errors import UserError

_ROWS = 256
"""Rows that are read at a time."""


def column_rows(path: Path, column: str) -> Iterator[tuple[bytes, float]]:
    """Yield the bytes of each row's text and the share of the rows before it; a null is an empty text.

    Strings and binary values of any width, also in dictionaries; fixed-size ones without the NUL bytes that fill them up.
    Raises UserError where the file is damaged, or the column is missing or of another type.
    """
    # pyarrow's own open() takes no name that is not UTF-8.
    with reading(path, pa.ArrowException), path.open("rb") as stream, pq.ParquetFile(stream) as file:
        schema = file.schema_arrow
        usable = ", ".join(name for name in schema.names if _is_text(schema.field(name).type)) or "none"
        if column not in schema.names:
            raise UserError(
                f"{path} has no column {column!r}, only {', '.join(schema.names)}; "
                f"name one of text with --text-field (here: {usable})"
            )
        kind = schema.field(column).type
        if not _is_text(kind) and not pa.types.is_null(kind):
            raise UserError(
                f"column {column!r} of {path} is {kind}, wanted text; name a column of text with --text-field (here: {usable})"
            )
        padding = b"\0" if pa.types.is_fixed_size_binary(_value_type(kind)) else b""
        rows = max(file.metadata.num_rows, 1)
        row = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            values = batch.column(0)
            if pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            for value in values.cast(pa.large_binary()).to_pylist():  # bytes, because strings may be no UTF-8
                yield (value or b"").rstrip(padding) if padding else value or b"", row / rows
                row += 1


def _value_type(kind: Any) -> Any:
    """Return a dictionary's type of values, any other type as it is."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    """Tell whether a column of this arrow type can hold text."""
    name = str(_value_type(kind))  # by name, as views are younger than the oldest pyarrow that is supported
    return name.removeprefix("large_").removesuffix("_view") in ("string", "binary") or name.startswith("fixed_size_binary")
