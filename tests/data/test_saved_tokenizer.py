"""The tokenizer beside a model is the corpus' own, whatever kind of model that is."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastdistil.data.tokenizer import difference_as_loaded, fast_tokenizer, load_tokenizer, save_tokenizer, train_wordpiece
from fastdistil.evaluate import EvaluateOptions, evaluate
from fastdistil.recipe import load_recipe
from tests.small_run import events, quiet

TEXTS = ["the river's 1234 stones", "Ünder  the mountains\n\n they don't sing", "naïve ﬁsh and cafe\u0301"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
ROLES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
KINDS = ("bert", "distilbert", "roberta", "modernbert", "gpt2", "llama", "qwen2", "qwen3")


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=letters, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS * 3, trainers.UnigramTrainer(vocab_size=70, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """By kind: the library's own tokenizer, which is the truth, and ours of it."""
    wordpiece = load_tokenizer(train_wordpiece(TEXTS, 120, tmp_path_factory.mktemp("wordpiece")))
    by_kind = {"byte-level": byte_level(), "unigram": unigram(), "word-level": word_level()}
    ours: dict[str, tuple[Tokenizer, Any]] = {
        name: (tokenizer, fast_tokenizer(tokenizer, 512, ROLES)) for name, tokenizer in by_kind.items()
    }
    return {**ours, "wordpiece": (wordpiece.backend_tokenizer, wordpiece)}


def assert_same_ids(truth: Tokenizer, tokenizer: Any) -> None:
    assert tokenizer.get_vocab() == truth.get_vocab()
    for text in (*TEXTS, " two  spaces\t\n\n", "1234,5 don't"):
        assert tokenizer(text).input_ids == truth.encode(text).ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["byte-level", "unigram", "word-level", "wordpiece"])
def test_a_tokenizer_beside_a_model_is_what_its_file_says(
    kind: str, name: str, tokenizers: dict[str, tuple[Tokenizer, Any]], tmp_path: Path
) -> None:
    truth, tokenizer = tokenizers[name]
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    assert_same_ids(truth, load_tokenizer(tmp_path))
    difference = difference_as_loaded(tokenizer, tmp_path, TEXTS)
    if kind == "qwen2":  # whose class transformers uses whatever the files say
        assert difference is not None
    else:
        assert difference is None
        auto: Any = transformers.AutoTokenizer
        assert_same_ids(truth, auto.from_pretrained(tmp_path))


def test_a_class_that_builds_its_own_is_not_asked(tokenizers: dict[str, tuple[Tokenizer, Any]], tmp_path: Path) -> None:
    """A directory that somebody else wrote: tokenizer.json beside the name of a class with another pre-tokenizer."""
    truth, tokenizer = tokenizers["byte-level"]
    transformers.AutoConfig.for_model("qwen2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "Qwen2Tokenizer"}))
    assert_same_ids(truth, load_tokenizer(tmp_path))


def test_roles_that_no_file_names_are_the_usual_ones_of_the_model(tmp_path: Path) -> None:
    """As of bert-base-uncased, whose tokenizer_config.json names no special token."""
    train_wordpiece(TEXTS, 120, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true, "pad_token": "[PAD]"}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer: Any = load_tokenizer(tmp_path)
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id) == (2, 3, 4, 0)
    assert tokenizer.bos_token_id is None


def test_a_student_says_how_to_load_its_tokenizer_where_the_usual_way_gives_another(material: Path, tmp_path: Path) -> None:
    """transformers reads any tokenizer beside a Qwen2 model as Qwen2's own."""
    config = "{model_type: qwen2, num_hidden_layers: 1, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, "
    overrides = [
        f"student.config={config}num_key_value_heads: 2, max_position_embeddings: 48}}",
        "objective={a_ce: 0, a_mlm: 0, a_clm: 1, a_cos: 0}",
        f"data.train={material / 'train'}",
        "data.micro_batch_tokens=256",
        "loop={updates: 1, accumulation: 1, precision: fp32}",
        "checkpoint.every=null",
        f"runs_dir={tmp_path}",
        "name=run",
        "device=cpu",
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text("student: {}\n")
    quiet(load_recipe(str(path), overrides))
    student = tmp_path / "run" / "student"
    (note,) = (event["message"] for event in events(tmp_path / "run", "note") if "tokenizer" in event["message"])
    assert "PreTrainedTokenizerFast.from_pretrained" in note
    assert "PreTrainedTokenizerFast.from_pretrained" in (student / "README.md").read_text()
    fast: Any = transformers.PreTrainedTokenizerFast
    truth = Tokenizer.from_file(str(material / "tokenizer" / "tokenizer.json"))
    assert_same_ids(truth, fast.from_pretrained(student))
    options = EvaluateOptions(device="cpu", precision="fp32")
    report = evaluate(str(student), [str(material / "heldout"), str(material / "heldout.jsonl")], options)
    assert all(corpus.causal is not None for corpus in report.corpora)
