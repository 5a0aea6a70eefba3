"""Teacher and student: transformers' models seen as backbone + head.

The objective works from hidden states and the vocabulary matrix, so that logits need never exist whole. A `LanguageModel`
gives it those, for every supported architecture:

    hidden_ND   = model.hidden(batch)            the backbone's last hidden state, one row a token
    features_ND = model.transform(rows of it)    the head's dense + activation + norm (identity for causal models)
    logits_NV   = features_ND @ weight_VD.T + bias_V

Legend: N = batch * length rows, D width, V vocabulary.
"""

import difflib
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fastdistil.attention import attention_keywords, packed_attention, padded_attention
from fastdistil.batches import Batch
from fastdistil.errors import FastdistilError, UserError, translated

ATTENTION = "fastdistil"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    packing, tokens = keywords.pop("packing", None), keywords.pop("tokens_B11S", None)
    if packing is None and tokens is None:  # called by somebody else
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
        return out, None
    dropout, scaling = keywords.get("dropout", 0.0), keywords.get("scaling")
    rest = attention_keywords(keywords)
    if packing is None:
        return padded_attention(module, query, key, value, tokens, dropout=dropout, scaling=scaling, **rest), None
    return packed_attention(module, query, key, value, packing, dropout=dropout, scaling=scaling, **rest), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


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
        # RoBERTa's positions start behind its padding index.
        position_offset=lambda config: int(config.pad_token_id) + 1,
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
        module.set_attn_implementation(ATTENTION)
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
        with _quiet():
            for length in sorted(set(length_B.tolist())):
                rows = (length_B == length).nonzero().squeeze(1)
                found: Tensor = self.module(input_ids=batch.ids_BS[rows, :length], **keywords).logits
                if len(rows) == len(length_B):
                    return found.flatten(0, 1)
                if logits_BSV is None:
                    logits_BSV = found.new_zeros(*batch.ids_BS.shape, found.shape[2])
                logits_BSV[rows, :length] = found
        assert logits_BSV is not None, "a batch has sequences"
        return logits_BSV.flatten(0, 1)

    def transform(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND


def family_of(config: PretrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise UserError(
            f"architecture {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)} (`evaluate` takes any "
            "masked or causal one). Another one can be given from Python as a module with hidden, transform, weight, bias "
            "(see fastdistil.models)"
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
            f"causal (missing: {', '.join(missing)}); see fastdistil.models.LanguageModel"
        )
    return model


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a hub id or local directory, of a supported architecture. Raises UserError."""
    config = _any_config(path)
    family_of(config)
    return config


def evaluation_config(path: str) -> tuple[PretrainedConfig, bool]:
    """(configuration, whether the model is causal) of any masked or causal language model. Raises UserError.

    An architecture that transformers has as both is masked, unless the configuration names the causal class.
    """
    config = _any_config(path)
    kind = config.model_type
    if kind in FAMILIES:
        return config, FAMILIES[kind].causal
    masked, causal = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if masked is None and causal is None:
        raise UserError(
            f"architecture {kind!r} is neither a masked nor a causal language model; "
            "give one that AutoModelForMaskedLM or AutoModelForCausalLM of transformers loads"
        )
    named = causal != masked and causal in (config.architectures or ())
    return config, masked is None or named


def _any_config(path: str) -> PretrainedConfig:
    # The library would take a missing directory for a misspelt hub id, and say so.
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"no model directory {path}; give a hub id or a directory with config.json")
    if Path(path).is_file():
        raise UserError(f"the model {path} is a file; give a hub id or a directory with config.json and weights")
    try:
        with _quiet():
            config: PretrainedConfig = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"no model at {path!r}: {_reason(error)}; give a hub id or a directory with config.json") from error
    return config


def load_model(path: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A masked or causal language model from a hub id or local directory, in eval mode. Raises UserError.

    Weights the architecture needs and the files lack are an error, never drawn at random; unused ones are left out.
    """
    return LanguageModel(_pretrained(_auto(load_config(path)), path, dtype)).eval()


def load_for_evaluation(path: str, dtype: torch.dtype = torch.float32) -> LanguageModel | AnyModel:
    """As `load_model`, for any masked or causal language model of transformers."""
    config, causal = evaluation_config(path)
    if config.model_type in FAMILIES:
        return load_model(path, dtype)
    model = AnyModel(_pretrained(_auto_class(causal), path, dtype), causal).eval()
    if causal and _sees_later_tokens(model):
        raise UserError(
            f"the model at {path!r} is a causal one by its configuration, and its predictions change with later tokens; "
            "give a decoder (is_decoder: true where the architecture is an encoder too)"
        )
    return model


@torch.no_grad()
def _sees_later_tokens(model: AnyModel) -> bool:
    """Encoders loaded as causal models, and XLNet, would be given a perplexity that is far too low."""
    ids_BS = torch.arange(8).repeat(2, 1) + model.vocabulary // 2
    ids_BS[1, -1] -= 4
    with _quiet():
        logits_BSV = model.module(input_ids=ids_BS, use_cache=False).logits[:, :-1].float()
    return bool((logits_BSV[0] - logits_BSV[1]).abs().max() > 1e-3 * logits_BSV.std())


def _pretrained(auto: Any, path: str, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel
    with translated(f"loading {path}"), _quiet():
        try:
            model, report = auto.from_pretrained(path, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True)
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(f"the model at {path!r} cannot be loaded: {_reason(error)}") from error
        except Exception as error:  # safetensors has its own exception type for a truncated file
            if "safetensor" in f"{type(error).__module__}{error}".lower() or "header" in str(error).lower():
                raise UserError(f"the weights at {path!r} are damaged: {_reason(error)}; copy them again") from error
            raise
    for problem, names in (("lacks", report["missing_keys"]), ("has another shape for", report["mismatched_keys"])):
        if names:
            first = min(name if isinstance(name, str) else name[0] for name in names)
            raise UserError(
                f"the checkpoint at {path!r} {problem} {len(names)} of the weights of {type(model).__name__} ({first}, ...); "
                "give one that was saved with its language-model head and its own config.json"
            )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars and reports are not for our users: what matters in them is raised."""
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub = getLogger("huggingface_hub")  # a line a retry
    hub_level = hub.level
    hub.setLevel(ERROR)
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def config_from(values: Mapping[str, Any], vocabulary: int, pad_id: int | None = None) -> PretrainedConfig:
    """A configuration from a recipe's mapping; unknown options are refused. Raises UserError."""
    values = dict(values)
    kind = values.pop("model_type", None)
    if kind not in FAMILIES:
        raise UserError(f"student.config.model_type is {kind!r}; wanted one of {', '.join(FAMILIES)}")
    config_class = transformers.AutoConfig.for_model(kind).__class__
    known = config_class().to_dict()
    known |= dict.fromkeys(getattr(config_class, "attribute_map", {}))
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"student.config.{name} is not an option of a {kind} configuration{hint}")
    values.setdefault("vocab_size", vocabulary)
    if pad_id is not None:
        values.setdefault("pad_token_id", pad_id)
    # The defaults are special tokens of the architecture's own tokenizer, which this vocabulary may not even reach.
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if isinstance(known.get(name), int) and isinstance(values["vocab_size"], int) and known[name] >= values["vocab_size"]:
            values.setdefault(name, None)
    try:
        return config_class(**values)
    except Exception as error:  # validators of several libraries, each with its own exceptions
        raise UserError(f"student.config is not a valid {kind} configuration: {_reason(error)}") from error


def model_of(config: PretrainedConfig) -> LanguageModel:
    try:
        with translated("making the student"):
            return LanguageModel(fresh_model(config))
    except (ValueError, KeyError, TypeError, AssertionError, RuntimeError) as error:
        if isinstance(error, FastdistilError) or (isinstance(error, RuntimeError) and "negative dimension" not in str(error)):
            raise
        raise UserError(f"student.config makes no {config.model_type} model: {_reason(error)}") from error


def without_weights(config: PretrainedConfig) -> LanguageModel:
    """A configuration's model with shapes and no memory (torch's meta device): to count and to check."""
    with torch.device("meta"):
        return LanguageModel(fresh_model(config))


def _auto(config: PretrainedConfig) -> Any:
    return _auto_class(family_of(config).causal)


def _auto_class(causal: bool) -> Any:
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM


def fresh_model(config: PretrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = _auto(config).from_config(config, dtype=torch.float32)
    return model


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


def has_tokenizer(path: str) -> bool:
    folder = Path(path)
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer_config.json")
    return not folder.is_dir() or any((folder / name).exists() for name in names)


def save_pretrained(model: nn.Module, directory: Path) -> None:
    """Write a model so that transformers loads it without fastdistil; your own module as model.safetensors."""
    if isinstance(model, LanguageModel):
        with _quiet():
            model.module.save_pretrained(directory)
        return
    from safetensors.torch import save_model

    save_model(model, str(directory / "model.safetensors"))
    (directory / "config.json").write_text(json.dumps({"module": type(model).__qualname__}) + "\n")


def _reason(error: BaseException) -> str:
    """What a library says, on one line."""
    text = textwrap.shorten(str(error), 300, placeholder=" ...").rstrip(".")
    return f"{type(error).__name__} {text}" if isinstance(error, KeyError) or not text else text


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
    seen: set[int] = set()
    state = {}
    for name, tensor in (module.module if isinstance(module, LanguageModel) else module).state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


@torch.no_grad()
def load_own_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `own_state` gave back in place, so that ties and the optimizer's references hold."""
    own = own_state(module)
    if own.keys() != state.keys() or any(own[name].shape != tensor.shape for name, tensor in state.items()):
        names = sorted(own.keys() ^ state.keys())[:3]
        raise UserError(f"the checkpoint is of another model (differs in {', '.join(names) or 'shapes'}); start a new run")
    for name, tensor in state.items():
        own[name].copy_(tensor)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
