"""`fastdistil cache-teacher` and training from what it wrote, with small models on a real prepared corpus."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
import torch
import transformers

from fastdistil import cli
from fastdistil.console import Console
from fastdistil.data import teacher_cache
from fastdistil.data.batches import Batches
from fastdistil.data.corpus import Corpus
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.python_docs import docstrings
from fastdistil.data.tokenizer import load_tokenizer, token_facts, train_wordpiece
from fastdistil.errors import CorruptData, UserError
from fastdistil.models import loading
from fastdistil.models.loading import load_model
from fastdistil.recipe import Recipe, load_recipe
from fastdistil.train import train
from fastdistil.training.cache_teacher import cache_teacher
from fastdistil.training.inputs import resolve
from fastdistil.training.memory_plan import show_plan
from tests.fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 6


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of about 20,000 tokens, the same text cut and tokenized otherwise; masked teachers and a causal one."""
    folder = tmp_path_factory.mktemp("cache")
    text = folder / "text.txt"
    text.write_text("\n\n".join(docstrings(Path(json.__file__))) + "\n\n".join(docstrings(Path(re.__file__))), encoding="utf-8")
    tokenizer = train_wordpiece([text.read_text(encoding="utf-8")], 300, folder / "tokenizer")
    prepare([str(text)], folder / "corpus", PrepareOptions(tokenizer=str(tokenizer), max_length=32, workers=1))
    prepare([str(text)], folder / "shorter", PrepareOptions(tokenizer=str(tokenizer), max_length=24, workers=1))
    other_tokenizer = train_wordpiece([text.read_text(encoding="utf-8").upper()[::-1]], 300, folder / "other-tokenizer")
    prepare([str(text)], folder / "otherwise", PrepareOptions(tokenizer=str(other_tokenizer), max_length=32, workers=1))
    facts = token_facts(load_tokenizer(str(tokenizer)))
    for name, seed in (("bert", 1), ("other", 2)):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=facts.vocab_size, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
        )
        model: Any = transformers.BertForMaskedLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=facts.vocab_size, n_embd=32, n_layer=2, n_head=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD_TOKENS", 2000)


def recipe_of(material: Path, tmp_path: Path, *overrides: str, teacher: str = "bert") -> Recipe:
    causal = teacher == "gpt2"
    settings = [
        f"teacher.path={material / teacher}",
        f"data.train={material / 'corpus'}",
        "data.micro_batch_tokens=1000",
        *(["objective.a_mlm=0", "objective.a_clm=2"] if causal else []),
        "objective.a_cos=0",
        f"loop.updates={UPDATES}",
        "loop.accumulation=3",
        "loop.precision=fp32",
        "logging.every=1",
        "student.every=2",
        "student.architecture=same",
        "student.dropout=0",
        "device=cpu",
        f"runs_dir={tmp_path / 'runs'}",
    ]
    return load_recipe("distilbert", [*settings, *overrides])


def losses(recipe: Recipe) -> list[float]:
    with Path(os.devnull).open("w") as nowhere:
        result = train(recipe, console=Console(file=nowhere))
    events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    return [event["soft"] for event in events if event["event"] == "train"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".npy", ".json")}


def test_the_student_may_have_another_width_whatever_the_recipe_says_of_hidden_states(material: Path, tmp_path: Path) -> None:
    """The cosine term, which every recipe has, compares widths; a cache holds no hidden states."""
    config = {
        "model_type": "distilbert",
        "dim": 16,
        "hidden_dim": 32,
        "n_layers": 1,
        "n_heads": 2,
        "max_position_embeddings": 64,
    }
    recipe = recipe_of(material, tmp_path, "objective.a_cos=1", "student.every=null", f"student.config={json.dumps(config)}")
    assert cache_teacher(recipe, tmp_path / "cache").shards > 0


@pytest.mark.parametrize("layout", ["packed", "length-grouped"])
def test_holds_the_teachers_distribution_under_the_runs_masks(layout: str, material: Path, tmp_path: Path) -> None:
    recipe = recipe_of(material, tmp_path, f"data.layout={layout}", "teacher.top_k=5")
    written = cache_teacher(recipe, tmp_path / "cache")
    assert written.epochs >= 1
    assert written.made == written.shards >= 3
    corpus = Corpus.open(material / "corpus")
    facts = token_facts(load_tokenizer(str(corpus.tokenizer_dir)))
    batches = Batches(corpus, facts, recipe.data, recipe.mask, seed=recipe.seed, accumulation=1, causal=False)
    starts, bounds = teacher_cache.shard_starts(corpus), np.r_[0, np.cumsum(corpus.lengths)]
    teacher = load_model(str(material / "bert"))
    for sequence in (0, 7, len(corpus) - 1):
        batch = batches.make(0, np.array([sequence]))
        model: Any = teacher.module
        model.set_attn_implementation("eager")
        with torch.no_grad():
            logits = model(input_ids=batch.ids_BS).logits[0]
        p = (logits / recipe.objective.temperature).softmax(-1)
        shard = int(np.searchsorted(starts, sequence, side="right")) - 1
        values = np.load(tmp_path / "cache" / teacher_cache.shard_name(0, shard))
        here = values[bounds[sequence] - bounds[starts[shard]] : bounds[sequence + 1] - bounds[starts[shard]]]
        cached_p = torch.from_numpy(here["log_probability"].astype(np.float32)).exp()
        torch.testing.assert_close(cached_p, p.gather(1, torch.from_numpy(here["index"].astype(np.int64))), rtol=5e-3, atol=0)
        torch.testing.assert_close(cached_p, p.topk(5).values, rtol=5e-3, atol=0)
        torch.testing.assert_close(torch.from_numpy(here["tail"].copy()), 1 - p.topk(5).values.sum(-1), rtol=1e-3, atol=1e-5)
        assert float(p.max()) > 3 / facts.vocab_size


@pytest.mark.parametrize("teacher", ["bert", "gpt2"])
@pytest.mark.parametrize("layout", ["packed", "length-grouped"])
def test_a_cache_of_all_tokens_trains_as_the_teacher_does(teacher: str, layout: str, material: Path, tmp_path: Path) -> None:
    vocabulary = load_model(str(material / teacher)).weight.shape[0]
    plain = recipe_of(material, tmp_path, f"data.layout={layout}", teacher=teacher)
    live = losses(plain)
    keys = {"top_k": vocabulary, "cache": str(tmp_path / "cache")}
    written = cache_teacher(plain.with_(teacher=keys), tmp_path / "cache")
    assert written.epochs == (1 if teacher == "gpt2" else 2)  # a causal model has no masks that change
    cached = losses(plain.with_(teacher=keys))
    assert len(live) == len(cached) == UPDATES
    np.testing.assert_allclose(cached, live, rtol=2e-3)
    fewer = losses(plain.with_(teacher={**keys, "top_k": 4, "cache": str(cache_of(plain, tmp_path, top_k=4))}))
    # The first rate is 0, so both have the same student in two updates; tokens in one bucket cannot tell more than apart.
    assert all(few < complete for few, complete in zip(fewer[:2], live[:2], strict=True))


def cache_of(recipe: Recipe, tmp_path: Path, **keys: Any) -> Path:
    out = tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"
    cache_teacher(recipe.with_(teacher=keys), out)
    return out


def test_a_cut_off_teaches_what_is_above_it(material: Path, tmp_path: Path) -> None:
    plain = recipe_of(material, tmp_path)
    out = cache_of(plain, tmp_path, top_k=20, min_probability=0.01)
    values = np.load(out / teacher_cache.shard_name(0, 0))
    finite = np.isfinite(values["log_probability"])
    assert 0 < finite[:, 1:].mean() < 1
    assert np.exp(values["log_probability"][:, 1:].astype(np.float64)[finite[:, 1:]]).min() > 0.0099
    assert (values["tail"] == 0).all()
    loss_series = losses(plain.with_(teacher={"cache": str(out), "top_k": 20, "min_probability": 0.01}))
    assert len(loss_series) == UPDATES
    assert all(np.isfinite(loss_series))


def test_training_from_a_cache_does_not_run_the_teacher(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdistil.training import inputs

    plain = recipe_of(material, tmp_path, f"student.path={material / 'other'}")
    out = cache_of(plain, tmp_path, top_k=4)
    real, loaded = loading.load_model, []
    monkeypatch.setattr(inputs.loading, "load_model", lambda path, *arguments: (loaded.append(path), real(path, *arguments))[1])
    losses(plain.with_(teacher={"cache": str(out), "top_k": 4}))
    assert loaded == []


# Makes a cache, and is killed when two shards are written.
KILLED = """
import os, signal, sys
from pathlib import Path
from fastdistil.data import teacher_cache
from fastdistil.recipe import load_recipe
from fastdistil.training import cache_teacher

teacher_cache.SHARD_TOKENS = 2000
write, written = cache_teacher._write, []
def counted(path, values):
    write(path, values)
    written.append(path)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
cache_teacher._write = counted
cache_teacher.cache_teacher(load_recipe(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_and_continued_gives_the_same_bytes(material: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    recipe = recipe_of(material, tmp_path, "teacher.top_k=8")
    reference = cache_teacher(recipe, tmp_path / "whole")
    out, program, recipe_file = tmp_path / "cut", tmp_path / "killed.py", tmp_path / "recipe.yaml"
    program.write_text(KILLED)
    recipe_file.write_text(recipe.to_yaml())
    child = fork_server.popen([sys.executable, str(program), str(recipe_file), str(out)], os.environ)
    _, err = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, err
    assert len(list(out.glob("*-*.json"))) == 2 < reference.shards
    again = cache_teacher(recipe, out)
    assert again.made == reference.shards - 2
    assert contents(out) == contents(tmp_path / "whole")
    assert cache_teacher(recipe, out).made == 0


@pytest.mark.parametrize("vocabulary", [300, 30_522, 2**16 + 1, 2**20])
@pytest.mark.parametrize("top_k", [16, 32, 128])
def test_a_listed_token_takes_four_to_six_bytes(vocabulary: int, top_k: int) -> None:
    """Its share of the token's tail included. Shards are these records alone, as the next test has it."""
    assert 4 <= teacher_cache.record(vocabulary, top_k).itemsize / top_k <= 6.25


def test_the_size_is_what_the_shards_take(material: Path, tmp_path: Path) -> None:
    written = cache_teacher(recipe_of(material, tmp_path, "teacher.top_k=8"), tmp_path / "cache")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.npy"))
    assert 0 <= on_disk - written.size <= 256 * written.shards  # their headers


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=57", "another seed: it has 56, the recipe 57"),
        ("mask.probability=0.2", r"another mask\.probability: it has 0.15, the recipe 0.2"),
        ("objective.temperature=3", "another objective.temperature: it has 2.0, the recipe 3.0"),
        ("teacher.top_k=9", r"another teacher\.top_k"),
        ("teacher.min_probability=0.1", r"another teacher\.min_probability"),
        ("teacher.dtype=bf16", r"another teacher\.dtype"),
        ("teacher.path=OTHER", r"another teacher\.path"),
        ("data.train=CORPUS", r"another data\.train"),
        ("data.train=TOKENIZER", r"another data\.train"),
        ("loop.updates=500", r"this run needs \d+ epochs; run fastdistil cache-teacher"),
        ("objective.a_cos=1", "holds no hidden states; set objective.a_cos=0"),
        ("objective.a_ce=0", "nothing is learnt from the teacher's cache"),
        ("objective.divergence=jsd", "set objective.divergence=forward-kl"),
        ("teacher.cache=nowhere", "no teacher cache at nowhere"),
        ("teacher.cache=null", "teacher.top_k is of a cached teacher"),
    ],
)
def test_a_cache_of_something_else_is_refused(override: str, message: str, material: Path, tmp_path: Path) -> None:
    plain = recipe_of(material, tmp_path, "student.path=" + str(material / "other"))
    out = cache_of(plain, tmp_path, top_k=4)
    for placeholder, name in (("OTHER", "other"), ("CORPUS", "shorter"), ("TOKENIZER", "otherwise")):
        override = override.replace(placeholder, str(material / name))
    overrides = [f"teacher.cache={out}", "teacher.top_k=4", override]
    recipe = recipe_of(material, tmp_path, f"student.path={material / 'other'}", *overrides)
    with pytest.raises(UserError, match=message):
        train(recipe)
    with pytest.raises(UserError, match=message):
        show_plan(resolve(recipe), tmp_path, rich.console.Console(quiet=True))


def test_damage_is_seen(material: Path, tmp_path: Path) -> None:
    plain = recipe_of(material, tmp_path)
    out = cache_of(plain, tmp_path, top_k=4)
    recipe = plain.with_(teacher={"cache": str(out), "top_k": 4})
    shard = out / teacher_cache.shard_name(0, 1)
    good = shard.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for damaged in (bytes(flipped), good[:-5]):
        shard.write_bytes(damaged)
        with pytest.raises(CorruptData, match=r"is damaged: .* run fastdistil cache-teacher again"):
            train(recipe)
    assert cache_teacher(recipe, out).made == 1
    assert shard.read_bytes() == good
    (out / teacher_cache.IDENTITY).write_text("{}")
    with pytest.raises(CorruptData, match=r"identity\.json is damaged"):
        train(recipe)


def test_the_command(material: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(recipe_of(material, tmp_path, "teacher.top_k=4").to_yaml())
    command = [sys.executable, "-c", "from fastdistil.cli import main; main()", "cache-teacher", str(recipe)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = re.findall(r"teacher\.cache=(\S+)", done.stdout)
    assert Path(path).parent == material / "corpus"
    train_command = [*command[:3], "train", str(recipe), f"teacher.cache={path}"]
    plan = subprocess.run([*train_command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"teacher parameters\W+cached", plan)
    assert re.search(r"teacher weights\W+0\.0 MiB", plan)
    done = subprocess.run(train_command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_refuses(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(recipe_of(material, tmp_path, "teacher.top_k=4").to_yaml())
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "book.txt").write_text("text")
    for arguments, message in (
        (["--out", str(tmp_path / "file")], "a file is in the way; choose another --out"),
        (["--out", str(tmp_path / "file" / "below")], "a file is in the way; choose another --out"),
        (["--out", str(tmp_path / "full")], "holds something else; give --out a new directory"),
        (["objective.divergence=jsd"], "a cache teaches the forward KL only"),
        (["teacher.top_k=100000"], "set it to at most that"),
    ):
        monkeypatch.setattr(sys, "argv", ["fastdistil", "cache-teacher", str(recipe), *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        error = capsys.readouterr().err
        assert (exit_info.value.code, message in " ".join(error.split())) == (2, True), error


def test_a_shard_that_is_no_array_of_records_is_refused_in_a_line(tmp_path: Path) -> None:
    """With data.verify=size only the size was looked at."""
    path = tmp_path / "0-00000.npy"
    np.save(path, np.zeros(3, "S0"))
    empty_items = path.read_bytes().replace(b"|S1", b"|S0")
    np.save(path, np.zeros((2, 3)))
    for content in (b"PK\x03\x04" + bytes(40), empty_items, path.read_bytes(), b"", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(CorruptData, match=f"{path} holds no records"):
            teacher_cache.open_shard(path)
