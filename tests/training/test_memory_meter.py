"""What a meter reads against tensors and allocators of our own, and errors of memory that really ran out."""

import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich.console
import torch
import transformers
from torch import nn

from fastdistil.data.batch import assemble
from fastdistil.data.corpus import Corpus
from fastdistil.errors import OutOfMemory, is_out_of_memory
from fastdistil.events import MemoryReading, as_fields
from fastdistil.gradients.compressor import BucketLayout
from fastdistil.gradients.compressors import make_compressor
from fastdistil.models.language_model import LanguageModel
from fastdistil.models.loading import fresh_model
from fastdistil.profiling.memory import PARTS, MemoryMeter, SavedTensorBytes, held_bytes, memory_parts
from fastdistil.profiling.memory_estimate import MemoryEstimate, student_activation_bytes
from fastdistil.profiling.quantities import size_text
from fastdistil.recipe import Recipe
from fastdistil.training.inputs import Data, load_inputs, resolve
from fastdistil.training.instruments import Instruments
from fastdistil.training.memory_advice import out_of_memory
from fastdistil.training.memory_plan import estimate_memory, make_plan, show_plan, transformer_shape
from tests.small_run import small

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
V, LENGTH = 101, 32


def bert(width: int = 64, dropout: float = 0.0) -> LanguageModel:
    config = transformers.BertConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=4, num_hidden_layers=3, vocab_size=V,
        max_position_embeddings=LENGTH, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return LanguageModel(fresh_model(config))


def a_batch(sequences: int) -> Any:
    lengths = torch.full((sequences,), LENGTH).numpy()
    ids = torch.randint(0, V, (sequences * LENGTH,)).numpy()
    targets = torch.arange(0, len(ids), 7).numpy()
    return assemble(ids, lengths, targets, ids[targets])


# ---- parts ----


def test_parts_are_those_of_the_tensors() -> None:
    student, teacher, projection = bert(), bert(width=32).bfloat16(), nn.Linear(64, 32, bias=False)
    optimizer = torch.optim.AdamW([*student.parameters(), *projection.parameters()])
    for parameter in [*student.parameters(), *projection.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    elements = sum(parameter.numel() for parameter in student.parameters()) + 64 * 32
    buffers = sum(buffer.nbytes for buffer in student.buffers())
    flat = torch.zeros(1000)
    parts = memory_parts(
        students=[student, projection], teacher=teacher, optimizer=optimizer, residuals=[flat[:300], flat[300:]],
        peak=100_000_000,
    )  # fmt: skip
    tensors = len(list(student.parameters())) + 1
    assert parts["student_weights"] == 4 * elements + buffers
    assert parts["gradients"] == 4 * elements
    assert parts["optimizer"] == 8 * elements + 4 * tensors  # and the number of steps of each
    teacher_buffers = sum(buffer.nbytes for buffer in teacher.buffers())
    assert parts["teacher_weights"] == 2 * sum(parameter.numel() for parameter in teacher.parameters()) + teacher_buffers
    assert parts["residuals"] == 4000, "views of one buffer hold it once"
    assert sum(size or 0 for size in parts.values()) == 100_000_000
    assert tuple(parts) == PARTS
    held = {"students": [student], "teacher": None, "optimizer": optimizer}
    assert memory_parts(**held, peak=10)["activations_and_logits"] is None  # type: ignore[arg-type]
    assert memory_parts(**held, kept=7)["activations_and_logits"] == 7  # type: ignore[arg-type]
    assert "logits" not in memory_parts(**held, peak=10), "nobody measured them"  # type: ignore[arg-type]


def test_estimates_have_the_names_of_measurements() -> None:
    student = bert()
    shape = transformer_shape(student)
    recipe = small_recipe()
    estimate = estimate_memory(recipe, shape, None, causal=False, longest=LENGTH)
    assert tuple(estimate.parts()) == (*PARTS[:-1], "logits", "activations"), "what a measurement has together, apart"
    assert sum(estimate.parts().values()) == estimate.total
    assert estimate.parts()["student_weights"] == 4 * sum(parameter.numel() for parameter in student.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kept_is_what_autograd_keeps(dropout: float) -> None:
    """Against the estimate, which another test holds against autograd."""
    student = bert(dropout=dropout).train()
    batch = a_batch(8)
    with SavedTensorBytes(student) as saved:
        features = student.transform(student.hidden(batch))
        loss = features @ torch.ones(64, 1, requires_grad=True)
    grouped = 3 * 64 * 4  # of each layer: attention by groups keeps one more width
    expected = 8 * LENGTH * (student_activation_bytes(transformer_shape(student), torch.float32, False, LENGTH) + grouped)
    assert saved.bytes == pytest.approx(expected, rel=0.05)
    loss.sum().backward()
    assert student.weight.grad is not None
    outside = saved.bytes
    student.hidden(batch)
    assert saved.bytes == outside, "nothing is counted after the block"


@pytest.mark.parametrize("kind", ["fp16", "int8", "top-k", "powersgd"])
def test_residuals_are_estimated(kind: str) -> None:
    shape = transformer_shape(bert())
    recipe = small_recipe(compression={"kind": kind, "block": 32}, world={"ranks": 4})
    elements = shape.parameters // 128 * 128
    layout = BucketLayout(elements, ((0, (elements // 128, 128)),), 0)
    compressor = make_compressor(recipe.compression, ranks=4, rank=0, engine="torch", seed=0)
    residuals = {
        name: tensor for name, tensor in compressor.start(layout, torch.zeros(1)).items() if name in ("residual", "server")
    }
    estimated_bytes = estimate_memory(recipe, shape, None, causal=False, longest=LENGTH).residuals
    assert estimated_bytes == pytest.approx(held_bytes(residuals.values()), rel=0.02)
    alone = small_recipe(compression={"kind": kind}, world={"ranks": 1})
    assert estimate_memory(alone, shape, None, causal=False, longest=LENGTH).residuals == 0
    bare = small_recipe(compression={"kind": kind, "error_feedback": False}, world={"ranks": 4})
    assert estimate_memory(bare, shape, None, causal=False, longest=LENGTH).residuals == 0


# ---- the meter ----


class Allocator:
    """Of a GPU, as torch.cuda reports it."""

    def __init__(self) -> None:
        self.allocated = self.peak = self.reserved = self.peak_reserved = 0
        self.resets = 0

    def hold(self, allocated: int, reserved: int | None = None) -> None:
        self.allocated = allocated
        self.reserved = max(self.reserved, allocated) if reserved is None else reserved
        self.peak, self.peak_reserved = max(self.peak, self.allocated), max(self.peak_reserved, self.reserved)

    def reset(self, device: torch.device) -> None:
        self.peak, self.peak_reserved = self.allocated, self.reserved
        self.resets += 1


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    fake = Allocator()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: fake.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: fake.peak)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: fake.reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: fake.peak_reserved)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": 3, "num_ooms": 1})
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", fake.reset)
    return fake


def test_peaks_of_phases(allocator: Allocator) -> None:
    meter = MemoryMeter(GPU)
    allocator.hold(900)
    allocator.hold(100, reserved=800)
    with meter.phase("student"):
        allocator.hold(500)
    assert allocator.resets == 0, "others' counters are left alone but for the first updates"
    assert meter.phase_peaks == {}
    meter.watching = True
    for most in (700, 600):
        with meter.phase("student"):
            allocator.hold(most)
            allocator.hold(300)
        with pytest.raises(RuntimeError), meter.phase("backward"):  # noqa: PT012
            allocator.hold(400)
            raise RuntimeError
        allocator.hold(100)
    assert meter.phase_peaks == {"student": 700, "backward": 400}
    meter.watching = False
    readings = meter.read()
    assert readings["peak_allocated_bytes"] == 900 == meter.peak_bytes(), "of the run, whatever was reset"
    assert readings["peak_reserved_bytes"] == 900
    assert readings["phase_peaks"] == meter.phase_peaks


@pytest.mark.parametrize(("warmup", "peak"), [(3, 300_000_000), (1, 900_000_000)])
def test_parts_are_of_the_update_that_was_watched(warmup: int, peak: int, allocator: Allocator) -> None:
    """Restoring holds weights and moments twice, an evaluation its own; a first update may have no moments yet, and then it is
    the run's peak."""
    inputs: Any = SimpleNamespace(device=CPU, student=bert(), teacher=None, projection=None, data=Data())
    instruments = Instruments(small_recipe(profile={"warmup": warmup}), inputs, chief=False, tell=print)
    instruments._chief, instruments.memory, inputs.device = True, MemoryMeter(GPU), GPU
    allocator.hold(900_000_000)
    for most in (310_000_000, 320_000_000, 300_000_000, 330_000_000):
        allocator.hold(100_000_000)
        instruments.begin()
        for name, part in (("student", 0.5), ("backward", 1.0), ("optimizer", 0.5)):
            with instruments.span(name):  # type: ignore[arg-type]
                allocator.hold(int(most * part))
                allocator.hold(100_000_000)
        instruments.end()
    allocator.hold(800_000_000)
    optimizer = torch.optim.AdamW(inputs.student.parameters())
    measurement = instruments.parts(4, optimizer, {})
    assert measurement is not None
    assert measurement.peak_bytes == peak
    assert measurement.parts is not None
    assert measurement.parts["activations_and_logits"] == peak - (measurement.parts["student_weights"] or 0)
    assert instruments.memory.peak_bytes() == 900_000_000


def test_a_gpu_is_read(allocator: Allocator) -> None:
    """fragmented: what was reserved beyond the most that was in use. A log line finds activations freed; they are no waste."""
    allocator.hold(4500, reserved=5000)
    allocator.hold(3000, reserved=5000)
    readings = MemoryMeter(GPU).read(used_bytes=9000)
    assert {name: readings[name] for name in readings if "rss" not in name} == {
        "allocated_bytes": 3000, "reserved_bytes": 5000, "peak_allocated_bytes": 4500, "peak_reserved_bytes": 5000,
        "fragmented_bytes": 500, "used_bytes": 9000, "outside_bytes": 4000, "retries": 3, "ooms": 1, "phase_peaks": {},
    }  # fmt: skip
    assert as_fields(MemoryReading(**readings)) == readings, "the event has a field for each"
    # The allocator may have grown since the device was asked.
    assert MemoryMeter(GPU).read(used_bytes=4000)["outside_bytes"] == 0
    unknown = MemoryMeter(GPU).read()
    assert unknown["used_bytes"] is unknown["outside_bytes"] is None


def test_a_processor_has_its_resident_memory() -> None:
    meter = MemoryMeter(CPU)
    meter.watching = True
    with meter.phase("student"):
        block = torch.ones(16 << 20)
    readings = meter.read()
    assert set(readings) == {"rss_bytes", "peak_rss_bytes"}
    assert readings["peak_rss_bytes"] >= readings["rss_bytes"] > block.nbytes
    assert meter.phase_peaks == {}
    assert meter.peak_bytes() >= readings["rss_bytes"]


# ---- when it runs out ----


def small_recipe(**sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "device": "cpu",
        "kernels": "torch",
        "teacher": {"path": "teacher", "dtype": "fp32"},
        "student": {"config": {"model_type": "bert"}},
        "data": {"micro_batch_tokens": 4096},
        "loop": {"updates": 1, "precision": "fp32", "accumulation": 2},
    }
    return Recipe(**{**values, **sections})


def estimate_of(recipe: Recipe, width: int = 64, teacher: bool = True) -> MemoryEstimate:
    shape = transformer_shape(bert(width))
    return estimate_memory(recipe, shape, shape if teacher else None, causal=False, longest=LENGTH)


CUDA_OUT = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.00 GiB of which 12.00 MiB is free. Of "
    "the allocated memory 60.00 GiB is allocated by PyTorch, and 9.50 GiB is reserved by PyTorch but unallocated."
)
OUT = RuntimeError("[enforce fail at alloc_cpu.cpp:129] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                   "1610612736 bytes. Error code 12 (Cannot allocate memory)")  # fmt: skip


def advice(phase: str, recipe: Recipe, meter: MemoryMeter | None = None, error: Exception = OUT, **sizes: Any) -> str:
    out_of_memory_error = out_of_memory(error, phase, meter or MemoryMeter(CPU), recipe, estimate_of(recipe, **sizes))
    assert isinstance(out_of_memory_error, OutOfMemory)
    assert out_of_memory_error.exit_code == 11
    return str(out_of_memory_error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (MemoryError("Unable to allocate 1.00 GiB for an array"), True),
        (OUT, True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("out of memory"), False),
    ],
)
def test_which_errors_they_are(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


FEWER = "a lower data.micro_batch_tokens, with a higher loop.accumulation to keep the batch"
SMALLER = "a smaller student (keys of student), or a device with more memory"


def test_the_largest_part_and_what_makes_it_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdistil.training.memory_advice.has_fast_bf16", lambda device: True)
    recipe = small_recipe()
    message = advice("backward", recipe)
    assert message.startswith("out of memory in backward, for 1.50 GiB more; the most in use so far was")
    assert f"(by the estimate: activations {size_text(estimate_of(recipe).parts()['activations'])}, " in message
    assert f"what helps: {FEWER}, or loop.precision=bf16;" in message
    assert f"what helps: {FEWER}, or loop.precision=bf16, or kernels=auto;" in advice(
        "losses", small_recipe(kernels="reference")
    )
    assert "what helps: evaluation.batch_tokens=4096;" in advice("evaluation", recipe)
    monkeypatch.setattr("fastdistil.training.memory_advice.has_fast_bf16", lambda device: False)
    assert "bf16" not in advice("backward", recipe), "it would be emulated"


def test_what_helps_where_no_micro_batch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdistil.training.memory_advice.has_fast_bf16", lambda device: True)
    recipe = small_recipe()
    assert f"what helps: {SMALLER};" in advice("optimizer", recipe, teacher=False)
    unknown = str(out_of_memory(OUT, "loading", MemoryMeter(CPU), recipe))
    assert "what helps: teacher.dtype=bf16, or a smaller student or teacher (keys of student, teacher.path)" in unknown
    assert f"what helps: {FEWER}" in str(out_of_memory(OUT, "backward", MemoryMeter(CPU), recipe))
    meter = MemoryMeter(CPU)
    meter.parts = {"student_weights": 2, "teacher_weights": 4, "residuals": 3}
    assert "what helps: teacher.dtype=bf16, or a smaller teacher" in advice("loading", recipe, meter)
    without_hidden = small_recipe(objective={"a_cos": 0.0})
    assert "teacher.cache, which `fastdistil cache-teacher` writes" in advice("loading", without_hidden, meter)
    meter.parts["residuals"] = 5
    assert "what helps: compression=none;" in advice("optimizer", recipe, meter)
    # Without a measurement of what the micro-batch needs, the estimate says that it is the largest.
    assert f"what helps: {FEWER}, or loop.precision=bf16" in advice("backward", recipe, meter)


def test_what_was_measured_is_told(allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.setattr("fastdistil.training.memory_advice.has_fast_bf16", lambda device: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 79 << 30))
    allocator.hold(60 << 30, reserved=70 << 30)
    meter = MemoryMeter(GPU)
    meter.parts = {"activations_and_logits": 50 << 30, "student_weights": 10 << 30, "teacher_weights": None, "residuals": 0}
    message = advice("backward", small_recipe(), meter, CUDA_OUT)
    assert "for 20.00 MiB more; the most in use so far was 60.00 GiB: activations and logits 50.00 GiB, student" in message
    assert "9.00 GiB are held by other processes" in message
    assert "expandable_segments:True in the environment (9.50 GiB are reserved, in pieces" in message, "by torch's own count"
    assert "expandable_segments" not in advice("backward", small_recipe(), meter, torch.OutOfMemoryError("CUDA out of memory"))
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "expandable_segments:True")
            assert "expandable_segments" not in advice("backward", small_recipe(), meter, CUDA_OUT)
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert "other processes" not in advice("backward", small_recipe(), meter, CUDA_OUT)


def broken(device: torch.device) -> tuple[int, int]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


CHILD = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from tests.training.test_memory_meter import *
torch.set_num_threads(1)
student = bert(128)
batch = a_batch(2048)
student.hidden(a_batch(1)).sum().backward()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (256 << 20), resource.RLIM_INFINITY))
meter = MemoryMeter(CPU)
try:
    student.hidden(batch).sum().backward()
except Exception as error:
    assert is_out_of_memory(error), error
    recipe = small_recipe(data={{"micro_batch_tokens": 2048 * LENGTH}})
    told = out_of_memory(error, "student", meter, recipe, estimate_of(recipe, 128, teacher=False))
    print(told)
    sys.exit(told.exit_code)
"""


def test_memory_that_really_ran_out() -> None:
    child = CHILD.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 11, done.stderr
    assert re.match(r"out of memory in student, for [0-9.]+ [GM]iB more; the most in use so far was", done.stdout)
    assert FEWER in done.stdout
    assert "Traceback" not in done.stderr


def test_a_plan_is_data(material: Path, tmp_path: Path) -> None:
    """What --dry-run prints, as data: the same as of the models that a run would load."""
    recipe = resolve(small(material, tmp_path))
    notes: list[str] = []
    plan = make_plan(recipe, notes.append)
    inputs = load_inputs(recipe, note=notes.append)
    assert isinstance(inputs.student, LanguageModel)
    assert isinstance(inputs.teacher, LanguageModel)
    assert plan.student == transformer_shape(inputs.student)
    assert plan.teacher == transformer_shape(inputs.teacher)
    assert plan.updates == inputs.updates
    corpus = Corpus.open(recipe.data.train, verify="size")
    assert (plan.tokens, plan.sequences) == (int(corpus.lengths.sum()), len(corpus))
    longest = int(corpus.lengths.max())
    assert plan.memory == estimate_memory(recipe, plan.student, plan.teacher, causal=False, longest=longest)
    printed = io.StringIO()
    show_plan(recipe, tmp_path, rich.console.Console(file=printed, width=200))
    assert size_text(plan.memory.total) in printed.getvalue()
    assert f"{plan.tokens:,} tokens in {plan.sequences:,} sequences" in printed.getvalue()
