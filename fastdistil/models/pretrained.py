"""The door to transformers: configurations and weights are read here, and whatever it raises for them becomes one line.

What people have on their disks is often not what it should be: a Git LFS pointer where the weights should be, a file cut
short by a full disk, an adapter that was never merged, a configuration of an older version of the library. Some of it the
library refuses, with the exceptions of a dozen libraries below it; some it takes without a word and computes another function.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
import transformers
from torch import Tensor

from fastdistil.data.transformers_calls import library_call
from fastdistil.errors import UserError

if TYPE_CHECKING:  # who reads a tokenizer alone need not wait for these
    from transformers import PretrainedConfig, PreTrainedModel


def read_config(path: str) -> "PretrainedConfig":
    """Return the configuration of a hub id or local directory, of any architecture of transformers.

    Raises UserError, also for what is wrong with the files of a local directory and can be seen without loading them.
    """
    folder = Path(path)
    # The library would take a missing directory for a misspelt hub id, and say so.
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"no model directory {path}; give a hub id or a directory with config.json")
    if folder.is_file():
        raise UserError(f"the model {path} is a file; give a hub id or a directory with config.json and weights")
    if (folder / "adapter_config.json").exists():  # the library loads the model below it, with or without the adapter
        raise UserError(
            f"{path} holds an adapter (adapter_config.json), not a whole model; merge it into its model first "
            "(peft: merge_and_unload, then save_pretrained) and give the result"
        )
    if (folder / "config.json").exists():
        problem, advice = f"the configuration {folder / 'config.json'} cannot be used", "correct it, or copy it again"
    else:
        problem, advice = f"no model at {path!r}", "give a hub id or a directory with config.json"
    with library_call(f"loading {path}", problem, advice):
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    _check_sizes(config, path)
    _check_positions(config, path)
    _check_quantisation(config, path)
    for file in weight_files(folder):
        _check_weight_file(file)
    return config


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _check_sizes(config: "PretrainedConfig", path: str) -> None:
    """Refuse sizes below 1, with which some architectures are made all the same, and fail or compute nothing."""
    for name in SIZES:
        size = getattr(config, name, None)
        if isinstance(size, int) and size < 1:
            raise UserError(f"the configuration of {path} has {name}={size}, wanted at least 1; correct it")


_ABSOLUTE_POSITIONS = ("bert", "roberta", "distilbert")


def _check_positions(config: "PretrainedConfig", path: str) -> None:
    """Refuse relative positions that transformers had once: it now computes absolute ones, and says nothing."""
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind == "absolute":
        return
    if config.model_type in _ABSOLUTE_POSITIONS or str(kind).startswith("relative_key"):
        raise UserError(
            f"the model at {path!r} was trained with position_embedding_type={kind}, and transformers "
            f"{transformers.__version__} computes {config.model_type} with absolute positions only; give another model"
        )


def _check_quantisation(config: "PretrainedConfig", path: str) -> None:
    """Refuse a quantised checkpoint that this machine lacks the package or the device for, before its weights are read."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantisation: Any = getattr(config, "quantization_config", None)
    if quantisation is None:
        quantisation = getattr(config.get_text_config(), "quantization_config", None)
    if quantisation is None:
        return
    problem, advice = f"the model at {path!r} is quantised and cannot be loaded here", "give the model before quantisation"
    with library_call(f"loading {path}", problem, f"install what it needs, or {advice}"):
        quantisers: Any = AutoHfQuantizer  # untyped in the library
        supported = quantisers.supports_quant_method(quantisation)
        if supported:
            quantiser = quantisers.from_config(quantisation, pre_quantized=True)
            quantiser.validate_environment(device_map=None, weights_only=True)
    if not supported:  # the library would warn, and take the packed integers for weights
        method = quantisation.get("quant_method")
        raise UserError(f"{problem}: transformers {transformers.__version__} knows no quant_method {method!r}; {advice}")


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads weights from, in its order of preference; none for a hub id."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        with library_call("reading", f"{index} is no index of weights", "copy it again"):
            return [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return []


def _check_weight_file(file: Path) -> None:
    """Refuse a file that is no whole file of weights, as far as that shows without reading its tensors."""
    if not file.is_file():
        raise UserError(f"{file} is missing, which the index of the weights names; copy it too")
    damaged = f"the weights at {file} are damaged"
    with library_call("reading", damaged, "copy them again"), file.open("rb") as opened:
        head = opened.read(512)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` where it was cloned")
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):  # a safetensors file may begin with "<", by its length
        raise UserError(f"{file} is a web page, not the weights; download it again, from the link to the file itself")
    if not head:
        raise UserError(f"{damaged}: the file is empty; copy them again")
    if file.suffix == ".safetensors":
        with library_call("reading", damaged, "copy them again"), safetensors.safe_open(file, "pt"):
            pass  # it compares the header with the file's size
    elif head.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise UserError(f"{damaged}: the end of the file is missing; copy them again")


class LacksWeights(UserError):
    """A checkpoint without some of its model's weights, whose names are `names`."""

    names: tuple[str, ...] = ()


def read_weights(
    auto: Any, path: str, dtype: torch.dtype, note: Callable[[str], None], may_lack: tuple[str, ...] = ()
) -> "PreTrainedModel":
    """Return the model of an Auto class with the weights at `path`, every one of them, and no weight left over.

    Missing weights are drawn with torch's generator below the prefixes `may_lack`, and refused elsewhere. `note` hears on one
    line of weights that were passed over because no logit depends on them. Raises FastdistilError, LacksWeights.
    """
    model: PreTrainedModel
    try:
        with library_call(
            f"loading {path}", f"the model at {path!r} cannot be loaded", "give one that transformers of this version loads"
        ):
            model, report = auto.from_pretrained(
                path, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False
            )
    except UserError:
        _check_pickles(path)
        raise
    unexpected = sorted(report["unexpected_keys"])
    needed = [name for name in unexpected if not any(re.search(pattern, name) for pattern in HARMLESS)]
    missing = [name for name in report["missing_keys"] if not (may_lack and name.startswith(may_lack))]
    if needed or missing or report["mismatched_keys"]:
        _check_pickles(path)
    if needed and _ADAPTER.search(" ".join(needed)):
        raise UserError(
            f"the checkpoint at {path!r} holds an adapter's weights beside the model's ({_some(needed)}); merge the adapter "
            "first (peft: merge_and_unload, then save_pretrained) and give the result"
        )
    for problem, names in (("lacks", missing), ("has another shape for", report["mismatched_keys"])):
        if names:
            first = min(name if isinstance(name, str) else name[0] for name in names)
            refusal = LacksWeights(
                f"the checkpoint at {path!r} {problem} {len(names)} of the weights of {type(model).__name__} ({first}, ...); "
                "give one that was saved with its language-model head and its own config.json"
            )
            refusal.names = tuple(missing)
            raise refusal
    if needed:
        raise UserError(
            f"the checkpoint at {path!r} has {len(needed)} weights that {type(model).__name__} has no place for "
            f"({_some(needed)}){_beyond(needed, model)}; without them it would be another model: "
            "give it the config.json that it was saved with"
        )
    if unexpected:
        note(f"{path}: passed over {len(unexpected)} weights that no logit depends on: {_some(unexpected)}")
    return model


HARMLESS = (
    # Heads beside the language model's: BERT's next sentence, ALBERT's sentence order, ELECTRA's and DeBERTa's replaced
    # tokens, GPT-2's multiple choice, classes, answers, and the value of reinforcement learning.
    r"^cls\.seq_relationship\.",
    r"^sop_classifier\.",
    r"^(discriminator|mask)_predictions\.",
    r"^multiple_choice_head\.",
    r"^(classifier|score|qa_outputs|v_head)\.",
    # The first token's hidden state made ready for such heads.
    r"(^|\.)pooler\.",
    # Predictions of the tokens after the next.
    r"^(model\.)?mtp\.",
    # Constants that older versions saved: counts from 0 on, causal masks, and what masks put at masked places.
    r"(^|\.)(position_ids|token_type_ids)$",
    r"\.(attn|attention)\.(masked_)?bias$",
    # Frequencies of rotary positions, which the configuration gives.
    r"\.inv_freq$",
)
"""Patterns of the names of weights that a language model's logits do not depend on."""

_ADAPTER = re.compile(r"\.(base_layer|original_module|modules_to_save|adapters?)\.|[._](lora|ia3|hada|lokr|oft|boft|vera)_")
"""Names that peft and others give to the parts of an adapter, and to what it stands around."""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _beyond(names: Iterable[str], model: "PreTrainedModel") -> str:
    """Say so where the names are those of layers behind the last one, as where config.json has too small a depth."""
    depths = {name: len(part) for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)}
    for name in names:
        for layers, depth in depths.items():
            number = re.match(rf"{re.escape(layers)}\.(\d+)\.", name)
            if number and int(number[1]) >= depth:
                return f", in layers behind the {depth} that config.json has"
    return ""


def _check_pickles(path: str) -> None:
    """Say what is in the way in .bin files; called where loading fell short, as it reads them whole."""
    for file in weight_files(Path(path)):
        if file.suffix == ".safetensors":
            continue
        advice = "save its model's state_dict() alone"
        try:
            with library_call("reading", f"the weights at {file} are damaged", "copy them again"):
                contents: Any = torch.load(file, map_location="meta", weights_only=True)
        except UserError as error:
            foreign = re.search(r"GLOBAL ([\w.]+)", str(error.__cause__))
            if foreign is None:
                raise
            raise UserError(f"{file} holds other objects than tensors ({foreign[1]}); {advice}") from error
        if not isinstance(contents, Mapping):
            raise UserError(f"{file} holds an object of type {type(contents).__name__}, not a dictionary of tensors; {advice}")
        for name, value in contents.items():
            if not isinstance(value, Tensor):
                raise UserError(f"{file} holds an object of type {type(value).__name__} under {name!r}, not a tensor; {advice}")
