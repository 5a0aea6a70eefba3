"""Every architecture against transformers' own forward, and students against the layers they were made from."""

import copy
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fastdistil.data.batch import Batch, assemble
from fastdistil.errors import UserError
from fastdistil.models import language_model, loading, students
from fastdistil.models.language_model import LanguageModel
from fastdistil.recipe import Student

VOCABULARY, WIDTH, DEPTH, POSITIONS = 97, 32, 4, 48
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
    "distilbert": {"dim": WIDTH, "n_layers": DEPTH, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": POSITIONS},
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
    "gpt2": {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": POSITIONS, "bos_token_id": 1, "eos_token_id": 1},
    "llama": GROUPED_QUERIES,
    # A window of 6 tokens from layer 2 on.
    "qwen2": {**GROUPED_QUERIES, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {**GROUPED_QUERIES, "head_dim": 8},
}
MASKED = ("bert", "roberta", "distilbert", "modernbert")
LAYERS = {
    "bert": "bert.encoder.layer.{}.",
    "roberta": "roberta.encoder.layer.{}.",
    "distilbert": "distilbert.transformer.layer.{}.",
    "modernbert": "model.layers.{}.",
    "gpt2": "transformer.h.{}.",
    "llama": "model.layers.{}.",
    "qwen2": "model.layers.{}.",
    "qwen3": "model.layers.{}.",
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


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What transformers logs. (Its own handler writes to the stream that was stderr when it was imported.)"""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    transformers.utils.logging.add_handler(handler)
    yield lines
    transformers.utils.logging.remove_handler(handler)


# The interface


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
@pytest.mark.parametrize(("kind", "change"), [("modernbert", {"local_attention": 80}), ("qwen2", {"sliding_window": 40})])
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
    assert language_model.parameter_count(model) == sum({id(p): p.numel() for p in module.parameters()}.values())
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
        language_model.load_own_state(LanguageModel(build("bert", num_hidden_layers=2)), language_model.own_state(model))
    with pytest.raises(UserError, match="another model"):
        language_model.load_own_state(LanguageModel(build("bert", intermediate_size=44)), language_model.own_state(model))


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


# Students


@every_family
def test_a_student_has_the_layers_it_was_promised(kind: str) -> None:
    teacher = build(kind)
    student = students.fewer_layers(teacher, [0, 3])
    source, copied = teacher.state_dict(), student.module.state_dict()
    first, second = (LAYERS[kind].format(place) for place in (0, 1))
    assert not any(LAYERS[kind].format(2) in name for name in copied)
    for name, tensor in copied.items():
        old = LAYERS[kind].format(3) + name.removeprefix(second) if name.startswith(second) else name
        assert torch.equal(tensor, source[old]), name
    assert any(name.startswith(first) for name in copied)
    assert len({tensor.data_ptr() for tensor in copied.values()} & {tensor.data_ptr() for tensor in source.values()}) == 0


@every_family
@torch.no_grad()
def test_a_student_of_all_layers_is_the_teacher(kind: str) -> None:
    teacher = build(kind)
    student = students.fewer_layers(teacher, list(range(DEPTH)))
    texts = sequences()
    expected = own_logits(copy.deepcopy(teacher).double(), texts)
    torch.testing.assert_close(logits(student.eval().double(), batch_of(texts)), expected, rtol=0, atol=1e-10)
    assert teacher.config.to_dict() == {**student.module.config.to_dict(), **_dtypes(teacher.config)}


def _dtypes(config: PretrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name in ("dtype", "torch_dtype")}


@pytest.mark.parametrize("layers", [[0, 1], [0, 3], [0, 2, 3]])
@torch.no_grad()
def test_modernbert_layers_keep_their_windows(layers: list[int]) -> None:
    """Computed by the teacher with its other layers skipped."""
    teacher = build("modernbert").double()
    texts = sequences()
    student = logits(students.fewer_layers(teacher, layers).eval().double(), batch_of(texts))
    teacher.model.layers = nn.ModuleList(teacher.model.layers[layer] for layer in layers)
    torch.testing.assert_close(student, own_logits(teacher, texts), rtol=0, atol=1e-6)  # through float32 weights


def test_modernbert_students_start_with_the_first_layer() -> None:
    with pytest.raises(UserError, match="must start with layer 0"):
        students.fewer_layers(build("modernbert"), [1, 3])


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@torch.no_grad()
def test_distilbert_with_all_layers_is_its_bert(activation: str) -> None:
    teacher = build("bert", hidden_act=activation)
    embeddings = teacher.bert.embeddings
    # On a grid, where float32 adds positions and segments without rounding.
    for table in (embeddings.position_embeddings.weight, embeddings.token_type_embeddings.weight):
        table.copy_((table * 1024).round() / 1024)
    assert embeddings.token_type_embeddings.weight[0].abs().max() > 0.1
    student = students.distilbert_from_bert(teacher, list(range(DEPTH)))
    texts = sequences()
    truth = own_logits(copy.deepcopy(teacher).double(), texts)
    torch.testing.assert_close(logits(student.eval().double(), batch_of(texts)), truth, rtol=0, atol=1e-10)


def test_distilbert_takes_the_layers_it_was_promised() -> None:
    teacher = build("bert")
    student = students.distilbert_from_bert(teacher, [1, 3]).module
    assert student.config.model_type == "distilbert"
    for place, layer in enumerate((1, 3)):
        new, old = student.distilbert.transformer.layer[place], teacher.bert.encoder.layer[layer]
        assert torch.equal(new.attention.v_lin.weight, old.attention.self.value.weight)
        assert torch.equal(new.ffn.lin2.bias, old.output.dense.bias)
        assert torch.equal(new.sa_layer_norm.weight, old.attention.output.LayerNorm.weight)


def test_distilbert_refuses_what_it_cannot_express() -> None:
    with pytest.raises(UserError, match="needs a BERT teacher, got roberta"):
        students.distilbert_from_bert(build("roberta"), [0])
    with pytest.raises(UserError, match="eps 1e-12, the teacher's 1e-05"):
        students.distilbert_from_bert(build("bert", layer_norm_eps=1e-5), [0])


HEADS = {
    "bert": "cls.predictions.transform.dense.weight",
    "roberta": "lm_head.dense.weight",
    "distilbert": "vocab_transform.weight",
    "modernbert": "head.dense.weight",
}


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_not_copied_is_new_but_the_vocabulary_stays(kind: str, tied: bool) -> None:
    teacher = build(kind, tie_word_embeddings=tied)
    with_head = students.fewer_layers(teacher, [0, 2], copy_head=True)
    without_head = students.fewer_layers(teacher, [0, 2], copy_head=False)
    source = teacher.state_dict()
    assert torch.equal(with_head.module.state_dict()[HEADS[kind]], source[HEADS[kind]])
    assert not torch.equal(without_head.module.state_dict()[HEADS[kind]], source[HEADS[kind]])
    assert without_head.bias is not None
    assert float(without_head.bias.detach().abs().max()) == 0
    for student in (with_head, without_head):
        assert torch.equal(student.weight, LanguageModel(copy.deepcopy(teacher)).weight)
        assert (student.module.get_input_embeddings().weight is student.weight) == tied


def test_distilbert_head_that_is_not_copied_is_new_but_tied() -> None:
    teacher = build("bert")
    student = students.distilbert_from_bert(teacher, [0, 2], copy_head=False)
    assert student.module.distilbert.embeddings.word_embeddings.weight is student.weight
    assert torch.equal(student.weight, teacher.cls.predictions.decoder.weight)
    assert not torch.equal(student.module.vocab_transform.weight, teacher.cls.predictions.transform.dense.weight)
    assert float(student.bias.detach().abs().max()) == 0


def test_make_student_follows_the_recipe(tmp_path: Path) -> None:
    teacher = LanguageModel(build("bert"))
    every = students.make_student(Student(every=3), teacher, VOCABULARY)
    assert torch.equal(
        every.module.bert.encoder.layer[1].output.dense.weight, teacher.module.bert.encoder.layer[3].output.dense.weight
    )
    distil = students.make_student(Student(layers=(0, 2), architecture="distilbert", dropout=0.25), teacher, VOCABULARY)
    assert distil.module.config.model_type == "distilbert"
    assert {m.p for m in distil.modules() if isinstance(m, nn.Dropout)} == {0.25}
    config = {"model_type": "bert", **SIZES, "num_hidden_layers": 1}
    fresh = students.make_student(Student(config=config, freeze_positions=True), None, 33)
    assert language_model.shape(fresh) == (33, WIDTH)
    frozen = [name for name, parameter in fresh.named_parameters() if not parameter.requires_grad]
    assert frozen == ["module.bert.embeddings.position_embeddings.weight"]
    loading.save_pretrained(every, tmp_path)
    loaded = students.make_student(Student(path=str(tmp_path)), None, VOCABULARY)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), every.parameters(), strict=True))


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        (Student(layers=(0, 4)), r"\[0, 4\] must be ascending, different and below the teacher's 4 layers"),
        (Student(layers=(2, 1)), "ascending"),
        (Student(layers=(1, 1)), "different"),
        (Student(config={"model_type": "t5"}), "wanted one of bert"),
        (Student(config={"hidden_size": 3}), "model_type is None"),
        (Student(config={"model_type": "bert", "hidden_sise": 3}), "hidden_sise is not an option .* did you mean hidden_size"),
        (Student(config={"model_type": "bert", "hidden_size": "wide"}), "expected int, got str"),
        (Student(config={"model_type": "bert", **SIZES, "hidden_size": 30}), "not a multiple"),
        (Student(config={"model_type": "bert", **SIZES, "hidden_act": "step"}), "step"),
    ],
)
def test_what_makes_no_student_is_one_line(recipe: Student, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        students.make_student(recipe, LanguageModel(build("bert")), VOCABULARY)
    assert "\n" not in str(caught.value)


def test_layers_need_a_teacher_and_positions_to_freeze() -> None:
    with pytest.raises(UserError, match=r"set teacher\.path"):
        students.make_student(Student(every=2), None, VOCABULARY)
    with pytest.raises(UserError, match="no position embeddings"):
        students.make_student(Student(every=2, freeze_positions=True), LanguageModel(build("llama")), VOCABULARY)


@every_family
def test_special_ids_of_a_new_configuration_are_the_tokenizers(kind: str, tmp_path: Path, said: list[str]) -> None:
    """Never the defaults, which are those of the architecture's own tokenizer: neither in the model nor for generation."""
    sizes = {name: value for name, value in CONFIGS[kind].items() if not name.endswith("_token_id")}
    padding = {"pad_token_id": 7}
    everything = {**padding, "bos_token_id": 3, "eos_token_id": 4, "cls_token_id": 5, "sep_token_id": 6, "mask_token_id": 8}
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
        with pytest.raises(UserError, match=r"numbers positions from its padding token's.*set student\.config\.pad_token_id"):
            students.make_student(recipe, None, VOCABULARY)
        return
    config = students.make_student(recipe, None, VOCABULARY).module.config.to_dict()
    assert [name for name, value in config.items() if name.endswith("_token_id") and value is not None] == []


@every_family
@pytest.mark.parametrize("before", [0.3, 0.0, 0])
def test_set_dropout_reaches_every_dropout(kind: str, before: float) -> None:
    names = [name for name, value in config_of(kind).to_dict().items() if "drop" in name and isinstance(value, float | int)]
    model = build(kind, **dict.fromkeys(names, before))
    students.set_dropout(model, 0.125)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} <= {0.125}
    assert all(getattr(model.config, name) == 0.125 for name in names)
    fresh = auto(kind).from_config(model.config)
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Dropout)] == [
        n for n, m in fresh.named_modules() if isinstance(m, nn.Dropout)
    ]
    numbers = [m.attention_dropout for m in model.modules() if isinstance(getattr(m, "attention_dropout", None), float | int)]
    assert set(numbers) <= {0.125}
    assert numbers or any(isinstance(module, nn.Dropout) for module in model.modules())


# Pairs and tokenizers


def test_pairs_that_cannot_be_compared_are_refused() -> None:
    bert, narrow = LanguageModel(build("bert")), LanguageModel(build("bert", hidden_size=16))
    language_model.check_pair(bert, LanguageModel(build("roberta")), hidden_terms=True, projection=False)
    language_model.check_pair(bert, narrow, hidden_terms=False, projection=False)
    language_model.check_pair(bert, narrow, hidden_terms=True, projection=True)
    with pytest.raises(UserError, match=r"width 16 of the student with 32 of the teacher.*projection=true"):
        language_model.check_pair(bert, narrow, hidden_terms=True, projection=False)
    with pytest.raises(UserError, match="teacher is a masked model, the student causal"):
        language_model.check_pair(bert, LanguageModel(build("gpt2")), hidden_terms=False, projection=False)


# Files


@every_family
@torch.no_grad()
def test_a_saved_student_loads_without_fastdistil(kind: str, tmp_path: Path) -> None:
    teacher = LanguageModel(build(kind).bfloat16())
    student = students.fewer_layers(teacher.module, [0, 3]).eval()
    loading.save_pretrained(student, tmp_path)
    plain, report = auto(kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert "fastdistil" not in (tmp_path / "config.json").read_text()
    assert plain.dtype == torch.float32
    texts = sequences()
    truth = own_logits(plain.double(), texts)
    again = loading.load_model(str(tmp_path))
    torch.testing.assert_close(logits(student.eval().double(), batch_of(texts)), truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(again.double(), batch_of(texts)), truth, rtol=0, atol=1e-10)


def test_a_module_of_your_own_is_saved_as_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    module = nn.Linear(3, 2)
    loading.save_pretrained(module, tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], module.weight)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    loading.save_pretrained(LanguageModel(build("bert")), folder)
    return folder


def test_loading_is_quiet_and_in_evaluation_mode(tmp_path: Path, said: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Also where the files hold more than the model needs, as published BERT checkpoints do."""
    torch.manual_seed(0)
    transformers.BertForPreTraining(config_of("bert")).save_pretrained(tmp_path)
    transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert "UNEXPECTED" in "".join(said)
    said.clear()
    capfd.readouterr()
    model = loading.load_model(str(tmp_path), torch.bfloat16)
    loading.save_pretrained(model, tmp_path / "again")
    assert (said, *capfd.readouterr()) == ([], "", "")
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def damaged(folder: Path, saved: Path, damage: str) -> Path:
    shutil.copytree(saved, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        case "empty":
            weights.write_bytes(b"")
        case "noise":
            weights.write_bytes(b"\xff" * 1000)
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "no json":
            config.write_text("{")
        case "unheard-of":
            config.write_text(json.dumps({**values, "model_type": "unheard-of"}))
        case "t5":
            config.write_text(json.dumps({"model_type": "t5"}))
        case "vocabulary":
            config.write_text(json.dumps({**values, "vocab_size": VOCABULARY + 1}))
        case "deeper":
            config.write_text(json.dumps({**values, "num_hidden_layers": DEPTH + 1}))
        case "no head":
            torch.manual_seed(0)
            shutil.rmtree(folder)
            transformers.BertModel(config_of("bert")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("truncated", "weights at .* are damaged: .*; copy them again"),
        ("empty", "damaged"),
        ("noise", "damaged"),
        ("no weights", "cannot be loaded: .*no file named"),
        ("no config", r"no model at .*config\.json"),
        ("no json", "not a valid JSON file"),
        ("unheard-of", "unheard-of"),
        ("t5", "architecture 't5' is not supported"),
        ("vocabulary", "another shape for 2 of the weights"),
        ("deeper", "lacks 16 of the weights"),
        ("no head", "lacks .* of the weights of BertForMaskedLM .*language-model head"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    damage: str, complaint: str, saved: Path, tmp_path: Path, said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(tmp_path / "model", saved, damage)
    said.clear()
    capfd.readouterr()
    with pytest.raises(UserError, match=complaint) as caught:
        loading.load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert (said, *capfd.readouterr()) == ([], "", "")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing-here", "no-such-model", "nobody/no-such-model", "not a/hub id"])
def test_a_model_that_is_nowhere_is_one_line(path: str) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match="no model") as caught:
        loading.load_model(path)
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)


def test_verbosity_is_left_as_it_was(saved: Path) -> None:
    library = transformers.utils.logging
    before, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_info()
    try:
        loading.load_model(str(saved))
        assert library.get_verbosity() == library.INFO
        assert library.is_progress_bar_enabled() == bars
    finally:
        library.set_verbosity(before)
