"""Documents -> sequences of tokens, in this process or in several.

A document becomes pieces as in the Hugging Face distillation example: [CLS] tokens [SEP] if that fits into max_length, else
chunks of max_length - 2 of it, each given the special tokens it lacks (so the first piece is one token shorter than the
next). Tokenizers without [CLS] and [SEP] use their bos, where they put it in front of texts themselves, and eos; those with
only one of them get that one alone.

Shapes: d documents, p pieces.
"""

import json
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastdistil.data.corpus import Lengths, TokenArray
from fastdistil.data.ragged import Ints, ranges
from fastdistil.data.text_files import Block
from fastdistil.data.tokenizer import plain
from fastdistil.errors import OutOfMemory, UserError, is_out_of_memory, of_a_library

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

PIECE_CHARACTERS = 32_768
"""Long documents are tokenised in stretches of this size: a megabyte in one call takes up to 1.6 times as long."""


class PieceRules(NamedTuple):
    """How tokens become sequences."""

    max_length: int
    front: int | None
    back: int | None
    unknown: int | None
    min_tokens: int
    max_unknown: float
    dtype: str
    special_tokens_in_text: bool = False
    """Whether special tokens that the text spells out become these tokens, and not the tokens of their letters."""


class Encoded(NamedTuple):
    tokens: TokenArray
    """[sum of lengths]"""
    lengths: Lengths
    """[sequences]"""
    documents: int
    dropped: int
    special_spellings: int = 0
    """How often the documents spell out a special token."""


class Encoder:
    """Documents -> sequences, with one thread of the tokenizers library and numpy."""

    def __init__(self, tokenizer_file: str, plan: PieceRules) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(tokenizer_file)
        plain(self.tokenizer)
        self.plan = plan
        names = sorted(_special_names(self.tokenizer), key=len, reverse=True)  # the longest first, as the tokenizer has it
        self.special = re.compile("|".join(map(re.escape, names))) if names else None
        if not plan.special_tokens_in_text:
            _read_special_tokens_as_text(self.tokenizer)
        # A tokenizer that marks the beginning of every text would mark the stretches too.
        self.stretch = sys.maxsize
        with suppress(UserError):  # where it has no token for these words
            joined, first, second = (part.ids for part in self.encode(["one two three four", "one two", " three four"]))
            self.stretch = PIECE_CHARACTERS if joined == first + second else sys.maxsize

    def __call__(self, documents: list[str]) -> Encoded:
        stretches: list[str] = []
        firsts: list[int] = []
        for document in documents:
            firsts.append(len(stretches))
            stretches += [document] if len(document) <= self.stretch else cut_at_spaces(document, self.stretch)
        encodings = self.encode(stretches)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ids = chain.from_iterable(encoding.ids for encoding in encodings)
        tokens = np.fromiter(ids, self.plan.dtype, int(lengths.sum()))
        spellings = 0
        if self.special is not None:
            spellings = sum(1 for _ in self.special.finditer("\n".join(documents)))
        return pieces(tokens, np.add.reduceat(lengths, firsts), self.plan)._replace(special_spellings=spellings)

    def encode(self, texts: list[str]) -> "list[Encoding]":
        """Return the tokens of each text. Raises UserError where there are none for a text, as without an unknown token."""
        try:
            return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if not of_a_library(error) or is_out_of_memory(error):
                raise
            if len(texts) > 1:
                for text in texts:  # to name the first that fails
                    self.encode([text])
            start = " ".join(texts[0][:60].split())
            raise UserError(
                f"the tokenizer cannot encode the text {start!r}: {error}; "
                "give one whose vocabulary has its unknown token, or text of known words alone"
            ) from error


def _special_names(tokenizer: "Tokenizer") -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special and token.content}


def _read_special_tokens_as_text(tokenizer: "Tokenizer") -> None:
    """Make a tokenizer encode what spells a special token, such as [MASK], as it encodes other text; ids stay the same.

    encode_special_tokens keeps the tokenizer from looking for them, but most are entries of its model too, which may come upon
    them by itself: as a word, or by merging. There they are renamed. One of a single character stays what it also is, a
    letter of the alphabet.
    """
    from tokenizers import Tokenizer

    tokenizer.encode_special_tokens = True
    definition = json.loads(tokenizer.to_str())
    model = definition["model"]
    merges, prefix = model.get("merges", []), model.get("continuing_subword_prefix") or ""
    entries = model["vocab"] if model["type"] == "Unigram" else list(model["vocab"].items())  # pairs of name and score, or id
    reachable = {name for name, _ in entries}
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        reachable = {left + right.removeprefix(prefix) for left, right in merges}
    hidden = {name: _UNMATCHABLE + name for name in _special_names(tokenizer) if len(name) > 1 and name in reachable}
    if not hidden:
        return
    renamed = [(hidden.get(name, name), value) for name, value in entries]
    model["vocab"] = renamed if model["type"] == "Unigram" else dict(renamed)
    if "unk_token" in model:
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    if merges:
        model["merges"] = [pair for pair in merges if hidden.keys().isdisjoint((*pair, pair[0] + pair[1].removeprefix(prefix)))]
    tokenizer.model = Tokenizer.from_str(json.dumps({**definition, "added_tokens": []})).model


_UNMATCHABLE = "\U0010fffe\U0010ffff"
"""Noncharacters: no text that is exchanged holds them."""


def cut_at_spaces(text: str, stretch: int) -> Iterator[str]:
    """Cut between two words, before a single space: no pre-tokenizer in use joins those, so the tokens stay the same.

    A text that has no such place within a stretch is left whole from there on.
    """
    start = 0
    while len(text) - start > stretch:
        end = text.rfind(" ", start + 1, start + stretch)
        while end > 0 and not (text[end - 1].isalnum() and text[end + 1].isalnum()):
            end = text.rfind(" ", start + 1, end)
        if end <= 0:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def pieces(tokens: TokenArray, lengths_d: Ints, plan: PieceRules) -> Encoded:
    """Split documents (tokens end to end, lengths [documents]) and frame each piece."""
    has_front = int(plan.front is not None)
    added = has_front + int(plan.back is not None)
    chunk = plan.max_length - added
    first = chunk - has_front  # the example cuts the framed document: its front token takes room in the first chunk
    count_d = np.where(lengths_d + added <= plan.max_length, 1, 1 + -((first - lengths_d) // chunk))
    count_d[lengths_d == 0] = 0
    length_p = np.repeat(lengths_d, count_d)
    index_p = ranges(np.zeros_like(count_d), count_d)
    whole_p = np.repeat(count_d, count_d) == 1
    end_p = np.where(whole_p, length_p, np.minimum(length_p, first + index_p * chunk))
    start_p = np.where(index_p == 0, 0, first + (index_p - 1) * chunk)
    framed_p = end_p - start_p + added
    ends_p = np.cumsum(framed_p)
    starts_p = ends_p - framed_p
    out: TokenArray = np.empty(int(framed_p.sum()), plan.dtype)
    body = np.ones(len(out), np.bool_)
    if plan.front is not None:
        out[starts_p] = plan.front
        body[starts_p] = False
    if plan.back is not None:
        out[ends_p - 1] = plan.back
        body[ends_p - 1] = False
    out[body] = tokens
    keep_p = framed_p >= plan.min_tokens
    if plan.max_unknown < 1.0 and plan.unknown is not None and len(framed_p):
        keep_p &= np.add.reduceat(out == plan.unknown, starts_p, dtype=np.int64) / framed_p < plan.max_unknown
    documents = int((lengths_d > 0).sum())
    if keep_p.all():
        return Encoded(out, framed_p.astype(np.int32), documents, 0)
    return Encoded(out[np.repeat(keep_p, framed_p)], framed_p[keep_p].astype(np.int32), documents, int((~keep_p).sum()))


@cache
def _encoder(tokenizer_file: str, plan: PieceRules) -> Encoder:
    """A worker process's own. (Made with its first block: what fails while it starts would be lost.)"""
    return Encoder(tokenizer_file, plan)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A parent that is killed cannot tell its workers to stop; they would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(tokenizer_file: str, plan: PieceRules, documents: list[str]) -> Encoded:
    return _encoder(tokenizer_file, plan)(documents)


def encoded_blocks(
    blocks: Iterator[Block], tokenizer_file: str, plan: PieceRules, workers: int
) -> Generator[tuple[Block, Encoded], None, None]:
    """Every block and its tokens, in order; at most two blocks a worker are in flight."""
    if workers == 1:
        with one_thread():
            encoder = Encoder(tokenizer_file, plan)
            for block in blocks:
                yield block, encoder(block.documents)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    waiting: deque[tuple[Block, Future[Encoded]]] = deque()
    try:
        for block in blocks:
            waiting.append((block._replace(documents=[]), pool.submit(_encode, tokenizer_file, plan, block.documents)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise OutOfMemory(
            "a tokenising process died, most likely killed for want of memory; run again with fewer --workers "
            "(finished shards are kept); in a script of your own, call prepare under if __name__ == '__main__'"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """The tokenizers library would use every core; it reads this variable at each call and has no other switch."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
