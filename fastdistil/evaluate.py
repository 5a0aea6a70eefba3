"""`fastdistil evaluate`: losses and perplexities of a model's directory, on prepared corpora and on raw text.

Models are those that can be trained (language_model.LanguageModel) or any other of transformers (language_model.AnyModel).
What is measured, models/perplexity.py says.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import rich.console
import torch
from rich.markup import escape
from rich.table import Table

from fastdistil.data.corpus import Corpus
from fastdistil.data.prepare import Bos, PrepareOptions, PrepareProgress, check_bos, front_of_pieces, prepare
from fastdistil.data.text_files import Documents
from fastdistil.data.text_inputs import TextKind, find_inputs
from fastdistil.data.tokenizer import front_token, has_front, load_tokenizer, token_facts
from fastdistil.data.unknown_tokens import MAX_UNKNOWN_SHARE, WARNING_SHARE, check_unknown_share, unknown_share, unknown_text
from fastdistil.errors import NonFinite, UserError, translated
from fastdistil.models import language_model, loading
from fastdistil.models.device import resolve_device
from fastdistil.models.perplexity import (
    CausalPerplexity,
    HeldOut,
    PseudoPerplexity,
    causal_perplexity,
    checked_facts,
    held_out,
    pseudo_perplexity,
)
from fastdistil.models.scoring import Progress
from fastdistil.models.vocabularies import disagreement

# The command: a model's directory and texts


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """How `evaluate` measures. Out-of-range values raise UserError."""

    positions: int | Literal["all"] = 2000
    """Tokens for pseudo-perplexity; 0 leaves it out. Masked models only."""
    seed: int = 0
    """Of masks and positions."""
    batch_tokens: int = 8192
    max_length: int | None = None
    """Tokens of a sequence of raw text (None: 512), or of a window of a causal model (None: 1024); at most the model's."""
    stride: int | None = None
    """Tokens from window to window; None: half a window. Causal models only."""
    documents: Documents = "file"
    """What a document of a raw .txt file is."""
    text_field: str = "text"
    read_as: TextKind | None = None
    """What every raw file holds, whatever its name; None: what the end of its name says."""
    strip_gutenberg: bool = False
    strip: bool | None = None
    """Whether white space at both ends of raw documents is taken off; None: for masked models."""
    special_tokens_in_text: bool = False
    """Whether special tokens that raw text spells out become these tokens."""
    max_unknown_share: float = MAX_UNKNOWN_SHARE
    """A corpus with a larger share of unknown tokens raises UserError."""
    bos: Bos = "auto"
    """Whether BOS (or [CLS]) stands in front of each raw document; auto: as `PrepareOptions.bos` has it, so where a call of
    the tokenizer puts it there. Causal models only; prepared corpora have it or not."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "auto"
    """auto, fp32, bf16 or fp16; auto: bf16 where the hardware multiplies bf16 matrices, else fp32."""

    def __post_init__(self) -> None:
        if self.positions != "all" and self.positions < 0:
            raise UserError(f"positions must be a number of at least 0, or all, got {self.positions}")
        for name, allowed in (
            ("documents", get_args(Documents)),
            ("read_as", (None, *get_args(TextKind))),
            ("device", ("auto", "cpu", "cuda")),
            ("precision", ("auto", "fp32", "bf16", "fp16")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        check_bos(self.bos)
        for name, low in (("seed", 0), ("batch_tokens", 1), ("max_length", 4), ("stride", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name} must be at least {low}, got {value}")
        if not 0 <= self.max_unknown_share <= 1:
            raise UserError(f"max_unknown_share must be from 0 to 1, got {self.max_unknown_share:g}")


@dataclass(frozen=True)
class CorpusReport:
    corpus: str
    """As it was given."""
    sequences: int
    tokens: int
    """Special ones included."""
    heldout: HeldOut | None
    """Masked models."""
    pseudo: PseudoPerplexity | None
    """Masked models, unless left out."""
    causal: CausalPerplexity | None
    """Causal models."""
    bos: str | None
    """Causal models: the token that every text begins with, which is not predicted itself; None: a text's own first token."""
    seconds: float
    unknown_share: float
    """Unknown tokens among all but the special ones added, from 0 to 1."""
    special_spellings: int | None
    """How often the text spells out a special token; None where an earlier version prepared it."""
    notes: tuple[str, ...]
    """What a reader of the numbers should know of the text."""


@dataclass(frozen=True)
class Report:
    model: str
    architecture: str
    parameters: int
    vocabulary: int
    device: str
    precision: str
    torch: str
    options: EvaluateOptions
    corpora: tuple[CorpusReport, ...]

    def to_json(self) -> str:
        """One JSON object; numbers that are not finite are null."""
        return json.dumps(_finite(asdict(self)), indent=1, allow_nan=False)


def evaluate(
    model_path: str,
    corpora: Sequence[str],
    options: EvaluateOptions | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> Report:
    """Measure a model on prepared corpora and on raw text, which is prepared with the model's own tokenizer.

    `progress` is told the fraction done, from 0 to 1, and what is being done. Raises UserError for a model, text or option that
    cannot be used, before anything is measured; CorruptData for a damaged corpus; NonFinite where a loss is not finite.
    """
    options = options if options is not None else EvaluateOptions()
    tell = progress if progress is not None else lambda fraction, text: None
    if not corpora:
        raise UserError("nothing to evaluate on; give prepared directories or text files")
    device, precision = resolve_device(options.device, options.precision, "use --device cpu")
    config, causal = loading.evaluation_config(model_path)
    raw = [path for path in corpora if not _is_prepared(path)]
    for path in raw:
        find_inputs([path], Path(path), options.read_as)
    if raw:
        token_facts(load_tokenizer(model_path))
    if options.bos != "auto" and not causal:
        raise UserError(f"bos is for causal models, and {model_path} is a masked one; leave it out")
    opened = {path: _open(path, model_path, causal) for path in corpora if path not in raw}
    for path, corpus in opened.items():
        has = "no" if beginning(corpus) is None else "yes"
        if options.bos not in ("auto", has):
            raise UserError(f"bos is {options.bos} and {path} was prepared with bos {has}; prepare it with --bos {options.bos}")
    tell(0.0, f"loading {model_path}")
    model = loading.load_for_evaluation(model_path, note=partial(tell, 0.0)).to(device)
    size = _size(model, options, causal)
    for path, corpus in opened.items():
        lengths_n = np.minimum(corpus.lengths, size) if causal else corpus.lengths
        checked_facts(model, corpus, lengths_n, corpus.facts)
        check_unknown_share(_unknown_share(corpus), options.max_unknown_share, corpus.tokenizer, path)
    remarks: dict[str, list[str]] = {path: [] for path in corpora}
    with tempfile.TemporaryDirectory(prefix="fastdistil-") as folder, translated("evaluating", Path(folder)):
        for number, path in enumerate(dict.fromkeys(raw)):
            tell(0.0, f"preparing {path}")
            place = Path(folder, str(number))
            prepare([path], place, _preparation(options, model_path, size, causal), partial(_collect, remarks[path], place))
            opened[path] = Corpus.open(place, verify="size")
        reports: list[CorpusReport] = []
        for number, path in enumerate(corpora):
            share = _Share(tell, number / len(corpora), 1 / len(corpora), path)
            try:
                reports.append(_evaluate_one(model, path, opened[path], options, size, precision, share))
            except NonFinite as error:
                raise _with_text(error, path, opened[path]) from error
    return Report(
        model=model_path,
        architecture=str(config.model_type),
        parameters=language_model.parameter_count(model),
        vocabulary=language_model.vocabulary(model),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        precision=precision,
        torch=torch.__version__,
        options=options,
        corpora=tuple(replace(report, notes=(*remarks[report.corpus], *report.notes)) for report in reports),
    )


def _with_text(error: NonFinite, corpus_name: str, corpus: Corpus) -> NonFinite:
    """The same error with the corpus and how the text of the sequence begins."""
    if error.sequence is None:
        return error
    ids = corpus.gather(np.array([error.sequence]))[:24]
    text = " ".join(str(corpus.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).split())
    return NonFinite(f"{corpus_name}: {error} (the sequence begins: {text[:80]!r})")


class _Share(NamedTuple):
    """A part of the whole, from `start` on, that reports its own fraction."""

    tell: Callable[[float, str], None]
    start: float
    width: float
    text: str

    def part(self, start: float, width: float, text: str) -> Progress:
        return lambda done: self.tell(self.start + self.width * (start + width * done), f"{self.text}: {text}")


def _evaluate_one(
    model: language_model.LanguageModel | language_model.AnyModel,
    source: str,
    corpus: Corpus,
    options: EvaluateOptions,
    size: int,
    precision: str,
    share: _Share,
) -> CorpusReport:
    tokenizer, facts = corpus.tokenizer, corpus.facts
    begun = time.perf_counter()
    common: dict[str, Any] = {"batch_tokens": options.batch_tokens, "precision": precision}
    heldout, pseudo, causal = None, None, None
    if model.causal:
        progress = share.part(0.0, 1.0, "perplexity")
        causal = causal_perplexity(model, corpus, facts, max_length=size, stride=options.stride, progress=progress, **common)
    else:
        tokens = int(corpus.lengths.sum())
        positions = tokens if options.positions == "all" else min(options.positions, tokens)
        # A position costs a forward of its sequence, the held-out loss one of every sequence.
        part = len(corpus) / (len(corpus) + positions)
        progress = share.part(0.0, part, "held-out loss")
        heldout = held_out(model, corpus, facts, seed=options.seed, progress=progress, **common)
        if options.positions != 0:
            progress = share.part(part, 1 - part, "pseudo-perplexity")
            pseudo = pseudo_perplexity(
                model, corpus, facts, positions=options.positions, seed=options.seed, progress=progress, **common
            )
    seconds = time.perf_counter() - begun
    unknown, spellings = _unknown_share(corpus), corpus.manifest.special_spellings
    notes = [f"warning: {unknown_text(unknown, tokenizer, source)}"] if unknown > WARNING_SHARE else []
    if spellings:
        notes.append(f"{source} spells out {spellings:,} special tokens, {corpus.manifest.special_spellings_became}")
    tokens = int(corpus.lengths.sum())
    bos = beginning(corpus) if model.causal else None
    return CorpusReport(source, len(corpus), tokens, heldout, pseudo, causal, bos, seconds, unknown, spellings, tuple(notes))


def _unknown_share(corpus: Corpus) -> float:
    return unknown_share(corpus.tokenizer, corpus.counts, len(corpus), corpus.manifest.options)


def _collect(remarks: list[str], place: Path, progress: PrepareProgress) -> None:
    """Keep what `prepare` says of raw text, but for what the report says itself: its frame and its unknown tokens."""
    if progress.note and str(place) not in progress.note and not progress.note.startswith("in front of"):
        remarks.append(progress.note)


def beginning(corpus: Corpus) -> str | None:
    """Return the BOS or [CLS] in front of every sequence, as it is spelt; None where there is none."""
    front = front_token(corpus.tokenizer)
    return (
        str(corpus.tokenizer.convert_ids_to_tokens(front)) if front is not None and has_front(corpus.manifest.options) else None
    )


def _is_prepared(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("manifest.json", "progress.json"))


def _open(path: str, model_path: str, causal: bool) -> Corpus:
    corpus = Corpus.open(path)
    if loading.has_tokenizer(model_path) and (difference := disagreement(model_path, corpus, causal)) is not None:
        raise UserError(
            f"the model {model_path} has another vocabulary than the corpus ({difference}); "
            f"prepare the corpus with --tokenizer {model_path}"
        )
    return corpus


def _size(model: language_model.LanguageModel | language_model.AnyModel, options: EvaluateOptions, causal: bool) -> int:
    """Tokens of a sequence or window."""
    limit = language_model.max_length(model)
    if limit is not None and options.max_length is not None and options.max_length > limit:
        raise UserError(f"max_length is {options.max_length} and the model takes {limit} tokens; lower it")
    size = options.max_length if options.max_length is not None else 1024 if causal else 512
    size = size if limit is None else min(size, limit)
    if options.batch_tokens < size:
        raise UserError(f"batch_tokens {options.batch_tokens} is less than one sequence of {size} tokens; raise it")
    if causal and options.stride is not None and options.stride >= size:
        raise UserError(f"stride must be less than the window of {size} tokens, got {options.stride}")
    return size


def _preparation(options: EvaluateOptions, model_path: str, size: int, causal: bool) -> PrepareOptions:
    bos = options.bos
    if causal and bos == "auto":  # as in the corpora that such models are trained on
        bos = "no" if front_of_pieces(load_tokenizer(model_path), PrepareOptions(tokenizer=model_path)) is None else "yes"
    return PrepareOptions(
        tokenizer=model_path,
        # Windows slide over whole documents; a masked model sees pieces.
        max_length=2**31 - 1 if causal else size,
        special_tokens=not causal,
        bos=bos,
        documents=options.documents,
        text_field=options.text_field,
        read_as=options.read_as,
        strip_gutenberg=options.strip_gutenberg,
        strip=not causal if options.strip is None else options.strip,
        special_tokens_in_text=options.special_tokens_in_text,
        max_unknown_share=options.max_unknown_share,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_report(report: Report) -> None:
    """Print the measures of each corpus as a table, and then what a reader of them should know."""
    table = Table(
        title=f"{report.model}: {report.architecture}, {report.parameters:,} parameters, {report.device}, {report.precision}. "
        "± is one standard error.",
        title_justify="left",
    )
    for column in ("corpus", "measure", "loss", "perplexity", "tokens"):
        table.add_column(column, justify="left" if column in ("corpus", "measure") else "right", overflow="fold")
    for corpus in report.corpora:
        if (heldout := corpus.heldout) is not None:
            table.add_row(corpus.corpus, "masked tokens", _loss(heldout), f"{heldout.perplexity:.2f}", f"{heldout.labels:,}")
        if (pseudo := corpus.pseudo) is not None:
            table.add_row(corpus.corpus, "pseudo-perplexity", _loss(pseudo), f"{pseudo.pppl:.2f}", f"{pseudo.positions:,}")
        if (causal := corpus.causal) is not None:
            measure = f"next token, behind {corpus.bos}" if corpus.bos is not None else "next token, no BOS"
            table.add_row(corpus.corpus, escape(measure), _loss(causal), f"{causal.perplexity:.2f}", f"{causal.tokens:,}")
    table.add_section()
    for corpus in report.corpora:
        table.add_row(corpus.corpus, "unknown tokens", "", "", f"{corpus.unknown_share:.2%}")
    rich.console.Console().print(table)
    for corpus in report.corpora:
        for note in corpus.notes:
            print(note)


def _loss(heldout: Any) -> str:
    return f"{heldout.loss:.4f} ± {heldout.loss_se:.4f}"
