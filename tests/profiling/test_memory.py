"""The estimates against what torch and the operating system really hold."""

import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fastdistil.kernels import cpu, distill_torch, linear_distill
from fastdistil.kernels.distill_options import DistillOptions, Head, Targets
from fastdistil.profiling.memory import device_memory, host_memory
from fastdistil.profiling.memory_estimate import (
    EAGER_LOGIT_TENSORS,
    Shape,
    estimate_disk,
    estimate_training_memory,
    student_activation_bytes,
)

B, S = 4, 32  # sequences, tokens in each
D, F, H, L, V = 64, 256, 4, 3, 101


def tiny_bert(dropout: float = 0.0) -> BertForMaskedLM:
    config = BertConfig(
        hidden_size=D, intermediate_size=F, num_attention_heads=H, num_hidden_layers=L, vocab_size=V,
        max_position_embeddings=S, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForMaskedLM(config).train()


def bert_hidden(model: BertForMaskedLM, ids_BS: Tensor) -> Tensor:
    return model.cls.predictions.transform(model.bert(input_ids=ids_BS)[0])


def tiny_distilbert(dropout: float = 0.0) -> DistilBertForMaskedLM:
    config = DistilBertConfig(
        dim=D, hidden_dim=F, n_heads=H, n_layers=L, vocab_size=V, max_position_embeddings=S, dropout=dropout,
        attention_dropout=dropout,
    )  # fmt: skip
    return DistilBertForMaskedLM(config).train()


def distilbert_hidden(model: DistilBertForMaskedLM, ids_BS: Tensor) -> Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(model.distilbert(input_ids=ids_BS)[0])))


def tiny_llama(dropout: float = 0.0) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=D, intermediate_size=F, num_attention_heads=H, num_hidden_layers=L, vocab_size=V,
        max_position_embeddings=S,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def llama_hidden(model: LlamaForCausalLM, ids_BS: Tensor) -> Tensor:
    return model.model(input_ids=ids_BS)[0]


def tiny_gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=D, n_head=H, n_layer=L, vocab_size=V, n_positions=S, bos_token_id=1, eos_token_id=1, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def gpt2_hidden(model: GPT2LMHeadModel, ids_BS: Tensor) -> Tensor:
    return model.transformer(input_ids=ids_BS)[0]


def kept_bytes(model: nn.Module, hidden: Callable[[Any, Tensor], Tensor], dtype: torch.dtype) -> int:
    """Distinct storages that autograd keeps for a backward, without the parameters and their low-precision copies."""
    model_pointers = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in model_pointers:
            held[tensor.untyped_storage().data_ptr()] = tensor  # held, so that its address is not given out again
        return tensor

    ids_BS = torch.randint(0, V, (B, S))
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        # The last product stands for the head, which keeps its input.
        output = hidden(model, ids_BS) @ torch.ones(D, 1, requires_grad=True)
    matrices = {parameter.shape for parameter in model.parameters() if parameter.ndim == 2}
    casts = {(*shape[::-1],) for shape in matrices} | {(*shape,) for shape in matrices}
    total = sum(
        tensor.untyped_storage().nbytes()
        for tensor in held.values()
        if dtype == torch.float32 or tensor.dtype != dtype or tuple(tensor.shape) not in casts
    )
    assert output.requires_grad
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("make", "hidden", "feed_forward", "within"),
    [
        (tiny_bert, bert_hidden, {}, 0.05),
        (tiny_distilbert, distilbert_hidden, {}, 0.1),
        (tiny_llama, llama_hidden, {"gated": True}, 0.25),
        (tiny_gpt2, gpt2_hidden, {"gelu_written_out": True}, 0.25),
    ],
    ids=["bert", "distilbert", "llama", "gpt2"],
)
def test_activations_are_what_autograd_keeps(
    make: Callable[[float], nn.Module],
    hidden: Callable[[Any, Tensor], Tensor],
    feed_forward: dict[str, bool],
    within: float,
    dropout: float,
    dtype: torch.dtype,
) -> None:
    shape = shape_of(make(dropout), dropout=dropout > 0 and make is not tiny_llama, **feed_forward)
    estimated = B * S * student_activation_bytes(shape, dtype, on_gpu=False, sequence_length=S)
    measured = kept_bytes(make(dropout), hidden, dtype)
    assert measured > B * S * L * D * dtype.itemsize  # something was counted
    assert estimated == pytest.approx(measured, rel=within)


def shape_of(model: nn.Module, dropout: bool = False, **feed_forward: bool) -> Shape:
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=L, hidden=D, intermediate=F, heads=H, vocabulary=V, dropout=dropout, attention_dropout=dropout,
        **feed_forward,
    )  # fmt: skip


def estimate(model: nn.Module, **changed: Any) -> Any:
    settings: dict[str, Any] = {
        "student": shape_of(model), "teacher": None, "rows": B * S, "logits": 1000, "compute_dtype": torch.float32,
        "teacher_dtype": torch.float32, "on_gpu": False, "sequence_length": S,
    }  # fmt: skip
    return estimate_training_memory(**{**settings, **changed})


def test_weights_gradients_and_moments_are_counted_exactly() -> None:
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.randint(0, V, (B, S)), labels=torch.randint(0, V, (B, S))).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is None:  # the pooler-like parts that this loss does not reach still get a gradient buffer
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    estimated = estimate(model, teacher=shape_of(model), teacher_dtype=torch.bfloat16)
    assert estimated.student_weights == sum(parameter.nbytes for parameter in model.parameters())
    assert estimated.gradients == sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert estimated.optimizer == sum(value.nbytes for value in moments)
    assert estimated.teacher_weights == sum(parameter.nbytes for parameter in tiny_bert().bfloat16().parameters())
    assert estimated.total == sum(getattr(estimated, name) for name in estimated.__dataclass_fields__)
    assert estimate(model, compute_dtype=torch.bfloat16).student_casts == estimated.student_weights // 2
    assert estimated.student_casts == 0
    assert estimate(model).teacher_activations == 0


class LiveBytes(TorchDispatchMode):
    """Bytes of the [rows, vocabulary]-sized storages that are alive, at their worst."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least = at_least
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size < self.at_least or key in self.seen:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def test_logits_of_an_eager_head() -> None:
    rows, vocabulary = 64, 1000
    student_ND = torch.randn(rows, 8, requires_grad=True)
    teacher_ND = torch.randn(rows, 8)
    weight_VD = torch.randn(vocabulary, 8)
    with LiveBytes(at_least=rows * vocabulary * 4) as live:
        student_NV, teacher_NV = student_ND @ weight_VD.T, teacher_ND @ weight_VD.T
        log_q_NV, log_p_NV = (student_NV / 2).log_softmax(-1), (teacher_NV / 2).log_softmax(-1)
        p_NV = log_p_NV.exp()
        loss = torch.where(p_NV > 0, p_NV * (log_p_NV - log_q_NV), 0).sum() + student_NV.logsumexp(-1).sum()
        loss.backward()
    measured = live.peak / (rows * vocabulary * 4)
    assert measured == pytest.approx(EAGER_LOGIT_TENSORS, rel=0.25)


@pytest.mark.parametrize(("rows", "dtype"), [(100, torch.float32), (300, torch.bfloat16), (500, torch.float32)])
def test_what_fused_losses_hold(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_distill._BUDGET, "cpu", 2**20)
    monkeypatch.setattr(distill_torch, "BLOCK", 2**13)
    monkeypatch.setattr(linear_distill, "BLOCK", 2**13)
    monkeypatch.setattr(cpu, "_onednn_is_faster", lambda: False)  # whose pieces are small only at real sizes
    width, vocabulary = 32, 1000
    hidden, teacher = (torch.randn(rows, width).to(dtype) for _ in range(2))
    weight, teacher_weight = torch.randn(vocabulary, width), torch.randn(vocabulary, width).to(dtype)
    chunk = linear_distill.rows_per_chunk(rows, vocabulary, 2 * dtype.itemsize, hidden.device)
    op: Any = linear_distill._linear_distill
    arguments = linear_distill.OpArguments(
        Head(hidden, weight),
        Head(teacher, teacher_weight),
        Targets(torch.arange(rows)),
        linear_distill.NeededGradients(hidden=True, weight=True, bias=False),
        "torch",
        chunk,
        DistillOptions(hard=1.0),
    )
    with LiveBytes(at_least=2**13) as live:  # the op's own function: a mode does not see inside of an op
        live.seen |= {tensor.untyped_storage()._cdata for tensor in (hidden, teacher, weight, teacher_weight)}
        op._init_fn(*arguments.flat())
    workspace = linear_distill.workspace_bytes(rows, vocabulary, width, 2 * dtype.itemsize, hidden.device)
    beside = rows * width * dtype.itemsize + (weight.numel() * dtype.itemsize if dtype != torch.float32 else 0)
    assert live.peak == pytest.approx(workspace + beside, rel=0.1)


def test_host_memory_sees_what_is_allocated() -> None:
    before = host_memory()
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(b"\1" * (64 << 20))
        during = host_memory()
    after = host_memory()
    assert during.rss_bytes - before.rss_bytes > 60 << 20
    assert after.peak_rss_bytes >= before.rss_bytes + (60 << 20)
    assert before.rss_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.02)
    assert before.anonymous_bytes <= before.rss_bytes <= before.peak_rss_bytes
    assert after.rss_bytes < during.rss_bytes - (60 << 20)


def test_file_pages_are_not_anonymous(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(os.urandom(32 << 20))
    with (tmp_path / "shard").open("rb") as file:
        before = host_memory()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            assert sum(pages[::4096]) > 0
            after = host_memory()
    assert after.rss_bytes - before.rss_bytes > 30 << 20
    assert after.anonymous_bytes - before.anonymous_bytes < 8 << 20


def test_a_processor_has_no_device_memory() -> None:
    assert device_memory(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_memory() -> None:
    block = torch.empty(1 << 20, device="cuda")
    memory = device_memory(block.device)
    assert memory is not None
    assert memory.peak_allocated_bytes >= memory.allocated_bytes >= block.nbytes


def test_disk_of_a_run(tmp_path: Path) -> None:
    from fastdistil.training import checkpoint

    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}.{key}": value for parameter, state in optimizer.state.items() for key, value in state.items()
    }
    tensors = {"model": dict(model.named_parameters()), "optimizer": moments}
    path = checkpoint.save(tmp_path, 1, tensors, {}, keep=1)
    written = sum(file.stat().st_size for file in path.iterdir())
    disk = estimate_disk(shape_of(model), keep=3)
    assert disk.checkpoint == pytest.approx(written, rel=0.05)
    # Three to keep, the best one, and the one that is written before an older one goes.
    assert disk.checkpoints == pytest.approx(5 * written, rel=0.05)
    assert disk.total == disk.checkpoints + disk.student
