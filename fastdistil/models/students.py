"""Students: made from a teacher's layers, from a configuration or from a checkpoint, as a recipe asks.

transformers itself is behind language_model.py, loading.py and pretrained.py; here its configurations and models are values
with attributes.
"""

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.errors import UserError
from fastdistil.models.language_model import FAMILIES, LanguageModel, family_of, head_names, is_number, silent
from fastdistil.models.loading import config_from, fresh_model, load_config, load_model, model_of
from fastdistil.models.pretrained import LacksWeights
from fastdistil.models.student_checks import check_copied_parts, check_transformers_agrees
from fastdistil.recipe import Student

SpecialIds = Mapping[str, int | None]
"""Ids of a tokenizer's special tokens, by their names in configurations (`eos_token_id`)."""
NO_IDS: SpecialIds = MappingProxyType({})


def make_student(
    recipe: Student,
    teacher: LanguageModel | None,
    vocabulary: int,
    special_ids: SpecialIds = NO_IDS,
    note: Callable[[str], None] = silent,
) -> LanguageModel:
    """Make the student a recipe asks for, float32, and check that it computes what it should. Raises UserError.

    `vocabulary`, `special_ids`: of the tokenizer, where a configuration names none. `note` is called with what a user should
    hear of the checkpoint it is loaded from (see `load_model`).
    """
    if recipe.path is not None:
        student = _from_checkpoint(recipe.path, recipe.head == "fresh", note)
    elif recipe.config is not None:
        student = model_of(config_from(recipe.config, vocabulary, special_ids))
    elif teacher is None:
        raise UserError("student.layers and student.every take layers from a transformers teacher; set teacher.path")
    else:
        layers = _student_layers(recipe, teacher.module.config)
        make = distilbert_from_bert if recipe.architecture == "distilbert" else fewer_layers
        student = make(teacher.module, layers, recipe.copy_head)
        check_copied_parts(teacher, student, layers, head=recipe.copy_head)
    check_transformers_agrees(student)
    train_every_embedding(student)
    return _with_options(student, recipe)


def special_ids(tokenizer: Any) -> SpecialIds:
    """The ids of a tokenizer's special tokens; a padding token that is another special token too is none.

    Padding's embedding stays as it is drawn, and padding is taken out of a text: neither may happen to the end of a text.
    """
    names = [f"{kind}_token_id" for kind in ("bos", "eos", "cls", "sep", "unk", "mask")]
    ids = {name: getattr(tokenizer, name) for name in names}
    pad_id = tokenizer.pad_token_id
    return {**ids, "pad_token_id": None if pad_id in ids.values() else pad_id}


def train_every_embedding(student: LanguageModel) -> None:
    """Give every token's embedding its gradient, also where a model's padding token stands for something else as well.

    torch withholds it from a `padding_idx`. Real padding needs no such care: no loss term and no attention reads it.
    """
    embeddings: Any = student.module.get_input_embeddings()
    embeddings.padding_idx = None


def _from_checkpoint(path: str, draw_head: bool, note: Callable[[str], None]) -> LanguageModel:
    try:
        return load_model(path, note=note, draw_head=draw_head)
    except LacksWeights as error:
        if not error.names or not all(name.startswith(head_names(load_config(path))) for name in error.names):
            raise
        raise UserError(f"{error}, or set student.head=fresh to have the missing head drawn") from error


def student_config(recipe: Student, teacher: Any | None, vocabulary: int, special_ids: SpecialIds = NO_IDS) -> Any:
    """The configuration of what `make_student` makes: for estimates, before there are weights."""
    if recipe.path is not None:
        return load_config(recipe.path)
    if recipe.config is not None:
        return config_from(recipe.config, vocabulary, special_ids)
    if teacher is None:
        raise UserError("student.layers and student.every take layers from a transformers teacher; set teacher.path")
    layers = _student_layers(recipe, teacher)
    return _distilbert_config(teacher, layers) if recipe.architecture == "distilbert" else config_with_layers(teacher, layers)


def _student_layers(recipe: Student, config: Any) -> list[int]:
    depth = int(getattr(config, family_of(config).depth))
    layers = list(recipe.layers) if recipe.layers is not None else list(range(0, depth, recipe.every or 1))
    if max(layers) >= depth or sorted(set(layers)) != layers:
        raise UserError(f"student.layers {layers} must be ascending, different and below the teacher's {depth} layers")
    return layers


def config_with_layers(teacher: Any, layers: list[int]) -> Any:
    """The teacher's configuration for some of its layers, each of which keeps its type."""
    config = copy.deepcopy(teacher)
    setattr(config, family_of(teacher).depth, len(layers))
    if getattr(config, "layer_types", None):
        config.layer_types = [teacher.layer_types[layer] for layer in layers]
        # The same in older words, which some programs go by: they must not say otherwise.
        if hasattr(config, "max_window_layers") and "sliding_attention" in config.layer_types:
            config.max_window_layers = config.layer_types.count("full_attention")
        cadence = getattr(config, "global_attn_every_n_layers", None)
        if cadence and config.layer_types != [_type_by_cadence(cadence, place) for place in range(len(layers))]:
            del config.global_attn_every_n_layers
    return config


def _type_by_cadence(cadence: int, place: int) -> str:
    return "sliding_attention" if place % cadence else "full_attention"


def fewer_layers(teacher: Any, layers: list[int], copy_head: bool = True) -> LanguageModel:
    """A student of the teacher's architecture with some of its layers; everything else is copied."""
    family = family_of(teacher.config)
    student = fresh_model(config_with_layers(teacher.config, layers))
    place = {old: new for new, old in enumerate(layers)}
    prefix = family.layers + "."
    weights = {}
    for name, tensor in teacher.state_dict().items():
        if name.startswith(prefix):
            number, _, suffix = name.removeprefix(prefix).partition(".")
            if int(number) not in place:
                continue
            name = f"{prefix}{place[int(number)]}.{suffix}"
        weights[name] = tensor.float()
    if getattr(teacher.config, "scale_attn_by_inverse_layer_idx", False):
        _keep_attention_scales(weights, prefix, layers)
    _load(student, weights, () if copy_head else family.head)
    return LanguageModel(student)


def _keep_attention_scales(weights: dict[str, Tensor], prefix: str, layers: list[int]) -> None:
    """Let layers of a GPT-2 that divides attention scores by a layer's number (from 1) have the scores they had.

    What the new number changes, the queries make up for: they are the first third of `c_attn`.
    """
    for place, layer in enumerate(layers):
        for part in ("weight", "bias"):
            name = f"{prefix}{place}.attn.c_attn.{part}"
            queries, keys_and_values = weights[name].tensor_split([weights[name].shape[-1] // 3], dim=-1)
            weights[name] = torch.cat([queries * ((place + 1) / (layer + 1)), keys_and_values], dim=-1)


def _distilbert_config(old: Any, layers: list[int]) -> Any:
    if old.model_type != "bert":
        raise UserError(f"student.architecture: distilbert needs a BERT teacher, got {old.model_type}; use architecture: same")
    if old.layer_norm_eps != 1e-12:
        raise UserError(f"DistilBERT's norms have eps 1e-12, the teacher's {old.layer_norm_eps:g}; use architecture: same")
    values = {
        "model_type": "distilbert",
        "vocab_size": old.vocab_size,
        "max_position_embeddings": old.max_position_embeddings,
        "n_layers": len(layers),
        "n_heads": old.num_attention_heads,
        "dim": old.hidden_size,
        "hidden_dim": old.intermediate_size,
        "dropout": old.hidden_dropout_prob,
        "attention_dropout": old.attention_probs_dropout_prob,
        "activation": old.hidden_act,
        "initializer_range": old.initializer_range,
        "pad_token_id": old.pad_token_id,
        "tie_word_embeddings": old.tie_word_embeddings,
    }
    return config_from(values, old.vocab_size)


_DISTILBERT_NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def distilbert_from_bert(teacher: Any, layers: list[int], copy_head: bool = True) -> LanguageModel:
    """DistilBERT with layers of a BERT teacher (Sanh et al. 2019).

    DistilBERT has no segment embeddings: those of segment 0, the only one in distillation, are added to the positions. With
    all layers the student therefore computes exactly the teacher's function. (The published script leaves them out.)
    """
    old = teacher.config
    student = fresh_model(_distilbert_config(old, layers))
    source = {name: tensor.float() for name, tensor in teacher.state_dict().items()}
    embeddings = "bert.embeddings."
    segment_D = source[embeddings + "token_type_embeddings.weight"][0]
    weights = {
        "distilbert.embeddings.word_embeddings.weight": source[embeddings + "word_embeddings.weight"],
        "distilbert.embeddings.position_embeddings.weight": source[embeddings + "position_embeddings.weight"] + segment_D,
        "vocab_transform.weight": source["cls.predictions.transform.dense.weight"],
        "vocab_transform.bias": source["cls.predictions.transform.dense.bias"],
        "vocab_projector.weight": source["cls.predictions.decoder.weight"],
        "vocab_projector.bias": source["cls.predictions.decoder.bias"],
    }
    for part in ("weight", "bias"):
        weights[f"distilbert.embeddings.LayerNorm.{part}"] = source[f"{embeddings}LayerNorm.{part}"]
        weights[f"vocab_layer_norm.{part}"] = source[f"cls.predictions.transform.LayerNorm.{part}"]
        for new, layer in enumerate(layers):
            for bert_name, distil_name in _DISTILBERT_NAMES.items():
                tensor = source[f"bert.encoder.layer.{layer}.{bert_name}.{part}"]
                weights[f"distilbert.transformer.layer.{new}.{distil_name}.{part}"] = tensor
    _load(student, weights, () if copy_head else FAMILIES["distilbert"].head)
    return LanguageModel(student)


def _load(student: Any, weights: dict[str, Tensor], leave: tuple[str, ...]) -> None:
    """Load all of `weights` but the prefixes in `leave`; every other parameter must be given."""
    tied_output = family_of(student.config).output + ".weight"
    state = {name: tensor for name, tensor in weights.items() if not (leave and name.startswith(leave) and name != tied_output)}
    missing, unexpected = student.load_state_dict(state, strict=False)
    missing = [name for name in missing if not (leave and name.startswith(leave))]
    if missing or unexpected:
        name = (missing or unexpected)[0]
        raise UserError(
            f"student.layers: the chosen layers do not fit the places they would take ({name}); "
            "ModernBERT students must start with layer 0, whose attention has no norm"
        )
    student.tie_weights()


def _with_options(student: LanguageModel, recipe: Student) -> LanguageModel:
    if recipe.dropout is not None:
        set_dropout(student.module, recipe.dropout)
    if recipe.freeze_positions:
        frozen = [p for name, p in student.module.named_parameters() if "position_embeddings" in name or ".wpe." in name]
        if not frozen:
            raise UserError("student.freeze_positions: this architecture has no position embeddings; set it to false")
        for parameter in frozen:
            parameter.requires_grad_(False)
    return student


def set_dropout(model: Any, probability: float) -> None:
    """Every dropout of the model, in its modules and in its configuration."""
    for name, value in model.config.to_dict().items():
        if is_number(value) and ("dropout" in name or name.endswith("pdrop")):
            setattr(model.config, name, probability)
    for module in list(model.modules()):
        if isinstance(getattr(module, "out_drop", None), nn.Identity):  # what ModernBERT makes of a probability of 0
            module.out_drop = nn.Dropout(probability)
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ("attention_dropout", "dropout_prob"):  # attention keeps its own as a number
            if is_number(getattr(module, name, None)):
                setattr(module, name, probability)
