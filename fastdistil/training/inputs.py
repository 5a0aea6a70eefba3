"""From a recipe to what the loop runs on: device and precision resolved, models loaded and checked, windows of batches."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdistil.data.batches import Batches
from fastdistil.data.corpus import Corpus
from fastdistil.data.masking import mask_table
from fastdistil.data.sources import CorpusSource, MappingSource, WindowSource
from fastdistil.data.teacher_cache import TeacherCache, identity
from fastdistil.data.tokenizer import TokenFacts, load_tokenizer, token_facts
from fastdistil.data.word_marks import check_words
from fastdistil.errors import UserError
from fastdistil.kernels.backend import chosen_backend
from fastdistil.models import language_model, loading, students
from fastdistil.models.compiling import check_compiler
from fastdistil.models.vocabularies import check_heldout, check_tokenizers, facts_within, shared_columns, teacher_rows
from fastdistil.profiling.device import has_fast_bf16
from fastdistil.recipe import Recipe, Teacher
from fastdistil.storage import canonical, text_sha256
from fastdistil.training.teacher_identity import teacher_fingerprint


@dataclass(frozen=True)
class Inputs:
    device: torch.device
    student: Any
    teacher: Any | None
    projection: nn.Linear | None
    source: WindowSource
    updates: int
    heldout: Corpus | None
    facts: TokenFacts | None
    """Of the held-out corpus, or of data.train."""
    tokenizer: Any | None
    columns: int | None = None
    """Entries that the vocabularies of teacher and student have in common, where they are not equally wide."""


def resolve(recipe: Recipe, own_teacher: bool = False) -> Recipe:
    """The recipe with every `auto` replaced by what this machine gives. Raises UserError for what it cannot give.

    A teacher given as a module (`own_teacher`) keeps its dtype unless the recipe names one.
    """
    device = recipe.device if recipe.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda and torch finds no GPU; set device=cpu, or see `fastdistil doctor`")
    precision = recipe.loop.precision
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(torch.device(device)) else "fp32"
    changes: dict[str, Any] = {"device": device, "loop": {"precision": precision}, "kernels": _kernels(recipe, device)}
    if recipe.teacher is not None and recipe.teacher.dtype == "auto" and not own_teacher:
        changes["teacher"] = {"dtype": precision}
    return recipe.with_(**changes)


def _kernels(recipe: Recipe, device: str) -> str:
    if recipe.kernels == "reference":
        return recipe.kernels
    try:
        return chosen_backend(recipe.kernels, device)
    except ValueError as error:
        raise UserError(f"kernels is {recipe.kernels} and the run's device is {device}: {error}") from error


def indexed_device(name: str) -> torch.device:
    """A device as the things that need one of several GPUs take it: "cuda" is the current one."""
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def load_inputs(
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    note: Callable[[str], None] = print,
    rank: int = 0,
    ranks: int = 1,
) -> Inputs:
    """Load and check all that a resolved recipe names; the arguments stand in for parts of it. Of the updates' batches this
    rank gets its own.

    Raises UserError, CorruptData.
    """
    device = indexed_device(recipe.device)
    if recipe.objective.needs_teacher and recipe.teacher is None and teacher is None:
        raise UserError(
            "the objective compares with a teacher and the recipe has none; set teacher.path, "
            "or objective.a_ce=0 objective.a_cos=0 objective.a_mse=0 for pre-training"
        )
    check_cached(recipe, own_models=teacher is not None or batches is not None)
    check_compiler(recipe)
    corpus = None if batches is not None else open_corpus(recipe.data.train, recipe.data.verify, "data.train")
    heldout = open_corpus(recipe.data.heldout, recipe.data.verify, "data.heldout") if recipe.data.heldout is not None else None
    tokenizer = load_tokenizer(str(corpus.tokenizer_dir)) if corpus is not None else None
    facts = token_facts(tokenizer) if tokenizer is not None else None
    if corpus is not None and heldout is not None:
        check_heldout(recipe, corpus, heldout)
    heldout_facts = facts
    if heldout is not None and (corpus is None or heldout.manifest.fingerprint != corpus.manifest.fingerprint):
        heldout_tokenizer = load_tokenizer(str(heldout.tokenizer_dir))
        heldout_facts = token_facts(heldout_tokenizer)
        if corpus is None:
            tokenizer, facts = heldout_tokenizer, heldout_facts
    if corpus is not None:
        check_tokenizers(recipe, corpus, note, own_teacher=teacher is not None, own_student=student is not None)

    # The same seed gives the same student, whatever was drawn before.
    torch.manual_seed(recipe.seed)
    cached = recipe.teacher is not None and recipe.teacher.cache is not None
    from_layers = recipe.student.layers is not None or recipe.student.every is not None
    teacher_model = None if cached and not (from_layers and student is None) else _teacher(recipe, teacher, note)
    vocabulary = facts.vocab_size if facts is not None else 0
    if student is not None:
        student_model = language_model.as_language_model(student)
        if isinstance(student_model, language_model.LanguageModel):
            students.train_every_embedding(student_model)
    else:
        special_ids = students.special_ids(tokenizer) if tokenizer is not None else students.NO_IDS
        student_model = students.make_student(recipe.student, teacher_model, vocabulary, special_ids, note)
    if cached:
        teacher_model = None  # it was needed for its layers only
    own_models = teacher is not None or student is not None
    rows_t, rows_s = teacher_rows(recipe, teacher_model), language_model.shape(student_model)[0]
    pairs = ((corpus, facts), (heldout, heldout_facts))
    corpora = [(opened, ids) for opened, ids in pairs if opened is not None and ids is not None]
    columns = shared_columns(recipe, rows_t, rows_s, corpora, bool(student_model.causal), note, own_models=own_models)
    projection = check_models(recipe, teacher_model, student_model, corpus)
    student_model.float().to(device)
    if teacher_model is not None:
        teacher_model.to(device=device).eval().requires_grad_(False)
    if projection is not None:
        projection.to(device)
    if recipe.loop.compile:
        for model in (student_model, teacher_model):
            if isinstance(model, language_model.LanguageModel):
                model.compile_backbone()
            elif model is not None:
                raise UserError("loop.compile is for transformers models; compile your own module yourself and set it to false")

    causal = bool(student_model.causal)
    source: WindowSource
    if batches is not None:
        update_batches = recipe.loop.accumulation * (recipe.world.ranks or ranks)
        source = MappingSource(batches, causal, language_model.shape(student_model)[0], update_batches, rank, ranks)
    else:
        assert corpus is not None and facts is not None and tokenizer is not None
        used_facts = facts_within(facts, min(rows_s, rows_t or rows_s))
        corpus_batches = make_batches(recipe, corpus, used_facts, causal, rank, ranks)
        if recipe.mask.whole_word and not causal:
            table = mask_table(recipe.mask, used_facts, corpus.counts)
            check_words(tokenizer.backend_tokenizer, table, corpus.sample(200), note)
        if cached:
            assert rows_t is not None
            corpus_batches.learn_from(open_cache(recipe, corpus, causal, rows_t, columns, epochs_of(recipe, corpus_batches)))
        source = CorpusSource(corpus_batches, text_sha256(canonical(corpus.manifest.files)), device)
    updates = source.updates(recipe.loop)
    return Inputs(device, student_model, teacher_model, projection, source, updates, heldout, heldout_facts, tokenizer, columns)


def make_batches(recipe: Recipe, corpus: Corpus, facts: TokenFacts, causal: bool, rank: int = 0, ranks: int = 1) -> Batches:
    return Batches(
        corpus,
        facts,
        recipe.data,
        recipe.mask,
        seed=recipe.seed,
        accumulation=recipe.loop.accumulation,
        causal=causal,
        rank=rank,
        ranks=ranks,
        update_ranks=recipe.world.ranks,
    )


def epochs_of(recipe: Recipe, batches: Batches) -> int:
    """Epochs that a run reads from, the last one perhaps in part."""
    source = CorpusSource(batches, "", torch.device("cpu"))
    return source.place(source.updates(recipe.loop) - 1)[0] + 1


def check_cached(recipe: Recipe, own_models: bool) -> None:
    """What cannot be learnt from a cache, or only from one. Raises UserError."""
    objective = recipe.objective
    if recipe.teacher is None:
        return
    if recipe.teacher.cache is None:
        for key in ("top_k", "min_probability"):
            if getattr(recipe.teacher, key) != Teacher.model_fields[key].default:
                raise UserError(
                    f"teacher.{key} is of a cached teacher and teacher.cache is not set; run `fastdistil cache-teacher` with "
                    f"this recipe and set teacher.cache to what it wrote, or leave teacher.{key} out"
                )
        return
    if own_models:
        raise UserError(
            "teacher.cache is for teachers and corpora named by the recipe; leave teacher and batches out, or the cache"
        )
    if not objective.a_ce:
        raise UserError("objective.a_ce is 0, so nothing is learnt from the teacher's cache; set it, or teacher.cache=null")
    if objective.a_cos or objective.a_mse:
        raise UserError(
            "a teacher cache holds no hidden states; set objective.a_cos=0 objective.a_mse=0, or teacher.cache=null"
        )
    if objective.divergence != "forward-kl":
        raise UserError(
            f"a teacher cache lists the likeliest tokens only, and {objective.divergence} needs all; "
            "set objective.divergence=forward-kl, or teacher.cache=null"
        )


def open_cache(recipe: Recipe, corpus: Corpus, causal: bool, vocabulary: int, columns: int | None, epochs: int) -> TeacherCache:
    """`vocabulary`, `columns`: the teacher's entries, and those that the student shares where it has not as many."""
    assert recipe.teacher is not None and recipe.teacher.cache is not None
    identity = cache_identity(recipe, corpus, causal, vocabulary, columns)
    return TeacherCache.open(Path(recipe.teacher.cache), identity, corpus, epochs, recipe.data.verify)


def cache_identity(recipe: Recipe, corpus: Corpus, causal: bool, vocabulary: int, columns: int | None) -> dict[str, Any]:
    assert recipe.teacher is not None
    fingerprint = teacher_fingerprint(recipe.teacher.path, loading.load_config(recipe.teacher.path))
    return identity(recipe, corpus, causal, fingerprint, vocabulary, columns)


def open_corpus(path: str | None, verify: str, key: str) -> Corpus:
    if not path:
        raise UserError(f"{key} is not set; give a directory written by `fastdistil prepare`, e.g. {key}=corpus/")
    return Corpus.open(path, verify=verify)


def _teacher(recipe: Recipe, module: nn.Module | None, note: Callable[[str], None]) -> Any | None:
    if module is not None:
        model = language_model.as_language_model(module)
        named = recipe.teacher.dtype if recipe.teacher is not None else "auto"
        return model if named == "auto" else model.to(language_model.DTYPES[named])
    if recipe.teacher is None:
        return None
    return loading.load_model(recipe.teacher.path, language_model.DTYPES[recipe.teacher.dtype], note)


def check_models(recipe: Recipe, teacher: Any | None, student: Any, corpus: Corpus | None) -> nn.Linear | None:
    """Refuse what cannot be trained; returns the projection if the objective has one."""
    objective = recipe.objective
    if (student.causal and objective.a_mlm) or (not student.causal and objective.a_clm):
        kind, right, wrong = ("causal", "a_clm", "a_mlm") if student.causal else ("masked", "a_mlm", "a_clm")
        raise UserError(f"the student is a {kind} model: set objective.{right} instead of objective.{wrong}")
    longest = int(corpus.lengths.max()) if corpus is not None else 0
    for name, model in (("student", student), ("teacher", teacher)):
        limit = language_model.max_length(model) if model is not None else None
        if limit is not None and longest > limit:
            raise UserError(
                f"the corpus has sequences of {longest} tokens, the {name} takes {limit}; prepare it with --max-length {limit}"
            )
    if teacher is None:
        return None
    hidden_terms = bool(objective.a_cos or objective.a_mse)
    language_model.check_pair(teacher, student, hidden_terms=hidden_terms, projection=objective.projection)
    if not (objective.projection and hidden_terms):
        return None
    return nn.Linear(language_model.shape(student)[1], language_model.shape(teacher)[1], bias=False)
