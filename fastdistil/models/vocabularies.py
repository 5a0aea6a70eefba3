"""Checks that models and a corpus mean the same tokens by the same ids, where a run uses them.

Models of one family pad their vocabularies to different widths, rename special tokens, and come with tokenizers that have an
entry more than the model. None of that matters while the ids in use agree: those in the corpus' text, and the mask's.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np

from fastdistil.data.batch import TokenSequences
from fastdistil.data.corpus import Corpus
from fastdistil.data.masking import TokenFacts
from fastdistil.data.ragged import Ints
from fastdistil.data.tokenizer import FastTokenizer, load_tokenizer, vocabulary_fingerprint
from fastdistil.errors import UserError
from fastdistil.models import language_model, loading
from fastdistil.recipe import Recipe

ROLES = {"bos": "front", "cls": "front", "eos": "back", "sep": "back", "pad": "pad", "mask": "mask", "unk": "unknown"}
"""What a special token is for: BERT's [CLS] and [SEP] stand where others have BOS and EOS."""
_SHOWN = 10
"""So many ids are named where vocabularies differ."""


def _ids_in_use(corpus: TokenSequences, facts: TokenFacts, causal: bool) -> Ints:
    """The ids that a model is given, ascending int64: those in the corpus and, for masked models, the mask's.

    Padding is not among them: what stands there is never looked at.
    """
    mask_ids = [] if causal or facts.mask_id is None else [facts.mask_id]
    return np.union1d(np.flatnonzero(corpus.counts), np.array(mask_ids, np.int64))


def differing_ids(tokenizer: FastTokenizer, other: FastTokenizer, ids: Iterable[int]) -> dict[int, tuple[str, str]]:
    """Each of the ids that means two things, with both spellings.

    A special token of another name is the same one where it has a role in common, such as padding.
    """
    spellings, other_spellings = (_spellings(vocabulary) for vocabulary in (tokenizer, other))
    roles, other_roles = (_roles(vocabulary) for vocabulary in (tokenizer, other))
    differing = {}
    for token in ids:
        pair = spellings.get(token, "nothing"), other_spellings.get(token, "nothing")
        if pair[0] != pair[1] and not roles.get(token, set()) & other_roles.get(token, set()):
            differing[token] = pair
    return differing


def _spellings(tokenizer: FastTokenizer) -> dict[int, str]:
    return {index: repr(token) for token, index in tokenizer.get_vocab().items()}


def _roles(tokenizer: FastTokenizer) -> dict[int, set[str]]:
    roles: dict[int, set[str]] = {}
    for name, role in ROLES.items():
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            roles.setdefault(token, set()).add(role)
    return roles


def disagreement(path: str, corpus: Corpus, causal: bool) -> str | None:
    """Say which of the ids in use the tokenizer of a model spells otherwise than the corpus; None: it does not."""
    tokenizer = load_tokenizer(path)
    if vocabulary_fingerprint(tokenizer) == corpus.manifest.fingerprint:
        return None
    used = _ids_in_use(corpus, corpus.facts, causal).tolist()
    differing = differing_ids(tokenizer, corpus.tokenizer, used)
    return f"of {len(used)} ids in use {_shown(differing, 'in the corpus')}" if differing else None


def _pair_disagreement(path: str, other: str) -> str | None:
    """Say which ids two models' tokenizers both have and spell differently; None: no id."""
    tokenizers = [load_tokenizer(directory) for directory in (path, other)]
    common = set.intersection(*(set(tokenizer.get_vocab().values()) for tokenizer in tokenizers))
    differing = differing_ids(tokenizers[0], tokenizers[1], sorted(common))
    return f"of {len(common)} ids {_shown(differing, 'there')}" if differing else None


def _shown(differing: dict[int, tuple[str, str]], there: str) -> str:
    first = "; ".join(f"{token} is {one}, {there} {other}" for token, (one, other) in list(differing.items())[:_SHOWN])
    return f"{len(differing)} differ: {first}" + ("; ..." if len(differing) > _SHOWN else "")


def check_rows(who: str, rows: int, corpus: TokenSequences, facts: TokenFacts, causal: bool, advice: str = "") -> None:
    """Refuse a vocabulary of `rows` entries where ids beyond are in use. Raises UserError; `advice` precedes the usual one."""
    largest = int(_ids_in_use(corpus, facts, causal).max(initial=0))
    if largest >= rows:
        raise UserError(
            f"{who} has {rows} entries of vocabulary, and the token id {largest} is in use; {advice}prepare the corpus with "
            f"the model's own tokenizer, or give the model {largest + 1} entries (resize_token_embeddings of transformers)"
        )


_Facts = TypeVar("_Facts", bound=TokenFacts)


def facts_within(facts: _Facts, rows: int) -> _Facts:
    """What masking and batching may know for a model whose vocabulary has `rows` entries, though the tokenizer has more.

    Ids beyond are never drawn as replacements, and pad nothing.
    """
    if rows >= facts.vocab_size:
        return facts
    beyond = np.arange(rows, facts.vocab_size)
    pad_id = facts.pad_id if facts.pad_id < rows else 0
    special_ids = np.union1d(facts.special_ids, beyond)
    return cast(_Facts, replace(cast(Any, facts), pad_id=pad_id, special_ids=special_ids))


def check_tokenizers(recipe: Recipe, corpus: Corpus, note: Callable[[str], None], from_python: Sequence[str] = ()) -> None:
    """Refuse teachers and students for which the corpus' ids mean other tokens; without a tokenizer they cannot be checked.

    `from_python`: which of them ("teacher", "student") are modules, in the place of those that the recipe names.
    Raises UserError.
    """
    paths = {}
    if recipe.teacher is not None and "teacher" not in from_python:
        paths["the teacher"] = recipe.teacher.path
    if recipe.student.path is not None and "student" not in from_python:
        paths["the student's model"] = recipe.student.path
    for who, path in paths.items():
        causal = language_model.family_of(loading.load_config(path)).causal  # a missing model is no missing tokenizer
        if not loading.has_tokenizer(path):
            note(f"{who} {path} has no tokenizer files: only the size of its vocabulary can be compared with the corpus")
            continue
        if (difference := disagreement(path, corpus, causal)) is None:
            continue
        advice = f"prepare the corpus with --tokenizer {path}"
        for other in paths.values():
            if other != path and loading.has_tokenizer(other) and (apart := _pair_disagreement(path, other)) is not None:
                advice = f"{path} and {other} differ too ({apart}), so choose a teacher and a student of one vocabulary"
        raise UserError(f"{who} {path} has another vocabulary than the corpus ({difference}); {advice}")


def check_heldout(recipe: Recipe, corpus: Corpus, heldout: Corpus) -> None:
    """Refuse a held-out corpus whose ids in use mean other tokens. Raises UserError."""
    if (difference := disagreement(str(corpus.tokenizer_dir), heldout, causal=False)) is not None:
        raise UserError(
            f"data.heldout {recipe.data.heldout} has another vocabulary than data.train ({difference}); "
            "prepare both with one --tokenizer"
        )


def teacher_rows(recipe: Recipe, teacher: Any | None) -> int | None:
    """Entries of the teacher's vocabulary, though only its cache be used; None without a teacher."""
    if teacher is not None:
        return language_model.shape(teacher)[0]
    return int(loading.load_config(recipe.teacher.path).vocab_size) if recipe.teacher is not None else None


def shared_columns(
    recipe: Recipe,
    teacher: int | None,
    student: int,
    corpora: Sequence[Corpus],
    causal: bool,
    note: Callable[[str], None],
    *,
    user_modules: bool = False,
) -> int | None:
    """The first entries that a teacher's and a student's vocabulary of these sizes have in common; None: all, equally many.

    `user_modules`: one of them is a module of the user, without a tokenizer. Raises UserError where a vocabulary lacks an id
    that a corpus uses, and where two sizes may mean two vocabularies.
    """
    config = recipe.student.config
    advice = "leave student.config.vocab_size out, " if config is not None and "vocab_size" in config else ""
    for corpus in corpora:
        if teacher is not None:
            check_rows("the teacher", teacher, corpus, corpus.facts, causal)
        check_rows("the student", student, corpus, corpus.facts, causal, advice)
    if teacher is None or teacher == student:
        return None
    paths = [recipe.student.path, recipe.teacher.path if recipe.teacher is not None else None]
    if user_modules or not corpora or not all(loading.has_tokenizer(path) for path in paths if path is not None):
        size = "student.config.vocab_size" if config is not None else "resize_token_embeddings of transformers"
        raise UserError(
            f"the teacher's vocabulary has {teacher} entries, the student's {student}, and the tokenizers that say which they "
            f"share are not there; put their files beside the weights, or give the student {teacher} entries ({size})"
        )
    columns = min(teacher, student, corpora[0].facts.vocab_size)
    note(
        f"the teacher's vocabulary has {teacher} entries, the student's {student}: they are compared in the first {columns}, "
        "those of the corpus' tokenizer; the others are padding"
    )
    return columns
