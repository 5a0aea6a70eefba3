"""A small model of every family, texts for it, and its logits, ours and transformers' own."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fastdistil.data.batch import Batch, assemble
from fastdistil.models import students
from fastdistil.models.language_model import LanguageModel
from fastdistil.recipe import Student

VOCABULARY, WIDTH, DEPTH, POSITIONS = 97, 32, 4, 48
ALL = tuple(range(DEPTH))  # layers
LENGTHS = (3, 3, 7, 12, 12, 12, 20, 31)
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": POSITIONS,
}
GROUPED_QUERIES: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": {**SIZES, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {
        "dim": WIDTH,
        "n_layers": DEPTH,
        "n_heads": 4,
        "hidden_dim": 40,
        "max_position_embeddings": POSITIONS,
    },
    # A window of 4 tokens to each side, global attention in layers 0 and 3.
    "modernbert": {
        **SIZES,
        "local_attention": 8,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt2": {
        "n_embd": WIDTH,
        "n_layer": DEPTH,
        "n_head": 4,
        "n_positions": POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "llama": GROUPED_QUERIES,
    # A window of 6 tokens from layer 2 on.
    "qwen2": {**GROUPED_QUERIES, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {**GROUPED_QUERIES, "head_dim": 8},
}
MASKED = ("bert", "roberta", "distilbert", "modernbert")
SLIDING: dict[str, dict[str, Any]] = {
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {
        "layer_types": [*3 * ["sliding_attention"], "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 6,
    },
}
every_family = pytest.mark.parametrize("kind", CONFIGS)


def config_of(kind: str, **changes: Any) -> PretrainedConfig:
    return transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **{**CONFIGS[kind], **changes})


def auto(kind: str) -> Any:
    return transformers.AutoModelForMaskedLM if kind in MASKED else transformers.AutoModelForCausalLM


def build(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A small model in evaluation mode, far enough from its initial state that norms, biases and positions matter."""
    torch.manual_seed(seed)
    # Not eager: that computes the softmax of some architectures in float32.
    model = auto(kind).from_config(config_of(kind, **changes), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sequences(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    return [np.random.default_rng((seed, i)).integers(5, VOCABULARY, n) for i, n in enumerate(lengths)]


def batch_of(texts: list[np.ndarray], layout: Any = "packed") -> Batch:
    nothing = np.zeros(0, np.int64)
    return assemble(np.concatenate(texts), np.array([len(t) for t in texts]), nothing, nothing, layout=layout)


def logits(model: LanguageModel, batch: Batch) -> Tensor:
    """[tokens, V], padding left out."""
    features = model.transform(model.hidden(batch))
    scores = features @ model.weight.T + (model.bias if model.bias is not None else 0)
    return scores if batch.valid_rows is None else scores[batch.valid_rows]


def own_logits(model: PreTrainedModel, texts: list[np.ndarray]) -> Tensor:
    """transformers' own, of each sequence alone."""
    return torch.cat([model(input_ids=torch.from_numpy(text)[None]).logits[0] for text in texts])


def of_layers(teacher: PreTrainedModel, *layers: int, **options: Any) -> LanguageModel:
    return students.make_student(Student(layers=layers, **options), LanguageModel(teacher), VOCABULARY)


@torch.no_grad()
def assert_computes(student: LanguageModel, truth: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(logits(student.eval(), batch_of(sequences())), truth, rtol=0, atol=atol)
