"""Students against the weights, layers, tokenizers and sizes they come from, and as transformers loads them."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdistil import models, students
from fastdistil.models import LanguageModel
from fastdistil.recipe import Student
from tests.test_models import (
    DEPTH,
    VOCABULARY,
    batch_of,
    logits,
    sequences,
)

ALL = tuple(range(DEPTH))


def of_layers(teacher: PreTrainedModel, *layers: int, **options: Any) -> LanguageModel:
    return students.make_student(Student(layers=layers, **options), LanguageModel(teacher), VOCABULARY)


def with_layers(teacher: PreTrainedModel, *layers: int) -> PreTrainedModel:
    """The teacher itself, all but some of its layers skipped: what a student of those layers has to compute."""
    path, _, name = models.family_of(teacher.config).layers.rpartition(".")
    blocks = getattr(teacher.get_submodule(path), name)
    setattr(teacher.get_submodule(path), name, nn.ModuleList(blocks[layer] for layer in layers))
    return teacher


@torch.no_grad()
def assert_computes(student: LanguageModel, truth: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(logits(student.eval(), batch_of(sequences())), truth, rtol=0, atol=atol)


# Small vocabularies


@pytest.mark.parametrize("size", [2, 3, 4, 12])
def test_a_causal_model_of_few_tokens_is_evaluated(size: int) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    model = models.AnyModel(transformers.GPTNeoXForCausalLM(config), causal=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert not models._sees_later_tokens(model)
    encoder = copy.deepcopy(model)
    real = encoder.module.forward
    # What an encoder does: the first tokens' logits depend on the last one.
    encoder.module.forward = lambda input_ids, **keywords: real(input_ids=input_ids.flip(1), **keywords)
    assert models._sees_later_tokens(encoder)
