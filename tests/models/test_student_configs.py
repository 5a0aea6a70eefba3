"""Students of a new configuration: its options, special tokens, sizes that are left out, and small vocabularies."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.errors import UserError
from fastdistil.models import language_model, loading, students
from fastdistil.models.language_model import LanguageModel
from fastdistil.recipe import Student
from tests.models.families import CONFIGS, SIZES, VOCABULARY, batch_of, build, every_family, logits, sequences
from tests.small_run import TINY, quiet, small


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        (Student(layers=(0, 4)), r"\[0, 4\] must be ascending, different and below the teacher's 4 layers"),
        (Student(layers=(2, 1)), "ascending"),
        (Student(layers=(1, 1)), "different"),
        (Student(config={"model_type": "t5"}), "wanted one of bert"),
        (Student(config={"hidden_size": 3}), "model_type is None"),
        (
            Student(config={"model_type": "bert", "hidden_sise": 3}),
            "hidden_sise is not an option .* did you mean hidden_size",
        ),
        (Student(config={"model_type": "bert", "hidden_size": "wide"}), "expected int, got str"),
        (Student(config={"model_type": "bert", **SIZES, "hidden_size": 30}), "not a multiple"),
        (Student(config={"model_type": "bert", **SIZES, "hidden_act": "step"}), "step"),
    ],
)
def test_what_makes_no_student_is_one_line(recipe: Student, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        students.make_student(recipe, LanguageModel(build("bert")), VOCABULARY)
    assert "\n" not in str(caught.value)


# Padding and special tokens


@every_family
def test_special_ids_of_a_new_configuration_are_the_tokenizers(
    kind: str,
    tmp_path: Path,
    said: list[str],
) -> None:
    """Never the defaults, which are those of the architecture's own tokenizer: neither in the model nor for generation."""
    sizes = {name: value for name, value in CONFIGS[kind].items() if not name.endswith("_token_id")}
    padding = {"pad_token_id": 7}
    everything = {
        **padding,
        "bos_token_id": 3,
        "eos_token_id": 4,
        "cls_token_id": 5,
        "sep_token_id": 6,
        "mask_token_id": 8,
    }
    for ids in (padding, everything):
        student = students.make_student(Student(config={"model_type": kind, **sizes}), None, VOCABULARY, ids)
        loading.save_pretrained(student, tmp_path)
        for name in ("config.json", "generation_config.json"):
            if (tmp_path / name).exists():
                values = json.loads((tmp_path / name).read_text())
                saved = {key: value for key, value in values.items() if key.endswith("_token_id") and value is not None}
                assert saved.items() <= ids.items(), name
                if name == "config.json":
                    assert saved["pad_token_id"] == 7
        assert student.module.config.eos_token_id == ids.get("eos_token_id")
    chosen = {"model_type": kind, **sizes, "pad_token_id": 9, "eos_token_id": 2}
    config = students.make_student(Student(config=chosen), None, VOCABULARY, everything).module.config
    assert (config.pad_token_id, config.eos_token_id) == (9, 2)
    assert said == []


@every_family
def test_a_configuration_needs_no_special_tokens(kind: str) -> None:
    sizes = {name: value for name, value in CONFIGS[kind].items() if not name.endswith("_token_id")}
    recipe = Student(config={"model_type": kind, **sizes})
    if kind == "roberta":
        with pytest.raises(
            UserError,
            match=r"numbers positions from its padding token's.*set student\.config\.pad_token_id",
        ):
            students.make_student(recipe, None, VOCABULARY)
        return
    config = students.make_student(recipe, None, VOCABULARY).module.config.to_dict()
    assert [name for name, value in config.items() if name.endswith("_token_id") and value is not None] == []


def tokenizer_of(tokens: list[str], **names: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=names.get("unk_token")),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast
    tokenizer_fast: PreTrainedTokenizerFast = make(tokenizer_object=tokenizer, **names)
    return tokenizer_fast


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"pad_token": "c", "eos_token": "b"}, {"pad_token_id": 2, "eos_token_id": 1}),
        ({"pad_token": "b", "eos_token": "b", "bos_token": "a"}, {"eos_token_id": 1, "bos_token_id": 0}),
        ({"pad_token": "a", "unk_token": "a", "cls_token": "c"}, {"unk_token_id": 0, "cls_token_id": 2}),
        ({"eos_token": "b"}, {"eos_token_id": 1}),
    ],
)
def test_padding_is_a_token_for_padding_alone(names: dict[str, str], expected: dict[str, int]) -> None:
    ids = students.special_ids(tokenizer_of(["a", "b", "c"], **names))
    assert {name: number for name, number in ids.items() if number is not None} == expected


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("way", ["config", "layers", "path"])
def test_a_token_that_also_pads_is_learnt(kind: str, way: str, tmp_path: Path) -> None:
    """Where the checkpoint or the recipe itself says so; untied, so that the embedding's gradient is all there is."""
    values = {**CONFIGS[kind], "pad_token_id": 7, "tie_word_embeddings": False}
    teacher = build(kind, **values)
    recipe = {"config": {"model_type": kind, **values}, "layers": [0, 1], "path": str(tmp_path)}[way]
    teacher.save_pretrained(tmp_path)
    student = students.make_student(Student.model_validate({way: recipe}), LanguageModel(teacher), VOCABULARY)
    texts = sequences()
    texts[3][2] = 7
    logits(student, batch_of(texts)).square().sum().backward()
    gradient = student.module.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient[7].abs().sum() > 0


# Sizes that a configuration leaves out


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "bert", "distilbert", "modernbert", "gpt2"])
def test_sizes_left_out_fit_those_given(kind: str) -> None:
    sizes = {"dim": 48, "n_heads": 4} if kind == "distilbert" else {"hidden_size": 48, "num_attention_heads": 4}
    layers = {"n_layers": 1} if kind == "distilbert" else {"num_hidden_layers": 1}
    values = {"model_type": kind, **sizes, **layers, "max_position_embeddings": 48}
    config = students.make_student(Student(config=values), None, VOCABULARY).module.config
    inner = {"distilbert": "hidden_dim", "gpt2": "n_inner"}.get(kind, "intermediate_size")
    expected = {
        "llama": 129,
        "qwen2": 258,
        "qwen3": 258,
        "bert": 192,
        "distilbert": 192,
        "modernbert": 72,
        "gpt2": None,
    }
    assert getattr(config, inner) == expected[kind]  # as 11008 to 4096, 22016 to 4096, 3072 to 768, 1152 to 768
    if kind in ("llama", "qwen2", "qwen3"):
        assert config.num_key_value_heads == 4
        assert getattr(config, "head_dim", 12) == 12
    chosen = {
        **values,
        inner: 56,
        **({"num_key_value_heads": 2} if hasattr(config, "num_key_value_heads") else {}),
    }
    config = students.make_student(Student(config=chosen), None, VOCABULARY).module.config
    assert getattr(config, inner) == 56
    assert getattr(config, "num_key_value_heads", 2) == 2


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_configuration_of_no_sizes_is_the_architectures(kind: str) -> None:
    ours = loading.config_from({"model_type": kind, "pad_token_id": 1}, VOCABULARY).to_dict()
    plain = transformers.AutoConfig.for_model(kind).to_dict()
    assert {name: value for name, value in ours.items() if "token_id" not in name and name != "vocab_size"} == {
        name: value for name, value in plain.items() if "token_id" not in name and name != "vocab_size"
    }


# Small vocabularies


@pytest.mark.parametrize("size", [2, 3, 4, 12])
def test_a_causal_model_of_few_tokens_is_evaluated(size: int) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    model = language_model.AnyModel(transformers.GPTNeoXForCausalLM(config), causal=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert not loading._sees_later_tokens(model)
    encoder = copy.deepcopy(model)
    real = encoder.module.forward
    # What an encoder does: the first tokens' logits depend on the last one.
    encoder.module.forward = lambda input_ids, **keywords: real(input_ids=input_ids.flip(1), **keywords)
    assert loading._sees_later_tokens(encoder)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_dozen_tokens_are_trained_on(kind: str, tmp_path: Path) -> None:
    names = {"unk_token": "<u>", "pad_token": "<p>", "eos_token": "</s>", "mask_token": "<m>"}
    tokenizer_of([*names.values(), *"abcdefgh"], **names).save_pretrained(tmp_path / "tokenizer")
    lines = [" ".join("abcdefgh"[(row * step) % 8] for step in range(3, 12)) for row in range(1, 30)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    options = PrepareOptions(
        tokenizer=str(tmp_path / "tokenizer"),
        max_length=16,
        workers=1,
        documents="line",
    )
    prepare([str(tmp_path / "text.txt")], tmp_path / "corpus", options)
    objective = ["objective.a_mlm=0", "objective.a_clm=1"] if kind == "llama" else ["objective.a_mlm=1"]
    config = json.dumps({**TINY, "model_type": kind})
    recipe = [f"student.config={config}", "teacher=null", "objective.a_ce=0", "objective.a_cos=0", *objective]
    folders = [
        f"data.train={tmp_path / 'corpus'}",
        f"data.heldout={tmp_path / 'corpus'}",
        "evaluation.every=null",
    ]
    result = quiet(small(tmp_path, tmp_path, *recipe, *folders, "loop.updates=2"))
    assert result.evaluation is not None
