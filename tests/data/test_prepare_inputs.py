"""Reading text files: every kind, every order, and everything that can be wrong with them."""

import base64
import gzip
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistil.data import gutenberg, text_files
from fastdistil.data.corpus import Corpus
from fastdistil.data.prepare import PrepareOptions, PrepareProgress, prepare
from fastdistil.data.text_files import Reading, cut_documents, cut_in_line
from fastdistil.data.text_inputs import find_inputs
from fastdistil.data.tokenizer import load_tokenizer, train_wordpiece
from fastdistil.errors import UserError

TEXTS = [f"document {number} of the small library, with words and more words" for number in range(30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_wordpiece(TEXTS, 150, tmp_path_factory.mktemp("tokenizer")))


def read(paths: Iterable[Path], out: Path, **changes: Any) -> tuple[list[str], Reading]:
    sources = find_inputs([str(path) for path in paths], out, changes.pop("read_as", None)).sources
    values = {"documents": "line", "text_field": "text", "strip_gutenberg": False, "max_bad_fraction": 0.001, **changes}
    reader = Reading(sources, quarantine=out / "quarantine.jsonl", **values)
    return [document for block in reader.blocks() for document in block.documents], reader


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "b").mkdir(parents=True)
    text = "\n".join(TEXTS).encode()
    (data / "a.txt").write_bytes(text)
    (data / "a.TXT.GZ").write_bytes(gzip.compress(text))
    write_jsonl(data / "b" / "c.jsonl", ({"text": line, "other": 1} for line in TEXTS))
    (data / "b" / "d.jsonl.gz").write_bytes(gzip.compress((data / "b" / "c.jsonl").read_bytes()))
    pq.write_table(pa.table({"n": range(len(TEXTS)), "text": TEXTS}), data / "b" / "e.parquet", row_group_size=7)
    (data / "ignored.pdf").write_text("no text")
    for path in (path for path in data.rglob("*") if path.is_file() and path.suffix != ".pdf"):
        assert read([path], tmp_path)[0] == TEXTS, path
    documents, reader = read([data], data / "out")
    assert documents == TEXTS * 5
    assert (reader.records, reader.files_done) == (5 * len(TEXTS), 5)
    assert reader.bytes_read == sum(source.size for source in reader.sources)
    assert find_inputs([str(data)], tmp_path).ignored == [data / "ignored.pdf"]


def test_inputs_are_sorted_and_each_is_read_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "a/3.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a" / "1.txt")
    given_twice = [str(tmp_path / "b"), str(tmp_path / "*" / "*.txt"), str(tmp_path / "link.txt"), str(tmp_path)]
    sources = find_inputs(given_twice, tmp_path / "out").sources
    assert [str(source.path.relative_to(tmp_path)) for source in sources] == ["b/2.txt", "a/1.txt", "a/3.txt"]
    assert [source.size for source in sources] == [7, 7, 7]
    deep = find_inputs([str(tmp_path / "**" / "*.txt")], tmp_path / "out").sources
    assert len(deep) == 3
    inside = find_inputs([str(tmp_path)], tmp_path / "a").sources  # where the corpus itself is written is not read
    assert [source.path.name for source in inside] == ["2.txt", "link.txt"]


def test_what_a_document_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf  First line\r\nsecond\r\n\r\n \t\r\n\r\nnext paragraph\rold Mac line\n\n")
    assert read([path], tmp_path, documents="file")[0] == ["First line\nsecond\n\n \t\n\nnext paragraph\nold Mac line"]
    assert read([path], tmp_path, documents="paragraph")[0] == ["First line\nsecond", "next paragraph\nold Mac line"]
    assert read([path], tmp_path, documents="line")[0] == ["First line", "second", "next paragraph", "old Mac line"]
    path.write_text("one\n \t\ntwo\n")  # a line of white space is blank
    assert read([path], tmp_path, documents="paragraph")[0] == ["one", "two"]


@settings(max_examples=200)
@given(st.text("ab \n\u00e9", max_size=80), st.lists(st.integers(1, 20)), st.sampled_from(["file", "paragraph", "line"]))
def test_documents_do_not_depend_on_the_chunks(text: str, sizes: list[int], documents: Any) -> None:
    """Chunks end at lines, as they are read."""
    lines, chunks = text.splitlines(keepends=True), []
    for size in [*sizes, len(text) + 1]:
        chunks.append("".join(lines[:size]))
        lines = lines[size:]
    cut = [document for document in cut_documents(iter(chunks), documents) if document.strip()]
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    expected = {
        "file": [text] if text.strip() else [],
        "line": [line for line in text.split("\n") if line.strip()],
        "paragraph": ["\n".join(lines) for lines in paragraphs if lines],
    }
    assert cut == expected[documents]


@pytest.mark.parametrize("documents", ["file", "paragraph", "line"])
def test_small_blocks_and_chunks_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: Any) -> None:
    monkeypatch.setattr(text_files, "BLOCK_CHARACTERS", 100)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 64)
    words = [f"w\u00f6rd{number}" for number in range(3000)]
    kinds = [" ".join(words), "\n".join(words), "\n\n".join(words), "\u5b57" * 1000]
    for text in kinds:
        path = tmp_path / "text.txt"
        path.write_text(text, "utf-8")
        parts, _ = read([path], tmp_path, documents=documents)
        assert max(map(len, parts)) <= 100
        assert "".join("".join(parts).split()) == "".join(text.split())
        if " " in text or "\n" in text:
            assert [word for part in parts for word in part.split()] == words  # none was cut in two
    write_jsonl(tmp_path / "long.jsonl", [{"text": text} for text in kinds])
    parts, reader = read([tmp_path / "long.jsonl"], tmp_path)
    assert reader.records == len(kinds)
    assert "".join("".join(parts).split()) == "".join("".join(kinds).split())


def test_long_documents_are_cut_at_the_best_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_CHARACTERS", 20)
    for text, expected in (
        ("aaaa bbbb\n\ncc dd\nee ff gg hh", ["aaaa bbbb\n\ncc dd", "ee ff gg hh"]),  # blank line in the first half
        ("aaaa bbbb cc\n\ndd\nee ff gg hh", ["aaaa bbbb cc", "dd\nee ff gg hh"]),
        ("aaaa bbbb cc dd eee ff", ["aaaa bbbb cc dd eee", "ff"]),
        ("a" * 45, ["a" * 20, "a" * 20, "a" * 5]),
    ):
        (tmp_path / "text.txt").write_text(text)
        assert read([tmp_path / "text.txt"], tmp_path, documents="file")[0] == expected


@pytest.mark.parametrize("text", ["\u5b57" * 5, "\u00e9" * 5, "\U0001f600" * 3, "abcdef", "a"])
def test_a_line_without_spaces_is_cut_between_characters(text: str) -> None:
    data = text.encode()
    for size in range(4, len(data) + 1):
        end = cut_in_line(data[:size])
        assert 0 < end <= size
        data[:end].decode()
        assert size - end < 4 + (len(text[0].encode()) > 1)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_CHARACTERS", 20_000)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(gutenberg, "WINDOW", 20_000)
    peaks = []
    for repeats in (2_000, 40_000):
        path = tmp_path / "long.txt.gz"
        path.write_bytes(gzip.compress(b"no line ends, only words and " * repeats, 1))
        sources = find_inputs([str(path)], tmp_path / "out").sources
        reader = Reading(sources, "file", "text", True, 0.001, tmp_path / "quarantine.jsonl")
        tracemalloc.start()
        size = sum(len(document) for block in reader.blocks() for document in block.documents)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert size > 28 * repeats
    assert peaks[1] < 1.5 * peaks[0] < 1_000_000


# Project Gutenberg

HEADER = "The Project Gutenberg EBook of X\n\nlicence\n\n"
START, END = "*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n", "*** END OF THIS PROJECT GUTENBERG EBOOK X ***\n"
OLD_END = "End of the Project Gutenberg EBook of X\n\n"
BOOKS = {
    "plain": (f"{HEADER}{START}body\n{END}end\n", "body"),
    "the, no spaces": (
        f"{HEADER}***START OF THE PROJECT GUTENBERG EBOOK X***\nbody\n***END OF THE PROJECT GUTENBERG EBOOK X***\n",
        "body",
    ),
    "title of two lines": (f"{HEADER}*** START OF THIS PROJECT GUTENBERG EBOOK X, BY\nSOMEBODY ***\nbody\n", "body"),
    "two starts": (f"{HEADER}{START}note\n{START}body\n", "body"),
    "old footer": (f"{HEADER}{START}body\n{OLD_END}{END}end\n", "body"),
    "no header": (f"body\n{END}licence", "body"),
    "unmarked": ("body, as in *** stars *** of Project Gutenberg", "body, as in *** stars *** of Project Gutenberg"),
}
BOOKS["two books"] = (BOOKS["plain"][0] + BOOKS["plain"][0].replace("body", "second"), "body\nsecond")


@pytest.mark.parametrize("name", BOOKS)
def test_gutenberg_wrapping_is_removed(tmp_path: Path, name: str) -> None:
    book, body = BOOKS[name]
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + book.replace("\n", "\r\n").encode())
    documents, reader = read([path], tmp_path, strip_gutenberg=True, documents="file")
    assert [text for text in documents[0].split("\n") if text] == body.split("\n")
    assert reader.unmarked == ([str(path)] if name == "unmarked" else [])
    assert read([path], tmp_path, documents="file")[0] == [book.strip()]  # unless asked


def test_real_books(data_folder: Path, tmp_path: Path) -> None:
    if not (data_folder / "gutenberg").is_dir():
        pytest.skip("the data folder has no gutenberg")
    documents, reader = read([data_folder / "gutenberg"], tmp_path, strip_gutenberg=True, documents="file")
    unstripped, _ = read([data_folder / "gutenberg"], tmp_path, documents="file")
    assert reader.unmarked == []
    assert reader.bad.total() == 0
    lost = sum(map(len, unstripped)) - sum(map(len, documents))
    assert 15_000 * 40 < lost < 25_000 * 40  # header and licence are about 20,000 characters
    assert abs(reader.gutenberg_removed - lost) < 20 * 40  # besides, white space around them
    assert reader.half_marked == reader.shortened == []
    assert not any("gutenberg.org/license" in document.lower() for document in documents)


# What is bad


def quarantine(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    for entry in entries:
        entry["bytes"] = base64.b64decode(entry.pop("bytes_base64"))
    return entries


def test_bad_lines_of_text_are_set_aside_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 200)  # longer than a line, which would count twice
    path = tmp_path / "text.txt"
    raw = [text.encode() for text in TEXTS]
    raw[3], raw[17] = b"caf\xe9 " + b"x" * 40, b"\xff"
    path.write_bytes(b"\n".join(raw))
    documents, reader = read([path], tmp_path, max_bad_fraction=0.1)
    assert documents == [text for index, text in enumerate(TEXTS) if index not in (3, 17)]
    assert (reader.bad.total(), reader.records) == (2, 30)
    assert quarantine(tmp_path) == [
        {"file": str(path), "line": 4, "reason": "not UTF-8: byte 0xe9 at offset 3", "bytes": raw[3]},
        {"file": str(path), "line": 18, "reason": "not UTF-8: byte 0xff at offset 0", "bytes": b"\xff"},
    ]
    read([path], tmp_path, max_bad_fraction=0.1)
    assert len(quarantine(tmp_path)) == 2  # a second pass starts anew


def test_bad_records_of_jsonl_are_set_aside_with_their_reason(tmp_path: Path) -> None:
    bad = [
        b'{"text": ',
        b"[1]",
        b'{"title": "x"}',
        b'{"text": null}',
        b'{"text": 3}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xe9"}',
        b"[" * 100_000,
    ]
    path = tmp_path / "records.jsonl"
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    path.write_bytes(b"\n".join([*good, b"", *bad, b'{"text": "\\ud83d\\ude00"}']) + b"\n")
    documents, reader = read([path], tmp_path, max_bad_fraction=0.5)
    assert documents == [*TEXTS, "\U0001f600"]
    assert reader.records == 30 + len(bad) + 1
    entries = quarantine(tmp_path)
    assert [entry["bytes"] for entry in entries] == bad
    assert [entry["line"] for entry in entries] == list(range(32, 32 + len(bad)))
    reasons = [
        "not JSON",
        "a list, wanted",
        "no field 'text'",
        "is null",
        "is a number",
        "surrogate",
        "not UTF-8: byte 0xe9",
        "",
    ]
    for entry, reason in zip(entries, reasons, strict=True):
        assert reason in entry["reason"]


def test_bad_rows_of_parquet_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    column = pa.array([b"gut", None, b"\xe9", b"gut"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), path)
    documents, reader = read([path], tmp_path, max_bad_fraction=0.5)
    assert documents == ["gut", "gut"]
    assert reader.bad == {str(path): 1}
    assert [(entry["line"], entry["bytes"]) for entry in quarantine(tmp_path)] == [(3, b"\xe9")]


def test_too_many_bad_records_stop_with_file_count_and_quarantine(tmp_path: Path) -> None:
    good, latin = tmp_path / "good.txt", tmp_path / "latin.txt"
    good.write_text("\n".join(["line"] * 997))
    latin.write_bytes("süß\nfine\nnaïve".encode("latin-1"))
    assert read([good, latin], tmp_path, max_bad_fraction=0.002)[0].count("line") == 997
    with pytest.raises(UserError) as caught:
        read([good, latin], tmp_path, max_bad_fraction=0.0019)
    message = str(caught.value)
    for part in (
        "2 of 1000 records are bad",
        "0.19% allowed",
        f"2 in {latin}",
        "line 1: not UTF-8: byte 0xfc",
        "iconv -f latin1",
    ):
        assert part in message
    assert str(tmp_path / "quarantine.jsonl") in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_hopeless_files_are_given_up_early_and_only_those(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(text_files, "EARLY_STOP_RECORDS", 50)
    path = tmp_path / "text.txt"
    path.write_bytes(b"s\xfc\xdf\n" * 20_000)
    with pytest.raises(UserError, match=r"of \d{3} records are bad"):
        read([path], tmp_path, max_bad_fraction=0.01)
    path.write_bytes(b"s\xfc\xdf\n" * 4_000 + b"good\n" * 20_000)  # a bad beginning is no bad file
    assert len(read([path], tmp_path, max_bad_fraction=0.2)[0]) == 20_000


def utf16(path: Path) -> None:
    path.write_text("some words", "utf-16")


def cut_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("\n".join(TEXTS).encode())[:-20])


def flipped_gzip(path: Path) -> None:
    data = bytearray(gzip.compress("\n".join(TEXTS).encode()))
    data[-6] ^= 1  # of the checksum
    path.write_bytes(data)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "binary": ("a.txt", lambda path: path.write_bytes(b"\x7fELF\0\0\0"), "NUL bytes: a binary file"),
    "binary jsonl": ("a.jsonl", lambda path: path.write_bytes(b"{}\0"), "NUL bytes: a binary file"),
    "utf-16": ("a.txt", utf16, r"is UTF-16, wanted UTF-8; convert it: iconv -f utf-16 -t utf-8"),
    "utf-32": ("a.txt", lambda path: path.write_text("x", "utf-32"), r"is UTF-32, wanted UTF-8"),
    "cut gzip": ("a.txt.gz", cut_gzip, "truncated or corrupt"),
    "flipped gzip": ("a.jsonl.gz", flipped_gzip, "truncated or corrupt"),
    "no gzip": ("a.txt.gz", lambda path: path.write_text("plain"), "truncated or corrupt"),
    "no parquet": ("a.parquet", lambda path: path.write_text("plain text"), "truncated or corrupt"),
    "other column": (
        "a.parquet",
        lambda path: pq.write_table(pa.table({"body": ["x"]}), path),
        "has no column 'text', only body",
    ),
    "missing": ("a.txt", lambda path: None, "no file, directory or glob matches"),
    "dangling link": ("a.txt", lambda path: path.symlink_to("nowhere"), "cannot read .*No such file"),
    "other suffix": ("a.pdf", lambda path: path.write_text("x"), "of no kind that can be read; wanted .txt.*rename it, .*--as"),
    "empty": ("a.txt", lambda path: path.touch(), "the inputs are empty"),
    "white space": ("a.txt", lambda path: path.write_text(" \n\n"), "no usable sequence"),
    "empty gzip": ("a.txt.gz", lambda path: path.write_bytes(gzip.compress(b"")), "no usable sequence"),
    "empty folder": ("a", lambda path: path.mkdir(), r"no \.txt, .*\.parquet .* files in .*--as txt\|jsonl\|parquet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_one_line_with_a_way_out(tokenizer: str, tmp_path: Path, case: str) -> None:
    name, make, complaint = REFUSED[case]
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    make(path)
    with pytest.raises(UserError, match=complaint) as caught:
        prepare([str(path)], tmp_path / "out", PrepareOptions(tokenizer=tokenizer, workers=1))
    message = str(caught.value)
    assert "\n" not in message
    assert (str(path) in message) is not case.startswith(("empty", "white")) or case == "empty folder"
    assert not (tmp_path / "out" / "manifest.json").exists()
    # Nothing stands in the way of a second try.
    (tmp_path / "good.txt").write_text(TEXTS[0])
    assert (
        prepare([str(tmp_path / "good.txt")], tmp_path / "out", PrepareOptions(tokenizer=tokenizer, workers=1)).sequences == 1
    )


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_parquet_is_refused_or_read(tokenizer: str, tmp_path: Path, damage: str) -> None:
    """Whatever pyarrow raises for it; where a byte changed that no check covers, other text may be read."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=7)
    undamaged, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for number, place in enumerate(rng.integers(0, len(undamaged), 40)):
        data = bytearray(undamaged[:place] if damage == "cut" else undamaged)
        if damage == "changed":
            data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            prepare([str(path)], tmp_path / str(number), PrepareOptions(tokenizer=tokenizer, workers=1))
        except UserError:
            refused += 1
    assert refused == 40 if damage == "cut" else refused > 5


def test_no_inputs(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no inputs"):
        prepare([], tmp_path / "out", PrepareOptions(tokenizer=tokenizer))
    assert not (tmp_path / "out").exists()


def test_every_sequence_dropped(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    options = PrepareOptions(tokenizer=tokenizer, documents="line", min_tokens=400, workers=1)
    with pytest.raises(UserError, match=r"no usable sequence in 1 files \(30 documents with tokens, 30 pieces dropped"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", options)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_line_of_json_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(text_files, "LONGEST_RECORD_BYTES", 5000)
    (tmp_path / "a.jsonl").write_text(json.dumps([{"text": text} for text in TEXTS * 10]))
    with pytest.raises(UserError, match="JSON lines hold one record a line"):
        read([tmp_path / "a.jsonl"], tmp_path)


def test_manifest_counts_quarantine_and_notes(tokenizer: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_bytes(b"\n".join([*(text.encode() for text in TEXTS), b"\xe9"]))
    (data / "notes.pdf").write_text("x")
    events: list[PrepareProgress] = []
    options = PrepareOptions(tokenizer=tokenizer, strip_gutenberg=True, max_bad_fraction=0.1, workers=1)
    manifest = prepare([str(data)], tmp_path / "out", options, events.append)
    assert (manifest.records, manifest.bad_records, manifest.unmarked_files, manifest.documents) == (31, 1, 1, 1)
    assert "quarantine.jsonl" in manifest.files
    notes = [progress.note for progress in events if progress.note]
    assert notes[0] == "ignored 1 files of other kinds: notes.pdf"
    assert "no Project Gutenberg lines" in notes[1]
    last = [progress for progress in events if not progress.note][-1]
    assert last.bytes_read == last.bytes_total == (data / "a.txt").stat().st_size
    assert last.tokens == manifest.tokens
    corpus = Corpus.open(tmp_path / "out")
    decoded = load_tokenizer(corpus.tokenizer_dir).decode(corpus.gather(np.arange(len(corpus))), skip_special_tokens=True)
    assert "".join(str(decoded).split()) == "".join(" ".join(TEXTS).split())
