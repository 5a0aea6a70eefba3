"""The share of a corpus' tokens that are unknown ([UNK]): little of it is usual, much of it is the wrong tokenizer.

It is of all tokens but those that `prepare` puts around the pieces. PrepareOptions.max_unknown is something else: it drops
single pieces.
"""

from collections.abc import Mapping
from typing import Any

from fastdistil.data.ragged import Ints
from fastdistil.data.tokenizer import FastTokenizer, added_tokens, unknown_id
from fastdistil.data.word_marks import normalized
from fastdistil.errors import UserError

WARNING_SHARE = 0.01
MAX_UNKNOWN_SHARE = 0.2
_CAPITALS = 0.02
"""A vocabulary of cased text has a larger share of entries with capitals."""


def unknown_share(tokenizer: FastTokenizer, counts_V: Ints, sequences: int, options: Mapping[str, Any]) -> float:
    """Return the share of unknown tokens, from 0 to 1, from the counts of all tokens, int64 [V], in so many sequences.

    options: of the manifest; they say which special tokens stand around each sequence, and these are left out.
    """
    added = added_tokens(tokenizer, options)
    tokens = int(counts_V.sum()) - sequences * len(added)
    unknown = unknown_id(tokenizer)
    if unknown is None or tokens == 0:
        return 0.0
    return (int(counts_V[unknown]) - sequences * added.count(unknown)) / tokens


def check_unknown_share(share: float, limit: float, tokenizer: FastTokenizer, where: str) -> None:
    """Raises UserError where more than `limit` of the tokens are unknown."""
    if share > limit:
        raise UserError(
            f"{unknown_text(share, tokenizer, where)}; that is more than the {limit:.0%} allowed: choose a tokenizer for this "
            "text, or allow more with --max-unknown-share (1: any)"
        )


def unknown_text(share: float, tokenizer: FastTokenizer, where: str) -> str:
    """Say how many tokens of what `where` names are unknown, and why that may be."""
    name = tokenizer.convert_ids_to_tokens(unknown_id(tokenizer) or 0)
    return f"{share:.1%} of the tokens of {where} are unknown ({name}): {_likely_reason(tokenizer)}"


def _likely_reason(tokenizer: FastTokenizer) -> str:
    special = set(tokenizer.all_special_tokens)
    names = [name for name in tokenizer.get_vocab() if name not in special]
    cased = sum(name != name.lower() for name in names) > _CAPITALS * len(names)
    lower_cases = normalized(tokenizer.backend_tokenizer, "Aa") == "aa"
    if cased and lower_cases:
        return "the tokenizer lower-cases the text and its vocabulary is cased (see do_lower_case)"
    if not cased and not lower_cases:
        return "the tokenizer keeps capitals and its vocabulary has none (see do_lower_case), or it is of another script"
    return "its vocabulary is of another script, language or kind of text"
