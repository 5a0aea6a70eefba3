"""What is text: names and kinds of files, NUL bytes, binary files, hidden files, columns of parquet."""

import base64
import gzip
import json
import lzma
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fastdistil.cli import app
from fastdistil.data import text_files
from fastdistil.data.corpus import Manifest
from fastdistil.data.prepare import PrepareOptions, PrepareProgress, prepare
from fastdistil.data.text_inputs import SUFFIXES, find_inputs
from fastdistil.data.tokenizer import train_wordpiece
from fastdistil.errors import UserError
from fastdistil.evaluate import EvaluateOptions
from fastdistil.storage import canonical, text_sha256
from tests.data.test_gutenberg import FOOTERS, HEADERS, STORY
from tests.data.text_records import LINES, PLAIN, TEXTS, read

ARRAY = json.dumps([{"text": text, "more": [{}, "]"]} for text in TEXTS], indent=2).encode()


def compressed(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    if name.endswith(".xz"):
        return lzma.compress(data)
    if name.endswith(".zst"):
        half = len(data) // 2  # frames follow each other, as parallel compressors write them
        return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))
    return data


NAMES = {
    "wiki.test.raw": PLAIN,
    "wiki.test.tokens": PLAIN,
    "README.MD": PLAIN,
    "a.text": PLAIN,
    "about.jsonl-files.txt": PLAIN,
    "my.parquet.txt": PLAIN,
    "a.json.text": PLAIN,
    "c4-train.00000-of-01024.json": LINES,
    "a.ndjson": LINES,
    "a.JsonLines": LINES,
    "a.txt.jsonl": LINES,
    "dolma.json": ARRAY,
    "small.json": b" \n[" + b",".join(LINES.splitlines()) + b"]",
}


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".ZST"])
@pytest.mark.parametrize("name", NAMES)
def test_the_kind_is_the_end_of_the_name(tmp_path: Path, name: str, ending: str) -> None:
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(compressed(path.name.lower(), NAMES[name]))
    documents, reader = read(path, tmp_path)
    assert documents == TEXTS
    assert (reader.records, reader.bad.total(), reader.bytes_read) == (20, 0, path.stat().st_size)


def test_other_names_are_read_as_they_are_said_to_be(tmp_path: Path) -> None:
    for name, kind, data in (
        ("wiki_00", "jsonl", LINES),
        ("wiki_00.gz", "jsonl", gzip.compress(LINES)),
        ("part-00000", "txt", PLAIN),
        ("lines.txt", "jsonl", LINES),
        ("export", "jsonl", ARRAY),
        ("array.json.zst", "jsonl", compressed(".zst", ARRAY)),
    ):
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name, tmp_path, kind)[0] == TEXTS
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "part-0")
    assert read(tmp_path / "part-0", tmp_path, "parquet")[0] == TEXTS
    for name in ("wiki_00", "part-00000", "part.parquet.gz", "a.txt.bz2", "txt"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=r"rename it, or say what it holds with --as txt\|jsonl\|parquet"):
            find_inputs([str(tmp_path / name)], tmp_path)
    with pytest.raises(UserError, match="read_as must be txt, jsonl, parquet or null, got 'csv'"):
        PrepareOptions(tokenizer="t", read_as="csv")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="read_as must be one of None, txt, jsonl, parquet"):
        EvaluateOptions(read_as="csv")  # type: ignore[arg-type]


def test_damaged_compression_is_said(tmp_path: Path) -> None:
    for ending in (".gz", ".xz", ".zst"):
        path = tmp_path / f"a.txt{ending}"
        for data in (compressed(ending, PLAIN * 50)[:-9], PLAIN):
            path.write_bytes(data)
            with pytest.raises(
                UserError,
                match=r"a\.txt.* is truncated or corrupt .*fetch or compress it again",
            ):
                read(path, tmp_path)


# Directories


def test_hidden_and_backup_files_of_directories_are_passed_over(tmp_path: Path) -> None:
    data = tmp_path / ".cache" / "data"  # what is above the directory does not count
    hidden = (
        "._a.txt",
        "__MACOSX/b/c.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        ".git/info/d.txt",
        ".hidden.txt",
    )
    backups = ("a.txt~", "#a.txt#", "a.txt.bak", "a.txt.orig", ".a.txt.swp")
    for name in ("a.txt", "b/c.txt", "d.pdf", *hidden, *backups):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text("words")
    inputs = find_inputs([str(data)], tmp_path)
    assert [str(source.path.relative_to(data)) for source in inputs.sources] == ["a.txt", "b/c.txt"]
    assert inputs.ignored == [data / "d.pdf"]
    passed_over = sorted(
        {name.split("/")[0] for name in hidden} | set(backups),
    )  # of a folder, the folder alone
    for read_as in (None, "txt"):
        inputs = find_inputs([str(data)], tmp_path, read_as)
        assert sorted(str(path.relative_to(data)) for path in inputs.passed_over) == passed_over
    assert len(find_inputs([str(data / ".hidden.txt")], tmp_path).sources) == 1  # named, it is meant
    for path in (data / "a.txt", data / "b" / "c.txt"):
        path.unlink()
    with pytest.raises(UserError, match="1 files of other kinds, 10 hidden or backup files"):
        find_inputs([str(data)], tmp_path)


def test_hidden_folders_are_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", ".git/objects/1/2", ".git/objects/1/3", ".Trash/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("words")
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if Path(path).name.startswith("."):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    inputs = find_inputs([str(tmp_path)], tmp_path / "out")
    assert [source.path.name for source in inputs.sources] == ["a.txt"]
    assert [path.name for path in inputs.passed_over] == [".Trash", ".git"]


# NUL bytes and binary files


def write_kind(folder: Path, kind: str, texts: list[str]) -> Path:
    path = folder / f"data.{kind}"
    if kind == "txt":
        path.write_text("".join(f"{text}\n" for text in texts))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == "raw.jsonl":
        path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    else:
        pq.write_table(pa.table({"text": texts}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "raw.jsonl", "json", "parquet"])
@pytest.mark.parametrize("at", [0, 49, 2990])
def test_a_nul_byte_makes_a_bad_record_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, at: int
) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 2000)
    texts = [f"line {number} about dogs" for number in range(3000)]
    path = write_kind(tmp_path, kind, [*texts[:at], "a stray \0 byte", *texts[at + 1 :]])
    documents, reader = read(path, tmp_path, max_bad_fraction=0.001)
    assert documents == [*texts[:at], *texts[at + 1 :]]
    assert (reader.records, reader.bad) == (3000, {str(path): 1})
    (entry,) = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert (entry["file"], entry["line"]) == (str(path), at + 1)
    assert "NUL" in entry["reason"]
    assert b"a stray " in base64.b64decode(entry["bytes_base64"])


NOISE = random.Random(3).randbytes(5000)
BINARY = {
    "PDF": (b"%PDF-1.7\n1 0 obj\n" + b"text of the objects\n" * 100, "is a PDF, wanted UTF-8 text"),
    "zip": (b"PK\3\4" + NOISE, "is a zip archive"),
    "parquet": (b"PAR1" + NOISE, "is a parquet file"),
    "gzip": (gzip.compress(PLAIN), r"is compressed with gzip \(let its name end in .gz\)"),
    "xz": (lzma.compress(PLAIN), r"is compressed with xz"),
    "zstd": (compressed(".zst", PLAIN), r"is compressed with zstd"),
    "UTF-16": (PLAIN.decode().encode("utf-16le"), "holds NUL bytes: a binary file, or UTF-16 text without"),
    "noise": (bytes(byte for byte in NOISE if byte), "holds control characters: a binary file"),
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz"])
@pytest.mark.parametrize("case", BINARY)
def test_binary_files_are_refused(tmp_path: Path, case: str, name: str) -> None:
    data, message = BINARY[case]
    (tmp_path / name).write_bytes(compressed(name, data))
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name, tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1251", "shift-jis", "utf-8"])
def test_text_of_other_encodings_is_not_called_binary(tmp_path: Path, encoding: str) -> None:
    words = {
        "latin-1": "\u00e9t\u00e9 \u00fcber",
        "cp1251": "\u0441\u043b\u043e\u0432\u043e",
        "shift-jis": "\u8a00\u8449",
        "utf-8": "\x1b[0m\f words",
    }
    (tmp_path / "a.txt").write_bytes(f"{words[encoding]}\n".encode(encoding) * 50)
    if encoding == "utf-8":
        assert len(read(tmp_path / "a.txt", tmp_path)[0]) == 50
    else:
        with pytest.raises(UserError, match=r"first: .* line 1: not UTF-8.*iconv"):
            read(tmp_path / "a.txt", tmp_path)


# Parquet


def strings(values: list[bytes | None]) -> Any:
    """A column of strings that are not checked to be UTF-8, as some writers leave them."""
    return pa.array(values, pa.binary()).view(pa.string())


COLUMNS = {
    "string": strings,
    "large_string": lambda values: pa.array(values, pa.large_binary()).view(pa.large_string()),
    "string_view": lambda values: pa.array(values, pa.binary_view()).view(pa.string_view()),
    "binary": lambda values: pa.array(values, pa.binary()),
    "large_binary": lambda values: pa.array(values, pa.large_binary()),
    "binary_view": lambda values: pa.array(values, pa.binary_view()),
    "fixed": lambda values: pa.array([value and value.ljust(40, b"\0") for value in values], pa.binary(40)),
    "dictionary": lambda values: strings(values).dictionary_encode(),
    "dictionary of binary": lambda values: pa.array(values, pa.binary()).dictionary_encode(),
}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("empty", [None, b""])
def test_columns_of_every_type_of_text(tmp_path: Path, column: str, empty: bytes | None) -> None:
    if column == "fixed" and empty == b"":
        empty = b"\0" * 40
    values = [text.encode() for text in TEXTS]
    values[3], values[17] = b"caf\xe9", b"\xff"
    rows = [*values, empty, *values]
    pq.write_table(
        pa.table({"n": range(len(rows)), "text": COLUMNS[column](rows)}),
        tmp_path / "a.parquet",
        row_group_size=11,
    )
    documents, reader = read(tmp_path / "a.parquet", tmp_path)
    assert documents == [text for number, text in enumerate(TEXTS) if number not in (3, 17)] * 2
    assert (reader.records, reader.bad.total()) == (41, 4)
    entries = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [4, 18, 25, 39]
    assert base64.b64decode(entries[0]["bytes_base64"]).rstrip(b"\0") == b"caf\xe9"
    assert entries[0]["reason"] == "not UTF-8: byte 0xe9 at offset 3"


def test_a_column_of_nulls_is_empty(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    documents, reader = read(tmp_path / "a.parquet", tmp_path)
    assert (documents, reader.bad.total()) == ([], 0)


@pytest.mark.parametrize(
    ("values", "kind"),
    [([["a"]], "list<"), ([{"content": "a"}], "struct<content: string>"), ([1], "int64"), ([1.5], "double")],
)
def test_columns_of_no_text_name_those_that_are(tmp_path: Path, values: list[Any], kind: str) -> None:
    pq.write_table(
        pa.table({"text": values, "title": ["a"], "n": [1], "body": [b"b"]}),
        tmp_path / "a.parquet",
    )
    with pytest.raises(
        UserError, match=r"wanted text; name a column of text with --text-field \(here: title, body\)"
    ) as caught:
        read(tmp_path / "a.parquet", tmp_path)
    assert f"column 'text' of {tmp_path / 'a.parquet'} is {kind}" in str(caught.value)
    assert read(tmp_path / "a.parquet", tmp_path, text_field="body")[0] == ["b"]


# What prepare says


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_wordpiece([*TEXTS, STORY], 150, tmp_path_factory.mktemp("tokenizer")))


def test_prepare_counts_and_names(tokenizer: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    books = {
        "whole": f"{HEADERS['2021']}\n{STORY * 9}\n\n{FOOTERS['2021']}",
        "half": f"{HEADERS['1993']}\n{STORY * 9}\n",
        "short": f"{HEADERS['2021']}\nA short poem.\n\n{FOOTERS['2021']}",
        "plain": STORY,
    }
    for name, text in books.items():
        (data / f"{name}.txt").write_text(text)
    (data / "books.jsonl").write_text(json.dumps({"text": books["whole"]}) + "\n")
    (data / "._whole.txt").write_bytes(b"\0\5\x16\7")
    progress: list[PrepareProgress] = []
    options = PrepareOptions(tokenizer=tokenizer, strip_gutenberg=True, workers=1)
    manifest = prepare([str(data)], tmp_path / "out", options, progress.append)
    bodies = len(STORY) * 28 + len("A short poem.")
    total = sum(map(len, books.values())) + len(books["whole"])
    assert manifest.gutenberg_characters == total
    assert 0 <= total - bodies - manifest.gutenberg_removed < 40  # line ends about the bodies
    assert (manifest.unmarked_files, manifest.half_marked_files, manifest.passed_over_files) == (1, 1, 1)
    notes = [entry.note for entry in progress if entry.note]
    assert notes[0] == "passed over 1 hidden or backup files: ._whole.txt"
    assert notes[1].endswith(f"kept whole: {data / 'plain.txt'}")
    assert notes[2].startswith("1 files have a Project Gutenberg header without its footer")
    assert notes[2].endswith(str(data / "half.txt"))
    assert notes[3].startswith("warning: 1 files lose more than 30% of their characters")
    assert f"{data / 'short.txt'} (" in notes[3]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_records_that_lose_much_are_told(tokenizer: str, tmp_path: Path, suffix: str) -> None:
    """However little that is of their file."""
    wrapped = f"{HEADERS['2021']}\nA short poem.\n\n{FOOTERS['2021']}"
    texts = [*[STORY] * 30, wrapped, STORY, wrapped]
    path = tmp_path / f"books.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    progress: list[PrepareProgress] = []
    options = PrepareOptions(tokenizer=tokenizer, strip_gutenberg=True, workers=1)
    prepare([str(path)], tmp_path / "out", options, progress.append)
    notes = [entry.note for entry in progress if entry.note]
    assert len(notes) == 1
    assert notes[0].startswith("warning: 1 files lose more than 30% of their characters, or of a record's,")
    assert notes[0].endswith(f"{path} (2 records, up to 98%)")


def test_an_older_manifest_is_read(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(PLAIN)
    manifest = prepare(
        [str(tmp_path / "a.txt")],
        tmp_path / "out",
        PrepareOptions(tokenizer=tokenizer, workers=1),
    )
    values = json.loads(manifest.to_json())
    for name in (
        "passed_over_files",
        "half_marked_files",
        "gutenberg_characters",
        "gutenberg_removed",
        "sha256",
    ):
        del values[name]
    del values["options"]["read_as"]
    (tmp_path / "out" / "manifest.json").write_text(
        json.dumps({**values, "sha256": text_sha256(canonical(values))}),
    )
    older = Manifest.read(tmp_path / "out" / "manifest.json")
    assert older.gutenberg_removed == 0
    again = prepare(
        [str(tmp_path / "a.txt")],
        tmp_path / "out",
        PrepareOptions(tokenizer=tokenizer, workers=1),
    )
    assert again == older  # up to date


def test_the_command_line_says_what_was_taken_out(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "wiki_00").write_text(json.dumps({"text": f"{HEADERS['1993']}\n{STORY}\n"}) + "\n")
    arguments = [
        "prepare",
        str(tmp_path / "wiki_00"),
        "--tokenizer",
        tokenizer,
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    result = CliRunner().invoke(app, [*arguments, "--as", "jsonl", "--strip-gutenberg"])
    assert result.exit_code == 0, result.output
    last = result.output.strip().splitlines()[-1]
    assert "1 documents; Project Gutenberg's 1,8" in last
    assert "; only half of the markers in 1 files" in last
    assert "read_as" in json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]


def test_every_suffix_is_of_a_kind() -> None:
    assert set(SUFFIXES.values()) == {"txt", "jsonl", "parquet"}
