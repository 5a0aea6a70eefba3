"""JSON and YAML that others wrote: what is bounded, what is read as before; names in a manifest stay in its directory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastdistil.data.corpus import Corpus
from fastdistil.data.json_text import json_text
from fastdistil.data.local_copy import cached_corpus
from fastdistil.errors import CorruptData, FastdistilError, UserError
from fastdistil.launch.job import MOST_RANKS, choose_slots, parse_elastic
from fastdistil.recipe import load_recipe
from fastdistil.runs import stored_recipe
from fastdistil.training import checkpoint
from fastdistil.untrusted import DEPTH, PlainName, Real, Whole, converted, parse_json, parse_yaml, reason
from tests.damage import ALIASES
from tests.test_damaged_files import facts, seal_checkpoint, sealed, small_corpus


def refused(text: str, parse: Any = parse_yaml) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        parse(text)
    line = reason(error.value)
    assert "\n" not in line and len(line) <= 500
    return line


def test_what_people_write_in_yaml_is_read_as_it_was() -> None:
    for text in (
        "a: 1\nb: [1, 2.5, x]\n", "base: &base {x: 1}\nc: {<<: *base, y: 2}\nd: [*base, *base]", "a: {}", "",
        "x: 0x1F", "1_000",
        "a: 1\na: 2", "t: yes\nn: ~", "- |\n  two\n  lines\n", "e: 1.0e-4", "'2026-01-02'", "\ufeffa: 1",
    ):  # fmt: skip
        assert parse_yaml(text) == yaml.safe_load(text)


def test_a_date_is_text_also_where_there_is_no_such_day() -> None:
    for date in ("2026-13-45", "2026-01-02", "2026-01-02 25:61:61", "2001-12-14t21:59:43.10-05:00"):
        assert parse_yaml(f"name: {date}") == {"name": date}
    assert load_recipe("distilbert", ["name=2026-13-45"]).name == "2026-13-45"


def test_aliases_neither_multiply_nor_deepen_a_document() -> None:
    assert "more than 100,000 values" in refused(f"[{ALIASES}]")
    merges = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9))
    assert "more than 100,000 values" in refused("a0: &a0 {x: 1}\n" + merges)
    chain = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [[[[[*a{n - 1}]]]]]\n" for n in range(1, 30))
    assert "nested more than" in refused(chain)
    assert "within what it stands for" in refused("&a [*a]")
    assert "within what it stands for" in refused("&a {b: {c: *a}}")


def test_depth_and_size_are_bounded() -> None:
    assert parse_json("[" * DEPTH + "]" * DEPTH) == parse_yaml("[" * DEPTH + "]" * DEPTH)
    for parse in (parse_json, parse_yaml):
        for depth in (DEPTH + 1, 500, 10_000, 100_000):
            assert "deep" in refused("[" * depth + "]" * depth, parse)
        assert "digits" in refused("9" * 5000, parse)
        assert "digits" in refused("1" + "0" * 400, parse)
    assert "longer than" in refused("a" * 2**19)
    assert parse_json(str(2**64)) == 2**64
    assert parse_yaml(str(2**63)) == 2**63
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}


def test_tags_that_make_no_plain_values_are_refused() -> None:
    for text in ("!!set {a}", "!!binary YQ==", "!!omap [a: 1]", "!!python/name:os.system", "!!int x", "!!bool x", "!!float x"):
        refused(text)
    for text in ('"\\0"', '"\\ud800"'):
        assert "NUL" in refused(text)


def test_an_error_names_the_field_and_not_the_whole_value() -> None:
    with pytest.raises(ValueError, match="validation error") as error:
        converted(dict[str, list[Whole]], {"a": [1, "x" * 10_000]})
    assert reason(error.value).startswith("a.1: input should be a valid integer, got 'xxx") and len(reason(error.value)) < 200
    for value in (True, "1", float("nan"), float("inf"), 1e300, None):
        with pytest.raises(ValueError, match="validation error"):
            converted(Real, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "override",
    ["optim.lr=[" + "[" * 10_000, f"pre_run=[{ALIASES}]", "loop.updates=1" + "0" * 400, "loop.updates=" + "9" * 5000,
     "seed=!!int x", "data.micro_batch_tokens=9007199254740993", 'data.train="\\0"', "name=" + "x" * 300],
)  # fmt: skip
def test_overrides_and_recipes_are_refused_in_a_line(override: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("distilbert", [override])
    assert len(str(error.value)) < 1000
    key, _, value = override.partition("=")
    for part in reversed(key.split(".")):
        value = f"{{{part}: {value}}}"
    (tmp_path / "recipe.yaml").write_text(value)
    for read in (load_recipe, lambda path: stored_recipe(Path(path).parent)):
        with pytest.raises(UserError) as error:
            read(str(tmp_path / "recipe.yaml"))
        assert len(str(error.value)) < 1000


def test_numbers_of_ranks_are_bounded() -> None:
    for np, hosts in ((100_000_000, None), (0, None), (None, "a:1000000000"), (None, "a:" + "9" * 5000), (None, "a:\u0663"),
                      (None, f"a:{MOST_RANKS},b:1"), (None, "a:0"), (10**400, "a:8")):  # fmt: skip
        with pytest.raises(UserError) as error:
            choose_slots(np, hosts)
        assert len(str(error.value)) < 500
    assert len(choose_slots(None, f"a:{MOST_RANKS}")[0]) == MOST_RANKS
    with pytest.raises(UserError, match="MIN:MAX"):
        parse_elastic("1:1000000000")


def test_a_line_that_is_nested_too_deeply_is_a_bad_record() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        json_text('{"text": ' + "[" * 100_000, "text")


# Names in manifests


OUTSIDE = ["../outside.txt", "/tmp/outside.txt", "tokenizer/../../outside.txt", "..", ".", "", "a/b", "a\0b", "tokenizer//x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_plain_names_are_names_of_files_in_a_directory(name: str) -> None:
    with pytest.raises(ValueError, match=r"plain name"):
        converted(PlainName, name)
    assert converted(PlainName, "tokens-00000.bin") == "tokens-00000.bin"


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_corpus_manifest_names_nothing_outside(name: str, tmp_path: Path) -> None:
    """The checksums are right: whoever passes the corpus on could have made it so."""
    corpus = small_corpus(tmp_path / "corpus")
    secret = tmp_path / "outside.txt"
    secret.write_text("of somebody else")
    values = json.loads((corpus / "manifest.json").read_text())
    values["files"][name.replace("/tmp/", f"{tmp_path}/")] = facts(secret)
    (corpus / "manifest.json").write_text(json.dumps(sealed(values)))
    before = sorted(tmp_path.rglob("*"))
    for read in (
        Corpus.open,
        lambda path: cached_corpus(path, tmp_path / "cache" / "here", 0, lambda: None, lambda text: None),
    ):
        with pytest.raises(CorruptData, match=r"plain name|wanted the name of a file of a corpus"):
            read(corpus)
    assert sorted(tmp_path.rglob("*")) == before
    assert secret.read_text() == "of somebody else"


def test_a_corpus_copies_all_of_its_tokenizer(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path / "corpus")
    (corpus / "tokenizer" / "additional_chat_templates").mkdir()
    template = corpus / "tokenizer" / "additional_chat_templates" / "tool.jinja"
    template.write_text("{{ x }}")
    values = json.loads((corpus / "manifest.json").read_text())
    values["files"][str(template.relative_to(corpus))] = facts(template)
    (corpus / "manifest.json").write_text(json.dumps(sealed(values)))
    copy = cached_corpus(corpus, tmp_path / "cache", 0, lambda: None, lambda text: None)
    assert (copy / "tokenizer" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ x }}"
    assert len(Corpus.open(copy)) == len(Corpus.open(corpus))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_checkpoint_manifest_names_nothing_outside(name: str, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "checkpoints", 1, {"model": {"w": torch.ones(3)}}, {"a": 1}, keep=2)
    shutil.copy(path / "model.safetensors", tmp_path / "outside.txt")
    values = json.loads((path / "manifest.json").read_text())
    values["files"][name.replace("/tmp/", f"{tmp_path}/")] = facts(tmp_path / "outside.txt")
    (path / "manifest.json").write_text(json.dumps(seal_checkpoint(values)))
    with pytest.raises(FastdistilError, match="plain name") as error:
        checkpoint.load(path)
    assert error.value.exit_code == 14
