"""Which tokens a masked model has to guess: a pure function of (seed, epoch, sequence, position).

Every random number here is a hash of the counters that name it, so a sequence gets the same mask in whatever batch, layout,
rank or order it lies, a run resumes at any step without replaying the ones before, and what was stored per masked token stays
valid. The price: targets are drawn per sequence, where the Hugging Face example draws ceil(p * tokens) of them over a whole
batch at once. Both count all tokens, the special ones too, and choose only among the others.

A sequence of L tokens gets floor(p L + u) targets, u uniform: p L on average, exactly. They are drawn without replacement with
weight max(count, 1)^-smoothing by the exponential race (Efraimidis and Spirakis 2006): token i arrives at E_i / w_i, E_i
exponential, and the first ones win. Times are compared as logarithms, where no smoothing underflows.

Shapes: V vocabulary, n sequences, T tokens of n sequences laid end to end, W words, M targets.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastdistil.data.ragged import (
    ACTION,
    CROSSING,
    RACE,
    RANDOM_ID,
    TARGETS,
    Bools,
    Floats,
    Hashes,
    Ints,
    hashed,
    offsets,
    ranges,
    uniform,
)
from fastdistil.errors import UserError

if TYPE_CHECKING:  # corpus.py and its worker processes use the arithmetic here and never a recipe
    from fastdistil.recipe import Mask


@dataclass(frozen=True)
class TokenFacts:
    """What masking and batching must know of a tokenizer."""

    vocab_size: int
    mask_id: int | None
    pad_id: int
    """Id of the padding token, else of eos, else of sep."""
    special_ids: Ints
    """int64 [k], ascending."""
    continues: Bools
    """bool [V]: True where a token goes on with the word before it (##x of WordPiece; no leading blank in byte-level BPE and
    sentencepiece). Special tokens: False. All False for vocabularies without such marks; see marks_words."""
    marks_words: bool
    """Whether the vocabulary shows where words begin at all; if not, there is no whole-word masking."""
    ends: Bools
    """bool [V]: True where a token ends its word (x</w>), so that the next one begins a word although it `continues`."""


@dataclass(frozen=True)
class MaskTable:
    """Per-vocabulary tables of one recipe; made by `mask_table`."""

    mask: "Mask"
    mask_id: int
    handicap_V: Floats
    """-log of the weight; inf for special tokens, which never win the race."""
    ordinary_ids: Ints
    """The vocabulary without special tokens."""
    continues_V: Bools
    ends_V: Bools


def mask_table(mask: "Mask", facts: TokenFacts, counts_V: Ints) -> MaskTable:
    """Raises UserError: no mask token, counts of another vocabulary, whole words where the vocabulary does not mark them."""
    if facts.mask_id is None:
        raise UserError("a masked model needs a tokenizer with a mask token, and this one has none; use its own tokenizer")
    if len(counts_V) != facts.vocab_size:
        raise UserError(
            f"the corpus counts {len(counts_V)} token ids and the tokenizer has {facts.vocab_size}; prepare the corpus again"
        )
    if mask.whole_word and not facts.marks_words:
        raise UserError(
            "mask.whole_word needs a vocabulary that marks where words begin, and this one does not; set it to false"
        )
    handicap_V = mask.smoothing * np.log(np.maximum(counts_V, 1))
    handicap_V[facts.special_ids] = np.inf
    return MaskTable(
        mask=mask,
        mask_id=facts.mask_id,
        handicap_V=handicap_V,
        ordinary_ids=np.flatnonzero(np.isfinite(handicap_V)),
        continues_V=facts.continues,
        ends_V=facts.ends,
    )


def maskable_counts(table: MaskTable, ids_T: Ints, lengths_n: NDArray[Any]) -> Ints:
    """Tokens of each sequence that are not special, int64 [n]."""
    return np.diff(offsets(np.isfinite(table.handicap_V)[ids_T])[offsets(lengths_n)])


def target_counts(
    table: MaskTable, lengths_n: NDArray[Any], maskable_n: NDArray[Any], sequences_n: Ints, *, seed: int, epoch: int
) -> Ints:
    """Targets of each sequence, int64 [n]: p times its tokens, specials included, on average; at most its maskable tokens.

    For whole words it is what the expectation aims at: the word that crosses it is taken or left as a whole.
    """
    chance_n = uniform(hashed(seed, TARGETS, epoch, sequences_n))
    wanted_n = np.floor(table.mask.probability * lengths_n + chance_n).astype(np.int64)
    result: Ints = np.minimum(wanted_n, maskable_n)
    return result


def choose_targets(table: MaskTable, ids_T: Ints, lengths_n: NDArray[Any], sequences_n: Ints, *, seed: int, epoch: int) -> Ints:
    """Indices into ids_T of the tokens to guess, ascending int64 [M].

    ids_T are the unmasked tokens of whole sequences end to end, lengths_n their lengths (at least 1), sequences_n their indices
    in the corpus.
    """
    # How many targets each sequence gets, and each token's sequence and place in it.
    maskable_n = maskable_counts(table, ids_T, lengths_n)
    wanted_n = target_counts(table, lengths_n, maskable_n, sequences_n, seed=seed, epoch=epoch)
    starts_n = offsets(lengths_n)[:-1]
    segments_T = np.repeat(np.arange(len(lengths_n)), lengths_n)
    keys_n = hashed(seed, RACE, epoch, sequences_n)  # of each sequence's race
    positions_T = np.arange(len(ids_T)) - starts_n[segments_T]
    if not table.mask.whole_word:
        # Tokens race; those of a sequence stand together in order_T, the first to arrive in front.
        arrivals_T = table.handicap_V[ids_T] + _log_exponential(keys_n[segments_T], positions_T)
        order_T = _by_segment(segments_T, arrivals_T, len(lengths_n))
        return np.sort(order_T[ranges(starts_n, wanted_n)])

    # Words race: each with the mean weight of its tokens.
    words_W = word_starts(table, ids_T, positions_T)
    word_lengths_W = np.diff(words_W, append=len(ids_T))
    handicap_W = np.log(word_lengths_W) - np.logaddexp.reduceat(-table.handicap_V[ids_T], words_W)
    segments_W = segments_T[words_W]
    arrivals_W = handicap_W + _log_exponential(keys_n[segments_W], positions_T[words_W])
    order_W = _by_segment(segments_W, arrivals_W, len(lengths_n))
    # Tokens of the words before this one in its sequence's race: the running sum from the sequence's start.
    before_W = offsets(word_lengths_W[order_W])[:-1] - starts_n[segments_W[order_W]]
    # How many targets were still missing when a word arrived.
    room_W = wanted_n[segments_W[order_W]] - before_W
    coin_n = uniform(hashed(seed, CROSSING, epoch, sequences_n))
    # room / length is 1 or more for a word that fits, and 0 or less once the target is reached.
    taken_W = order_W[coin_n[segments_W[order_W]] * word_lengths_W[order_W] < room_W]
    return np.sort(ranges(words_W[taken_W], word_lengths_W[taken_W]))


def mask_tokens(
    table: MaskTable, ids_T: Ints, lengths_n: NDArray[Any], sequences_n: Ints, *, seed: int, epoch: int
) -> tuple[Ints, Ints]:
    """(what the model sees, int64 [T]; the targets' indices into it, ascending int64 [M]).

    Of the targets the share `mask.mask` becomes the mask token, `mask.random` a token drawn uniformly from the vocabulary
    without special tokens, and the rest stays as it is. Arguments as in `choose_targets`.
    """
    targets_M = choose_targets(table, ids_T, lengths_n, sequences_n, seed=seed, epoch=epoch)
    # Each target's sequence and place in it: they name its two random numbers.
    starts = offsets(lengths_n)
    segments_M = np.searchsorted(starts, targets_M, side="right") - 1
    positions_M = targets_M - starts[segments_M]
    action_M = uniform(hashed(hashed(seed, ACTION, epoch, sequences_n)[segments_M], positions_M))
    draw_M = uniform(hashed(hashed(seed, RANDOM_ID, epoch, sequences_n)[segments_M], positions_M))
    # The lower end of action_M becomes the mask token, the upper end a token drawn, and what lies between stays.
    seen_T = ids_T.copy()
    masked_M = action_M < table.mask.mask
    random_M = action_M >= 1.0 - table.mask.random
    seen_T[targets_M[masked_M]] = table.mask_id
    drawn = (draw_M[random_M] * len(table.ordinary_ids)).astype(np.int64)
    seen_T[targets_M[random_M]] = table.ordinary_ids[drawn]
    return seen_T, targets_M


def word_starts(table: MaskTable, ids_T: Ints, positions_T: Ints) -> Ints:
    """First token of every word, int64 [W]; a special token is a word of its own and ends the one before it."""
    special_T = np.isinf(table.handicap_V)[ids_T]
    starts_T = (positions_T == 0) | special_T | ~table.continues_V[ids_T]
    starts_T[1:] |= (special_T | table.ends_V[ids_T])[:-1]
    return np.flatnonzero(starts_T)


def _log_exponential(keys: Hashes, positions: Ints) -> Floats:
    """Logarithms of exponentially distributed times, one for each (sequence's key, position)."""
    logs: Floats = np.log(-np.log(uniform(hashed(keys, positions))))
    return logs


def _by_segment(segments: Ints, arrivals: Floats, n: int) -> Ints:
    """Order by (segment, arrival). Two passes: numpy sorts 16-bit integers by radix, twice as fast as lexsort."""
    by_arrival = np.argsort(arrivals)
    narrow = segments[by_arrival].astype(np.min_scalar_type(n))
    return by_arrival[np.argsort(narrow, kind="stable")]
