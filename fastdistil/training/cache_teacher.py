"""`fastdistil cache-teacher`: the teacher's likeliest tokens for every token that a recipe trains on, written once.

Shards are functions of the recipe alone, each is complete or absent, and a second call makes those that are missing: however
often the work was interrupted, the bytes are the same.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from fastdistil.data.batches import Batches, ascending_starts
from fastdistil.data.corpus import Corpus
from fastdistil.data.ragged import offsets
from fastdistil.data.teacher_cache import IDENTITY, check_identity, check_shard, record, shard_name, shard_starts
from fastdistil.errors import CorruptData, DiskFull, NonFinite, UserError
from fastdistil.kernels.linear_distill import rows_per_chunk
from fastdistil.kernels.sparse_distill import top_k
from fastdistil.models.device import indexed_device
from fastdistil.models.not_finite import first_not_finite
from fastdistil.recipe import Recipe
from fastdistil.runs import sole_user
from fastdistil.storage import canonical, file_sha256, text_sha256, write_atomically
from fastdistil.training.inputs import Models, cache_identity, load_models, open_data, resolve, window_source


@dataclass(frozen=True)
class CacheSummary:
    directory: Path
    epochs: int
    shards: int
    """All of them."""
    made: int
    """Those that this call made."""
    size: int
    """Bytes of all shards."""


def cache_teacher(
    recipe: Recipe, out: Path | None = None, progress: Callable[[float, str], None] = lambda fraction, text: None
) -> CacheSummary:
    """Write, or complete, the cache of a recipe's teacher. Raises FastdistilError.

    out: None: a directory in that of the corpus, named after what the cache is made of.
    """
    recipe = resolve(recipe)
    if recipe.teacher is None:
        raise UserError("the recipe has no teacher to cache; set teacher.path")
    if recipe.objective.divergence != "forward-kl":
        raise UserError(
            f"a cache teaches the forward KL only, objective.divergence is {recipe.objective.divergence}; "
            "set it to forward-kl, or train without a cache"
        )
    # What the cache is made of is neither held-out text nor another cache, and no hidden state: the student may have any width.
    hidden_terms = {"a_cos": 0.0, "a_mse": 0.0, "projection": False}
    recipe = recipe.with_(data={"heldout": None}, teacher={"cache": None}, objective=hidden_terms)
    assert recipe.teacher is not None
    note = partial(progress, 0.0)
    data = open_data(recipe, note)
    models = load_models(recipe, data, note, shapes_only=("student",))
    models.teacher.to(indexed_device(recipe.device))  # type: ignore[union-attr]
    corpus, vocabulary = data.train, models.teacher_rows
    assert corpus is not None and vocabulary is not None
    if recipe.teacher.top_k > (models.columns or vocabulary):
        raise UserError(
            f"teacher.top_k is {recipe.teacher.top_k}, the teacher has {models.columns or vocabulary} tokens; "
            "set it to at most that"
        )
    source = window_source(recipe, data, models, note)
    identity = cache_identity(recipe, corpus, models)
    directory = out or Path(recipe.data.train) / f"teacher-{text_sha256(canonical(identity))[:12]}"
    epochs = 1 if models.causal else source.epochs(recipe.loop)
    starts = shard_starts(corpus)
    work = [(epoch, shard) for epoch in range(epochs) for shard in range(len(starts) - 1)]
    size = epochs * int(corpus.lengths.sum()) * record(vocabulary, recipe.teacher.top_k).itemsize

    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{directory} cannot be a directory: a file is in the way; choose another --out") from error
    with sole_user(directory, note=lambda text: progress(0.0, text)):
        if (directory / IDENTITY).exists():
            check_identity(directory, identity)
        elif any(path.name != f"{IDENTITY}.tmp" for path in directory.iterdir()):
            raise UserError(f"{directory} holds something else; give --out a new directory or one of a cache")
        missing = [entry for entry in work if not _complete(directory / shard_name(*entry))]
        _check_space(directory, size, len(missing) / max(1, len(work)))
        sealed = {"identity": identity, "sha256": text_sha256(canonical(identity))}
        write_atomically(directory / IDENTITY, json.dumps(sealed, indent=1, sort_keys=True) + "\n")
        for done, (epoch, shard) in enumerate(missing):
            progress(done / len(missing), f"epoch {epoch}, shard {shard} ({size / 2**20:,.0f} MiB in all)")
            values = _shard(recipe, models, source.batches, corpus, epoch, starts[shard], starts[shard + 1])
            _write(directory / shard_name(epoch, shard), values)
    progress(1.0, "done")
    return CacheSummary(directory, epochs, len(work), len(missing), size)


def _complete(path: Path) -> bool:
    if not path.with_suffix(".json").is_file():
        return False
    try:
        check_shard(path, full=True)
    except CorruptData:
        return False
    return not _holds_nan(np.load(path)).any()


def _check_space(directory: Path, size: int, share: float) -> None:
    free, needed = shutil.disk_usage(directory).free, int(size * share)
    if needed > free:
        raise DiskFull(
            f"the cache needs {needed / 2**20:,.0f} MiB more and {directory} has {free / 2**20:,.0f} MiB free; lower "
            "teacher.top_k, train fewer epochs, or choose another --out"
        )


@torch.no_grad()
def _shard(
    recipe: Recipe,
    models: Models,
    batches: Batches,
    corpus: Corpus,
    epoch: int,
    first: int,
    end: int,
) -> NDArray[Any]:
    """Records [tokens] of the sequences first ... end - 1."""
    teacher = models.teacher
    assert recipe.teacher is not None and teacher is not None and models.teacher_rows is not None
    device = indexed_device(recipe.device)
    bounds = offsets(corpus.lengths)
    values = np.zeros(int(bounds[end] - bounds[first]), record(models.teacher_rows, recipe.teacher.top_k))
    order_n = first + np.argsort(corpus.lengths[first:end], kind="stable")
    starts = ascending_starts(corpus.lengths[order_n], recipe.data.micro_batch_tokens, recipe.data.layout)
    for a, b in pairwise(starts):
        chosen_n = order_n[a:b]
        batch = batches.make(epoch, chosen_n).to(device)
        hidden_TE = teacher.hidden(batch)
        if batch.valid_rows is not None:
            hidden_TE = hidden_TE.index_select(0, batch.valid_rows)
        at_T = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in chosen_n]) - bounds[first]
        _fill(values, at_T, teacher.transform(hidden_TE), teacher, models.columns, recipe)
        if (bad_T := at_T[_holds_nan(values[at_T])]).size:
            sequence = int(np.searchsorted(bounds, bad_T[0] + bounds[first], side="right")) - 1
            reason = first_not_finite(teacher, batch) or "its logits are not finite"
            raise NonFinite(
                f"the teacher {recipe.teacher.path} is not finite in epoch {epoch}, sequence {sequence} (from 0) of "
                f"{corpus.path}: {reason}",
                "give a teacher that is finite there, or another teacher.dtype",
            )
    return values


def _holds_nan(values: NDArray[Any]) -> NDArray[np.bool_]:
    """bool [T]: the records that hold nan; a probability of zero (-inf) is a number."""
    bad_T: NDArray[np.bool_] = np.isnan(values["log_probability"]).any(-1) | np.isnan(values["tail"])
    return bad_T


def _fill(
    values: NDArray[Any], at_T: NDArray[Any], features_TE: Tensor, teacher: Any, columns: int | None, recipe: Recipe
) -> None:
    """The records of one batch's tokens, a chunk of logits at a time."""
    assert recipe.teacher is not None
    k, cut, temperature = recipe.teacher.top_k, recipe.teacher.min_probability, recipe.objective.temperature
    chunk = max(1, rows_per_chunk(len(at_T), len(teacher.weight), 4, features_TE.device))
    for first in range(0, len(at_T), chunk):
        here = at_T[first : first + chunk]
        logits_CV = linear(features_TE[first : first + chunk], teacher.weight, teacher.bias)
        likeliest = top_k(logits_CV, k, temperature=temperature, min_probability=cut, columns=columns)
        values["index"][here] = likeliest.indices_NK.cpu().numpy()
        values["log_probability"][here] = likeliest.log_probabilities_NK.cpu().numpy()
        if likeliest.tail_N is not None:
            values["tail"][here] = likeliest.tail_N.cpu().numpy()


def _write(path: Path, values: NDArray[Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    facts = {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}
    temporary.replace(path)
    write_atomically(path.with_suffix(".json"), json.dumps(facts) + "\n")
