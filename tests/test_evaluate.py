"""Losses, perplexities and divergences against transformers' own forward and against loops over single tokens."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from fastdistil.data.batch import Batch
from fastdistil.data.corpus import Corpus
from fastdistil.data.masking import TokenFacts, mask_table, mask_tokens
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.tokenizer import load_tokenizer, token_facts, train_wordpiece
from fastdistil.errors import CorruptData, UserError
from fastdistil.evaluate import EvaluateOptions, evaluate
from fastdistil.models import language_model, loading
from fastdistil.models.language_model import LanguageModel
from fastdistil.models.perplexity import causal_perplexity, held_out, pseudo_perplexity
from fastdistil.models.scoring import drawn_positions, drawn_sequences, ratio, sliding_windows
from fastdistil.recipe import Mask

WORDS = ("river", "stone", "the", "a", "cat", "running", "quickly", "under", "mountains", "sings", "of", "old", "letters")
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
    "modernbert": {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 2, "eos_token_id": 3},
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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_wordpiece(documents(40), 90, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(documents()) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tokenizer: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Pieces of at most LENGTH tokens, framed by [CLS] and [SEP]."""
    out = tmp_path_factory.mktemp("corpus")
    prepare([str(text)], out, PrepareOptions(tokenizer=str(tokenizer), max_length=LENGTH, documents="line", workers=1))
    return Corpus.open(out)


@pytest.fixture(scope="module")
def document_corpus(tokenizer: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Whole documents without special tokens."""
    out = tmp_path_factory.mktemp("whole")
    options = PrepareOptions(tokenizer=str(tokenizer), max_length=2**31 - 1, documents="line", special_tokens=False, workers=1)
    prepare([str(text)], out, options)
    return Corpus.open(out)


@pytest.fixture(scope="module")
def facts(tokenizer: Path) -> TokenFacts:
    return token_facts(load_tokenizer(tokenizer))


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


def masked_as_held_out(corpus: Corpus, facts: TokenFacts, seed: int, probability: float = 0.15) -> list[tuple[Tensor, Tensor]]:
    """(what the model sees, labels with -100 elsewhere) of each sequence by itself."""
    table = mask_table(Mask(probability=probability, smoothing=0.0), facts, corpus.counts)
    sequences = []
    for number, ids in enumerate(each_sequence(corpus)):
        masked_ids, targets = mask_tokens(table, ids, np.array([len(ids)]), np.array([number]), seed=seed, epoch=0)
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


# Held-out loss


@masked_families
@torch.no_grad()
def test_held_out_loss_is_that_of_transformers_on_padded_batches(kind: str, corpus: Corpus, facts: TokenFacts) -> None:
    reference, model = pair(kind, facts)
    sequences = masked_as_held_out(corpus, facts, seed=3)
    ids, labels = (
        padded([masked_ids for masked_ids, _ in sequences], facts.pad_id),
        padded([label for _, label in sequences], -100),
    )
    out = reference(input_ids=ids, attention_mask=(ids != facts.pad_id).long(), labels=labels)
    losses = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    sums, counts = losses.sum(1).tolist(), (labels >= 0).sum(1).tolist()
    assert len(set(counts)) > 2
    truth = sum(sums) / sum(counts)

    heldout = held_out(model, corpus, facts, seed=3, batch_tokens=100)
    assert heldout.loss == pytest.approx(truth, rel=1e-10)
    assert heldout.loss == pytest.approx(float(out.loss), rel=1e-5)
    assert heldout.loss_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-8)
    assert heldout.perplexity == pytest.approx(math.exp(truth), rel=1e-9)
    assert (heldout.labels, heldout.sequences) == (sum(counts), len(corpus))
    assert (heldout.kl, heldout.kl_se, heldout.kl_tokens) == (None, None, 0)


@causal_families
@torch.no_grad()
def test_held_out_loss_of_causal_models_is_that_of_every_next_token(kind: str, corpus: Corpus, facts: TokenFacts) -> None:
    reference, model = pair(kind, facts)
    sums, counts = [], []
    for ids in each_sequence(corpus):
        tokens = torch.from_numpy(ids)
        sums.append(float(F.cross_entropy(reference(input_ids=tokens[None]).logits[0, :-1], tokens[1:], reduction="sum")))
        counts.append(len(ids) - 1)
    heldout = held_out(model, corpus, facts, batch_tokens=64)
    assert heldout.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-10)
    assert heldout.loss_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-8)
    assert heldout.labels == sum(counts)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "gpt2"])
@torch.no_grad()
def test_kl_is_that_of_the_two_distributions_at_every_token(kind: str, corpus: Corpus, facts: TokenFacts) -> None:
    (reference, model), (reference_t, teacher) = pair(kind, facts), pair(kind, facts, seed=1)
    if model.causal:
        sequences = [(torch.from_numpy(ids), torch.tensor([])) for ids in each_sequence(corpus)]
    else:
        sequences = masked_as_held_out(corpus, facts, seed=2)
    sums, counts = [], []
    for masked_ids, _ in sequences:
        log_q, log_p = (m(input_ids=masked_ids[None]).logits[0].log_softmax(-1) for m in (reference, reference_t))
        sums.append(float(F.kl_div(log_q, log_p, reduction="sum", log_target=True)))
        counts.append(len(masked_ids))
    heldout = held_out(model, corpus, facts, teacher=teacher, seed=2)
    assert heldout.kl == pytest.approx(sum(sums) / sum(counts), rel=1e-10)
    assert heldout.kl > 0.1
    assert heldout.kl_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-8)
    assert heldout.kl_tokens == sum(counts) == int(corpus.lengths.sum())
    alone = held_out(model, corpus, facts, seed=2)
    assert heldout.loss == pytest.approx(alone.loss, rel=1e-12)
    assert (heldout.labels, heldout.loss_se) == (alone.labels, pytest.approx(alone.loss_se, rel=1e-12))


def test_kl_of_a_model_to_itself_is_nothing(corpus: Corpus, facts: TokenFacts) -> None:
    model = pair("bert", facts)[1]
    heldout = held_out(model, corpus, facts, teacher=model)
    assert heldout.kl == pytest.approx(0, abs=1e-14)


def test_the_same_numbers_whatever_the_batches(corpus: Corpus, facts: TokenFacts) -> None:
    model, teacher = pair("bert", facts)[1], pair("bert", facts, seed=1)[1]
    first = asdict(held_out(model, corpus, facts, teacher=teacher, seed=1))
    assert asdict(held_out(model, corpus, facts, teacher=teacher, seed=1)) == first
    for batch_tokens, layout in ((LENGTH, "packed"), (100, "length-grouped"), (10**6, "length-grouped")):
        again = held_out(model, corpus, facts, teacher=teacher, seed=1, batch_tokens=batch_tokens, layout=layout)
        assert asdict(again) == pytest.approx(first, rel=1e-10)
    assert held_out(model, corpus, facts, seed=2).loss != pytest.approx(first["loss"], rel=1e-3)


def test_rows_are_scored_in_chunks(corpus: Corpus, facts: TokenFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = pair("bert", facts)[1], pair("bert", facts, seed=1)[1]
    unchunked = asdict(held_out(model, corpus, facts, teacher=teacher))
    rows: list[int] = []
    transform = model.transform
    monkeypatch.setattr(model, "transform", lambda hidden: (rows.append(len(hidden)), transform(hidden))[1])
    monkeypatch.setattr("fastdistil.models.scoring.ROWS", 7)
    assert asdict(held_out(model, corpus, facts, teacher=teacher)) == pytest.approx(unchunked, rel=1e-12)
    assert set(rows[:-1]) == {7}
    assert sum(rows) == int(corpus.lengths.sum())


def test_drawn_sequences_are_a_function_of_the_seed() -> None:
    some = drawn_sequences(1000, 100, 4)
    assert np.array_equal(some, drawn_sequences(1000, 100, 4))
    assert len(np.unique(some)) == 100
    assert np.all(np.diff(some) > 0)
    assert 400 < some.mean() < 600
    assert not np.array_equal(some, drawn_sequences(1000, 100, 5))
    assert np.array_equal(drawn_sequences(7, None, 0), np.arange(7))
    assert np.array_equal(drawn_sequences(7, 8, 0), np.arange(7))


def test_some_sequences_have_the_masks_that_they_have_among_all(corpus: Corpus, facts: TokenFacts) -> None:
    reference, model = pair("bert", facts)
    heldout = held_out(model, corpus, facts, seed=3, max_sequences=4)
    drawn = drawn_sequences(len(corpus), 4, 3)
    sums, labels = 0.0, 0
    for number, (masked_ids, label_ids) in enumerate(masked_as_held_out(corpus, facts, seed=3)):
        if number in drawn:
            with torch.no_grad():
                sums += float(F.cross_entropy(reference(input_ids=masked_ids[None]).logits[0], label_ids, reduction="sum"))
            labels += int((label_ids >= 0).sum())
    assert (heldout.sequences, heldout.labels) == (4, labels)
    assert heldout.loss == pytest.approx(sums / labels, rel=1e-10)


class Unigram(nn.Module):
    """A model of one's own, whose loss can be counted: it predicts the same distribution everywhere."""

    causal, bias = False, None

    def __init__(self, log_probabilities_V: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(log_probabilities_V[:, None])
        self.modes: list[bool] = []
        self.autocast: list[bool] = []

    def hidden(self, batch: Batch) -> Tensor:
        self.modes.append(self.training)
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return torch.ones(batch.ids_BS.numel(), 1, dtype=self.weight.dtype)

    def transform(self, hidden_ND: Tensor) -> Tensor:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return hidden_ND


def test_a_module_of_your_own(corpus: Corpus, facts: TokenFacts) -> None:
    log_probabilities = torch.randn(facts.vocab_size, dtype=torch.float64).log_softmax(0)
    model = Unigram(log_probabilities)
    labels = torch.cat([targets[targets >= 0] for _, targets in masked_as_held_out(corpus, facts, seed=0, probability=0.4)])
    heldout = held_out(model, corpus, facts, probability=0.4)
    assert heldout.labels == len(labels) > 0.3 * corpus.lengths.sum()
    assert heldout.loss == pytest.approx(-float(log_probabilities[labels].mean()), rel=1e-12)
    ordinary = ~torch.isin(torch.from_numpy(corpus.gather(np.arange(len(corpus)))), torch.from_numpy(facts.special_ids))
    tokens = torch.from_numpy(corpus.gather(np.arange(len(corpus))))[ordinary]
    pseudo = pseudo_perplexity(model, corpus, facts, positions="all")
    assert pseudo.loss == pytest.approx(-float(log_probabilities[tokens].mean()), rel=1e-12)


def test_each_part_returns_to_its_mode(corpus: Corpus, facts: TokenFacts) -> None:
    model = Unigram(torch.zeros(facts.vocab_size, dtype=torch.float64))
    model.frozen, model.live = nn.Dropout(0.5).eval(), nn.Dropout(0.5)
    held_out(model, corpus, facts)
    assert model.training
    assert model.live.training
    assert not model.frozen.training
    assert set(model.modes) == {False}
    with pytest.raises(ZeroDivisionError):
        held_out(model, corpus, facts, progress=lambda done: 1 // 0)
    assert model.training
    assert not model.frozen.training


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(precision: str, corpus: Corpus, facts: TokenFacts) -> None:
    model = pair("bert", facts)[1].float()
    exact = held_out(model, corpus, facts, teacher=model)
    half = held_out(model, corpus, facts, teacher=model, precision=precision)
    assert half.loss == pytest.approx(exact.loss, rel=0.01)
    assert half.loss != exact.loss
    assert 0 < half.kl < 0.01


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_is_for_the_model_and_not_for_its_teacher(outside: bool, corpus: Corpus, facts: TokenFacts) -> None:
    model, teacher, plain = (Unigram(torch.zeros(facts.vocab_size)) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        held_out(model, corpus, facts, teacher=teacher, precision="bf16")
        held_out(plain, corpus, facts, precision="fp32")
    assert (set(model.autocast), set(teacher.autocast), set(plain.autocast)) == ({True}, {False}, {False})


def test_gradients_are_not_recorded(corpus: Corpus, facts: TokenFacts) -> None:
    model = Unigram(torch.zeros(facts.vocab_size, dtype=torch.float64))
    held_out(model, corpus, facts)
    pseudo_perplexity(model, corpus, facts, positions=3)
    assert model.weight.grad is None
    assert torch.is_grad_enabled()


def test_what_cannot_be_held_out_is_refused(corpus: Corpus, facts: TokenFacts) -> None:
    model = pair("bert", facts)[1]
    with pytest.raises(UserError, match="probability must lie between 0 and 1, got 1"):
        held_out(model, corpus, facts, probability=1.0)
    with pytest.raises(UserError, match=f"sequence of {LENGTH} tokens"):
        held_out(model, corpus, facts, batch_tokens=LENGTH - 1)
    with pytest.raises(UserError, match="prepare the corpus with the model's own tokenizer"):
        held_out(LanguageModel(build("bert", facts.vocab_size - 1)), corpus, facts)
    model.module.config.max_position_embeddings = LENGTH - 1
    with pytest.raises(UserError, match=f"sequences of {LENGTH} tokens, the model takes {LENGTH - 1}"):
        held_out(model, corpus, facts)


# Pseudo-perplexity


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


@masked_families
@torch.no_grad()
def test_pseudo_perplexity_masks_one_token_at_a_time(kind: str, corpus: Corpus, facts: TokenFacts) -> None:
    reference, model = pair(kind, facts)
    losses = literal_pseudo_losses(reference, corpus, facts)
    every = [loss for inner in losses for loss in inner]
    pseudo = pseudo_perplexity(model, corpus, facts, positions="all", batch_tokens=150)
    assert pseudo.positions == len(every) == int(corpus.lengths.sum()) - 2 * len(corpus)
    assert pseudo.loss == pytest.approx(sum(every) / len(every), rel=1e-10)
    assert pseudo.pppl == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-9)
    assert pseudo.loss_se == pytest.approx(error_of_ratio([sum(x) for x in losses], [len(x) for x in losses]), rel=1e-8)
    assert pseudo.sequences == len(corpus)
    assert asdict(pseudo_perplexity(model, corpus, facts, positions=10**9)) == pytest.approx(asdict(pseudo), rel=1e-10)


@torch.no_grad()
def test_sampled_pseudo_perplexity_is_the_mean_over_the_sample(corpus: Corpus, facts: TokenFacts) -> None:
    reference, model = pair("bert", facts)
    # By place in the corpus: nan for special tokens.
    losses = np.full(int(corpus.lengths.sum()), np.nan)
    tokens = corpus.gather(np.arange(len(corpus)))
    losses[~np.isin(tokens, facts.special_ids)] = np.concatenate(literal_pseudo_losses(reference, corpus, facts))
    pseudo = pseudo_perplexity(model, corpus, facts, positions=40, seed=9)
    sample = drawn_positions(corpus, facts, 40, 9)
    assert pseudo.positions == 40
    assert pseudo.loss == pytest.approx(losses[sample].mean(), rel=1e-10)
    means = [losses[drawn_positions(corpus, facts, 40, seed)].mean() for seed in range(200)]
    assert np.mean(means) == pytest.approx(np.nanmean(losses), abs=5 * np.std(means) / math.sqrt(200))
    assert asdict(pseudo_perplexity(model, corpus, facts, positions=40, seed=9)) == asdict(pseudo)


def test_positions_are_drawn_uniformly_from_the_ordinary_tokens(corpus: Corpus, facts: TokenFacts) -> None:
    special = np.isin(corpus.gather(np.arange(len(corpus))), facts.special_ids)
    ordinary, sample_size, draws = int((~special).sum()), 12, 3000
    times = np.zeros(len(special))
    for seed in range(draws):
        drawn = drawn_positions(corpus, facts, sample_size, seed)
        assert len(np.unique(drawn)) == len(drawn) == sample_size
        times[drawn] += 1
    assert not times[special].any()
    expected = draws * sample_size / ordinary
    deviations = (times[~special] - expected) / math.sqrt(expected * (1 - sample_size / ordinary))
    assert abs(deviations.std() - 1) < 0.25
    assert np.abs(deviations).max() < 5
    assert np.array_equal(drawn_positions(corpus, facts, "all", 0), np.flatnonzero(~special))
    assert np.array_equal(drawn_positions(corpus, facts, ordinary, 7), np.flatnonzero(~special))
    assert len(drawn_positions(corpus, facts, ordinary - 1, 7)) == ordinary - 1


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


def test_positions_are_found_among_many_special_tokens(facts: TokenFacts) -> None:
    rare = Mostly(int(facts.special_ids[0]))
    rare.counts = rare.counts[: facts.vocab_size]
    for sample_size in (1, 9, 10):
        drawn = drawn_positions(rare, facts, sample_size, 0)
        assert len(drawn) == sample_size
        assert set(drawn) <= set(range(360, 370))
    rare.counts[-1] += 5
    with pytest.raises(CorruptData, match="counts 15 tokens that are not special and holds 10"):
        drawn_positions(rare, facts, 11, 0)
    empty = Mostly(int(facts.special_ids[0]))
    empty.counts, empty.tokens = np.zeros(facts.vocab_size, np.int64), np.zeros((40, 50), np.int64)
    with pytest.raises(UserError, match="none that is not special"):
        drawn_positions(empty, facts, 1, 0)


def test_pseudo_perplexity_refuses_what_it_cannot_do(corpus: Corpus, facts: TokenFacts) -> None:
    with pytest.raises(UserError, match="for masked models"):
        pseudo_perplexity(pair("gpt2", facts)[1], corpus, facts)
    model = pair("bert", facts)[1]
    with pytest.raises(UserError, match="positions must be at least 1, or all, got 0"):
        pseudo_perplexity(model, corpus, facts, positions=0)
    with pytest.raises(UserError, match="does not fit into batch_tokens 8"):
        pseudo_perplexity(model, corpus, facts, batch_tokens=8)
    maskless = replace(facts, mask_id=None)
    with pytest.raises(UserError, match="needs a tokenizer with a mask token, and this one has none"):
        pseudo_perplexity(model, corpus, maskless)


# Perplexity of causal models


@causal_families
@pytest.mark.parametrize(("size", "stride"), [(32, None), (16, None), (8, 3), (8, 7), (5, 1), (2, 1)])
@torch.no_grad()
def test_causal_perplexity_scores_each_token_once_with_what_its_window_shows(
    kind: str, size: int, stride: int | None, document_corpus: Corpus, facts: TokenFacts
) -> None:
    reference, model = pair(kind, facts)
    step = stride or size // 2
    sums, counts = [], []
    for ids in each_sequence(document_corpus):
        losses = []
        for token in range(1, len(ids)):
            # The first window that reaches this token.
            begin = 0 if token < size else step * math.ceil((token - size + 1) / step)
            context = torch.from_numpy(ids[begin:token])[None]
            assert max(1, min(token, size - step)) <= context.shape[1] < size
            losses.append(-float(reference(input_ids=context).logits[0, -1].log_softmax(0)[int(ids[token])]))
        sums.append(sum(losses))
        counts.append(len(losses))
    causal = causal_perplexity(model, document_corpus, facts, max_length=size, stride=stride, batch_tokens=70)
    assert causal.tokens == sum(counts)
    assert causal.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-9)
    assert causal.perplexity == pytest.approx(math.exp(sum(sums) / sum(counts)), rel=1e-8)
    assert causal.loss_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-7)
    assert 1 in document_corpus.lengths
    assert (causal.sequences, causal.max_length, causal.stride) == (sum(map(bool, counts)), size, step)


def test_the_model_decides_the_window_unless_told(document_corpus: Corpus, facts: TokenFacts) -> None:
    causal = causal_perplexity(pair("gpt2", facts)[1], document_corpus, facts)
    assert (causal.max_length, causal.stride) == (32, 16)
    assert document_corpus.lengths.max() > 64


def test_windows_tile_what_they_score() -> None:
    lengths = np.array([1, 2, 7, 8, 9, 30, 1, 31])
    for size, stride in ((8, 4), (8, 1), (8, 7), (3, 2), (100, 50)):
        windows = sliding_windows(lengths, size, stride)
        for number, length in enumerate(lengths.tolist()):
            mine = windows.sequence == number
            scored = [t for a, b in zip(windows.first[mine], windows.end[mine], strict=True) for t in range(a, b)]
            assert scored == list(range(1, length))
            assert all(windows.first[mine] > windows.begin[mine])
            assert all(windows.end[mine] - windows.begin[mine] <= size)


def test_causal_perplexity_refuses_what_it_cannot_do(document_corpus: Corpus, corpus: Corpus, facts: TokenFacts) -> None:
    model = pair("gpt2", facts)[1]
    with pytest.raises(UserError, match="for causal models"):
        causal_perplexity(pair("bert", facts)[1], corpus, facts)
    for size in (0, 1, 33):
        with pytest.raises(UserError, match=f"max_length must be from 2 to 32 for this model, got {size}"):
            causal_perplexity(model, document_corpus, facts, max_length=size)
    for stride in (0, 8, 9):
        with pytest.raises(UserError, match=f"stride must be from 1 to 7 .*, got {stride}"):
            causal_perplexity(model, document_corpus, facts, max_length=8, stride=stride)
    with pytest.raises(UserError, match="of 32 tokens does not fit into batch_tokens 31"):
        causal_perplexity(model, document_corpus, facts, batch_tokens=31)
    short = Mostly(0)
    short.lengths, short.tokens = np.ones(40, np.int32), short.tokens[:, :1]
    with pytest.raises(UserError, match="every text has a single token"):
        causal_perplexity(model, short, facts)


# Standard errors


def test_the_error_of_a_ratio_by_hand() -> None:
    mean, error = ratio(np.array([2.0, 6.0, 0.0]), np.array([1, 2, 0]))
    # R = 8/3; residuals 2 - 8/3 = -2/3 and 6 - 16/3 = 2/3; sqrt(2/1 * 8/9) / 3 = 4/9
    assert mean == pytest.approx(8 / 3)
    assert error == pytest.approx(4 / 9)
    assert math.isnan(ratio(np.array([2.0, 0.0]), np.array([1, 0]))[1])


def test_the_error_covers_the_truth_as_often_as_it_says() -> None:
    """Tokens of a sequence share most of their loss: counting them as independent would be wrong by far."""
    generator = np.random.default_rng(0)
    inside = naive_inside = 0
    for _ in range(600):
        counts = generator.integers(5, 60, 80)
        shared = generator.normal(3.0, 1.0, 80)
        tokens = [generator.normal(level, 0.5, count) for level, count in zip(shared, counts, strict=True)]
        mean, error = ratio(np.array([x.sum() for x in tokens]), counts)
        inside += abs(mean - 3.0) < 1.96 * error
        together = np.concatenate(tokens)
        naive_inside += abs(mean - 3.0) < 1.96 * together.std() / math.sqrt(len(together))
    assert 0.92 < inside / 600 < 0.97
    assert naive_inside / 600 < 0.5


# The command


@pytest.fixture(scope="module")
def saved(tokenizer: Path, facts: TokenFacts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model directories with the tokenizer, and one without."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in ("bert", "gpt2"):
        loading.save_pretrained(LanguageModel(build(kind, facts.vocab_size).float()), folder / kind)
        load_tokenizer(tokenizer).save_pretrained(folder / kind)
    loading.save_pretrained(LanguageModel(build("bert", facts.vocab_size).float()), folder / "bare")
    return {name: str(folder / name) for name in ("bert", "gpt2", "bare")}


FP32 = EvaluateOptions(precision="fp32", device="cpu", documents="line", max_length=LENGTH, positions=30, batch_tokens=200)


def test_evaluate_measures_prepared_corpora_and_raw_text_alike(
    saved: dict[str, str], corpus: Corpus, text: Path, facts: TokenFacts, capfd: pytest.CaptureFixture[str]
) -> None:
    progress: list[tuple[float, str]] = []
    report = evaluate(saved["bert"], [str(corpus.path), str(text)], FP32, lambda *event: progress.append(event))
    assert capfd.readouterr() == ("", "")
    prepared, raw = report.corpora
    model = loading.load_model(saved["bert"])
    assert prepared.heldout == held_out(model, corpus, facts, batch_tokens=200)
    assert prepared.pseudo == pseudo_perplexity(model, corpus, facts, positions=30, batch_tokens=200)
    assert (raw.heldout, raw.pseudo) == (prepared.heldout, prepared.pseudo)
    assert (raw.sequences, raw.tokens) == (len(corpus), int(corpus.lengths.sum()))
    assert (prepared.causal, prepared.corpus, raw.corpus) == (None, str(corpus.path), str(text))
    assert (report.architecture, report.device, report.precision) == ("bert", "cpu", "fp32")
    assert report.parameters == sum(p.numel() for p in model.parameters())
    fractions = [fraction for fraction, _ in progress]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, pytest.approx(1.0))
    assert any("pseudo-perplexity" in phase for _, phase in progress)

    loaded = json.loads(report.to_json())
    assert loaded["corpora"][0]["heldout"] == pytest.approx(asdict(prepared.heldout))
    assert loaded["options"]["positions"] == 30
    assert loaded == json.loads(json.dumps(asdict(report)))


def test_evaluate_slides_over_whole_documents_for_causal_models(
    saved: dict[str, str], document_corpus: Corpus, text: Path, facts: TokenFacts
) -> None:
    options = EvaluateOptions(precision="fp32", device="cpu", documents="line", stride=5, bos="no")
    report = evaluate(saved["gpt2"], [str(text), str(document_corpus.path)], options)
    expected = causal_perplexity(loading.load_model(saved["gpt2"]), document_corpus, facts, stride=5)
    for measured in report.corpora:
        assert measured.causal == expected
        assert (measured.heldout, measured.pseudo) == (None, None)
        assert measured.tokens == int(document_corpus.lengths.sum())


def test_positions_zero_leaves_pseudo_perplexity_out_and_one_sequence_has_no_error(
    saved: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("the old cat sings under the mountains of letters")
    options = EvaluateOptions(precision="fp32", device="cpu", positions=0)
    report = evaluate(saved["bert"], [str(tmp_path / "one.txt")], options)
    assert report.corpora[0].pseudo is None
    assert math.isnan(report.corpora[0].heldout.loss_se)
    assert json.loads(report.to_json())["corpora"][0]["heldout"]["loss_se"] is None


def test_raw_text_of_any_name_is_read_as_it_is_said_to_be(saved: dict[str, str], text: Path, tmp_path: Path) -> None:
    lines = text.read_text().splitlines()
    (tmp_path / "wiki_00").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    refused(saved["bert"], [str(tmp_path / "wiki_00")], "--as txt")
    options = replace(FP32, positions=0)
    named = evaluate(saved["bert"], [str(tmp_path / "wiki_00")], replace(options, read_as="jsonl"))
    assert named.corpora[0].heldout == evaluate(saved["bert"], [str(text)], options).corpora[0].heldout


def test_auto_is_what_the_machine_has(saved: dict[str, str], text: Path) -> None:
    report = evaluate(saved["bert"], [str(text)], EvaluateOptions(positions=0))
    assert report.precision in ("bf16", "fp32")
    assert report.options == EvaluateOptions(positions=0)


def refused(model: str, corpora: list[str], complaint: str, options: EvaluateOptions = FP32) -> None:
    """Refused on one line, before the model is loaded or anything measured."""
    fractions: list[float] = []
    with pytest.raises(UserError, match=complaint) as caught:
        evaluate(model, corpora, options, lambda fraction, phase: fractions.append(fraction))
    assert "\n" not in str(caught.value)
    assert fractions in ([], [0.0])


def test_evaluate_checks_everything_before_it_measures(
    saved: dict[str, str], corpus: Corpus, text: Path, tmp_path: Path
) -> None:
    good, here = saved["bert"], str(corpus.path)
    refused(good, [], "nothing to evaluate on")
    refused("/no/such/model", [here], "no model directory /no/such/model")
    refused(good, [here, str(tmp_path / "missing.txt")], "missing.txt")
    refused(saved["bare"], [here, str(text)], "holds no tokenizer")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "progress.json").write_text("{}")
    refused(good, [str(tmp_path / "half")], "not complete")
    refused(good, [here], "max_length is 33 and the model takes 32", EvaluateOptions(max_length=33))
    refused(good, [here], "batch_tokens 8 is less than one sequence", EvaluateOptions(max_length=LENGTH, batch_tokens=8))
    refused(saved["gpt2"], [here], "stride must be less than the window of 16", EvaluateOptions(max_length=16, stride=16))
    other = train_wordpiece(["entirely different words"], 60, tmp_path / "other")
    options = PrepareOptions(tokenizer=str(other), max_length=LENGTH, workers=1, max_unknown_share=1)
    prepare([str(text)], tmp_path / "foreign", options)
    refused(good, [here, str(tmp_path / "foreign")], "the model .* has another vocabulary than the corpus")
    prepare([str(text)], tmp_path / "long", PrepareOptions(tokenizer=good, max_length=64, workers=1))
    refused(good, [here, str(tmp_path / "long")], "sequences of 64 tokens, the model takes 32")
    assert evaluate(saved["bare"], [here], FP32).corpora[0].heldout is not None


# Models of any architecture


def save(model: Any, tokenizer: Path, folder: Path) -> str:
    """As transformers saves it, in float32, with the tokenizer."""
    copy.deepcopy(model).float().save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    return str(folder)


@other_masked
@torch.no_grad()
def test_any_masked_model_is_measured_as_transformers_computes_it(
    kind: str, corpus: Corpus, text: Path, tokenizer: Path, facts: TokenFacts, tmp_path: Path
) -> None:
    reference = build(kind, facts.vocab_size)
    sums, counts = [], []
    for masked_ids, labels in masked_as_held_out(corpus, facts, seed=3):
        logits = reference(input_ids=masked_ids[None]).logits[0]
        sums.append(float(F.cross_entropy(logits, labels, reduction="sum")))
        counts.append(int((labels >= 0).sum()))
    pseudo = literal_pseudo_losses(reference, corpus, facts)
    every = [loss for losses in pseudo for loss in losses]
    assert np.std(every) > 0.1  # otherwise it would not matter which token was masked
    path = save(reference, tokenizer, tmp_path / "model")
    limit = 32 - (reference.config.pad_token_id + 1 if kind == "xlm-roberta" else 0)

    model = loading.load_for_evaluation(path, torch.float64)
    assert isinstance(model, language_model.AnyModel)
    assert language_model.max_length(model) == limit
    model.module.load_state_dict(reference.state_dict())  # of float64, before it was rounded
    heldout = held_out(model, corpus, facts, seed=3, batch_tokens=100)
    assert heldout.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-10)
    assert heldout.loss_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-8)
    one_by_one = pseudo_perplexity(model, corpus, facts, positions="all", batch_tokens=150)
    assert one_by_one.positions == len(every)
    assert one_by_one.loss == pytest.approx(sum(every) / len(every), rel=1e-10)
    assert one_by_one.loss_se == pytest.approx(
        error_of_ratio([sum(losses) for losses in pseudo], [len(losses) for losses in pseudo]), rel=1e-8
    )

    options = EvaluateOptions(
        precision="fp32", device="cpu", documents="line", max_length=LENGTH, positions="all", seed=3, batch_tokens=100
    )
    report = evaluate(path, [str(corpus.path), str(text)], options)
    for measured in report.corpora:
        assert measured.heldout is not None
        assert measured.pseudo is not None
        assert measured.causal is None
        assert measured.heldout.loss == pytest.approx(heldout.loss, rel=1e-5)
        assert measured.pseudo.loss == pytest.approx(one_by_one.loss, rel=1e-5)
    assert (report.architecture, report.vocabulary) == (kind, facts.vocab_size)
    refused(
        path,
        [str(corpus.path)],
        f"max_length is {limit + 1} and the model takes {limit}",
        EvaluateOptions(max_length=limit + 1),
    )


@other_causal
@torch.no_grad()
def test_any_causal_model_is_measured_as_transformers_computes_it(
    kind: str, document_corpus: Corpus, text: Path, tokenizer: Path, facts: TokenFacts, tmp_path: Path
) -> None:
    reference, size, step = build(kind, facts.vocab_size), 16, 8
    sums, counts = [], []
    for ids in each_sequence(document_corpus):
        losses = []
        for token in range(1, len(ids)):
            begin = 0 if token < size else step * math.ceil((token - size + 1) / step)
            logits = reference(input_ids=torch.from_numpy(ids[begin:token])[None]).logits[0, -1]
            losses.append(-float(logits.log_softmax(0)[int(ids[token])]))
        sums.append(sum(losses))
        counts.append(len(losses))
    path = save(reference, tokenizer, tmp_path / "model")

    model = loading.load_for_evaluation(path, torch.float64)
    model.module.load_state_dict(reference.state_dict())
    assert (type(model), language_model.max_length(model)) == (language_model.AnyModel, 32)
    causal = causal_perplexity(model, document_corpus, facts, max_length=size, batch_tokens=70)
    assert causal.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-9)
    assert causal.loss_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-7)

    sizes = {"max_length": size, "batch_tokens": 100}
    options = EvaluateOptions(precision="fp32", device="cpu", documents="line", bos="no", **sizes)
    for measured in evaluate(path, [str(document_corpus.path), str(text)], options).corpora:
        assert measured.causal is not None
        assert (measured.heldout, measured.pseudo) == (None, None)
        assert measured.causal.loss == pytest.approx(causal.loss, rel=1e-5)
        assert measured.causal.tokens == sum(counts)


def test_whole_logits_bound_the_batch(corpus: Corpus, facts: TokenFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model.AnyModel(build("albert", facts.vocab_size), causal=False)
    teacher = LanguageModel(build("bert", facts.vocab_size, seed=1))
    expected = asdict(held_out(model, corpus, facts, teacher=teacher))
    assert expected["kl"] > 0.1
    rows: list[int] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda batch: (rows.append(batch.ids_BS.numel()), hidden(batch))[1])
    monkeypatch.setattr("fastdistil.models.scoring.LOGITS", 50 * facts.vocab_size)
    assert asdict(held_out(model, corpus, facts, teacher=teacher)) == pytest.approx(expected, rel=1e-10)
    assert LENGTH < max(rows) <= 50
    monkeypatch.setattr("fastdistil.models.scoring.LOGITS", 1)
    assert asdict(held_out(model, corpus, facts, teacher=teacher)) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(UserError, match="takes no packed batches"):
        held_out(model, corpus, facts, layout="packed")


def test_masked_or_causal_is_what_transformers_and_the_configuration_say(
    corpus: Corpus, tokenizer: Path, facts: TokenFacts, tmp_path: Path
) -> None:
    def saved_as(name: str, kind: str, **values: Any) -> str:
        transformers.AutoConfig.for_model(kind, **values).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    assert not loading.evaluation_config(saved_as("plain", "electra"))[1]
    assert not loading.evaluation_config(saved_as("masked", "electra", architectures=["ElectraForMaskedLM"]))[1]
    assert loading.evaluation_config(saved_as("causal", "electra", architectures=["ElectraForCausalLM"]))[1]
    assert not loading.evaluation_config(saved_as("one class", "xlm", architectures=["XLMWithLMHeadModel"]))[1]
    assert loading.evaluation_config(saved_as("decoder", "mistral"))[1]
    refused(saved_as("t5", "t5"), [str(corpus.path)], "architecture 't5' is neither a masked nor a causal language model")

    for decoder in (True, False):
        config = transformers.AutoConfig.for_model(
            "electra", vocab_size=facts.vocab_size, is_decoder=decoder, **CONFIGS["electra"]
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        path = save(model, tokenizer, tmp_path / f"electra-{decoder}")
        if decoder:
            measured = evaluate(path, [str(corpus.path)], FP32).corpora[0]
            assert measured.causal is not None
        else:
            refused(path, [str(corpus.path)], "its predictions change with later tokens")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"positions": -1}, "positions must be a number of at least 0, or all, got -1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"max_length": 3}, "max_length must be at least 4"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, fp16"),
        ({"documents": "chapter"}, "documents must be one of file, paragraph, line, got .chapter."),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        EvaluateOptions(**values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(saved: dict[str, str], corpus: Corpus) -> None:
    refused(saved["bert"], [str(corpus.path)], "torch finds no GPU", EvaluateOptions(device="cuda"))
