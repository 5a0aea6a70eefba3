"""The objective and the loop against the published distillation step, written out here independently.

The published formulas (Sanh et al. 2019, and the Hugging Face example's step): the student's and the teacher's logits at the
non-padding positions picked out with a boolean mask; KLDivLoss(batchmean) of them at the temperature, times its square;
CrossEntropyLoss over the masked tokens; CosineEmbeddingLoss of the last hidden states at the non-padding positions.
"""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from fastdistil import distil
from fastdistil.data.batch import Batch, Counts
from fastdistil.data.batches import Batches
from fastdistil.data.corpus import Corpus
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.python_docs import docstrings
from fastdistil.data.ragged import Ints
from fastdistil.data.sources import from_mappings
from fastdistil.data.tokenizer import load_tokenizer, token_facts, train_wordpiece
from fastdistil.kernels import backend
from fastdistil.models.language_model import LanguageModel
from fastdistil.models.students import distilbert_from_bert, fewer_layers
from fastdistil.objective import Denominators, denominators, loss_terms
from fastdistil.recipe import Objective, Optim
from fastdistil.training.optim import learning_rate

VOCABULARY = 97
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": VOCABULARY}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(seed: int, layers: int = 4, **more: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(num_hidden_layers=layers, max_position_embeddings=40, **{**SIZES, **QUIET, **more})
    return transformers.BertForMaskedLM(config)


def roberta(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(num_hidden_layers=4, max_position_embeddings=42, pad_token_id=1, **SIZES, **QUIET)
    return transformers.RobertaForMaskedLM(config)


def gpt2(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_layer=4, n_embd=32, n_head=4, vocab_size=VOCABULARY, n_positions=40, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def make_pair(kind: str) -> tuple[Any, LanguageModel]:
    """(teacher, student) in float64; the student's weights are moved, so that no term is near 0."""
    teacher = {"distilbert": bert, "bert": bert, "roberta": roberta, "gpt2": gpt2}[kind](1)
    student = distilbert_from_bert(teacher, [0, 2]) if kind == "distilbert" else fewer_layers(teacher, [0, 2])
    torch.manual_seed(2)
    with torch.no_grad():
        for model in (teacher, student.module):
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return teacher.double().eval(), student.double().train()


def padded_text(causal: bool, pad: int) -> dict[str, Tensor]:
    """A padded batch whose labels sit on some of the tokens (causal: on all)."""
    generator = np.random.default_rng(5)
    lengths = [17, 5, 30, 2, 11]
    ids = torch.full((len(lengths), max(lengths)), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.from_numpy(generator.integers(5, VOCABULARY, length))
        mask[row, :length] = 1
        if causal:
            labels[row, :length] = ids[row, :length]
        elif length > 2:
            chosen = torch.from_numpy(generator.choice(length, max(1, length // 5), replace=False))
            labels[row, chosen] = torch.from_numpy(generator.integers(5, VOCABULARY, len(chosen)))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def published_terms(student: Any, teacher: Any, text: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """The example's losses on one micro-batch, literally; each term a mean of its own."""
    ids, mask, labels = text["input_ids"], text["attention_mask"], text["labels"]
    s = student(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    with torch.no_grad():
        t = teacher(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    chosen = mask.bool().unsqueeze(-1).expand_as(s.logits)
    s_selected = torch.masked_select(s.logits, chosen).view(-1, s.logits.size(-1))
    t_selected = torch.masked_select(t.logits, chosen).view(-1, s.logits.size(-1))
    soft = nn.KLDivLoss(reduction="batchmean")(
        nn.functional.log_softmax(s_selected / temperature, dim=-1), nn.functional.softmax(t_selected / temperature, dim=-1)
    )
    if student.config.model_type == "gpt2":
        logits, targets = s.logits[:, :-1, :].reshape(-1, s.logits.size(-1)), labels[:, 1:].reshape(-1)
    else:
        logits, targets = s.logits.view(-1, s.logits.size(-1)), labels.view(-1)
    hard = nn.CrossEntropyLoss(ignore_index=-100)(logits, targets)
    s_hidden, t_hidden = s.hidden_states[-1], t.hidden_states[-1]
    chosen = mask.bool().unsqueeze(-1).expand_as(s_hidden)
    s_rows = torch.masked_select(s_hidden, chosen).view(-1, s_hidden.size(-1))
    t_rows = torch.masked_select(t_hidden, chosen).view(-1, t_hidden.size(-1))
    cosine = nn.CosineEmbeddingLoss(reduction="mean")(s_rows, t_rows, s_rows.new_ones(s_rows.size(0)))
    return {"soft": soft * temperature**2, "hard": hard, "cosine": cosine}


def packed(batch: Batch, text: dict[str, Tensor], causal: bool) -> Batch:
    """The same sequences laid end to end, shortest first."""
    from fastdistil.data.batch import assemble

    lengths = text["attention_mask"].sum(1).numpy()
    rows = np.argsort(lengths, kind="stable")
    ids = np.concatenate([text["input_ids"][row, : lengths[row]].numpy() for row in rows])
    labels = np.concatenate([batch.labels_N.view(text["labels"].shape)[row, : lengths[row]].numpy() for row in rows])
    targets: Ints = np.flatnonzero(labels != -100)
    if causal:
        assert len(targets) == len(ids) - len(lengths)
    return assemble(ids, lengths[rows], targets, labels[targets])


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta", "gpt2"])
def test_terms_and_gradients_are_the_published_ones(kind: str, layout: str) -> None:
    """Relative error under 1e-9 in float64, for every term, the total and every gradient."""
    teacher, student = make_pair(kind)
    causal = kind == "gpt2"
    text = padded_text(causal, pad=1 if kind == "roberta" else 0)
    objective = Objective(a_ce=5.0, a_mlm=0.0 if causal else 2.0, a_clm=2.0 if causal else 0.0, a_cos=1.0, temperature=2.0)

    literal = copy.deepcopy(student.module)
    literal.set_attn_implementation("eager")
    truth = published_terms(literal, copy.deepcopy(teacher), text, 2.0)
    total = 5.0 * truth["soft"] + 2.0 * truth["hard"] + 1.0 * truth["cosine"]
    total.backward()
    assert all(float(term.detach()) > 0.01 for term in truth.values())  # nothing trivial is compared

    (batch,) = from_mappings([text], causal=causal)
    if layout == "packed":
        batch = packed(batch, text, causal)
    per = denominators(objective, batch.counts, batch.counts)
    terms = loss_terms(objective, student, LanguageModel(teacher), batch, per)
    terms.total.backward()

    values = {"soft": terms.soft, "hard": terms.hard, "cosine": terms.cosine, "total": terms.total}
    for name, expected in {**truth, "total": total}.items():
        assert abs(float(values[name]) / float(expected) - 1) < 1e-9, name
    for (name, ours), (_, theirs) in zip(student.module.named_parameters(), literal.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            difference = (ours.grad - theirs.grad).norm()
            # A bias whose gradient cancels exactly (keys under softmax) has no relative error: judge it by the whole.
            scale = max(float(theirs.grad.norm()), 1e-3)
            assert float(difference) / scale < 1e-9, name


def test_divergences_against_torch_distributions() -> None:
    from fastdistil.kernels.distill import divergence_reference

    torch.manual_seed(0)
    s, t = 3 * torch.randn(7, 50, dtype=torch.float64), 3 * torch.randn(7, 50, dtype=torch.float64)
    for temperature in (1.0, 2.0):
        p = torch.distributions.Categorical(logits=t / temperature)
        q = torch.distributions.Categorical(logits=s / temperature)
        m = torch.distributions.Categorical(probs=0.3 * p.probs + 0.7 * q.probs)
        kl = torch.distributions.kl_divergence
        expected = {"forward-kl": kl(p, q), "reverse-kl": kl(q, p), "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m)}
        for name, rows in expected.items():
            divergence = divergence_reference(s, t, temperature=temperature, divergence=name, beta=0.3)  # type: ignore[arg-type]
            torch.testing.assert_close(divergence, temperature**2 * rows, rtol=1e-10, atol=1e-12)


def test_normalisation_makes_the_cut_of_an_update_irrelevant() -> None:
    """One big batch, or its sequences in four micro-batches: the same gradient in float64; means of means differ."""
    teacher, student = make_pair("bert")
    text = padded_text(False, 0)
    objective = Objective()
    wrapped = LanguageModel(teacher)

    def gradient(parts: list[dict[str, Tensor]], objective: Objective) -> Tensor:
        student.zero_grad()
        batches = list(from_mappings(parts, causal=False))
        update = sum((batch.counts for batch in batches), Counts())
        for batch in batches:
            per = denominators(objective, update, batch.counts)
            loss_terms(objective, student, wrapped, batch, per).total.backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    one_batch = gradient([text], objective)
    parts = [
        {name: tensor[rows] for name, tensor in text.items()} for rows in (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5))
    ]
    cut = gradient(parts, objective)
    assert float((one_batch - cut).norm() / one_batch.norm()) < 1e-12
    means = gradient(parts, objective.model_copy(update={"normalisation": "micro-batch"}))
    assert float((one_batch - means).norm() / one_batch.norm()) > 1e-2


def test_weights_and_masked_rows_of_the_soft_loss() -> None:
    teacher, student = make_pair("bert")
    text = padded_text(False, 0)
    text["weights"] = torch.rand(text["input_ids"].shape, generator=torch.Generator().manual_seed(3)) * 2
    (batch,) = from_mappings([text], causal=False)
    mask = text["attention_mask"].bool()
    s = student.module(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
    t = teacher(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
    rows = 4 * nn.functional.kl_div((s / 2).log_softmax(-1), (t / 2).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    weights = text["weights"].double()
    objective = Objective(a_cos=0.0)
    per = denominators(objective, batch.counts, batch.counts)
    soft = loss_terms(objective, student, LanguageModel(teacher), batch, per).soft
    # The weights' sum is a float of the host; the weights are float32.
    torch.testing.assert_close(soft, (rows * weights)[mask].sum() / weights[mask].sum(), rtol=1e-6, atol=0)
    masked_only = Objective(a_cos=0.0, soft_rows="masked")
    per = denominators(masked_only, batch.counts, batch.counts)
    soft = loss_terms(masked_only, student, LanguageModel(teacher), batch, per).soft
    torch.testing.assert_close(soft, rows[text["labels"] != -100].mean(), rtol=1e-10, atol=0)


def test_a_batch_without_labels_has_a_hard_term_of_zero() -> None:
    teacher, student = make_pair("bert")
    text = padded_text(False, 0)
    text["labels"] = torch.full_like(text["labels"], -100)
    (batch,) = from_mappings([text], causal=False)
    objective = Objective()
    per = denominators(objective, batch.counts, batch.counts)
    assert per == Denominators(float(text["attention_mask"].sum()), 1.0, float(text["attention_mask"].sum()))
    terms = loss_terms(objective, student, LanguageModel(teacher), batch, per)
    assert float(terms.hard) == 0.0
    assert bool(torch.isfinite(terms.total))


def literal_training(
    student: Any, teacher: Any, batches: Batches, updates: int, accumulation: int, optim: Optim
) -> list[float]:
    """The example's loop, literally, on padded copies of our batches: the mean loss of each update."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=optim.lr, eps=1e-6, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(optim, step, updates) / optim.lr)
    losses, epoch, number = [], 0, 0
    for _ in range(updates):
        if number == batches.updates_per_epoch(epoch):
            epoch, number = epoch + 1, 0
        window, _ = batches.window(epoch, number)
        number += 1
        update_loss = 0.0
        for batch in window:
            terms = published_terms(student, teacher, unpacked(batch), 2.0)
            loss = 5.0 * terms["soft"] + 2.0 * terms["hard"] + 1.0 * terms["cosine"]
            update_loss += loss.item() / len(window)
            (loss / len(window)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(update_loss)
    return losses


def unpacked(batch: Batch) -> dict[str, Tensor]:
    assert batch.packing is not None
    bounds = batch.packing.cu_seqlens.tolist()
    shape = (len(bounds) - 1, batch.packing.max_seqlen)
    text = {"input_ids": torch.zeros(shape, dtype=torch.long), "attention_mask": torch.zeros(shape, dtype=torch.long)}
    text["labels"] = torch.full(shape, -100)
    for row, (first, end) in enumerate(itertools.pairwise(bounds)):
        text["input_ids"][row, : end - first] = batch.ids_BS[0, first:end]
        text["attention_mask"][row, : end - first] = 1
        text["labels"][row, : end - first] = batch.labels_N[first:end]
    return text


def test_fifty_updates_follow_the_published_loop(tmp_path: Path) -> None:
    """Same weights, same batches, float32: the losses agree to 1e-5 at every one of 50 updates."""
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(docstrings(Path(json.__file__))) + "\n\n".join(docstrings(Path(copy.__file__))), encoding="utf-8"
    )
    tokenizer = train_wordpiece([text.read_text(encoding="utf-8")], VOCABULARY + 200, tmp_path / "tokenizer")
    prepare([str(text)], tmp_path / "corpus", PrepareOptions(tokenizer=str(tokenizer), max_length=32, workers=1))
    corpus = Corpus.open(tmp_path / "corpus")
    facts = token_facts(load_tokenizer(str(corpus.tokenizer_dir)))
    teacher = bert(1, vocab_size=facts.vocab_size, pad_token_id=facts.pad_id)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    student = fewer_layers(teacher, [0, 2]).module
    literal, literal_teacher = copy.deepcopy(student), copy.deepcopy(teacher).eval()

    result = distil(
        "distilbert",
        teacher=teacher,
        student=student,
        corpus=tmp_path / "corpus",
        data={"micro_batch_tokens": 200},
        objective={"normalisation": "micro-batch"},
        loop={"updates": 50, "epochs": None, "accumulation": 2, "precision": "fp32"},
        logging={"every": 1},
        runs_dir=str(tmp_path / "runs"),
        device="cpu",
    )
    events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    ours = [event["total"] for event in events if event["event"] == "train"]

    from fastdistil.recipe import load_recipe

    recipe = load_recipe("distilbert", ["data.micro_batch_tokens=200"])
    batches = Batches(corpus, facts, recipe.data, recipe.mask, seed=recipe.seed, accumulation=2, causal=False)
    theirs = literal_training(literal, literal_teacher, batches, 50, 2, recipe.optim)
    assert len(ours) == len(theirs) == 50
    assert theirs[-1] < theirs[0] - 0.5  # something was learnt
    for update, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        assert abs(a / b - 1) < 1e-5, f"update {update}: {a} against {b}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reference_and_fast_kernels_train_alike(precision: str, tmp_path: Path) -> None:
    """Fifty updates with either: the losses stay together within the dtype's error."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(docstrings(Path(json.__file__))), encoding="utf-8")
    tokenizer = train_wordpiece([text.read_text(encoding="utf-8")], VOCABULARY + 200, tmp_path / "tokenizer")
    prepare([str(text)], tmp_path / "corpus", PrepareOptions(tokenizer=str(tokenizer), max_length=32, workers=1))
    facts = token_facts(load_tokenizer(str(Corpus.open(tmp_path / "corpus").tokenizer_dir)))
    teacher = bert(1, vocab_size=facts.vocab_size, pad_token_id=facts.pad_id)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    curves = {}
    for kernels in ("reference", "torch"):
        result = distil(
            "distilbert",
            teacher=copy.deepcopy(teacher),
            student=fewer_layers(teacher, [0, 2]).module,
            corpus=tmp_path / "corpus",
            data={"micro_batch_tokens": 200},
            loop={"updates": 50, "epochs": None, "accumulation": 2, "precision": precision},
            logging={"every": 1},
            runs_dir=str(tmp_path / kernels),
            device="cpu",
            kernels=kernels,
        )
        events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
        assert next(event for event in events if event["event"] == "start")["kernels"] == kernels
        curves[kernels] = [event["total"] for event in events if event["event"] == "train"]
    assert len(curves["torch"]) == 50
    assert curves["torch"][-1] < curves["torch"][0] - 0.5
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert max(abs(a / b - 1) for a, b in zip(curves["torch"], curves["reference"], strict=True)) < tolerance


def test_kernels_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdistil.errors import UserError
    from fastdistil.recipe import load_recipe
    from fastdistil.training.inputs import resolve

    recipe = load_recipe("demo", ["device=cpu"])
    assert resolve(recipe).kernels == "torch"
    assert resolve(recipe.with_(kernels="reference")).kernels == "reference"
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    with pytest.raises(UserError, match="kernels is triton and the run's device is cpu: triton kernels need tensors on a GPU"):
        resolve(recipe.with_(kernels="triton"))
