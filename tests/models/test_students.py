"""Students against the weights, layers, tokenizers and sizes they come from, and as transformers loads them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.errors import UserError
from fastdistil.models import language_model, loading, student_checks, students
from fastdistil.models.language_model import LanguageModel
from fastdistil.recipe import Student, load_recipe
from fastdistil.training import export
from tests.models.test_language_model import (
    CONFIGS,
    DEPTH,
    VOCABULARY,
    auto,
    batch_of,
    build,
    every_family,
    logits,
    own_logits,
    sequences,
)
from tests.small_run import TINY, quiet, small

ALL = tuple(range(DEPTH))


def of_layers(teacher: PreTrainedModel, *layers: int, **options: Any) -> LanguageModel:
    return students.make_student(Student(layers=layers, **options), LanguageModel(teacher), VOCABULARY)


def with_layers(teacher: PreTrainedModel, *layers: int) -> PreTrainedModel:
    """The teacher itself, all but some of its layers skipped: what a student of those layers has to compute."""
    path, _, name = language_model.family_of(teacher.config).layers.rpartition(".")
    blocks = getattr(teacher.get_submodule(path), name)
    setattr(teacher.get_submodule(path), name, nn.ModuleList(blocks[layer] for layer in layers))
    return teacher


@torch.no_grad()
def assert_computes(student: LanguageModel, truth: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(logits(student.eval(), batch_of(sequences())), truth, rtol=0, atol=atol)


# Tied or not


def untied(kind: str, folder: Path) -> Tensor:
    """Save a model whose configuration ties what its files hold apart, as published ones do; return its logits."""
    model = build(kind, tie_word_embeddings=True)
    model.save_pretrained(folder)
    output = language_model.family_of(model.config).output
    head = model.get_submodule(output)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    head.weight = nn.Parameter(head.weight + 0.5 * torch.randn_like(head.weight))
    weights[f"{output}.weight"] = head.weight.detach()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", True)
    with torch.no_grad():
        return own_logits(model, sequences())


@every_family
def test_weights_that_differ_are_not_tied(kind: str, tmp_path: Path) -> None:
    truth = untied(kind, tmp_path / "untied")
    path = str(tmp_path / "untied")
    assert_computes(loading.load_model(path), truth)
    students_by_kind = {
        "layers": students.make_student(Student(layers=ALL), loading.load_model(path), VOCABULARY),
        "path": students.make_student(Student(path=path), None, VOCABULARY),
    }
    if kind == "bert":
        recipe = Student(layers=ALL, architecture="distilbert")
        students_by_kind["distilbert"] = students.make_student(recipe, loading.load_model(path), VOCABULARY)
    for name, student in students_by_kind.items():
        assert_computes(student, truth)
        loading.save_pretrained(student, tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False
        plain = auto(str(student.module.config.model_type)).from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(own_logits(plain, sequences()), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_second_bias_of_an_untied_head_is_not_trained_and_saved_as_the_first(kind: str, tmp_path: Path) -> None:
    untied(kind, tmp_path / "untied")
    student = loading.load_model(str(tmp_path / "untied"))
    bias = student.bias
    assert bias is not None
    batch = student_checks._probe(student)
    (student.transform(student.hidden(batch)) @ student.weight.T + bias).square().sum().backward()
    assert all(
        parameter.grad is not None
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and "pooler" not in name and "token_type" not in name
    )
    with torch.no_grad():
        bias += 1.0
    loading.save_pretrained(student, tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    saved = [
        tensor
        for name, tensor in weights.items()
        if name in ("cls.predictions.bias", "lm_head.bias", "cls.predictions.decoder.bias", "lm_head.decoder.bias")
    ]
    assert saved and all(torch.equal(tensor, bias) for tensor in saved)


def test_an_error_of_our_own_code_is_not_told_as_the_students(monkeypatch: pytest.MonkeyPatch) -> None:
    student = LanguageModel(build("bert"))
    monkeypatch.setattr(LanguageModel, "hidden", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        student_checks.check_transformers_agrees(student)


@pytest.mark.parametrize("says", [True, False])
@torch.no_grad()
def test_a_model_given_from_python_is_tied_as_its_weights_are(says: bool) -> None:
    model = build("llama", tie_word_embeddings=says)
    if says:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight + torch.randn_like(model.lm_head.weight))
    else:
        model.lm_head.weight = model.model.embed_tokens.weight
    truth = own_logits(model, sequences())
    student = of_layers(model, *ALL)
    assert_computes(student, truth)
    assert student.module.config.tie_word_embeddings is not says
    assert (student.weight is student.module.get_input_embeddings().weight) is not says


# Layers that take something from their number


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3), (2,), (0, 3)])
@torch.no_grad()
def test_gpt2_layers_keep_the_scale_of_their_number(layers: tuple[int, ...], tmp_path: Path) -> None:
    teacher = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    student = of_layers(teacher, *layers)
    truth = own_logits(with_layers(teacher, *layers), sequences())
    assert_computes(student, truth)
    loading.save_pretrained(student, tmp_path)
    plain = auto("gpt2").from_pretrained(tmp_path).eval()
    torch.testing.assert_close(own_logits(plain, sequences()), truth, rtol=0, atol=1e-5)


SLIDING: dict[str, dict[str, Any]] = {
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"layer_types": [*3 * ["sliding_attention"], "full_attention"], "use_sliding_window": True, "sliding_window": 6},
}


@pytest.mark.parametrize("kind", SLIDING)
@pytest.mark.parametrize("layers", [(0, 2), (0, 1), (0, 2, 3), (0, 1, 3)])
@torch.no_grad()
def test_layers_keep_their_window_and_rotary_base(kind: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    teacher = build(kind, **SLIDING[kind])
    types = [teacher.config.layer_types[layer] for layer in layers]
    student = of_layers(teacher, *layers)
    # The teacher's own code looks at its configuration for a layer's type.
    teacher.config.layer_types = types
    teacher.config.use_cache = False
    truth = own_logits(with_layers(teacher, *layers), sequences())
    assert_computes(student, truth)
    loading.save_pretrained(student, tmp_path)
    plain = auto(kind).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(own_logits(plain, sequences()), truth, rtol=0, atol=1e-5)
    # Programs that go by the older words must come to the same types, where these can say them.
    config = json.loads((tmp_path / "config.json").read_text())
    every, first = config.get("global_attn_every_n_layers"), config.get("max_window_layers")
    if every is not None:
        assert types == ["sliding_attention" if place % every else "full_attention" for place in range(len(layers))]
    if kind == "qwen2":
        assert types == ["sliding_attention" if place >= first else "full_attention" for place in range(len(layers))]


# The guard


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_students_of_all_families_and_precisions_pass_the_guard(kind: str, dtype: torch.dtype) -> None:
    teacher = build(kind).to(dtype)
    of_layers(teacher, 0, 3)
    of_layers(teacher, *ALL, copy_head=False)
    if kind == "bert":
        of_layers(teacher, 1, 2, architecture="distilbert")


def spoil_config(**values: Any) -> Any:
    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        real = students.config_with_layers

        def spoilt(*arguments: Any) -> Any:
            config = real(*arguments)
            for name, value in values.items():
                setattr(config, name, value)
            return config

        monkeypatch.setattr(students, "config_with_layers", spoilt)

    return spoil


def spoil_weights(part: str, factor: float = 1.5) -> Any:
    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        real = students._load

        def spoilt(student: Any, weights: dict[str, Tensor], leave: tuple[str, ...]) -> None:
            real(student, {name: tensor * (factor if part in name else 1) for name, tensor in weights.items()}, leave)

        monkeypatch.setattr(students, "_load", spoilt)

    return spoil


def no_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(students, "_keep_attention_scales", lambda *arguments: None)


THETAS = {"full_attention": {"rope_type": "default", "rope_theta": 160000.0}}
FAULTS = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, no_scales, "layer 0, copied from the teacher's layer 1,"),
    ("gpt2", {}, spoil_config(layer_norm_epsilon=0.5), "layer 0, copied"),
    ("gpt2", {}, spoil_weights("wpe"), "embeddings"),
    ("gpt2", {}, spoil_weights("ln_f"), "last norm"),
    ("gpt2", {}, spoil_weights("ln_f", float("nan")), "last norm"),
    ("gpt2", {}, spoil_weights("h.1.mlp.c_proj"), "layer 1, copied from the teacher's layer 3,"),
    ("bert", {}, spoil_config(hidden_act="relu"), "layer 0, copied"),
    ("bert", {}, spoil_weights("predictions.transform"), "head"),
    ("bert", {}, spoil_weights("predictions.transform", 1.01), "head"),
    ("roberta", {}, spoil_weights("layer.0.attention.self.query"), "layer 0, copied"),
    ("llama", {}, spoil_config(rope_parameters={"rope_type": "default", "rope_theta": 100.0}), "layer 0, copied"),
    ("qwen2", SLIDING["qwen2"], spoil_config(layer_types=2 * ["full_attention"]), "layer 1, copied"),
    (
        "qwen2",
        {**SLIDING["qwen2"], "sliding_window": 40},
        spoil_config(layer_types=2 * ["full_attention"]),
        r"layer 1, .*window of \[None\] tokens for \[40\]",
    ),
    ("modernbert", {}, spoil_config(layer_types=2 * ["sliding_attention"]), "layer 0, copied|window of"),
]


@pytest.mark.parametrize(("kind", "values", "spoil", "part"), FAULTS)
def test_a_part_that_computes_otherwise_is_refused_by_name(
    kind: str, values: dict[str, Any], spoil: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = (0, 3) if kind == "modernbert" else (1, 3)
    teacher = build(kind, **values)
    of_layers(teacher, *layers)
    spoil(monkeypatch)
    with pytest.raises(UserError, match=rf"the student's .*({part}).*start from student\.config") as caught:
        of_layers(teacher, *layers)
    assert "\n" not in str(caught.value)


def test_the_guard_sees_a_scale_in_half_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = build("gpt2", scale_attn_by_inverse_layer_idx=True).bfloat16()
    of_layers(teacher, 1, 3)
    no_scales(monkeypatch)
    with pytest.raises(UserError, match="copied from the teacher's layer 1"):
        of_layers(teacher, 1, 3)


def test_a_teacher_that_is_not_finite_is_not_the_guards_to_find() -> None:
    teacher = build("bert")
    with torch.no_grad():
        teacher.bert.encoder.layer[1].output.dense.bias[3] = float("nan")
    of_layers(teacher, 1, 2)


def test_the_guard_draws_no_numbers_and_leaves_the_models_as_they_were() -> None:
    teacher = LanguageModel(build("bert").bfloat16()).train()
    student = students.fewer_layers(teacher.module, [0, 2]).train()
    student.module.bert.encoder.layer[0].eval()
    modes = [[part.training for part in model.modules()] for model in (teacher, student)]
    before, weights = torch.get_rng_state(), [p.clone() for p in student.parameters()]
    student_checks.check_copied_parts(teacher, student, [0, 2], head=True)
    student_checks.check_transformers_agrees(student)
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [[part.training for part in model.modules()] for model in (teacher, student)]
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(weights, student.parameters(), strict=True))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in (*teacher.modules(), *student.modules()))


# Padding and special tokens


def tokenizer_of(tokens: list[str], **names: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=names.get("unk_token")))
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
    expected = {"llama": 129, "qwen2": 258, "qwen3": 258, "bert": 192, "distilbert": 192, "modernbert": 72, "gpt2": None}
    assert getattr(config, inner) == expected[kind]  # as 11008 to 4096, 22016 to 4096, 3072 to 768, 1152 to 768
    if kind in ("llama", "qwen2", "qwen3"):
        assert config.num_key_value_heads == 4
        assert getattr(config, "head_dim", 12) == 12
    chosen = {**values, inner: 56, **({"num_key_value_heads": 2} if hasattr(config, "num_key_value_heads") else {})}
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


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 3},
        {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 8},
        {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 32},
    ],
)
def test_sizes_that_transformers_cannot_run_are_refused(values: dict[str, Any]) -> None:
    recipe = Student(config={**values, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1})
    with pytest.raises(UserError, match=r"student is no \w+ model that transformers runs .*change student\.config") as caught:
        students.make_student(recipe, None, VOCABULARY)
    assert "\n" not in str(caught.value)


# What is exported


def test_an_exported_student_that_transformers_cannot_run_is_an_error_and_stays(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loading.save_pretrained

    changes: dict[str, Any] = {}

    def spoilt(model: nn.Module, directory: Path) -> None:
        real(model, directory)
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    monkeypatch.setattr(export.loading, "save_pretrained", spoilt)
    for number, (config, complaint) in enumerate(
        [
            ({"hidden_act": "relu"}, "gives other logits than the one that was trained"),
            ({"num_attention_heads": 5}, "cannot be run by transformers"),
            ({"num_hidden_layers": 3}, "cannot be run by transformers .*lacks"),
        ]
    ):
        changes.clear()
        changes.update(config)
        recipe = small(material, tmp_path, "loop.updates=1", "evaluation.every=null", f"name=run{number}", "data.heldout=null")
        with pytest.raises(UserError, match=f"run{number}/student.*{complaint}") as caught:
            quiet(recipe)
        assert "\n" not in str(caught.value)
        assert (tmp_path / f"run{number}" / "student" / "model.safetensors").exists()
        assert '"event": "done"' not in (tmp_path / f"run{number}" / "events.jsonl").read_text()


# A checkpoint without a head


@every_family
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_drawn_where_the_recipe_says_so(kind: str, tied: bool, tmp_path: Path) -> None:
    teacher = build(kind, tie_word_embeddings=tied)
    body = teacher.get_submodule(language_model.family_of(teacher.config).backbone)
    body.save_pretrained(tmp_path)
    path = str(tmp_path)
    if not (kind in ("gpt2", "llama", "qwen2", "qwen3") and tied):  # else the embedding is all of the head
        with pytest.raises(UserError, match="language-model head") as caught:
            loading.load_model(path)
        assert "student.head" not in str(caught.value)  # a teacher's is never drawn
        with pytest.raises(UserError, match=r"lacks .*, or set student\.head=fresh to have the missing head drawn"):
            students.make_student(Student(path=path), None, VOCABULARY)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(students.make_student(Student(path=path, head="fresh"), None, VOCABULARY).module)
    first, same, other = (model.state_dict() for model in drawn)
    assert (drawn[0].get_input_embeddings().weight is LanguageModel(drawn[0]).weight) == tied
    prefix = language_model.family_of(teacher.config).backbone + "."
    source = teacher.state_dict()
    head = [name for name in source if not name.startswith(prefix)]
    for name, tensor in source.items():
        assert torch.equal(first[name], same[name])
        if name not in head:
            assert torch.equal(first[name], tensor)
    matrices = [name for name in head if tensor_is_drawn(first[name]) and not (tied and name.endswith(OUTPUTS))]
    assert bool(matrices) == (not tied or kind in ("bert", "roberta", "distilbert", "modernbert"))
    for name in matrices:
        assert not torch.equal(first[name], other[name])
        assert 0.005 < float(first[name].std()) < 0.05  # initializer_range is 0.02


OUTPUTS = ("decoder.weight", "vocab_projector.weight", "lm_head.weight")


def tensor_is_drawn(tensor: Tensor) -> bool:
    return tensor.dim() == 2


def test_a_body_without_a_weight_is_refused_all_the_same(tmp_path: Path) -> None:
    build("bert").bert.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the weights .*layer\.1\.output\.dense\.weight"):
        students.make_student(Student(path=str(tmp_path), head="fresh"), None, VOCABULARY)
    with pytest.raises(UserError, match="lacks") as caught:
        students.make_student(Student(path=str(tmp_path)), None, VOCABULARY)
    assert "student.head" not in str(caught.value)


def test_pretraining_and_distilling_from_a_bare_encoder(material: Path, tmp_path: Path) -> None:
    transformers.AutoModelForMaskedLM.from_pretrained(material / "teacher").bert.save_pretrained(tmp_path / "bare")
    overrides = [f"student.path={tmp_path / 'bare'}", "evaluation.every=null", "data.heldout=null", "loop.updates=1"]
    with pytest.raises(UserError, match=r"student\.head=fresh"):
        quiet(small(material, tmp_path, *overrides))
    alone = ["teacher=null", "objective.a_ce=0", "objective.a_cos=0", "objective.a_mlm=1"]
    for number, more in enumerate(([], alone)):
        quiet(small(material, tmp_path, *overrides, *more, "student.head=fresh", f"name=fresh{number}"))
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / f"fresh{number}" / "student")


def test_only_a_checkpoint_has_a_head_to_draw() -> None:
    with pytest.raises(UserError, match=r"head: fresh is for a checkpoint without one \(path\), got every"):
        load_recipe("distilbert", ["student.every=2", "student.head=fresh"])


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
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer"), max_length=16, workers=1, documents="line")
    prepare([str(tmp_path / "text.txt")], tmp_path / "corpus", options)
    objective = ["objective.a_mlm=0", "objective.a_clm=1"] if kind == "llama" else ["objective.a_mlm=1"]
    config = json.dumps({**TINY, "model_type": kind})
    recipe = [f"student.config={config}", "teacher=null", "objective.a_ce=0", "objective.a_cos=0", *objective]
    folders = [f"data.train={tmp_path / 'corpus'}", f"data.heldout={tmp_path / 'corpus'}", "evaluation.every=null"]
    result = quiet(small(tmp_path, tmp_path, *recipe, *folders, "loop.updates=2"))
    assert result.evaluation is not None
