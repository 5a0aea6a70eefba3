"""Models of transformers: from a checkpoint, or fresh from a configuration, and to disk."""

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fastdistil.data.transformers_calls import library_call, quiet, reason
from fastdistil.errors import UserError
from fastdistil.models.language_model import (
    FAMILIES,
    AnyModel,
    LanguageModel,
    family_of,
    head_names,
    silent,
    unused_bias,
)
from fastdistil.models.pretrained import read_config, read_weights


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a hub id or local directory, of a supported architecture. Raises UserError."""
    config = read_config(path)
    family_of(config)
    return config


def evaluation_config(path: str) -> tuple[PretrainedConfig, bool]:
    """(configuration, whether the model is causal) of any masked or causal language model. Raises UserError.

    An architecture that transformers has as both is masked, unless the configuration names the causal class.
    """
    config = read_config(path)
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


def load_model(
    path: str, dtype: torch.dtype = torch.float32, note: Callable[[str], None] = silent, *, draw_head: bool = False
) -> LanguageModel:
    """Load a masked or causal language model from a hub id or local directory, in eval mode. Raises UserError, LacksWeights.

    Weights the architecture needs and the files lack are an error, and are drawn with torch's generator only for the
    language-model head and with `draw_head`; so are weights that the files have and the architecture has no place for,
    unless no logit depends on them: `note` is called with a line that names those.
    """
    config = load_config(path)
    may_lack = head_names(config) if draw_head else ()
    return LanguageModel(read_weights(_auto(config), path, dtype, note, may_lack)).eval()


def load_for_evaluation(
    path: str, dtype: torch.dtype = torch.float32, note: Callable[[str], None] = silent
) -> LanguageModel | AnyModel:
    """Load, as `load_model` does, any masked or causal language model of transformers."""
    config, causal = evaluation_config(path)
    if config.model_type in FAMILIES:
        return load_model(path, dtype, note)
    model = AnyModel(read_weights(_auto_class(causal), path, dtype, note), causal).eval()
    if causal and _sees_later_tokens(model):
        raise UserError(
            f"the model at {path!r} is a causal one by its configuration, and its predictions change with later tokens; "
            "give a decoder (is_decoder: true where the architecture is an encoder too)"
        )
    return model


@torch.no_grad()
def _sees_later_tokens(model: AnyModel) -> bool:
    """Encoders loaded as causal models, and XLNet, would be given a perplexity that is far too low."""
    ids_BS = (torch.arange(8).repeat(2, 1) + model.vocabulary // 2) % model.vocabulary
    ids_BS[1, -1] = (ids_BS[0, -1] + max(1, model.vocabulary // 2)) % model.vocabulary
    with quiet():
        logits_BSV = model.module(input_ids=ids_BS, use_cache=False).logits[:, :-1].float()
    return bool((logits_BSV[0] - logits_BSV[1]).abs().max() > 1e-3 * logits_BSV.std())


def config_from(
    values: Mapping[str, Any], vocabulary: int, special_ids: Mapping[str, int | None] = MappingProxyType({})
) -> PretrainedConfig:
    """A configuration from a recipe's mapping; unknown options are refused. Raises UserError.

    What the mapping leaves out and the architecture's defaults could only say for another tokenizer or another size:
    special_ids: ids of the tokenizer's special tokens by their names in configurations (`bos_token_id`, ...); others are None
    sizes: see `_fitting_sizes`
    """
    values = dict(values)
    kind = values.pop("model_type", None)
    if kind not in FAMILIES:
        raise UserError(f"student.config.model_type is {kind!r}; wanted one of {', '.join(FAMILIES)}")
    config_class = transformers.AutoConfig.for_model(kind).__class__
    defaults = config_class()
    options = defaults.to_dict() | dict.fromkeys(config_class.attribute_map)
    for name in values:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"student.config.{name} is not an option of a {kind} configuration{hint}")
    values.setdefault("vocab_size", vocabulary)
    size = values["vocab_size"]
    for name in options:
        if name.endswith("_token_id"):
            number = special_ids.get(name)
            values.setdefault(name, number if isinstance(size, int) and number is not None and number < size else None)
    if kind == "roberta" and values["pad_token_id"] is None:
        raise UserError(
            "student.config: a roberta model numbers positions from its padding token's id on, and no token is for padding "
            "alone; name a pad_token in tokenizer_config.json, or set student.config.pad_token_id"
        )
    try:
        return config_class(**_fitting_sizes(defaults, values), **values)
    except Exception as error:  # validators of several libraries, each with its own exceptions
        raise UserError(f"student.config is not a valid {kind} configuration: {reason(error)}") from error


def _fitting_sizes(defaults: PretrainedConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that `values` leaves out and that follow from those it gives; the architecture's defaults fit its own width only.

    As many key/value heads as heads, heads that divide the width, and a feed-forward part in the architecture's proportion.
    """
    aliases = type(defaults).attribute_map
    spelt = {aliases.get(name, name): value for name, value in values.items()}
    names = {name: aliases.get(name, name) for name in ("hidden_size", "num_attention_heads")}
    width, heads = (spelt.get(name, getattr(defaults, name)) for name in names.values())
    inner = "hidden_dim" if defaults.model_type == "distilbert" else "intermediate_size"
    sizes: dict[str, Any] = {}
    if hasattr(defaults, "num_key_value_heads"):
        sizes["num_key_value_heads"] = heads
    if isinstance(width, int) and isinstance(heads, int) and hasattr(defaults, "head_dim") and heads > 0:
        sizes["head_dim"] = width // heads
    if isinstance(width, int) and isinstance(getattr(defaults, inner, None), int):
        sizes[inner] = max(1, round(width * getattr(defaults, inner) / getattr(defaults, names["hidden_size"])))
    return {name: size for name, size in sizes.items() if name not in spelt}


def model_of(config: PretrainedConfig) -> LanguageModel:
    """A model of a configuration, with weights drawn at random. Raises UserError."""
    return LanguageModel(fresh_model(config))


def without_weights(config: PretrainedConfig) -> LanguageModel:
    """A configuration's model with shapes and no memory (torch's meta device): to count and to check."""
    with torch.device("meta"):
        return LanguageModel(fresh_model(config))


def _auto(config: PretrainedConfig) -> Any:
    return _auto_class(family_of(config).causal)


def _auto_class(causal: bool) -> Any:
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM


def fresh_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of transformers with weights drawn at random, float32. Raises UserError for sizes that make none."""
    auto, where = _auto(config), config.name_or_path or "student.config"
    problem = f"the configuration {where} makes no {config.model_type} model"
    with library_call("making a model", problem, "correct its sizes and names"):
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


def has_tokenizer(path: str) -> bool:
    folder = Path(path)
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer_config.json")
    return not folder.is_dir() or any((folder / name).exists() for name in names)


def save_pretrained(model: nn.Module, directory: Path) -> None:
    """Write a model so that transformers loads it without fastdistil; your own module as model.safetensors."""
    if isinstance(model, LanguageModel):
        unused, bias = unused_bias(model.module, model.family), model.bias
        if (
            unused is not None and bias is not None
        ):  # readers that tie the two, whatever the configuration says, get the trained one
            unused.data.copy_(bias)
        with quiet():
            model.module.save_pretrained(directory)
        return
    from safetensors.torch import save_model

    save_model(model, str(directory / "model.safetensors"))
    (directory / "config.json").write_text(json.dumps({"module": type(model).__qualname__}) + "\n")
