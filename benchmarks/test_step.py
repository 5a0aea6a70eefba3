"""One update at DistilBERT's sizes: the published example's step against this trainer's, on the same weights and batch.

Teacher 12 layers, student 6, width 768, V = 30522, 8 sequences of 128 tokens, 15% of them masked, all three terms, AdamW. The
example's sides are its formulas (Sanh et al. 2019; the Hugging Face research example): whole logits, masked_select, a loss
module a term. Dropout is off, so that the losses can be compared.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastdistil.data.batch import Batch
from fastdistil.data.sources import from_mappings
from fastdistil.models.language_model import LanguageModel
from fastdistil.models.students import distilbert_from_bert
from fastdistil.objective import denominators, loss_terms
from fastdistil.recipe import Objective, Optim
from fastdistil.training.optim import make_optimizer

from .measure import DEVICE, measured

SEQUENCES, LENGTH, VOCABULARY = 8, 128, 30522
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@functools.cache
def models() -> tuple[Any, Any]:
    torch.manual_seed(0)
    teacher = transformers.BertForMaskedLM(transformers.BertConfig(**QUIET)).eval().requires_grad_(False)
    with torch.no_grad():  # an untrained head knows nothing: every term would be near its floor
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    student = distilbert_from_bert(teacher, [0, 2, 4, 7, 9, 11]).module
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return teacher, student


@functools.cache
def text() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1000, VOCABULARY, (SEQUENCES, LENGTH))
    labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100)
    return {"input_ids": ids.where(labels < 0, 103), "attention_mask": torch.ones_like(ids), "labels": labels}


def example_step(precision: str) -> tuple[Callable[[], Any], list[Tensor]]:
    teacher, student = (copy.deepcopy(model).to(DEVICE) for model in models())
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, eps=1e-6, betas=(0.9, 0.98), weight_decay=0.0)
    batch = {name: value.to(DEVICE) for name, value in text().items()}
    soft_loss, hard_loss, cosine_loss = nn.KLDivLoss(reduction="batchmean"), nn.CrossEntropyLoss(), nn.CosineEmbeddingLoss()
    losses: list[Tensor] = []

    def step() -> None:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            s = student(**inputs, output_hidden_states=True)
            with torch.no_grad():
                t = teacher(**inputs, output_hidden_states=True)
            chosen = batch["attention_mask"].bool().unsqueeze(-1)
            s_rows, t_rows = (x.logits.masked_select(chosen.expand_as(x.logits)).view(-1, VOCABULARY) for x in (s, t))
            soft = soft_loss((s_rows / 2).log_softmax(-1), (t_rows / 2).softmax(-1)) * 4
            hard = hard_loss(s.logits.view(-1, VOCABULARY), batch["labels"].view(-1))
            s_hidden, t_hidden = (x.hidden_states[-1] for x in (s, t))
            s_hidden, t_hidden = (x.masked_select(chosen.expand_as(x)).view(-1, x.shape[-1]) for x in (s_hidden, t_hidden))
            cosine = cosine_loss(s_hidden, t_hidden, s_hidden.new_ones(len(s_hidden)))
            total = 5 * soft + 2 * hard + cosine
        total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.detach())

    return step, losses


def fastdistil_step(precision: str) -> tuple[Callable[[], Any], list[Tensor]]:
    teacher, student = (LanguageModel(copy.deepcopy(model).to(DEVICE)) for model in models())
    student.train()
    if precision == "bf16":
        teacher.to(torch.bfloat16)
    objective, optim = Objective(), Optim(lr=1e-5)
    optimizer = make_optimizer([student], optim)
    (padded,) = from_mappings([text()], causal=False)
    batch: Batch = padded.to(DEVICE)
    per = denominators(objective, batch.counts, batch.counts)
    losses: list[Tensor] = []

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            terms = loss_terms(objective, student, teacher, batch, per)
        terms.total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(terms.total.detach())

    return step, losses


SIDES = {
    "eager fp32 (the example)": (example_step, "fp32"),
    "eager bf16 autocast (the example)": (example_step, "bf16"),
    "fastdistil fp32": (fastdistil_step, "fp32"),
    "fastdistil bf16": (fastdistil_step, "bf16"),
}


_first_losses: dict[str, float] = {}


@pytest.mark.parametrize("side", SIDES)
def test_step(benchmark: Any, side: str) -> None:
    make, precision = SIDES[side]
    step, losses = make(precision)
    benchmark.group = f"step, {SEQUENCES} x {LENGTH} tokens"
    measured(benchmark, step, 3, side=side, dtype=precision)
    facts = benchmark.extra_info
    facts["losses"] = [float(loss) for loss in losses]
    facts["tokens_per_s"] = SEQUENCES * LENGTH / facts["median_s"]
    print(f"\n{side}: {facts['tokens_per_s']:.0f} tokens/s, losses {facts['losses'][:3]}")
    _first_losses[side] = facts["losses"][0]
    expected = _first_losses.get("eager fp32 (the example)", facts["losses"][0])
    assert abs(facts["losses"][0] / expected - 1) < {"fp32": 1e-4, "bf16": 3e-2}[precision]
