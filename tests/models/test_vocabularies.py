"""Teachers, students and corpora whose vocabularies are the same where it matters, and those that are not."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from fastdistil.console import Console
from fastdistil.data.corpus import Corpus
from fastdistil.data.masking import mask_table
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.sources import from_mappings
from fastdistil.data.tokenizer import load_tokenizer, token_facts, train_wordpiece
from fastdistil.errors import UserError
from fastdistil.evaluate import EvaluateOptions, evaluate
from fastdistil.kernels.distill_options import DistillOptions, Head
from fastdistil.kernels.linear_distill import linear_distill_loss
from fastdistil.kernels.sparse_distill import top_k
from fastdistil.models.language_model import LanguageModel
from fastdistil.models.perplexity import held_out
from fastdistil.models.vocabularies import differing_ids, facts_within
from fastdistil.objective import denominators, loss_terms
from fastdistil.recipe import Mask, Objective, Recipe
from fastdistil.training.cache_teacher import cache_teacher
from fastdistil.training.inputs import resolve
from fastdistil.training.memory_plan import make_plan
from tests.small_run import TINY, learnt, quiet, saved_state, small

TOKENS = 300
"""Entries of the material's tokenizer."""
CONFIG = {**TINY, "num_hidden_layers": 1}


def bert(rows: int, seed: int = 0, width: int = 32) -> Any:
    """A model far from its initial state, so that padding columns have some of the probability."""
    torch.manual_seed(seed)
    sizes = {key: value for key, value in CONFIG.items() if key != "model_type"} | {"hidden_size": width}
    model: Any = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=rows, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(folder: Path, rows: int, tokenizer: Path | None, seed: int = 0) -> Path:
    bert(rows, seed).save_pretrained(folder)
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, folder)
    return folder


def renamed(source: Path, folder: Path, spellings: dict[str, str], extra: str | None = None) -> Path:
    """A copy of a tokenizer with other spellings for some of its tokens and, perhaps, one token more for padding."""
    folder.mkdir()
    values = json.loads((source / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = {spellings.get(token, token): index for token, index in vocabulary.items()}
    values["model"]["unk_token"] = spellings.get(values["model"]["unk_token"], values["model"]["unk_token"])
    for token in values["added_tokens"]:
        token["content"] = spellings.get(token["content"], token["content"])
    for end in ("sep", "cls"):
        values["post_processor"][end][0] = spellings.get(values["post_processor"][end][0], values["post_processor"][end][0])
    roles = json.loads((source / "tokenizer_config.json").read_text())
    roles = {key: spellings.get(value, value) if isinstance(value, str) else value for key, value in roles.items()}
    if extra is not None:
        values["added_tokens"].append({**values["added_tokens"][0], "id": len(vocabulary), "content": extra})
        roles["pad_token"] = extra
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


def run(material: Path, tmp_path: Path, *overrides: str, name: str = "run") -> Recipe:
    """One update; the student is made from CONFIG unless the overrides say from what."""
    student = [] if any(override.startswith("student.") for override in overrides) else [f"student.config={json.dumps(CONFIG)}"]
    fixed = ["student.every=null", "objective.a_cos=0", "loop.updates=1", "evaluation.every=null", "checkpoint.every=null"]
    return small(material, tmp_path, *fixed, *student, f"name={name}", *overrides)


def notes_of(recipe: Recipe) -> list[str]:
    """Train, and return what was said meanwhile."""
    from fastdistil import train

    said: list[str] = []
    console = Console(quiet=True)
    console.note = said.append  # type: ignore[method-assign]
    train.train(recipe, console=console)
    return said


# Token by token


def test_what_is_compared_is_each_token_or_its_role(material: Path, tmp_path: Path) -> None:
    source = material / "tokenizer"
    ours = load_tokenizer(source)
    names = {"[PAD]": "<pad>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>", "[UNK]": "<unk>"}
    other = load_tokenizer(renamed(source, tmp_path / "names", names))
    assert differing_ids(ours, other, range(TOKENS)) == {}
    words = sorted((index, token) for token, index in ours.get_vocab().items() if token.isalpha() and len(token) > 2)[:2]
    (first, one), (second, two) = words
    swapped = load_tokenizer(renamed(source, tmp_path / "words", {one: two, two: one}))
    assert differing_ids(ours, swapped, range(TOKENS)) == {first: (repr(one), repr(two)), second: (repr(two), repr(one))}
    assert differing_ids(ours, swapped, [0, 5, second]) == {second: (repr(two), repr(one))}
    roles = load_tokenizer(renamed(source, tmp_path / "roles", {"[CLS]": "[SEP]", "[SEP]": "[CLS]"}))
    # The same spellings at other ids, with the same roles at the same ids.
    assert differing_ids(ours, roles, range(TOKENS)) == {}
    assert differing_ids(ours, ours, [TOKENS - 1, TOKENS]) == {}
    longer = load_tokenizer(renamed(source, tmp_path / "longer", {}, extra="<extra>"))
    assert differing_ids(ours, longer, [TOKENS]) == {TOKENS: ("nothing", "'<extra>'")}


def test_special_tokens_may_have_other_names_and_unused_ids_other_tokens(material: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(material / "train")
    heldout, tokenizer = Corpus.open(material / "heldout"), load_tokenizer(material / "tokenizer")
    spelt = {index: token for token, index in tokenizer.get_vocab().items()}
    unused = [spelt[index] for index in np.flatnonzero((corpus.counts == 0) & (heldout.counts == 0)) if index > 4]
    assert unused
    names = {"[PAD]": "<pad>", "[CLS]": "<s>", "[MASK]": "<mask>", unused[0]: "somethingelse"}
    other = renamed(material / "tokenizer", tmp_path / "tokenizer", names)
    teacher = save(tmp_path / "teacher", TOKENS, other)
    quiet(run(material, tmp_path, f"teacher.path={teacher}"))
    options = EvaluateOptions(positions=0, device="cpu", precision="fp32")
    (measured,) = evaluate(str(teacher), [str(material / "heldout")], options).corpora
    assert measured.heldout is not None


def test_vocabularies_that_differ_in_a_used_id_are_refused_by_name_and_the_advice_works(material: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in (material / "train.jsonl").read_text().splitlines()]
    other = train_wordpiece(["zebra quux " * 50, *texts], TOKENS, tmp_path / "other")
    teacher = save(tmp_path / "teacher", TOKENS, other)
    recipe = run(material, tmp_path, f"teacher.path={teacher}", "data.heldout=null")
    spelt = {index: token for token, index in load_tokenizer(other).get_vocab().items()}
    corpus = Corpus.open(material / "train")
    ours = {index: token for token, index in load_tokenizer(corpus.tokenizer_dir).get_vocab().items()}
    differing = [index for index in np.flatnonzero(corpus.counts) if spelt[index] != ours[index]]
    pattern = rf"has another vocabulary than the corpus \(of \d+ ids in use {len(differing)} differ: (.*); \.\.\.\); prepare"
    with pytest.raises(UserError, match=pattern) as caught:
        quiet(recipe)
    (shown,) = re.findall(pattern, str(caught.value))
    assert shown == "; ".join(f"{i} is {spelt[i]!r}, in the corpus {ours[i]!r}" for i in differing[:10])
    with pytest.raises(UserError, match=pattern):
        make_plan(resolve(recipe), print)
    with pytest.raises(UserError, match=pattern):
        cache_teacher(recipe, tmp_path / "cache")
    with pytest.raises(UserError, match=pattern):
        evaluate(str(teacher), [str(material / "train")], EvaluateOptions(device="cpu"))
    advice = str(caught.value).rpartition("; ")[2]
    assert advice == f"prepare the corpus with --tokenizer {teacher}"
    prepare(
        [str(material / "train.jsonl")], tmp_path / "corpus", PrepareOptions(tokenizer=str(teacher), max_length=48, workers=1)
    )
    quiet(run(material, tmp_path, f"teacher.path={teacher}", "data.heldout=null", f"data.train={tmp_path / 'corpus'}"))
    # A student of the first vocabulary beside this teacher: no corpus suits both, whichever is prepared.
    student = save(tmp_path / "student", TOKENS, material / "tokenizer")
    for train_on in (tmp_path / "corpus", material / "train"):
        both = [f"teacher.path={teacher}", f"student.path={student}", f"data.train={train_on}", "data.heldout=null"]
        with pytest.raises(UserError, match="choose a teacher and a student of one vocabulary"):
            quiet(run(material, tmp_path, *both, name="both"))


# Other padding


def truth(
    student: Any, teacher: Any, ids_BS: Tensor, labels_BS: Tensor, columns: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The soft and the hard term as sums, by whole logits of transformers that end after `columns`."""
    student_NV, teacher_NV = (model(input_ids=ids_BS).logits[..., :columns].flatten(0, 1) for model in (student, teacher))
    log_q, log_p = ((logits_NV / temperature).log_softmax(-1) for logits_NV in (student_NV, teacher_NV.detach()))
    soft = temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
    return soft, F.cross_entropy(student_NV, labels_BS.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("path", ["torch", "reference"])
@pytest.mark.parametrize("rows", [(320, 304), (304, 320), (301, 300)])
def test_losses_and_gradients_are_those_of_truncated_vocabularies(rows: tuple[int, int], path: Any) -> None:
    teacher, student = bert(rows[0], 1, width=48).double(), bert(rows[1], 2).double()
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(5, TOKENS, (3, 11), generator=generator)
    labels_BS = torch.where(torch.rand(3, 11, generator=generator) < 0.3, ids_BS.roll(1, 1), -100)
    soft, hard = truth(student, teacher, ids_BS, labels_BS, TOKENS, 2.0)
    labels = int((labels_BS != -100).sum())
    expected = 5 * soft / 33 + 2 * hard / labels
    expected.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    with torch.no_grad():
        full_loss, _ = truth(student, bert(rows[1], 1, width=48).double(), ids_BS, labels_BS, rows[1], 2.0)
    assert abs(float(full_loss) / float(soft.detach()) - 1) > 1e-3  # the padding has some of the probability
    student.zero_grad()

    mapping = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": labels_BS}
    (batch,) = from_mappings([mapping], causal=False)
    objective = Objective(a_ce=5.0, a_mlm=2.0, a_cos=0.0, temperature=2.0)
    per = denominators(objective, batch.counts, batch.counts)
    ours = LanguageModel(student)
    terms = loss_terms(objective, ours, LanguageModel(teacher), batch, per, columns=TOKENS, backend=path)
    terms.total.backward()  # type: ignore[no-untyped-call]
    assert float(terms.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert float(terms.soft) == pytest.approx(float(soft.detach()) / 33, rel=1e-9)
    for name, parameter in student.named_parameters():
        if gradients[name] is not None:
            assert parameter.grad is not None
            assert (parameter.grad - gradients[name]).norm() <= 1e-9 * max(float(gradients[name].norm()), 1e-3), name
    assert ours.weight.grad is not None
    assert not ours.weight.grad[TOKENS:].any()


def test_a_list_of_all_shared_tokens_is_the_truncated_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    teacher_NV, hidden_ND, weight_VD = torch.randn(9, 320, **draw), torch.randn(9, 16, **draw), torch.randn(304, 16, **draw)
    teacher_NV[:, TOKENS:] += 4
    listed = top_k(teacher_NV, TOKENS, temperature=2.0, columns=TOKENS)
    assert int(listed.indices_NK.max()) < TOKENS
    options = DistillOptions(temperature=2.0, hard=0.0, columns=TOKENS)
    loss = linear_distill_loss(Head(hidden_ND, weight_VD), listed, options=options)
    log_q = ((hidden_ND @ weight_VD.T)[:, :TOKENS] / 2).log_softmax(-1)
    log_p = (teacher_NV[:, :TOKENS] / 2).log_softmax(-1)
    assert float(loss.total) == pytest.approx(4 * float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-9)


def test_padded_teachers_teach_online_and_from_a_cache(material: Path, tmp_path: Path) -> None:
    teacher, student = (save(tmp_path / name, rows, material / "tokenizer", rows) for name, rows in (("t", 320), ("s", 304)))
    overrides = [
        f"teacher.path={teacher}",
        f"student.path={student}",
        "loop.updates=2",
        "student.dropout=0",
        "checkpoint.every=1",
    ]
    recipe = run(material, tmp_path, *overrides, name="online")
    (note,) = (said for said in notes_of(recipe) if "vocabulary" in said)
    assert "320 entries, the student's 304" in note
    assert f"the first {TOKENS}," in note
    before, after = saved_state(tmp_path / "online", 1), saved_state(tmp_path / "online", 2)
    weight = "model.student.bert.embeddings.word_embeddings.weight"
    assert not torch.equal(before[weight][:TOKENS], after[weight][:TOKENS])
    assert before[weight].shape == (304, 32)
    gradients = after[weight][TOKENS:] - before[weight][TOKENS:]
    # Weight decay alone moves what gets no gradient.
    assert gradients.norm() <= 1e-3 * before[weight][TOKENS:].norm()

    with pytest.raises(UserError, match=f"top_k is 310, the teacher has {TOKENS} tokens"):
        cache_teacher(run(material, tmp_path, *overrides, "teacher.top_k=310"), tmp_path / "cache")
    listed = [*overrides, f"teacher.top_k={TOKENS}"]
    cache_teacher(run(material, tmp_path, *listed), tmp_path / "cache")
    indices = np.concatenate([np.load(shard)["index"] for shard in (tmp_path / "cache").glob("*.npy")])
    assert int(indices.max()) == TOKENS - 1
    quiet(run(material, tmp_path, *listed, f"teacher.cache={tmp_path / 'cache'}", name="cached"))
    for cached, online in zip(learnt(tmp_path / "cached"), learnt(tmp_path / "online"), strict=True):
        assert cached[:5] == pytest.approx(online[:5], rel=2e-3)
    planned = resolve(run(material, tmp_path, *listed, f"teacher.cache={tmp_path / 'cache'}"))
    planned_notes: list[str] = []
    assert make_plan(planned, planned_notes.append).updates == 2
    assert note in planned_notes

    # For a student as wide as the teacher the list is another one; what the message advises gives it.
    wide = [*listed, f"student.path={save(tmp_path / 'wide', 320, material / 'tokenizer')}"]
    with pytest.raises(UserError, match=r"made with another columns.*run fastdistil cache-teacher with this one"):
        quiet(run(material, tmp_path, *wide, f"teacher.cache={tmp_path / 'cache'}", name="wide-run"))
    cache_teacher(run(material, tmp_path, *wide), tmp_path / "wide-cache")
    quiet(run(material, tmp_path, *wide, f"teacher.cache={tmp_path / 'wide-cache'}", name="wide-run"))


def test_the_divergence_of_held_out_text_is_that_of_truncated_vocabularies(material: Path) -> None:
    corpus, facts = Corpus.open(material / "heldout"), token_facts(load_tokenizer(material / "tokenizer"))
    teacher, student = (LanguageModel(bert(rows, rows).double()) for rows in (320, 304))
    same = LanguageModel(bert(304, 304).double())
    scores = held_out(student, corpus, facts, teacher=teacher, columns=TOKENS, max_sequences=5)
    with torch.no_grad():
        for model in (teacher, same):
            model.bias[TOKENS:] = -torch.inf  # type: ignore[index]
        teacher.module.resize_token_embeddings(304)
        teacher.bias[TOKENS:] = -torch.inf  # type: ignore[index]
    truncated = held_out(same, corpus, facts, teacher=teacher, max_sequences=5)
    assert scores.kl == pytest.approx(truncated.kl, rel=1e-9)
    assert scores.loss > truncated.loss  # the loss is of the model as it is, padding and all
    with pytest.raises(UserError, match=r"entries, the model's 304; say which they share with columns"):
        held_out(student, corpus, facts, teacher=LanguageModel(bert(320)), max_sequences=5)


@pytest.mark.parametrize("advice", ["tokenizer", "size"])
def test_sizes_that_may_be_two_vocabularies_are_refused_and_both_advices_work(
    advice: str, material: Path, tmp_path: Path
) -> None:
    teacher = save(tmp_path / "teacher", 320, None)
    overrides = [f"teacher.path={teacher}"]
    with pytest.raises(UserError, match=r"320 entries, the student's 300.* 320 entries \(student.config.vocab_size\)"):
        quiet(run(material, tmp_path, *overrides))
    if advice == "tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(material / "tokenizer" / name, teacher)
    else:
        overrides.append(f"student.config={json.dumps({**CONFIG, 'vocab_size': 320})}")
    quiet(run(material, tmp_path, *overrides))


def test_modules_of_other_sizes_are_refused_until_they_are_resized(material: Path, tmp_path: Path) -> None:
    teacher, student = bert(320), bert(304)
    recipe = run(material, tmp_path)
    with pytest.raises(UserError, match=r"320 entries \(student.config.vocab_size\)|320 entries \(resize_token_embeddings"):
        quiet(recipe, teacher=teacher, student=student)
    student.resize_token_embeddings(320)
    quiet(recipe, teacher=teacher, student=student)


# An entry more than the model has


@pytest.fixture
def longer(material: Path, tmp_path: Path) -> Path:
    """longer/: a tokenizer with one entry more than the models have, which pads; corpus/ prepared with it."""
    tokenizer = renamed(material / "tokenizer", tmp_path / "longer", {}, extra="<extra>")
    options = PrepareOptions(tokenizer=str(tokenizer), max_length=48, workers=1)
    manifest = prepare([str(material / "train.jsonl")], tmp_path / "corpus", options)
    assert manifest.vocab_size == TOKENS + 1
    assert token_facts(load_tokenizer(tokenizer)).pad_id == TOKENS
    return tokenizer


@pytest.mark.parametrize("layout", ["packed", "length-grouped"])
def test_a_tokenizer_with_an_unused_entry_more_than_the_model_is_accepted(
    layout: str, longer: Path, material: Path, tmp_path: Path
) -> None:
    """Padding and random replacements would lie beyond the embeddings."""
    teacher, student = (save(tmp_path / name, TOKENS, longer, seed) for seed, name in enumerate(("teacher", "student")))
    overrides = [
        f"teacher.path={teacher}",
        f"student.path={student}",
        f"data.train={tmp_path / 'corpus'}",
        f"data.layout={layout}",
    ]
    # The held-out corpus has the shorter tokenizer: the ids in use are the same.
    quiet(run(material, tmp_path, *overrides, "mask={mask: 0.1, keep: 0, random: 0.9}", name="both"))
    quiet(run(material, tmp_path, *overrides[::2], f"data.layout={layout}", name="fresh"))  # a student of 301, a teacher of 300
    options = EvaluateOptions(positions=20, device="cpu", precision="fp32")
    report = evaluate(str(student), [str(tmp_path / "corpus"), str(material / "heldout.jsonl")], options)
    assert all(corpus.heldout is not None and corpus.pseudo is not None for corpus in report.corpora)


def test_ids_beyond_the_model_are_never_drawn(longer: Path, tmp_path: Path) -> None:
    facts, corpus = token_facts(load_tokenizer(longer)), Corpus.open(tmp_path / "corpus")
    within = facts_within(facts, TOKENS)
    assert (within.pad_id, within.special_ids[-1], within.vocab_size) == (0, TOKENS, TOKENS + 1)
    assert mask_table(Mask(), within, corpus.counts).ordinary_ids.max() < TOKENS
    assert facts_within(facts, TOKENS + 1) is facts


def test_an_id_in_use_that_the_model_lacks_is_refused_and_the_advices_work(material: Path, tmp_path: Path) -> None:
    short = json.dumps({**CONFIG, "vocab_size": 290})
    largest = int(np.flatnonzero(Corpus.open(material / "train").counts)[-1])
    assert largest >= 290
    with pytest.raises(
        UserError, match=f"the student has 290 entries .* token id {largest} .*leave student.config.vocab_size out"
    ):
        quiet(run(material, tmp_path, f"student.config={short}"))
    quiet(run(material, tmp_path))
    student = save(tmp_path / "student", 290, material / "tokenizer")
    with pytest.raises(UserError, match=rf"the student has 290 entries .* give the model {largest + 1} entries \(resize"):
        quiet(run(material, tmp_path, f"student.path={student}", name="path"))
    with pytest.raises(UserError, match="the model has 290 entries"):
        evaluate(str(student), [str(material / "train")], EvaluateOptions(device="cpu"))
    model: Any = transformers.BertForMaskedLM.from_pretrained(student)
    model.resize_token_embeddings(largest + 1)
    model.save_pretrained(student)
    largest_heldout = int(np.flatnonzero(Corpus.open(material / "heldout").counts)[-1])
    assert largest_heldout <= largest
    quiet(run(material, tmp_path, f"student.path={student}", name="path"))


def test_a_dry_run_refuses_in_a_run_s_words(material: Path, tmp_path: Path) -> None:
    """An id that held-out text alone uses, and a teacher that is not there."""
    (tmp_path / "few.txt").write_text("a a a a")
    options = PrepareOptions(tokenizer=str(material / "tokenizer"), max_length=48, workers=1)
    prepare([str(tmp_path / "few.txt")], tmp_path / "few", options)
    few, largest = (int(np.flatnonzero(Corpus.open(p).counts)[-1]) for p in (tmp_path / "few", material / "heldout"))
    assert few < largest
    config = f"student.config={json.dumps({**CONFIG, 'vocab_size': few + 1})}"
    corpora = [f"data.train={tmp_path / 'few'}", f"data.heldout={material / 'heldout'}", "teacher=null"]
    alone = run(material, tmp_path, *corpora, config, "objective.a_ce=0", "objective.projection=false")
    for recipe, words in (
        (alone, f"token id {largest} is in use"),
        (run(material, tmp_path, "teacher=null"), "recipe has none"),
    ):
        for refuse in (lambda: quiet(recipe), lambda: make_plan(resolve(recipe), print)):  # noqa: B023
            with pytest.raises(UserError, match=words):
                refuse()
