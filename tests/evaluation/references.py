"""Small models of every architecture, and their losses by transformers' own forward and by loops over single tokens."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from fastdistil.data.corpus import Corpus
from fastdistil.data.masking import TokenFacts, mask_table, mask_tokens
from fastdistil.models.language_model import LanguageModel
from fastdistil.recipe import Mask

WORDS = (
    "river",
    "stone",
    "the",
    "a",
    "cat",
    "running",
    "quickly",
    "under",
    "mountains",
    "sings",
    "of",
    "old",
    "letters",
)
LENGTH = 24
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": {**SIZES, "type_vocab_size": 1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 32},
    "modernbert": {
        **SIZES,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "llama": {**SIZES, "num_key_value_heads": 2},
    "qwen2": {**SIZES, "num_key_value_heads": 2},
    # Not among language_model.FAMILIES: evaluated by transformers' own forward.
    "albert": {**SIZES, "embedding_size": 16},
    "electra": {**SIZES, "embedding_size": 16},
    "xlm-roberta": {**SIZES, "type_vocab_size": 1},
    "convbert": {**SIZES, "embedding_size": 16, "conv_kernel_size": 3},
    "mistral": {**SIZES, "num_key_value_heads": 2, "sliding_window": 6},
    "opt": {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 32},
}
CAUSAL = ("gpt2", "llama", "qwen2", "mistral", "opt")
masked_families = pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
causal_families = pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
other_masked = pytest.mark.parametrize("kind", ["albert", "electra", "xlm-roberta", "convbert"])
other_causal = pytest.mark.parametrize("kind", ["mistral", "opt"])


def documents(n: int = 10) -> list[str]:
    generator = np.random.default_rng(5)
    return ["a", *(" ".join(generator.choice(WORDS, size)) for size in generator.integers(2, 80, n - 1))]


def build(kind: str, vocabulary: int, seed: int = 0) -> Any:
    """A small model of transformers in float64, far from its initial state, in evaluation mode."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocabulary, **CONFIGS[kind])
    auto: Any = transformers.AutoModelForCausalLM if kind in CAUSAL else transformers.AutoModelForMaskedLM
    model = auto.from_config(config, attn_implementation="eager" if kind == "convbert" else "sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def pair(kind: str, facts: TokenFacts, seed: int = 0) -> tuple[Any, LanguageModel]:
    reference = build(kind, facts.vocab_size, seed)
    return reference, LanguageModel(copy.deepcopy(reference))


def each_sequence(corpus: Corpus) -> Iterator[np.ndarray]:
    return (corpus.gather(np.array([i])) for i in range(len(corpus)))


def masked_as_held_out(
    corpus: Corpus,
    facts: TokenFacts,
    seed: int,
    probability: float = 0.15,
) -> list[tuple[Tensor, Tensor]]:
    """(what the model sees, labels with -100 elsewhere) of each sequence by itself."""
    table = mask_table(Mask(probability=probability, smoothing=0.0), facts, corpus.counts)
    sequences = []
    for number, ids in enumerate(each_sequence(corpus)):
        masked_ids, targets = mask_tokens(
            table,
            ids,
            np.array([len(ids)]),
            np.array([number]),
            seed=seed,
            epoch=0,
        )
        labels = np.full(len(ids), -100)
        labels[targets] = ids[targets]
        sequences.append((torch.from_numpy(masked_ids), torch.from_numpy(labels)))
    return sequences


def padded(sequences: list[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)


def error_of_ratio(sums: list[float], counts: list[int]) -> float:
    """Standard error of sum / count, sequences being the sample; written out."""
    used = [(s, c) for s, c in zip(sums, counts, strict=True) if c]
    mean = sum(s for s, _ in used) / sum(c for _, c in used)
    squares = sum((s - mean * c) ** 2 for s, c in used)
    return math.sqrt(squares * len(used) / (len(used) - 1)) / sum(c for _, c in used)


def literal_pseudo_losses(reference: Any, corpus: Corpus, facts: TokenFacts) -> list[list[float]]:
    """-log P(token | all others) of every token that is not special, one forward each."""
    losses_by_sequence = []
    for ids in each_sequence(corpus):
        losses = []
        for place, token in enumerate(ids.tolist()):
            if token not in facts.special_ids:
                masked_ids = torch.from_numpy(ids.copy())[None]
                masked_ids[0, place] = facts.mask_id
                losses.append(-float(reference(input_ids=masked_ids).logits[0, place].log_softmax(0)[token]))
        losses_by_sequence.append(losses)
    return losses_by_sequence


class Mostly:
    """A corpus in memory in which ordinary tokens are rare: the first draw does not find enough of them."""

    def __init__(self, special: int) -> None:
        self.lengths = np.array([50] * 40, np.int32)
        self.tokens = np.full((40, 50), special)
        self.tokens[7, 10:20] = special + 30
        self.counts = np.bincount(self.tokens.ravel(), minlength=200)

    def gather(self, sequences: np.ndarray) -> np.ndarray:
        return self.tokens[sequences].ravel()

    def __len__(self) -> int:
        return len(self.lengths)
