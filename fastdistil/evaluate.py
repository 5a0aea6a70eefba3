"""How well a model predicts text it has not seen, in numbers with standard errors.

    held_out            masked models: the mean cross-entropy of 15% of the tokens, chosen uniformly, the same ones at every
                        call (80% of them masked, 10% replaced, 10% kept); causal models: of every next token; KL to a teacher
    pseudo_perplexity   masked models: one token masked at a time, exp(-mean log P(token | all others))
                        (Salazar et al. 2020, equation 3)
    causal_perplexity   causal models: every token of a whole document once, through sliding windows
    evaluate            all of these for a model's directory, on prepared corpora and on raw text

Models are those that can be trained (models.LanguageModel) or any other of transformers (models.AnyModel).
Perplexity is exp(loss). Standard errors have sequences as their sample (see `scoring.ratio`).
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
import torch
from numpy.typing import NDArray

from fastdistil.data.batches import Batch, Layout, Tokens, assemble, evaluation_batches
from fastdistil.data.corpus import (
    Corpus,
    FastTokenizer,
    front_token,
    has_front,
    load_tokenizer,
    token_facts,
)
from fastdistil.data.masking import Facts, Ints, offsets, ranges
from fastdistil.data.prepare import Bos, PrepareOptions, check_bos, front_of_pieces, prepare
from fastdistil.data.prepare import Progress as PrepareProgress
from fastdistil.data.text_files import Documents
from fastdistil.data.text_inputs import TextKind, find_inputs
from fastdistil.data.unknown_tokens import MAX_UNKNOWN_SHARE, WARNING_SHARE, check_unknown_share, unknown_share, unknown_text
from fastdistil.errors import NonFinite, UserError, translated
from fastdistil.models import language_model
from fastdistil.models.scoring import (
    Progress,
    budget_of,
    by_sequence,
    device_of,
    drawn_positions,
    drawn_sequences,
    evaluating,
    layout_of,
    ratio,
    require_finite,
    score_pieces,
    sequence_sums,
    sliding_windows,
)
from fastdistil.models.vocabularies import check_rows, disagreement, facts_within
from fastdistil.profiling.device import has_fast_bf16
from fastdistil.recipe import Mask


@dataclass(frozen=True)
class HeldOut:
    """What `held_out` measured, in nats a token. A standard error of one single sequence is nan."""

    loss: float
    loss_se: float
    perplexity: float
    labels: int
    """Tokens that had to be predicted."""
    sequences: int
    kl: float | None
    """Mean over all tokens of KL(teacher || model) at temperature 1; None without a teacher."""
    kl_se: float | None
    kl_tokens: int


@dataclass(frozen=True)
class PseudoPerplexity:
    loss: float
    """Mean of -log P(token | all others)."""
    loss_se: float
    pppl: float
    positions: int
    """Tokens that were masked, one at a time."""
    sequences: int
    """Different sequences that they lie in."""


@dataclass(frozen=True)
class CausalPerplexity:
    loss: float
    loss_se: float
    perplexity: float
    tokens: int
    """Every token but the first of each document, which nothing comes before."""
    sequences: int
    """Documents of at least two tokens."""
    max_length: int
    stride: int


@torch.no_grad()
def held_out(
    model: Any,
    corpus: Tokens,
    facts: Facts,
    *,
    teacher: Any | None = None,
    columns: int | None = None,
    seed: int = 0,
    probability: float = 0.15,
    max_sequences: int | None = None,
    batch_tokens: int = 8192,
    layout: Layout | None = None,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> HeldOut:
    """Loss on held-out sequences, all or `max_sequences` drawn with the seed, and KL to a teacher that sees the same.

    `model` and `teacher`: models.LanguageModel, AnyModel or modules with their interface, on `device` (None: where the model
    is); training mode is off meanwhile. `columns`: the first entries of both vocabularies, over which the KL is taken (None:
    all, equally many); the loss is always over all of the model's. `layout` None: packed where the models can. `precision`
    (fp32, bf16, fp16) is autocast's for the model; the teacher computes in its own dtype. The same seed gives the same masks
    and sequences whatever the batch size. Raises UserError: no tokens to predict, sequences too long for the model, another
    vocabulary, no mask token; NonFinite where a loss or KL is not finite.
    """
    if not 0 < probability < 1:
        raise UserError(f"probability must lie between 0 and 1, got {probability:g}")
    chosen_n = drawn_sequences(len(corpus), max_sequences, seed)
    if (
        teacher is not None
        and columns is None
        and (v_t := language_model.vocabulary(teacher)) != (v_m := language_model.vocabulary(model))
    ):
        raise UserError(f"the teacher's vocabulary has {v_t} entries, the model's {v_m}; say which they share with columns")
    for scorer in (teacher, model):
        if scorer is not None:
            facts = _checked_facts(scorer, corpus, corpus.lengths[chosen_n], facts)
    where = torch.device(device) if device is not None else device_of(model)
    longest = int(corpus.lengths[chosen_n].max(initial=0))
    batches = evaluation_batches(
        corpus,
        facts,
        chosen_n,
        batch_tokens=min(budget_of(scorer, longest, batch_tokens) for scorer in (model, teacher) if scorer is not None),
        causal=bool(model.causal),
        mask=Mask(probability=probability, smoothing=0.0),
        seed=seed,
        layout=layout if layout is not None else layout_of(model, teacher),
    )
    total = int(corpus.lengths[chosen_n].sum())
    in_order_n = chosen_n[np.argsort(corpus.lengths[chosen_n], kind="stable")]  # as evaluation_batches has them
    done, first, parts = 0, 0, []
    with evaluating(model, teacher):
        for batch in batches:
            batch = batch.to(where)
            parts.append(sequence_sums(model, teacher, batch, precision, columns))
            sequences_n = in_order_n[first : first + batch.counts.sequences]
            require_finite(parts[-1], sequences_n, model, teacher, batch, precision)
            first += batch.counts.sequences
            done += batch.counts.tokens
            if progress is not None:
                progress(done / total)
    sums = np.concatenate(parts, axis=1)
    labels = int(sums[1].sum())
    if labels == 0:
        raise UserError(f"no token to predict in {len(chosen_n)} sequences of {total} tokens in all; give more or longer text")
    loss, loss_se = ratio(sums[0], sums[1])
    kl, kl_se = ratio(sums[2], sums[3]) if teacher is not None else (None, None)
    return HeldOut(loss, loss_se, _exp(loss), labels, len(chosen_n), kl, kl_se, int(sums[3].sum()))


@torch.no_grad()
def pseudo_perplexity(
    model: Any,
    corpus: Tokens,
    facts: Facts,
    *,
    positions: int | Literal["all"] = 2000,
    seed: int = 0,
    batch_tokens: int = 8192,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> PseudoPerplexity:
    """Mask one token at a time: `positions` of them, drawn without replacement from all tokens that are not special.

    A token costs a forward of its whole sequence. Raises UserError as `held_out` does, and for causal models.
    """
    if model.causal:
        raise UserError("pseudo-perplexity is for masked models; a causal model has a perplexity of its own (positions: 0)")
    facts = _checked_facts(model, corpus, corpus.lengths, facts)
    if facts.mask_id is None:
        raise UserError("pseudo-perplexity needs a tokenizer with a mask token, and this one has none; use the model's own")
    tokens_P = drawn_positions(corpus, facts, positions, seed)
    starts_n = offsets(corpus.lengths)
    sequences_P = np.searchsorted(starts_n, tokens_P, side="right") - 1
    places_P = tokens_P - starts_n[sequences_P]
    mask_id, layout = facts.mask_id, layout_of(model)

    def make(chosen: Ints) -> Batch:
        sequences = sequences_P[chosen]
        lengths = corpus.lengths[sequences]
        ids_T = corpus.gather(sequences)
        targets = offsets(lengths)[:-1] + places_P[chosen]
        labels = ids_T[targets]
        ids_T[targets] = mask_id
        return assemble(ids_T, lengths, targets, labels, layout=layout, pad_id=facts.pad_id, sequence_of_label_M=sequences)

    scored = score_pieces(model, corpus.lengths[sequences_P], make, batch_tokens, device, precision, progress)
    sums, counts = by_sequence(*scored)
    loss, loss_se = ratio(sums, counts)
    return PseudoPerplexity(loss, loss_se, _exp(loss), int(counts.sum()), len(counts))


@torch.no_grad()
def causal_perplexity(
    model: Any,
    corpus: Tokens,
    facts: Facts,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 8192,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> CausalPerplexity:
    """Every token but the first of each sequence is predicted once, in windows of `max_length` tokens, `stride` apart.

    A window scores the tokens that those before it have not, so behind the first window a token sees at least
    max_length - stride others. max_length: None for the model's; stride: None for half of it. The corpus should be prepared
    with whole documents and without special tokens, but for the BOS of models that were trained with one. Raises UserError as
    `held_out` does, and for masked models.
    """
    if not model.causal:
        raise UserError("sliding-window perplexity is for causal models; a masked one has held-out loss and pseudo-perplexity")
    limit = language_model.max_length(model)
    size = max_length if max_length is not None else limit or int(corpus.lengths.max())
    step = stride if stride is not None else max(size // 2, 1)
    if size < 2 or (limit is not None and size > limit):
        raise UserError(f"max_length must be from 2 to {limit or 'the longest text'} for this model, got {size}")
    if not 1 <= step < size:
        raise UserError(f"stride must be from 1 to {size - 1} (max_length - 1), got {step}: every token needs one before it")
    facts = _checked_facts(model, corpus, np.minimum(corpus.lengths, size), facts)
    windows, layout = sliding_windows(corpus.lengths, size, step), layout_of(model)

    def make(chosen: Ints) -> Batch:
        sequence, begin, first, end = (column[chosen] for column in windows)
        whole, inverse = np.unique(sequence, return_inverse=True)
        text, starts = corpus.gather(whole), offsets(corpus.lengths[whole])[:-1]
        ids_T = text[ranges(starts[inverse] + begin, end - begin)]
        targets = ranges(offsets(end - begin)[:-1] + first - 1 - begin, end - first)
        clusters = np.repeat(sequence, end - first)
        labels = ids_T[targets + 1]
        return assemble(ids_T, end - begin, targets, labels, layout=layout, pad_id=facts.pad_id, sequence_of_label_M=clusters)

    lengths_W = windows.end - windows.begin
    sums, counts = by_sequence(*score_pieces(model, lengths_W, make, batch_tokens, device, precision, progress))
    loss, loss_se = ratio(sums, counts)
    return CausalPerplexity(loss, loss_se, _exp(loss), int(counts.sum()), len(counts), size, step)


def _checked_facts(model: Any, corpus: Tokens, lengths_n: NDArray[Any], facts: Facts) -> Facts:
    """What of the tokenizer concerns the model. Raises UserError where the corpus is not for it."""
    longest, limit = int(lengths_n.max(initial=0)), language_model.max_length(model)
    check_rows("the model", language_model.vocabulary(model), corpus, facts, bool(model.causal))
    if limit is not None and longest > limit:
        raise UserError(
            f"the corpus has sequences of {longest} tokens, the model takes {limit}; prepare it with --max-length {limit}"
        )
    return facts_within(facts, language_model.vocabulary(model))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf if loss >= 700 else math.nan


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
        for name, known in (
            ("documents", get_args(Documents)),
            ("read_as", (None, *get_args(TextKind))),
            ("device", ("auto", "cpu", "cuda")),
            ("precision", ("auto", "fp32", "bf16", "fp16")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
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
    device, precision = _resolve(options)
    config, causal = language_model.evaluation_config(model_path)
    raw = [path for path in corpora if not _is_prepared(path)]
    for path in raw:
        find_inputs([path], Path(path), options.read_as)
    if raw:
        token_facts(load_tokenizer(model_path))
    if options.bos != "auto" and not causal:
        raise UserError(f"bos is for causal models, and {model_path} is a masked one; leave it out")
    opened = {path: _open(path, model_path, causal) for path in corpora if path not in raw}
    for path, corpus in opened.items():
        has = "no" if beginning(corpus, load_tokenizer(corpus.tokenizer_dir)) is None else "yes"
        if options.bos not in ("auto", has):
            raise UserError(f"bos is {options.bos} and {path} was prepared with bos {has}; prepare it with --bos {options.bos}")
    tell(0.0, f"loading {model_path}")
    model = language_model.load_for_evaluation(model_path, note=partial(tell, 0.0)).to(device)
    size = _size(model, options, causal)
    for path, corpus in opened.items():
        lengths_n = np.minimum(corpus.lengths, size) if causal else corpus.lengths
        tokenizer = load_tokenizer(corpus.tokenizer_dir)
        _checked_facts(model, corpus, lengths_n, token_facts(tokenizer))
        check_unknown_share(_unknown_share(corpus, tokenizer), options.max_unknown_share, tokenizer, path)
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
                reports.append(_evaluate_one(model, path, opened[path], options, size, device, precision, share))
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
    text = " ".join(str(load_tokenizer(corpus.tokenizer_dir).decode(ids.tolist(), skip_special_tokens=True)).split())
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
    given: str,
    corpus: Corpus,
    options: EvaluateOptions,
    size: int,
    device: torch.device,
    precision: str,
    share: _Share,
) -> CorpusReport:
    tokenizer = load_tokenizer(corpus.tokenizer_dir)
    facts = token_facts(tokenizer)
    begun = time.perf_counter()
    common: dict[str, Any] = {"batch_tokens": options.batch_tokens, "device": device, "precision": precision}
    heldout, pseudo, causal = None, None, None
    if model.causal:
        told = share.part(0.0, 1.0, "perplexity")
        causal = causal_perplexity(model, corpus, facts, max_length=size, stride=options.stride, progress=told, **common)
    else:
        tokens = int(corpus.lengths.sum())
        positions = tokens if options.positions == "all" else min(options.positions, tokens)
        # A position costs a forward of its sequence, the held-out loss one of every sequence.
        part = len(corpus) / (len(corpus) + positions)
        told = share.part(0.0, part, "held-out loss")
        heldout = held_out(model, corpus, facts, seed=options.seed, progress=told, **common)
        if options.positions != 0:
            told = share.part(part, 1 - part, "pseudo-perplexity")
            pseudo = pseudo_perplexity(
                model, corpus, facts, positions=options.positions, seed=options.seed, progress=told, **common
            )
    seconds = time.perf_counter() - begun
    unknown, spellings = _unknown_share(corpus, tokenizer), corpus.manifest.special_spellings
    notes = [f"warning: {unknown_text(unknown, tokenizer, given)}"] if unknown > WARNING_SHARE else []
    if spellings:
        notes.append(f"{given} spells out {spellings:,} special tokens, {corpus.manifest.special_spellings_became}")
    tokens = int(corpus.lengths.sum())
    bos = beginning(corpus, tokenizer) if model.causal else None
    return CorpusReport(given, len(corpus), tokens, heldout, pseudo, causal, bos, seconds, unknown, spellings, tuple(notes))


def _unknown_share(corpus: Corpus, tokenizer: FastTokenizer) -> float:
    return unknown_share(tokenizer, corpus.counts, len(corpus), corpus.manifest.options)


def _collect(remarks: list[str], place: Path, progress: PrepareProgress) -> None:
    """Keep what `prepare` says of raw text, but for what the report says itself: its frame and its unknown tokens."""
    if progress.note and str(place) not in progress.note and not progress.note.startswith("in front of"):
        remarks.append(progress.note)


def beginning(corpus: Corpus, tokenizer: FastTokenizer) -> str | None:
    """Return the BOS or [CLS] in front of every sequence, as it is spelt; None where there is none."""
    front = front_token(tokenizer)
    return str(tokenizer.convert_ids_to_tokens(front)) if front is not None and has_front(corpus.manifest.options) else None


def _resolve(options: EvaluateOptions) -> tuple[torch.device, str]:
    gpu = torch.cuda.is_available()
    if options.device == "cuda" and not gpu:
        raise UserError("device is cuda and torch finds no GPU; use --device cpu, or see fastdistil doctor")
    device = torch.device("cuda" if options.device == "cuda" or (options.device == "auto" and gpu) else "cpu")
    if options.precision != "auto":
        return device, options.precision
    return device, "bf16" if has_fast_bf16(device) else "fp32"


def _is_prepared(given: str) -> bool:
    return any((Path(given) / name).is_file() for name in ("manifest.json", "progress.json"))


def _open(path: str, model_path: str, causal: bool) -> Corpus:
    corpus = Corpus.open(path)
    if language_model.has_tokenizer(model_path) and (difference := disagreement(model_path, corpus, causal)) is not None:
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
