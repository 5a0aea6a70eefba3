"""A tokenizer, a text, and corpora prepared from it: what every measurement here is made on."""

from pathlib import Path

import pytest

from fastdistil.data.corpus import Corpus
from fastdistil.data.masking import TokenFacts
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.tokenizer import load_tokenizer, token_facts, train_wordpiece
from tests.evaluation.references import LENGTH, documents


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_wordpiece(documents(40), 90, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(documents()) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus(tokenizer: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Pieces of at most LENGTH tokens, framed by [CLS] and [SEP]."""
    out = tmp_path_factory.mktemp("corpus")
    prepare(
        [str(text)],
        out,
        PrepareOptions(tokenizer=str(tokenizer), max_length=LENGTH, documents="line", workers=1),
    )
    return Corpus.open(out)


@pytest.fixture(scope="session")
def document_corpus(tokenizer: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Whole documents without special tokens."""
    out = tmp_path_factory.mktemp("whole")
    options = PrepareOptions(
        tokenizer=str(tokenizer),
        max_length=2**31 - 1,
        documents="line",
        special_tokens=False,
        workers=1,
    )
    prepare([str(text)], out, options)
    return Corpus.open(out)


@pytest.fixture(scope="session")
def facts(tokenizer: Path) -> TokenFacts:
    return token_facts(load_tokenizer(tokenizer))
