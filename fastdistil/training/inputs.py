"""The way from a recipe to what it names: devices, corpora, models and batches.

Device and precision are resolved, corpora and models opened and checked, and windows of batches made.
`open_data`, `load_models` and `window_source` follow each other. `train`, its dry run and `cache-teacher` call them, so that
what one of them refuses the others refuse in the same words.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from fastdistil.data.word_marks import check_words
from fastdistil.errors import UserError
from fastdistil.kernels.backend import chosen_backend
from fastdistil.models import language_model, loading, students
from fastdistil.models.compiling import check_compiler
from fastdistil.models.device import indexed_device, resolve_device
from fastdistil.models.vocabularies import check_heldout, check_tokenizers, facts_within, shared_columns, teacher_rows
from fastdistil.recipe import Recipe, Teacher
from fastdistil.storage import canonical, text_sha256
from fastdistil.training.teacher_identity import teacher_fingerprint


def resolve(recipe: Recipe, own_teacher: bool = False) -> Recipe:
    """The recipe with every `auto` replaced by what this machine gives. Raises UserError for what it cannot give.

    A teacher given as a module (`own_teacher`) keeps its dtype unless the recipe names one.
    """
    device, precision = resolve_device(recipe.device, recipe.loop.precision, "set device=cpu")
    kernels = _kernels(recipe, device.type)
    changes: dict[str, Any] = {"device": device.type, "loop": {"precision": precision}, "kernels": kernels}
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


@dataclass(frozen=True, kw_only=True)
class Data:
    """The corpora that a recipe names."""

    train: Corpus | None = None
    """None: the micro-batches come from Python, or the corpus is not prepared yet."""
    heldout: Corpus | None = None
    vocabulary: int = 0
    """Entries of the tokenizer's vocabulary; 0 without a corpus."""

    @property
    def first(self) -> Corpus | None:
        """The corpus whose tokenizer the student has."""
        return self.train if self.train is not None else self.heldout


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models that a recipe names; they fit each other and the corpora."""

    student: Any
    teacher: Any | None
    """None: there is none, or its cache stands in for it."""
    teacher_rows: int | None
    """Entries of the teacher's vocabulary, though only its cache be used."""
    columns: int | None
    """Entries that the vocabularies of teacher and student have in common, where they are not equally wide."""
    projection: nn.Linear | None
    """Learnt map from the student's width to the teacher's, if the objective has one."""

    @property
    def causal(self) -> bool:
        return bool(self.student.causal)


@dataclass(frozen=True, kw_only=True)
class Inputs(Models):
    """What the loop runs on: the models, on their device, and the windows that they learn from."""

    device: torch.device
    data: Data
    source: WindowSource
    updates: int


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
    provided = {"teacher": teacher, "student": student, "batches": batches}
    from_python = [name for name, value in provided.items() if value is not None]
    check_recipe(recipe, from_python)
    data = open_data(recipe, note, from_python)
    models = load_models(recipe, data, note, teacher=teacher, student=student)
    device = indexed_device(recipe.device)
    models.student.float().to(device)
    if models.teacher is not None:
        models.teacher.to(device=device).eval().requires_grad_(False)
    if models.projection is not None:
        models.projection.to(device)
    if recipe.loop.compile:
        for model in (models.student, models.teacher):
            if isinstance(model, language_model.LanguageModel):
                model.compile_backbone()
            elif model is not None:
                raise UserError("loop.compile is for transformers models; compile your own module yourself and set it to false")
    source: WindowSource
    if batches is not None:
        update_batches = recipe.loop.accumulation * (recipe.world.ranks or ranks)
        vocabulary = language_model.shape(models.student)[0]
        source = MappingSource(batches, models.causal, vocabulary, update_batches, rank, ranks)
    else:
        source = window_source(recipe, data, models, note, rank=rank, ranks=ranks)
    return Inputs(**vars(models), device=device, data=data, source=source, updates=source.updates(recipe.loop))


def check_recipe(recipe: Recipe, from_python: Sequence[str] = ()) -> None:
    """Refuse what no training can be made of, before anything is opened; `from_python`: see `open_data`. Raises UserError."""
    if recipe.objective.needs_teacher and recipe.teacher is None and "teacher" not in from_python:
        raise UserError(
            "the objective compares with a teacher and the recipe has none; set teacher.path, "
            "or objective.a_ce=0 objective.a_cos=0 objective.a_mse=0 for pre-training"
        )
    _check_cached(recipe, user_modules="teacher" in from_python or "batches" in from_python)
    check_compiler(recipe)


def open_data(recipe: Recipe, note: Callable[[str], None], from_python: Sequence[str] = ()) -> Data:
    """Open the corpora that a recipe names, and check that they and the models' tokenizers mean the same tokens.

    `from_python`: what Python gives in the place of what the recipe names ("teacher", "student", "batches"). Raises UserError,
    CorruptData.
    """
    verify = recipe.data.verify
    train = None if "batches" in from_python else _open_corpus(recipe.data.train, verify, "data.train")
    heldout = _open_corpus(recipe.data.heldout, verify, "data.heldout") if recipe.data.heldout is not None else None
    first = train if train is not None else heldout
    vocabulary = first.facts.vocab_size if first is not None else 0
    if train is not None:
        if heldout is not None:
            check_heldout(recipe, train, heldout)
        check_tokenizers(recipe, train, note, from_python)
    return Data(train=train, heldout=heldout, vocabulary=vocabulary)


def load_models(
    recipe: Recipe,
    data: Data,
    note: Callable[[str], None],
    *,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    shapes_only: Sequence[str] = (),
) -> Models:
    """Load the models that a recipe names, on the CPU, and check that they can be trained on its data.

    `teacher`, `student`: modules in the place of those. `shapes_only`: which of them are made without weights ("teacher",
    "student"). Raises UserError.
    """
    # The same seed gives the same student, whatever was drawn before.
    torch.manual_seed(recipe.seed)
    cached = recipe.teacher is not None and recipe.teacher.cache is not None
    from_layers = recipe.student.layers is not None or recipe.student.every is not None
    teacher_model = None
    if not cached or (from_layers and student is None):
        teacher_model = _teacher(recipe, teacher, note, weights="teacher" not in shapes_only)
    special_ids = students.special_ids(data.first.tokenizer) if data.first is not None else students.NO_IDS
    if student is not None:
        student_model = language_model.as_language_model(student)
        if isinstance(student_model, language_model.LanguageModel):
            students.train_every_embedding(student_model)
    elif "student" in shapes_only:
        config = teacher_model.module.config if teacher_model is not None else None
        student_model = loading.without_weights(students.student_config(recipe.student, config, data.vocabulary, special_ids))
        if recipe.student.dropout is not None:
            students.set_dropout(student_model.module, recipe.student.dropout)
    else:
        student_model = students.make_student(recipe.student, teacher_model, data.vocabulary, special_ids, note)
    if cached:
        teacher_model = None  # it was needed for its layers only
    user_modules = teacher is not None or student is not None
    rows_t, rows_s = teacher_rows(recipe, teacher_model), language_model.shape(student_model)[0]
    corpora = [corpus for corpus in (data.train, data.heldout) if corpus is not None]
    columns = shared_columns(recipe, rows_t, rows_s, corpora, bool(student_model.causal), note, user_modules=user_modules)
    projection = _check_models(recipe, teacher_model, student_model, data.train)
    return Models(student=student_model, teacher=teacher_model, teacher_rows=rows_t, columns=columns, projection=projection)


def window_source(
    recipe: Recipe, data: Data, models: Models, note: Callable[[str], None], *, rank: int = 0, ranks: int = 1
) -> CorpusSource:
    """Return where the windows of the training corpus come from, with what the teacher's cache, if there is one, says of them.

    Raises UserError, CorruptData.
    """
    corpus, causal, rows_t = data.train, models.causal, models.teacher_rows
    assert corpus is not None
    rows_s = language_model.shape(models.student)[0]
    facts = facts_within(corpus.facts, min(rows_s, rows_t or rows_s))
    batches = Batches(
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
    if recipe.mask.whole_word and not causal:
        table = mask_table(recipe.mask, facts, corpus.counts)
        check_words(corpus.tokenizer.backend_tokenizer, table, corpus.sample(200), note)
    source = CorpusSource(batches, text_sha256(canonical(corpus.manifest.files)), indexed_device(recipe.device))
    if recipe.teacher is not None and recipe.teacher.cache is not None:
        expected = cache_identity(recipe, corpus, models)
        epochs = source.epochs(recipe.loop)
        batches.learn_from(TeacherCache.open(Path(recipe.teacher.cache), expected, corpus, epochs, recipe.data.verify))
    return source


def cache_identity(recipe: Recipe, corpus: Corpus, models: Models) -> dict[str, Any]:
    """Return what the cache of a recipe's teacher is made of."""
    assert recipe.teacher is not None and models.teacher_rows is not None
    fingerprint = teacher_fingerprint(recipe.teacher.path, loading.load_config(recipe.teacher.path))
    return identity(recipe, corpus, models.causal, fingerprint, models.teacher_rows, models.columns)


def _check_cached(recipe: Recipe, user_modules: bool) -> None:
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
    if user_modules:
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


def _open_corpus(path: str | None, verify: str, key: str) -> Corpus:
    if not path:
        raise UserError(f"{key} is not set; give a directory written by `fastdistil prepare`, e.g. {key}=corpus/")
    return Corpus.open(path, verify=verify)


def _teacher(recipe: Recipe, module: nn.Module | None, note: Callable[[str], None], *, weights: bool) -> Any | None:
    if module is not None:
        model = language_model.as_language_model(module)
        named = recipe.teacher.dtype if recipe.teacher is not None else "auto"
        return model if named == "auto" else model.to(language_model.DTYPES[named])
    if recipe.teacher is None:
        return None
    if not weights:
        return loading.without_weights(loading.load_config(recipe.teacher.path))
    return loading.load_model(recipe.teacher.path, language_model.DTYPES[recipe.teacher.dtype], note)


def _check_models(recipe: Recipe, teacher: Any | None, student: Any, corpus: Corpus | None) -> nn.Linear | None:
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
