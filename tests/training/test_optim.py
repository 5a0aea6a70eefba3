"""Parameter groups and the learning rate."""

import pytest
import torch
import transformers

from fastdistil.recipe import Optim
from fastdistil.training.optim import LossScale, learning_rate, make_optimizer, parameter_groups

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def models() -> dict[str, torch.nn.Module]:
    return {
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
        "roberta": transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL)),
        "distilbert": transformers.DistilBertForMaskedLM(
            transformers.DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
        ),
        "modernbert": transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**SMALL, pad_token_id=0)),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2)),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
        "qwen2": transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL)),
    }


@pytest.mark.parametrize("name", list(models()))
def test_norms_and_biases_are_not_decayed(name: str) -> None:
    """By the modules' own types, not by names: every weight of a norm module, every bias, and nothing else."""
    model = models()[name]
    plain: set[int] = set()
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            plain.update(id(parameter) for parameter in module.parameters(recurse=False))
    plain.update(id(parameter) for key, parameter in model.named_parameters() if key.endswith("bias"))
    decayed, undecayed = parameter_groups([model], 0.1)
    assert decayed["weight_decay"] == 0.1 and undecayed["weight_decay"] == 0.0
    assert {id(parameter) for parameter in undecayed["params"]} == plain  # type: ignore[attr-defined]
    every = [*decayed["params"], *undecayed["params"]]  # type: ignore[misc]
    assert sorted(id(p) for p in every) == sorted({id(p) for p in model.parameters()})  # tied ones once, none missing


def test_distilberts_norms_are_found() -> None:
    """The published example looks for "LayerNorm.weight" and so finds one of DistilBERT's six norms of two layers."""
    model = models()["distilbert"]
    undecayed_ids = {id(parameter) for parameter in parameter_groups([model], 0.1)[1]["params"]}  # type: ignore[attr-defined]
    norms = [key for key, _ in model.named_parameters() if "norm" in key.lower() and key.endswith("weight")]
    assert len(norms) == 6
    assert all(id(model.get_parameter(key)) in undecayed_ids for key in norms)


def test_frozen_parameters_are_left_out() -> None:
    model = models()["bert"]
    embedding = model.get_parameter("bert.embeddings.position_embeddings.weight")
    embedding.requires_grad_(False)
    assert all(parameter is not embedding for group in parameter_groups([model], 0.0) for parameter in group["params"])  # type: ignore[attr-defined]


def test_decay_reaches_matrices_only() -> None:
    """One step with gradients of zero: AdamW shrinks what it decays by lr * decay, and leaves the rest alone."""
    model = models()["distilbert"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    make_optimizer([model], Optim(lr=0.5, weight_decay=0.1)).step()
    for key, parameter in model.named_parameters():
        expected = 1.0 if parameter.dim() == 1 else 1.0 - 0.5 * 0.1
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected), msg=key)


def test_the_linear_schedule_is_transformers() -> None:
    optim, updates = Optim(lr=2.0, warmup=0.13), 50
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, 7, updates)  # ceil(0.13 * 50)
    for update in range(updates):
        assert learning_rate(optim, update, updates) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_other_schedules() -> None:
    cosine = Optim(lr=1.0, warmup=0.0, schedule="cosine")
    assert [round(learning_rate(cosine, update, 4), 6) for update in range(5)] == [1.0, 0.853553, 0.5, 0.146447, 0.0]
    constant = Optim(lr=1.0, warmup=0.5, schedule="constant")
    assert [learning_rate(constant, update, 4) for update in range(4)] == [0.0, 0.5, 1.0, 1.0]


def test_the_loss_scale_is_gradscalers() -> None:
    """Overflows halve it, a run of good updates doubles it: the same sequence as torch.amp.GradScaler's."""
    ours = LossScale(torch.device("cpu"))
    ours.GROWTH_AFTER = 3  # type: ignore[misc]
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for number in range(30):
        value = float("inf") if number in (0, 1, 7, 15, 16) else 0.5
        parameter.grad = torch.full((4,), value) * ours.scale
        theirs.scale(torch.zeros(()))  # it makes its scale at the first use
        expected = theirs.get_scale()
        assert float(ours.scale) == expected, number
        ours.unscale([parameter])
        if value == 0.5:
            assert torch.equal(parameter.grad, torch.full((4,), 0.5))
        overflow, judged = ours.update(parameter.grad.norm())
        assert float(overflow) == float(value != 0.5) and bool(judged.isfinite())
        parameter.grad = torch.full((4,), value) * expected
        theirs.unscale_(optimizer)
        theirs.update()


def test_a_gradient_that_never_becomes_finite_is_seen_by_the_guard() -> None:
    scale = LossScale(torch.device("cpu"))
    judged = [bool(scale.update(torch.tensor(float("nan")))[1].isfinite()) for _ in range(LossScale.PERSISTENT)]
    assert judged == [True] * (LossScale.PERSISTENT - 1) + [False]
    other = LossScale(torch.device("cpu"))
    other.load_state(scale.state())
    assert other.state() == scale.state()
