"""Every architecture against transformers' own forward and backward, one sequence at a time."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastdistil.data.batch import Batch
from fastdistil.errors import UserError
from fastdistil.models import language_model, students
from fastdistil.models.language_model import LanguageModel
from tests.models.families import (
    LENGTHS,
    MASKED,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    batch_of,
    build,
    every_family,
    logits,
    own_logits,
    sequences,
)


@every_family
@pytest.mark.parametrize("layout", ["packed", "length-grouped"])
@torch.no_grad()
def test_logits_are_those_of_transformers(kind: str, layout: str) -> None:
    reference = build(kind).double()
    model = LanguageModel(copy.deepcopy(reference))
    texts = sequences()
    truth = own_logits(reference, texts)
    assert truth.std() > 0.3
    assert model.causal == (kind not in MASKED)
    torch.testing.assert_close(logits(model, batch_of(texts, layout)), truth, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "change"),
    [("modernbert", {"local_attention": 80}), ("qwen2", {"sliding_window": 40})],
)
def test_the_windows_of_these_models_matter(kind: str, change: dict[str, Any]) -> None:
    """Otherwise the test above would not see whether packed attention keeps them."""
    texts = sequences()
    assert (own_logits(build(kind), texts) - own_logits(build(kind, **change), texts)).abs().max() > 1e-3


@every_family
def test_gradients_are_those_of_transformers(kind: str) -> None:
    reference = build(kind).double()
    model = LanguageModel(copy.deepcopy(reference))
    texts = sequences(lengths=(3, 9, 9, 14))
    own_logits(reference, texts).square().sum().backward()
    logits(model, batch_of(texts)).square().sum().backward()
    truth = dict(reference.named_parameters())
    for name, parameter in model.module.named_parameters():
        if truth[name].grad is None:
            assert parameter.grad is None, name
            continue
        # The true gradient of a key's bias is 0.
        scale = max(float(truth[name].grad.abs().max()), 1e-3)
        torch.testing.assert_close(parameter.grad, truth[name].grad, rtol=0, atol=1e-10 * scale)


@every_family
@torch.no_grad()
def test_no_token_sees_another_sequence(kind: str) -> None:
    model = LanguageModel(build(kind).double())
    texts = sequences()
    before = model.hidden(batch_of(texts))
    changed = texts.copy()
    changed[4] = sequences(seed=1)[4]
    after = model.hidden(batch_of(changed))
    start = sum(LENGTHS[:4])
    inside = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    inside[start : start + LENGTHS[4]] = True
    torch.testing.assert_close(after[~inside], before[~inside], rtol=0, atol=1e-12)
    assert (after[inside] - before[inside]).abs().max() > 0.1


@every_family
def test_no_gradient_reaches_another_sequence(kind: str) -> None:
    """The gradient of one sequence's hidden states with respect to every token's embedding."""
    model = LanguageModel(build(kind).double())
    embeddings: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[0]

    hook = model.module.get_input_embeddings().register_forward_hook(keep)
    hidden = model.hidden(batch_of(sequences()))
    hook.remove()
    start, length = sum(LENGTHS[:4]), LENGTHS[4]
    hidden[start : start + length].square().sum().backward()
    per_token = embeddings[0].grad[0].abs().amax(1)
    inside = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    inside[start : start + length] = True
    assert (per_token[inside] > 0).all()
    assert (per_token[~inside] == 0).all()


@every_family
@torch.no_grad()
def test_a_packed_row_may_be_longer_than_the_positions(kind: str) -> None:
    reference = build(kind).double()
    texts = sequences(lengths=(40,) * 5)
    assert sum(map(len, texts)) > 2 * POSITIONS
    ours = logits(LanguageModel(copy.deepcopy(reference)), batch_of(texts))
    torch.testing.assert_close(ours, own_logits(reference, texts), rtol=0, atol=1e-10)


@every_family
def test_dropout_is_on_in_training_and_reaches_attention(kind: str) -> None:
    model = LanguageModel(build(kind))
    students.set_dropout(model.module, 0.0)
    batch = batch_of(sequences())
    hidden = model.eval().hidden(batch)
    assert torch.equal(model.train().hidden(batch), hidden)
    for module in model.module.modules():  # attention's own only
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            inner = getattr(module, name, None)
            attends = any(hasattr(module, part) for part in ("q_proj", "query", "q_lin", "Wqkv", "c_attn"))
            if isinstance(inner, float) and attends:
                setattr(module, name, 0.5)
            elif isinstance(inner, nn.Dropout) and attends:
                inner.p = 0.5
    torch.manual_seed(0)
    first, second = model.hidden(batch), model.hidden(batch)
    assert not torch.equal(first, second)
    assert torch.equal(model.eval().hidden(batch), hidden)


@every_family
def test_parameters_are_listed_once(kind: str) -> None:
    module = build(kind)
    model = LanguageModel(module)
    assert [name.removeprefix("module.") for name, _ in model.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert len(model.state_dict()) == len(module.state_dict())
    assert language_model.parameter_count(model) == sum(
        {id(p): p.numel() for p in module.parameters()}.values(),
    )
    assert language_model.shape(model) == (VOCABULARY, WIDTH)
    assert language_model.max_length(model) == POSITIONS - (2 if kind == "roberta" else 0)


def test_own_state_comes_back_in_place() -> None:
    model, other = LanguageModel(build("bert")), LanguageModel(build("bert", seed=1))
    weight = other.weight
    language_model.load_own_state(other, language_model.own_state(model))
    assert other.weight is weight
    assert other.module.get_input_embeddings().weight is weight
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(UserError, match="another model"):
        language_model.load_own_state(
            LanguageModel(build("bert", num_hidden_layers=2)),
            language_model.own_state(model),
        )
    with pytest.raises(UserError, match="another model"):
        language_model.load_own_state(
            LanguageModel(build("bert", intermediate_size=44)),
            language_model.own_state(model),
        )


def test_a_module_of_your_own_is_taken_or_told_what_is_missing() -> None:
    class Own(nn.Module):
        causal, weight, bias = False, torch.zeros(3, 2), None

        def hidden(self, batch: Batch) -> Tensor: ...
        def transform(self, hidden: Tensor) -> Tensor: ...

    module = Own()
    assert language_model.as_language_model(module) is module
    assert isinstance(language_model.as_language_model(build("bert")), LanguageModel)
    with pytest.raises(UserError, match="missing: hidden, transform, weight, bias, causal"):
        language_model.as_language_model(nn.Identity())
    with pytest.raises(UserError, match="neither"):
        language_model.as_language_model("bert-base-uncased")
    with pytest.raises(UserError, match="'t5' is not supported; supported: bert, "):
        language_model.family_of(transformers.T5Config())


def test_pairs_that_cannot_be_compared_are_refused() -> None:
    bert, narrow = LanguageModel(build("bert")), LanguageModel(build("bert", hidden_size=16))
    language_model.check_pair(bert, LanguageModel(build("roberta")), hidden_terms=True, projection=False)
    language_model.check_pair(bert, narrow, hidden_terms=False, projection=False)
    language_model.check_pair(bert, narrow, hidden_terms=True, projection=True)
    with pytest.raises(UserError, match=r"width 16 of the student with 32 of the teacher.*projection=true"):
        language_model.check_pair(bert, narrow, hidden_terms=True, projection=False)
    with pytest.raises(UserError, match="teacher is a masked model, the student causal"):
        language_model.check_pair(bert, LanguageModel(build("gpt2")), hidden_terms=False, projection=False)
