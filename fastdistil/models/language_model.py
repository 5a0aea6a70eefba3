"""Teacher and student: transformers' models seen as backbone + head.

The objective works from hidden states and the vocabulary matrix, so that logits need never exist whole. A `LanguageModel`
gives it those, for every supported architecture:

    hidden_ND   = model.hidden(batch)            the backbone's last hidden state, one row a token
    features_ND = model.transform(rows of it)    the head's dense + activation + norm (identity for causal models)
    logits_NV   = features_ND @ weight_VD.T + bias_V

Legend: N = batch * length rows, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastdistil.data.batch import Batch
from fastdistil.data.transformers_calls import quiet
from fastdistil.errors import UserError
from fastdistil.models.attention import packed_attention, padded_attention

_ATTENTION = "fastdistil"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    packing, tokens = keywords.pop("packing", None), keywords.pop("tokens_B11S", None)
    if packing is None and tokens is None:  # called by somebody else
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
        return out, None
    names = ("dropout", "scaling", "is_causal", "sliding_window")  # what a model passes down, and these two look at
    options = {name: keywords[name] for name in names if keywords.get(name) is not None}
    if packing is None:
        return padded_attention(module, query, key, value, tokens, **options), None
    return packed_attention(module, query, key, value, packing, **options), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts, as attribute paths below the model with its language-model head."""

    backbone: str
    layers: str
    output: str
    transform: Callable[[Any, Tensor], Tensor]
    """(model, hidden_ND) -> features_ND: the head's part before the vocabulary."""
    head: tuple[str, ...] = ()
    """Prefixes of the head's own parameters: transform and output bias."""
    causal: bool = False
    depth: str = "num_hidden_layers"
    position_offset: Callable[[PretrainedConfig], int] = lambda config: 0


def _roberta_transform(model: Any, hidden_ND: Tensor) -> Tensor:
    head = model.lm_head
    features: Tensor = head.layer_norm(nn.functional.gelu(head.dense(hidden_ND)))
    return features


def _distilbert_transform(model: Any, hidden_ND: Tensor) -> Tensor:
    features: Tensor = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden_ND)))
    return features


def _identity(model: Any, hidden_ND: Tensor) -> Tensor:
    return hidden_ND


def _after_padding(config: PretrainedConfig) -> int:
    """RoBERTa's positions start behind its padding index."""
    if config.pad_token_id is None:
        raise UserError("a RoBERTa's positions start behind its pad_token_id, and the configuration has none; set it")
    return int(config.pad_token_id) + 1


_DECODER = Family("model", "model.layers", "lm_head", _identity, causal=True)
FAMILIES = {
    "bert": Family(
        "bert", "bert.encoder.layer", "cls.predictions.decoder", lambda m, h: m.cls.predictions.transform(h), ("cls.",)
    ),
    "roberta": Family(
        "roberta",
        "roberta.encoder.layer",
        "lm_head.decoder",
        _roberta_transform,
        ("lm_head.",),
        position_offset=_after_padding,
    ),
    "distilbert": Family(
        "distilbert",
        "distilbert.transformer.layer",
        "vocab_projector",
        _distilbert_transform,
        ("vocab_transform.", "vocab_layer_norm.", "vocab_projector.bias"),
        depth="n_layers",
    ),
    "modernbert": Family("model", "model.layers", "decoder", lambda m, h: m.head(h), ("head.", "decoder.bias")),
    "gpt2": Family("transformer", "transformer.h", "lm_head", _identity, causal=True, depth="n_layer"),
    "llama": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
}


class LanguageModel(nn.Module):
    """A masked or causal language model of transformers behind the interface that the objective needs.

    Your own module can stand in its place: an `nn.Module` with `hidden(batch)`, `transform(hidden_ND)`, `weight`, `bias`
    (may be None) and `causal`.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        super().__init__()
        self.family = family_of(module.config)
        self.causal = self.family.causal
        self.module = module
        _tie_as_weights(module, self.family)
        if (unused := unused_bias(module, self.family)) is not None:
            unused.requires_grad_(False)
        module.set_attn_implementation(_ATTENTION)
        self.position_offset = self.family.position_offset(module.config)
        # A four-dimensional mask is handed down as it is: transformers then makes none, and our attention looks at `packing`
        # or `tokens_B11S` alone.
        self.register_buffer("_no_mask", torch.zeros(1, 1, 1, 1), persistent=False)
        # In a tuple: as an attribute it would be registered, and its parameters listed, a second time.
        self._backbone: tuple[Callable[..., Any]] = (module.get_submodule(self.family.backbone),)

    def compile_backbone(self) -> None:
        """torch.compile the backbone (the rest is small)."""
        self._backbone = (torch.compile(self.module.get_submodule(self.family.backbone), dynamic=True),)

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden state of the backbone, [N, D]: rows in the order of batch.ids_BS."""
        # Token ids as embeddings: GPT-2 would otherwise look for padding with a host sync at every forward.
        keywords: dict[str, Any] = {"use_cache": False} if self.causal else {}
        if self.module.config.model_type == "gpt2":
            keywords["inputs_embeds"] = self.module.get_input_embeddings()(batch.ids_BS)
        else:
            keywords["input_ids"] = batch.ids_BS
        keywords["attention_mask"] = self._no_mask
        if batch.packing is not None:
            keywords["packing"] = batch.packing
        else:
            assert batch.attention_mask_BS is not None
            keywords["tokens_B11S"] = batch.attention_mask_BS.bool()[:, None, None, :]
        if batch.positions_BS is not None:
            keywords["position_ids"] = batch.positions_BS + self.position_offset
        states_BSD: Tensor = self._backbone[0](**keywords).last_hidden_state
        return states_BSD.flatten(0, 1)

    def transform(self, hidden_ND: Tensor) -> Tensor:
        return self.family.transform(self.module, hidden_ND)

    @property
    def _output(self) -> nn.Module:
        return self.module.get_submodule(self.family.output)

    @property
    def weight(self) -> Tensor:
        """[V, D]"""
        weight: Tensor = self._output.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """[V]"""
        bias: Tensor | None = self._output.bias  # type: ignore[assignment]
        return bias


def _tie_as_weights(module: PreTrainedModel, family: Family) -> None:
    """Let the configuration say what the weights do: that embedding and vocabulary matrix are one tensor, or two.

    transformers leaves two that differ in the files apart, whatever the configuration says. A model made from that
    configuration, and this one saved and loaded again, would otherwise be another function.
    """
    tied = module.get_submodule(family.output).weight is module.get_input_embeddings().weight
    if tied == bool(module.config.tie_word_embeddings):
        return
    partners = module.get_expanded_tied_weights_keys(all_submodels=True)
    module.config.tie_word_embeddings = tied
    module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in partners.items():  # of an untied model: its bias, too, is saved under both of its names
        parameter = module.get_parameter(target)
        if parameter is module.get_parameter(source):
            owner, _, name = target.rpartition(".")
            setattr(module.get_submodule(owner), name, nn.Parameter(parameter.detach().clone()))


def unused_bias(module: PreTrainedModel, family: Family) -> nn.Parameter | None:
    """Return the second bias of an untied BERT's or RoBERTa's head, which is a name in the files that no forward reads."""
    output = module.get_submodule(family.output)
    head = module.get_submodule(family.output.rpartition(".")[0])
    bias = getattr(head, "bias", None)
    return bias if isinstance(bias, nn.Parameter) and bias is not output.bias else None


class AnyModel(nn.Module):
    """Any masked or causal language model of transformers, to evaluate: it gives whole logits, and cannot be trained on.

    `hidden` is the logits, [N, V], and `weight` None says so. Batches must be padded (length-grouped): packing would need the
    architecture's attention.
    """

    weight = None
    bias = None

    def __init__(self, module: PreTrainedModel, causal: bool) -> None:
        super().__init__()
        self.module, self.causal = module, causal
        self.vocabulary = int(module.config.get_text_config().vocab_size)
        # Like RoBERTa, several number positions from behind a padding index, for which their table of positions keeps a row.
        tables = (part for name, part in module.named_modules() if name.endswith("position_embeddings"))
        self.position_offset = max((table.padding_idx + 1 for table in tables if is_number(table.padding_idx)), default=0)

    def hidden(self, batch: Batch) -> Tensor:
        """[N, V]; zero for padding."""
        if batch.attention_mask_BS is None:
            raise UserError(f"{type(self.module).__name__} takes no packed batches; use layout='length-grouped'")
        # A forward for each length, and no padding: convolutions, pooling, Fourier transforms look past an attention mask.
        length_B = batch.attention_mask_BS.sum(1)
        keywords = {"use_cache": False} if self.causal else {}
        logits_BSV: Tensor | None = None
        with quiet():
            for length in sorted(set(length_B.tolist())):
                rows = (length_B == length).nonzero().squeeze(1)
                logits_RSV: Tensor = self.module(input_ids=batch.ids_BS[rows, :length], **keywords).logits
                if len(rows) == len(length_B):
                    return logits_RSV.flatten(0, 1)
                if logits_BSV is None:
                    logits_BSV = logits_RSV.new_zeros(*batch.ids_BS.shape, logits_RSV.shape[2])
                logits_BSV[rows, :length] = logits_RSV
        assert logits_BSV is not None, "a batch has sequences"
        return logits_BSV.flatten(0, 1)

    def transform(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND


def family_of(config: PretrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise UserError(
            f"architecture {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)} (`evaluate` takes any "
            "masked or causal one). Another one can be given from Python as a module with hidden, transform, weight, bias "
            "(see fastdistil.models.language_model)"
        )
    return FAMILIES[config.model_type]


def as_language_model(model: Any) -> nn.Module:
    """A user's module as the objective sees it."""
    if isinstance(model, PreTrainedModel):
        return LanguageModel(model)
    missing = [name for name in ("hidden", "transform", "weight", "bias", "causal") if not hasattr(model, name)]
    if not isinstance(model, nn.Module) or missing:
        raise UserError(
            f"{type(model).__name__} is neither a transformers model nor a module with hidden, transform, weight, bias and "
            f"causal (missing: {', '.join(missing)}); see fastdistil.models.language_model.LanguageModel"
        )
    return model


def silent(text: str) -> None:
    """Say nothing: for callers that need no notes."""


def head_names(config: PretrainedConfig) -> tuple[str, ...]:
    """Prefixes of the parameters that the language-model head of an architecture adds to its body."""
    family = family_of(config)
    return (*family.head, f"{family.output}.")


def check_pair(teacher: nn.Module, student: nn.Module, *, hidden_terms: bool, projection: bool) -> None:
    """Refuse a teacher and a student whose losses would be meaningless. Raises UserError."""
    if teacher.causal != student.causal:
        kinds = {True: "causal", False: "masked"}
        raise UserError(
            f"the teacher is a {kinds[bool(teacher.causal)]} model, the student {kinds[bool(student.causal)]}; they must match"
        )
    width_t, width_s = shape(teacher)[1], shape(student)[1]
    if hidden_terms and width_t != width_s and not projection:
        raise UserError(
            f"hidden-state losses compare width {width_s} of the student with {width_t} of the teacher; "
            "set objective.projection=true for a learned map, or objective.a_cos=0 and objective.a_mse=0"
        )


def shape(model: nn.Module) -> tuple[int, int]:
    """(vocabulary, width) of a model's head."""
    weight = model.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0]), int(weight.shape[1])


def vocabulary(model: nn.Module) -> int:
    """Entries of a model's vocabulary."""
    return model.vocabulary if isinstance(model, AnyModel) else shape(model)[0]


def max_length(model: nn.Module) -> int | None:
    """Longest sequence the model has positions for; None where it does not say."""
    if not isinstance(model, LanguageModel | AnyModel):
        return None
    config = model.module.config.get_text_config()
    # n_positions and others have this name too, by attribute_map; MPT's has not. XLNet says -1 for none.
    limit = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))
    return None if limit is None or limit < 1 else int(limit) - model.position_offset


def parameter_count(model: nn.Module) -> int:
    """Parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, a tied tensor once, under its first name."""
    tensor_ids: set[int] = set()
    state = {}
    for name, tensor in (module.module if isinstance(module, LanguageModel) else module).state_dict(keep_vars=True).items():
        if id(tensor) not in tensor_ids:
            tensor_ids.add(id(tensor))
            state[name] = tensor.detach()
    return state


@torch.no_grad()
def load_own_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `own_state` gave back in place, so that ties and the optimizer's references hold."""
    tensors = own_state(module)
    if tensors.keys() != state.keys() or any(tensors[name].shape != tensor.shape for name, tensor in state.items()):
        names = sorted(tensors.keys() ^ state.keys())[:3]
        raise UserError(f"the checkpoint is of another model (differs in {', '.join(names) or 'shapes'}); start a new run")
    for name, tensor in state.items():
        tensors[name].copy_(tensor)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
