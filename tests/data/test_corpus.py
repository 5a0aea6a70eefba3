"""Prepared corpora against independent truths: the example's splitting retyped, the tokenizer itself, plain Python reading."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdistil.data import text_files, tokenise
from fastdistil.data.corpus import Corpus, Manifest
from fastdistil.data.prepare import prepare
from fastdistil.data.tokenise import Encoder, PieceRules, pieces
from fastdistil.errors import CorruptData, UserError
from tests.data.short_sentences import SENTENCES, WORDS, options


def sequences_of(corpus: Corpus) -> list[list[int]]:
    return [corpus.gather(np.array([index])).tolist() for index in range(len(corpus))]


# The Hugging Face example's preparation, retyped: one sequence at a time, in plain Python.
def example_chunks(framed: list[int], max_len: int, front: int | None, back: int | None) -> list[list[int]]:
    if len(framed) <= max_len:
        return [framed]
    size = max_len - (front is not None) - (back is not None)
    result = []
    for start in range(0, len(framed), size):
        chunk = framed[start : start + size]
        if front is not None and not (start == 0 and chunk[0] == front):
            chunk = [front, *chunk]
        if back is not None and not (start + size >= len(framed) and chunk[-1] == back):
            chunk = [*chunk, back]
        result.append(chunk)
    return result


def example_corpus(texts: list[str], tokenizer: Any, front: int, back: int, max_len: int) -> list[list[int]]:
    result = []
    for text in texts:
        framed = [front, *tokenizer.encode(text.strip(), add_special_tokens=False), back]
        chunks = example_chunks(framed, max_len, front, back)
        result += [chunk for chunk in chunks if len(chunk) > 2]  # ours never keeps an empty piece
    return result


@pytest.mark.parametrize(("front", "back"), [(1, 2), (7, 7), (1, None), (None, 2), (None, None)])
@pytest.mark.parametrize("max_length", [4, 5, 16])
def test_pieces_are_the_examples_at_every_length(
    front: int | None,
    back: int | None,
    max_length: int,
) -> None:
    lengths = list(range(3 * max_length + 3))
    documents = [[100 + index % 50 for index in range(length)] for length in lengths]
    tokens = np.array([token for document in documents for token in document], np.uint16)
    encoded = pieces(tokens, np.array(lengths), PieceRules(max_length, front, back, None, 0, 1.0, "uint16"))
    added = (front is not None) + (back is not None)
    expected = []
    for document in documents:
        framed = [*([front] if front is not None else []), *document, *([back] if back is not None else [])]
        expected += [chunk for chunk in example_chunks(framed, max_length, front, back) if len(chunk) > added]
    assert max(map(len, expected)) == max_length
    assert np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1]) == [pytest.approx(chunk) for chunk in expected]
    assert encoded.documents == len(lengths) - 1
    assert encoded.dropped == 0


def test_lines_become_the_examples_sequences(
    wordpiece: Path,
    byte_level: Path,
    lines: Path,
    tmp_path: Path,
) -> None:
    for folder, names in ((wordpiece, ("[CLS]", "[SEP]")), (byte_level, ("<|endoftext|>", "<|endoftext|>"))):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        front, back = tokenizer.convert_tokens_to_ids(list(names))
        out = tmp_path / folder.name
        manifest = prepare([str(lines)], out, options(folder, bos="yes"))
        expected = example_corpus(SENTENCES, tokenizer, front, back, 16)
        assert len(expected) > len(SENTENCES)  # some were split
        corpus = Corpus.open(out)
        assert sequences_of(corpus) == expected
        assert corpus.lengths.dtype == np.int32
        assert corpus.lengths.tolist() == [len(sequence) for sequence in expected]
        flat = [token for sequence in expected for token in sequence]
        assert corpus.counts.dtype == np.int64
        assert corpus.counts.tolist() == np.bincount(flat, minlength=len(tokenizer)).tolist()
        assert (manifest.documents, manifest.records, manifest.tokens) == (
            len(SENTENCES),
            len(SENTENCES),
            len(flat),
        )
        assert manifest.vocab_size == len(tokenizer)
        assert manifest.dtype == "uint16"


def test_the_examples_dropping_rules_when_asked(wordpiece: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(wordpiece)
    text = tmp_path / "text.txt"
    strange = [
        "字 " * 9 + "the fox jumps",
        "the fox jumps over the dog 字",
        "字 " * 3 + "the fox, the dog and the fox jumps over",
    ]
    text.write_text("\n".join([*SENTENCES, *strange]), "utf-8")
    manifest = prepare(
        [str(text)],
        tmp_path / "out",
        options(wordpiece, max_length=64, min_tokens=12, max_unknown=0.5),
    )
    everything = example_corpus([*SENTENCES, *strange], tokenizer, 2, 3, 64)
    expected = [
        sequence
        for sequence in everything
        if len(sequence) > 11 and sum(token == 1 for token in sequence) / len(sequence) < 0.5
    ]
    unknown = [sum(token == 1 for token in sequence) / len(sequence) for sequence in everything[-3:]]
    assert unknown[0] >= 0.5 > unknown[2] > 0
    assert sequences_of(Corpus.open(tmp_path / "out")) == expected
    assert manifest.dropped == len(everything) - len(expected) > 1


def test_the_share_of_unknown_tokens_counts_special_ones_and_its_limit_drops() -> None:
    tokens = np.array([9, 9, 5, 5, 9, 9, 9, 5], np.uint16)  # 9 is unknown: 2 of 6 and 3 of 6 with the frame
    for limit, sequences in ((1.0, 2), (0.51, 2), (0.5, 1), (2 / 6, 0)):
        encoded = pieces(tokens, np.array([4, 4]), PieceRules(16, 1, 2, 9, 0, limit, "uint16"))
        assert (len(encoded.lengths), encoded.dropped) == (sequences, 2 - sequences)
        assert encoded.tokens.tolist() == [1, 9, 9, 5, 5, 2, 1, 9, 9, 9, 5, 2][: 6 * sequences]


def test_without_special_tokens_and_with_only_one_of_them(
    byte_level: Path,
    lines: Path,
    tmp_path: Path,
) -> None:
    prepare([str(lines)], tmp_path / "bare", options(byte_level, special_tokens=False))
    tokenizer = AutoTokenizer.from_pretrained(byte_level)
    bare = Corpus.open(tmp_path / "bare")
    assert tokenizer.decode(bare.gather(np.arange(len(bare)))) == "".join(SENTENCES)
    only_eos = tmp_path / "only-eos"
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>").save_pretrained(only_eos)
    prepare([str(lines)], tmp_path / "eos", options(only_eos))
    sequences = sequences_of(Corpus.open(tmp_path / "eos"))
    assert {sequence[-1] for sequence in sequences} == {0}
    assert all(0 not in sequence[:-1] for sequence in sequences)


def test_wide_vocabularies_take_four_bytes(lines: Path, tmp_path: Path) -> None:
    vocabulary = {f"[{index}]": index for index in range(70_000)} | {word: 70_000 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[0]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer, unk_token="[0]", cls_token="[1]", sep_token="[2]").save_pretrained(
        tmp_path / "tokenizer",
    )
    manifest = prepare([str(lines)], tmp_path / "out", options(tmp_path / "tokenizer"))
    corpus = Corpus.open(tmp_path / "out")
    assert manifest.dtype == "uint32"
    assert corpus.gather(np.array([0]))[:3].tolist() == [1, 70_000, 70_001]


def test_long_documents_in_stretches_give_the_tokens_of_the_whole(
    wordpiece: Path, byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "PIECE_CHARACTERS", 100)
    # Runs of spaces of every length lie where a stretch would end: cut within one, byte-level BPE gives other tokens.
    text = "".join(sentence + ("\n\n" if i % 3 else " " * (i % 90)) for i, sentence in enumerate(SENTENCES)) + "x" * 300
    for folder in (wordpiece, byte_level):
        encoder = Encoder(
            str(folder / "tokenizer.json"),
            PieceRules(10**6, None, None, None, 0, 1.0, "uint16"),
        )
        assert encoder.stretch == 100
        assert len(list(tokenise.cut_at_spaces(text, 100))) > 50
        assert encoder([text, "a dog"]).tokens.tolist() == [
            *encoder.tokenizer.encode(text, add_special_tokens=False).ids,
            *encoder.tokenizer.encode("a dog", add_special_tokens=False).ids,
        ]


def test_a_tokenizer_that_marks_text_starts_is_given_whole_documents(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=100, show_progress=False))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(str(tmp_path / "tokenizer.json"), PieceRules(10**6, None, None, None, 0, 1.0, "uint16"))
    text = "the dog jumps over the fox " * 5000
    assert encoder([text]).tokens.tolist() == tokenizer.encode(text).ids


def test_any_number_of_workers_writes_the_same_bytes(
    wordpiece: Path,
    lines: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(text_files, "BLOCK_CHARACTERS", 500)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 700)
    manifests = [
        prepare([str(lines)], tmp_path / str(workers), options(wordpiece, shard_tokens=300, workers=workers))
        for workers in (1, 2)
    ]
    assert len(manifests[0].shards) > 3
    assert manifests[0] == manifests[1]
    assert Corpus.open(tmp_path / "2").manifest == manifests[0]
    assert (tmp_path / "1" / "manifest.json").read_bytes() == (tmp_path / "2" / "manifest.json").read_bytes()


def test_gather_across_shards_in_any_order(
    wordpiece: Path,
    lines: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(text_files, "BLOCK_CHARACTERS", 500)
    prepare([str(lines)], tmp_path / "one", options(wordpiece))
    prepare([str(lines)], tmp_path / "many", options(wordpiece, shard_tokens=300))
    one, many = Corpus.open(tmp_path / "one"), Corpus.open(tmp_path / "many", verify="size")
    assert len(many.manifest.shards) > 3
    tokens = np.fromfile(tmp_path / "one" / "tokens-00000.bin", np.uint16)
    parts = np.split(tokens, np.cumsum(one.lengths)[:-1])
    chosen = np.random.default_rng(0).integers(0, len(one), 50)
    assert len(set(chosen.tolist())) < 50  # some twice
    for order in (chosen, np.arange(len(one)), chosen[:0], chosen[:1]):
        expected = [token for index in order for token in parts[index].tolist()]
        for corpus in (one, many):
            gathered = corpus.gather(order)
            assert gathered.dtype == np.int64
            assert gathered.tolist() == expected


# Opening what is damaged


@pytest.fixture
def prepared(wordpiece: Path, lines: Path, tmp_path: Path) -> Path:
    prepare([str(lines)], tmp_path / "out", options(wordpiece))
    return tmp_path / "out"


FILES = ["tokens-00000.bin", "lengths-00000.bin", "counts.bin", "tokenizer/tokenizer.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(prepared: Path, name: str) -> None:
    path = prepared / name
    data = bytearray(path.read_bytes())
    # In the manifest: of a digit, which leaves valid JSON.
    place = data.index(b'"tokens": ') + 10 if name == "manifest.json" else len(data) // 2
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptData) as caught:
        Corpus.open(prepared)
    message = str(caught.value)
    assert caught.value.exit_code == 14
    assert str(path) in message
    assert "expected" in message
    assert "found" in message
    assert "fastdistil prepare" in message
    assert "\n" not in message
    if name != "manifest.json":
        assert hashlib.sha256(data).hexdigest() in message
    if name in ("tokens-00000.bin", "counts.bin"):
        Corpus.open(prepared, verify="size")  # does not read them, so does not see


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("verify", ["full", "size"])
def test_truncated_and_missing_files_are_found(prepared: Path, name: str, verify: str) -> None:
    path = prepared / name
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 4)
    with pytest.raises(CorruptData, match=f"expected {size} bytes, found {size - 4}"):
        Corpus.open(prepared, verify=verify)
    path.unlink()
    with pytest.raises(CorruptData, match="is missing"):
        Corpus.open(prepared, verify=verify)


def test_a_manifest_cut_short_or_from_the_future(prepared: Path) -> None:
    path = prepared / "manifest.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(CorruptData, match="is damaged"):
        Corpus.open(prepared)
    values = json.loads(text) | {"format": 2, "new": 1}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"format 2, this fastdistil reads up to 1; upgrade"):
        Corpus.open(prepared)
    path.write_text(text)
    assert isinstance(Corpus.open(prepared).manifest, Manifest)


def test_directories_that_are_no_corpus(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"no prepared corpus.*make one with fastdistil prepare"):
            Corpus.open(path)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="was interrupted; run it again"):
        Corpus.open(tmp_path)
    with pytest.raises(UserError, match="verify must be full or size"):
        Corpus.open(tmp_path, verify="none")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 3),
        ("min_tokens", 17),
        ("max_unknown", 1.1),
        ("max_bad_fraction", -0.1),
        ("max_unknown_share", 1.1),
        ("shard_tokens", 0),
        ("workers", 0),
    ],
)
def test_options_out_of_range(wordpiece: Path, name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} must be from .* got {value}"):
        options(wordpiece, **{name: value})


def test_an_unknown_kind_of_document(wordpiece: Path) -> None:
    with pytest.raises(UserError, match="documents must be file, paragraph or line, got 'page'"):
        options(wordpiece, documents="page")
