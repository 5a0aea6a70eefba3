"""Counted arithmetic against torch's own counter, table and shares against the traps that others fell into."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastdistil.data.batch import Batch, assemble
from fastdistil.kernels import cpu, linear_distill
from fastdistil.kernels.distill_options import DistillOptions, Head, Targets
from fastdistil.models import attention
from fastdistil.models.language_model import LanguageModel
from fastdistil.models.loading import fresh_model
from fastdistil.objective import denominators, loss_terms
from fastdistil.profiling import peaks as device_peaks
from fastdistil.profiling.flops import Coefficients, Work, WorkCounter, visible_pairs
from fastdistil.profiling.peaks import DATASHEETS, arithmetic, datasheet, measure_peaks, peaks, utilisation
from fastdistil.recipe import Objective

VOCABULARY, DEPTH, POSITIONS = 97, 3, 48
LENGTHS = (3, 3, 7, 12, 12, 20, 31)
TOKENS = sum(LENGTHS)
KINDS = ("bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "qwen2", "qwen3")
CAUSAL = ("gpt2", "llama", "qwen2", "qwen3")
CPU = torch.device("cpu")


def model_of(kind: str, width: int = 32, attention_dropout: float = 0.0) -> LanguageModel:
    sizes: dict[str, Any] = {
        "hidden_size": width, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 40,
        "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
    decoder = {**sizes, "num_key_value_heads": 2, "attention_dropout": attention_dropout, **tokens}
    values: dict[str, dict[str, Any]] = {
        "bert": {**sizes, "attention_probs_dropout_prob": attention_dropout},
        "roberta": {**sizes, "type_vocab_size": 1, "pad_token_id": 1, "attention_probs_dropout_prob": attention_dropout},
        "distilbert": {
            "dim": width, "n_layers": DEPTH, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": POSITIONS,
            "attention_dropout": attention_dropout,
        },
        # A window of 4 tokens to each side, global attention in layer 0.
        "modernbert": {**sizes, "local_attention": 8, "attention_dropout": attention_dropout, **tokens},
        "gpt2": {
            "n_embd": width, "n_layer": DEPTH, "n_head": 4, "n_positions": POSITIONS, "attn_pdrop": attention_dropout, **tokens,
        },
        "llama": decoder,
        "qwen2": {**decoder, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        "qwen3": {**decoder, "head_dim": 24},
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **values[kind])
    return LanguageModel(fresh_model(config))


def batch_of(layout: Any, causal: bool) -> Batch:
    lengths = torch.tensor(LENGTHS).numpy()
    ids = torch.randint(2, VOCABULARY, (TOKENS,)).numpy()
    ends = torch.tensor(LENGTHS).cumsum(0).numpy() - 1
    targets = [place for place in range(TOKENS) if (place not in ends if causal else place % 5 == 2)]
    chosen = torch.tensor(targets).numpy()
    return assemble(ids, lengths, chosen, ids[chosen], layout=layout)


def counter_of(aims: Objective, student: Any, teacher: Any, projection: nn.Linear | None = None) -> WorkCounter:
    return WorkCounter(aims, student, teacher, projection, device_type="cpu", dtype=torch.float32)


def counted_by_torch(
    aims: Objective, student: LanguageModel, teacher: LanguageModel | None, batch: Batch, projection: nn.Linear | None = None
) -> int:
    """Of a step with written-out attention and whole logits: torch's counter sees neither our op nor fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        per = denominators(aims, batch.counts, batch.counts)
        loss_terms(aims, student, teacher, batch, per, projection, backend="reference").total.backward()
    return counter.get_total_flops()


def weights_of(kind: str, **others: Any) -> Objective:
    hard = {"a_mlm": 0.0, "a_clm": 1.0} if kind in CAUSAL else {"a_mlm": 1.0, "a_clm": 0.0}
    return Objective(**{"a_ce": 1.0, "a_cos": 0.0, **hard, **others})


@pytest.mark.parametrize("layout", ["packed", "length-grouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_executed_is_what_torch_counts(kind: str, layout: str) -> None:
    """With attention written out on both sides, to the last operation."""
    student, teacher = model_of(kind, attention_dropout=0.1).train(), model_of(kind, width=48).eval()
    projection = nn.Linear(32, 48, bias=False)
    aims = weights_of(kind, a_cos=1.0, projection=True)
    batch = batch_of(layout, student.causal)
    counter = counter_of(aims, student, teacher, projection)
    counter._teacher_attention = "plain"
    work = counter(batch)
    assert work.executed == counted_by_torch(aims, student, teacher, batch, projection)
    assert work.executed > work.teacher + work.teacher_head + work.student_head > 0


@pytest.mark.parametrize(
    ("others", "with_teacher"),
    [
        ({"soft_rows": "masked"}, True),  # the labelled rows alone reach the heads
        ({"a_ce": 0.0, "a_cos": 1.0}, True),  # the teacher's head does not run
        ({"a_mlm": 0.0}, True),
        ({"a_ce": 0.0}, False),  # pre-training
        ({"a_ce": 0.0, "a_mlm": 0.0, "a_mse": 1.0}, True),  # no head runs
    ],
)
def test_every_objective(others: dict[str, Any], with_teacher: bool) -> None:
    student = model_of("bert", attention_dropout=0.1).train()
    teacher = model_of("bert").eval() if with_teacher else None
    aims, batch = weights_of("bert", **others), batch_of("packed", causal=False)
    assert counter_of(aims, student, teacher)(batch).executed == counted_by_torch(aims, student, teacher, batch)


def test_useful_work_of_encoders_is_what_torch_counts_without_padding() -> None:
    student, teacher = model_of("bert", attention_dropout=0.1).train(), model_of("bert", width=48).eval()
    aims, batch = weights_of("bert"), batch_of("packed", causal=False)
    work = counter_of(aims, student, teacher)(batch)
    total = counted_by_torch(aims, student, teacher, batch)
    assert work.student + work.teacher + work.student_head + work.teacher_head == total == work.executed
    assert work.fields() == {
        "student": work.student, "teacher": work.teacher, "heads": work.student_head + work.teacher_head,
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_no_useful_work(kind: str) -> None:
    student, teacher, aims = model_of(kind), model_of(kind, width=48), weights_of(kind)
    counter = counter_of(aims, student, teacher)
    packed, padded = (counter(batch_of(layout, student.causal)) for layout in ("packed", "length-grouped"))
    assert dataclasses.replace(padded, executed=0) == dataclasses.replace(packed, executed=0)
    assert padded.executed > 1.5 * packed.executed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 31, 40])
def test_pairs_against_the_mask(causal: bool, window: int | None) -> None:
    for length in (1, 2, 5, 31):
        mask = attention._near(length, causal, window, CPU)
        assert visible_pairs(length, causal, window) == (length * length if mask is None else int(mask.sum()))


def test_windows_of_real_models() -> None:
    assert Coefficients.of(model_of("modernbert")).windows == ((None, 1), (5, 2))
    assert Coefficients.of(model_of("qwen2")).windows == ((None, 2), (6, 1))
    assert Coefficients.of(model_of("llama")).windows == ((None, 3),)


@pytest.mark.parametrize("kind", ["gpt2", "modernbert", "qwen2"])
def test_what_each_attention_computes(kind: str) -> None:
    """Pairs of all layers, counted one by one for a student without dropout on each kind of device."""
    student, aims = model_of(kind), weights_of(kind, a_ce=0.0)
    batch = batch_of("packed", student.causal)
    coefficients = Coefficients.of(student)
    all_pairs = DEPTH * sum(length * length for length in LENGTHS)
    if kind == "gpt2":
        visible = DEPTH * sum(length * (length + 1) // 2 for length in LENGTHS)
        grouped = visible
    elif kind == "qwen2":
        near = sum(1 for length in LENGTHS for i in range(length) for j in range(i + 1) if i - j < 6)
        visible = 2 * sum(length * (length + 1) // 2 for length in LENGTHS) + near
        masked = sum(length * length if length > 6 else length * (length + 1) // 2 for length in LENGTHS)
        grouped = 2 * sum(length * (length + 1) // 2 for length in LENGTHS) + masked
    else:
        near = sum(1 for length in LENGTHS for i in range(length) for j in range(length) if abs(i - j) < 5)
        visible = sum(length * length for length in LENGTHS) + 2 * near
        grouped = all_pairs
    for device, dtype, computed in (
        ("cpu", torch.float32, grouped),
        ("cuda", torch.float32, grouped),
        ("cuda", torch.bfloat16, visible),
    ):
        work = WorkCounter(aims, student, None, device_type=device, dtype=dtype)(batch)
        assert work.executed - work.student - work.student_head == coefficients.pair * (3.5 * computed - 3 * visible)
    assert coefficients.pair == 4 * 32


def test_fused_attention_computes_scores_again() -> None:
    """2.5 times the forward, by torch's formula for its fused kernels; written out it would be 2."""
    shape = (2, 4, 31, 8)
    assert sdpa_backward_flop_count(shape, shape, shape, shape) == 2.5 * sdpa_flop_count(shape, shape, shape)


def test_heads_compute_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op in several chunks, counted inside of it."""
    monkeypatch.setattr(cpu, "_onednn_is_faster", lambda: False)  # whose products torch does not count
    rows, width, teacher_width = 150, 32, 48
    hidden, weight = torch.randn(rows, width), torch.randn(VOCABULARY, width)
    teacher, teacher_weight = torch.randn(rows, teacher_width), torch.randn(VOCABULARY, teacher_width)
    op: Any = linear_distill._linear_distill
    arguments = linear_distill.OpArguments(
        Head(hidden, weight),
        Head(teacher, teacher_weight),
        Targets(torch.zeros(rows, dtype=torch.int64)),
        linear_distill.NeededGradients(hidden=True, weight=True, bias=False),
        "torch",
        64,
        DistillOptions(hard=1.0),
    )
    with FlopCounterMode(display=False) as counter:
        op._init_fn(*arguments.flat())
    flops = linear_distill.flops(rows, VOCABULARY, width, teacher_width)
    assert counter.get_total_flops() == flops
    student, teacher_model = model_of("bert"), model_of("bert", width=teacher_width)
    work = counter_of(weights_of("bert"), student, teacher_model)(batch_of("packed", causal=False))
    assert work.student_head + work.teacher_head == linear_distill.flops(TOKENS, VOCABULARY, width, teacher_width)


def test_what_is_not_trained_is_not_differentiated() -> None:
    student, aims, batch = model_of("bert"), weights_of("bert", a_ce=0.0), batch_of("packed", causal=False)
    trained = counter_of(aims, student, None)(batch)
    student.weight.requires_grad_(False)
    part = counter_of(aims, student, None)(batch)
    labels = len(batch.label_rows)
    assert trained.student_head - part.student_head == 2 * labels * VOCABULARY * 32
    assert trained.student == part.student
    student.module.bert.encoder.layer[0].intermediate.dense.weight.requires_grad_(False)
    assert part.student - counter_of(aims, student, None)(batch).student == 2 * TOKENS * 32 * 40


def test_a_cached_teacher_costs_nothing() -> None:
    student, aims = model_of("bert"), weights_of("bert")
    batch = dataclasses.replace(batch_of("packed", causal=False), cached_indices_NK=torch.zeros(TOKENS, 2, dtype=torch.int64))
    work = counter_of(aims, student, None)(batch)
    assert work.teacher == work.teacher_head == 0
    assert work.student_head == linear_distill.flops(TOKENS, VOCABULARY, 32, 0)


def test_the_arithmetic_of_a_module_of_your_own_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="arithmetic of Linear is not known"):
        counter_of(weights_of("bert"), nn.Linear(2, 2), None)


def test_work_adds_up() -> None:
    one = Work(student=1, teacher=2, student_head=3, teacher_head=4, executed=5)
    assert one + one == Work(student=2, teacher=4, student_head=6, teacher_head=8, executed=10)


# ---- peaks ----


@pytest.mark.parametrize(
    ("name", "kind", "teraflops"),
    [
        # A substring would find the L4 in both others, or the L40 in none.
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA A10G", "bf16", None),
        ("nvidia l4", "bf16", None),
    ],
)
def test_names_are_matched_whole(name: str, kind: str, teraflops: float | None) -> None:
    sheet = datasheet(name)
    assert (None if sheet is None else sheet.flops[kind]) == (None if teraflops is None else teraflops * 1e12)


def test_a_part_of_a_device_is_another_device() -> None:
    assert datasheet("AMD Instinct MI300X", 304) is not None
    assert datasheet("AMD Instinct MI300X", 38) is None
    assert datasheet("AMD Instinct MI300X") is None


def test_the_table_is_plausible() -> None:
    """Dense rates: none is the one with sparsity, which is twice as high; no bf16 before Ampere."""
    for name, sheet in DATASHEETS.items():
        assert sheet.source
        assert ("bf16" in sheet.flops) == (not name.startswith("Tesla"))
        assert 2e13 < sheet.flops["fp16"] < 2.3e15, name
        assert sheet.flops["fp32"] <= sheet.flops.get("tf32", sheet.flops["fp16"]) <= sheet.flops["fp16"]
        balance = sheet.flops["fp16"] / sheet.bytes
        assert 90 < balance < 450, (name, balance)
    assert len({sheet.flops["bf16"] for name, sheet in DATASHEETS.items() if "H100" in name}) == 3


def test_measured_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against times of our own: sizes are multiplied and copied as they are said to be."""
    monkeypatch.setitem(device_peaks._COPY_BYTES, "cpu", 2**20)
    measured = measure_peaks(CPU, torch.float32)
    assert measured.flops_range[0] <= measured.flops <= measured.flops_range[1]
    assert measured.bytes_range[0] <= measured.bytes <= measured.bytes_range[1]
    assert measured.size in device_peaks._SIZES

    def timed(work: Any, device: torch.device, warmup: int) -> list[float]:
        work()
        return [3.0, 1.0, 2.0, 5.0, 4.0]

    monkeypatch.setattr(device_peaks, "_timed", timed)
    measured = measure_peaks(CPU, torch.float32)
    assert measured.flops == pytest.approx(2 * 512**3 / 3)
    assert measured.flops_range == (pytest.approx(2 * 512**3 / 5), pytest.approx(2 * 512**3))
    assert measured.bytes == pytest.approx(2 * 2**20 / 3)


def test_a_slow_processor_is_not_kept_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(device_peaks.time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    assert device_peaks._timed(lambda: work(7.0), CPU, warmup=1) == [7.0] * 3
    assert len(device_peaks._timed(lambda: work(0.001), CPU, warmup=1)) == 5


def test_an_unknown_device_has_its_measured_peak_only(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = device_peaks.MeasuredPeaks(
        flops=1e14, flops_range=(1e14, 1e14), bytes=1e12, bytes_range=(1e12, 1e12), size=4096, copied_bytes=2**28,
        dtype=torch.bfloat16, rounds=5, copies=5,
    )  # fmt: skip
    monkeypatch.setattr(device_peaks, "measure_peaks", lambda device, dtype: measured)
    name = "NVIDIA Something New"

    class Properties:
        multi_processor_count = 100

        @property
        def name(self) -> str:
            return name

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    peak_rates = peaks(torch.device("cuda"), "bf16")
    assert list(peak_rates["flops"].values()) == [1e14]
    assert "measured here" in next(iter(peak_rates["flops"]))
    (source,) = peak_rates["flops"]
    assert "100 to 100 TFLOP/s" in source, "with its range"
    name = "NVIDIA H100 PCIe"
    assert list(peaks(torch.device("cuda"), "bf16", measure=False)["flops"].values()) == [756.5e12]
    peak_rates = peaks(torch.device("cuda"), "bf16")
    assert list(peak_rates["flops"].values()) == [756.5e12, 1e14]
    assert list(peak_rates["bytes"].values()) == [2039e9, 1e12]
    assert "dense bf16" in next(iter(peak_rates["flops"]))


def test_the_faster_of_two_dtypes_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """An fp32 student beside a bf16 teacher: against the rate of fp32 both together could be more than there is."""

    def measured(device: torch.device, dtype: torch.dtype) -> device_peaks.MeasuredPeaks:
        flops = {torch.float32: 5e13, torch.bfloat16: 6e14}[dtype]
        return device_peaks.MeasuredPeaks(
            flops=flops, flops_range=(flops, flops), bytes=1e12, bytes_range=(1e12, 1e12), size=4096, copied_bytes=2**28,
            dtype=dtype, rounds=5, copies=5,
        )  # fmt: skip

    class H100:
        name, multi_processor_count = "NVIDIA H100 80GB HBM3", 132

    monkeypatch.setattr(device_peaks, "measure_peaks", measured)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100())
    for both in (("fp32", "bf16"), ("bf16", "fp32"), ("bf16",)):
        rates = peaks(torch.device("cuda"), *both)["flops"]
        assert list(rates.values()) == [989.4e12, 6e14]
        assert all("bf16" in source for source in rates)
    assert list(peaks(torch.device("cuda"), "fp32", "fp32")["flops"].values()) == pytest.approx([66.9e12, 5e13])


def test_measuring_leaves_nothing_in_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(device_peaks, "_measure_peaks", lambda device, dtype: done.append("measured"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("peaks"))
    measure_peaks(torch.device("cuda"), torch.float32)
    assert done == ["measured", "emptied", "peaks"]


def test_fp32_on_a_gpu_may_be_tf32() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert arithmetic("fp32", torch.device("cuda")) == "tf32"
        assert arithmetic("fp32", CPU) == "fp32"
        torch.set_float32_matmul_precision("highest")
        assert arithmetic("fp32", torch.device("cuda")) == "fp32"
        assert arithmetic("bf16", torch.device("cuda")) == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_shares() -> None:
    work = Work(student=30, teacher=20, student_head=10, teacher_head=10, executed=80)
    shares = utilisation(work, 2.0, 100.0, "a sheet")
    assert shares == {"student": 0.2, "with_teacher": 0.35, "hfu": 0.4, "peak_flops": 100.0, "peak_source": "a sheet"}


def test_more_than_there_is_is_refused() -> None:
    work = Work(student=30, executed=110)
    shares = utilisation(work, 1.0, 100.0, "a sheet")
    assert shares["student"] is shares["with_teacher"] is shares["hfu"] is None
    assert "110% of" in shares["refused"]
    assert "a sheet" in shares["refused"]
    assert utilisation(work, 1.1, 100.0, "a sheet")["hfu"] == pytest.approx(1.0)
    for seconds, peak in ((0.0, 1.0), (1.0, 0.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="wanted seconds and a peak"):
            utilisation(work, seconds, peak, "x")
