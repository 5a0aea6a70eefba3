"""Distillations of 300 updates whose gradients two ranks, simulated in one process, exchange through each compressor.

A BERT of two layers, trained for nothing but with weights far from its initial ones, teaches one of a single layer; text is a
random walk through its vocabulary; optimizer, dropout and weights of the losses are the published recipe's. What is compared
is the held-out distillation loss at the end: its mean over three seeds (student, text, masks, dropout) against the mean and the
standard deviation without compression.

Measured while this was written: 10.720 uncompressed, standard deviation 0.025, from 13.0 at the start. 300 updates are few for
methods that send an element every 1 / density of them, and AdamW takes their bursts for noise: top-k ended at 11.03 with a
density of 0.01, at 10.76 with 0.1.
"""

import functools
import statistics
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastdistil.data.batch import Batch, Counts
from fastdistil.data.sources import from_mappings
from fastdistil.gradients.compressor import BucketLayout, CompressionState, CompressionSteps
from fastdistil.gradients.compressors import make_compressor, starts_at
from fastdistil.models.language_model import LanguageModel
from fastdistil.objective import denominators, loss_terms
from fastdistil.recipe import Compression, Objective, Optim
from fastdistil.training.optim import learning_rate, make_optimizer

UPDATES, RANKS, VOCABULARY, LENGTH = 300, 2, 160, 24
OBJECTIVE = Objective()
OPTIM = Optim()


def bert(seed: int, layers: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        max_position_embeddings=48,  # half of which no text reaches: parameters that never have a gradient
    )
    return transformers.BertForMaskedLM(config)


@functools.cache
def make_teacher() -> LanguageModel:
    teacher = bert(0, 2)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return LanguageModel(teacher.eval())


def text(seed: int, rows: int) -> Batch:
    """Each token is one of four that may follow the one before it; 15% of them are masked."""
    draws = torch.Generator().manual_seed(seed)
    follows = torch.randint(5, VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(1))
    ids = torch.randint(5, VOCABULARY, (rows, LENGTH), generator=draws)
    for place in range(1, LENGTH):
        chosen = torch.randint(0, 4, (rows,), generator=draws)
        ids[:, place] = follows[ids[:, place - 1], chosen]
    masked = torch.rand(rows, LENGTH, generator=draws) < 0.15
    labels = ids.masked_fill(~masked, -100)
    (batch,) = from_mappings([{"input_ids": ids.masked_fill(masked, 4), "labels": labels}], causal=False)
    return batch


def loss(student: LanguageModel, batch: Batch, counts: Counts) -> Tensor:
    return loss_terms(OBJECTIVE, student, make_teacher(), batch, denominators(OBJECTIVE, counts, batch.counts)).total


def in_a_row(parameters: list[nn.Parameter]) -> BucketLayout:
    pieces, numel = [], 0
    for parameter in parameters:
        pieces.append((numel, tuple(parameter.shape)))
        numel += parameter.numel()
    return BucketLayout(numel, tuple(pieces), 0)


def together(exchanges: list[CompressionSteps]) -> list[tuple[Tensor, CompressionState]]:
    """Two ranks' exchanges, side by side."""
    answers: list[Any] = [None] * RANKS
    while True:
        requests, results = [], []
        for exchange, answer in zip(exchanges, answers, strict=True):
            try:
                requests.append(exchange.send(answer))
            except StopIteration as ended:
                results.append(ended.value)
        if results:
            return results
        tensors = [request.tensor for request in requests]
        match requests[0].kind:
            case "allreduce":
                summed = tensors[0] + tensors[1]
                answers = [tensor.copy_(summed) for tensor in tensors]
            case "all_to_all":
                answers = [torch.cat([tensor.view(RANKS, -1)[rank] for tensor in tensors]) for rank in range(RANKS)]
            case "all_gather":
                answers = [torch.cat(tensors)] * RANKS


def distilled(compression: Compression, seed: int) -> float:
    """The held-out loss after UPDATES."""
    student = LanguageModel(bert(100 + seed, 1).train())
    optimizer = make_optimizer([student], OPTIM)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    layout = in_a_row(parameters)
    members = [make_compressor(compression, ranks=RANKS, rank=rank, engine="torch", seed=seed) for rank in range(RANKS)]
    states = [member.start(layout, torch.zeros(0)) for member in members]
    for update in range(UPDATES):
        batches = [text(10_000 * (seed + 1) + RANKS * update + rank, 4) for rank in range(RANKS)]
        counts = sum((batch.counts for batch in batches), Counts())
        flats = []
        for batch in batches:
            grads = torch.autograd.grad(loss(student, batch, counts), parameters, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
            flats.append(torch.cat([grad.flatten() for grad in filled]))
        if update < starts_at(compression):
            summed = flats[0] + flats[1]
            states = [m.observe(summed, s, layout) for m, s in zip(members, states, strict=True)]
        else:
            exchanges = [m.exchange(g, s, layout) for m, g, s in zip(members, flats, states, strict=True)]
            results = together(exchanges)
            assert torch.equal(results[0][0], results[1][0])
            summed, states = results[0][0], [state for _, state in results]
        for parameter, (first, shape) in zip(parameters, layout.pieces, strict=True):
            parameter.grad = summed[first : first + parameter.numel()].view(shape).clone()
        nn.utils.clip_grad_norm_(parameters, OPTIM.clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, update, UPDATES)
        optimizer.step()
    student.eval()
    heldout = text(7, 128)
    with torch.no_grad():
        return float(loss(student, heldout, heldout.counts))


@functools.cache
def uncompressed() -> tuple[float, float]:
    """(mean, standard deviation)"""
    losses = [distilled(Compression(), seed) for seed in range(3)]
    return statistics.mean(losses), statistics.stdev(losses)


ENOUGH: dict[str, Compression] = {
    "fp16": Compression(kind="fp16"),
    "bf16": Compression(kind="bf16"),
    "int8": Compression(kind="int8"),
    "top-k": Compression(kind="top-k", density=0.1),
    "powersgd": Compression(kind="powersgd"),
}


def mean_loss(compression: Compression) -> float:
    return statistics.mean(distilled(compression, seed) for seed in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENOUGH)
def test_a_distillation_ends_within_two_standard_deviations_of_the_uncompressed(kind: str) -> None:
    mean, deviation = uncompressed()
    assert mean < 11.0  # from 13.0: something was learnt
    assert mean_loss(ENOUGH[kind]) <= mean + 2 * deviation


@pytest.mark.slow
def test_without_error_feedback_it_does_not() -> None:
    """Else the test above would pass on anything."""
    mean, deviation = uncompressed()
    assert mean_loss(ENOUGH["top-k"].model_copy(update={"error_feedback": False})) > mean + 3 * deviation
