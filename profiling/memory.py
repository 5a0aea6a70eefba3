"""What a process and a device hold, and what a training run will need.

The estimate counts what autograd keeps for one micro-batch of N tokens (rows) through L encoder layers of width D, with
feed-forward width F and H heads, attention as scaled_dot_product_attention. Kept per layer and token, in elements:

    tensor                                kept by                                   fp32         under autocast
    layer input                           query, key, value projections             D            3 D low (each casts anew)
    queries, keys, values                 attention                                 3 D          3 D low
    attention output                      attention and output projection           D            D low
    log-sum-exp                           attention                                 H            H fp32
    residual sum 1                        norm 1                                    D            D fp32
    norm 1 output                         first feed-forward matrix                 D            D low
    first matrix' output                  GELU                                      F            F low
    GELU's output                         second feed-forward matrix                F            F low
    residual sum 2                        norm 2                                    D            D fp32
    mean, 1/deviation                     two norms                                 4            4 fp32
    dropout masks (if dropout > 0)        two dropouts                              2 D, 1 byte each on a GPU

which is 8 D + 2 F elements in fp32, and 8 D + 2 F low-precision plus 2 D fp32 ones under autocast; autocast also keeps a
low-precision copy of every matrix. Dropout inside the attention costs nothing on a GPU, whose kernels draw it again; on a CPU
it brings back the plain formula, which works in fp32 and keeps the probabilities, the mask and their product:
3 H * sequence length a token. Instead of 2 F, gated feed-forwards keep 4 F and GPT-2's GELU 6 F. Attention by groups of
equal length keeps one more D. Sources: torch's derivatives.yaml for what each operator saves; the counts are held against
torch.autograd.graph.saved_tensors_hooks by a test.
"""

import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn

EAGER_LOGIT_TENSORS = 7
"""[rows, vocabulary] tensors in compute width that are alive at the worst instant of an eager distillation loss: student and
teacher logits, their two log-softmaxes, the teacher's probabilities, the product under the sum and its gradient."""


@dataclass(frozen=True)
class HostMemory:
    rss_bytes: int
    anonymous_bytes: int
    """Without file-backed pages: mapped files (libraries, weights) count in rss_bytes but can be dropped at any time."""
    peak_rss_bytes: int


@dataclass(frozen=True)
class DeviceMemory:
    allocated_bytes: int
    peak_allocated_bytes: int


def host_memory() -> HostMemory:
    """Of this process, now."""
    status = Path("/proc/self/status")
    fields: dict[str, int] = {}
    if status.exists():
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                fields[name] = int(value.split()[0]) * 1024
    peak = fields.get("VmHWM", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    if "VmRSS" in fields and "RssAnon" in fields:
        return HostMemory(fields["VmRSS"], fields["RssAnon"], max(peak, fields["VmRSS"]))
    full = psutil.Process().memory_full_info()
    return HostMemory(full.rss, full.uss, max(peak, full.rss))


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Of torch's allocator on `device`, without waiting for it; None for the CPU, which has no such allocator."""
    if device.type != "cuda":
        return None
    return DeviceMemory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the estimate needs to know of a transformer."""

    parameters: int
    """Unique elements: a tied matrix counts once."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    dropout: bool = False
    attention_dropout: bool = False
    gated: bool = False
    """Feed-forward of the form down(act(gate(x)) * up(x)), as in Llama, Qwen and ModernBERT."""
    gelu_written_out: bool = False
    """GELU in elementary operations, each of which keeps something: GPT-2's `gelu_new`."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the training device; an estimate for planning, not a promise."""

    student_weights: int
    student_casts: int
    teacher_weights: int
    gradients: int
    optimizer: int
    student_activations: int
    teacher_activations: int
    logits: int
    """What the losses hold: logits (of a chunk of rows, where they are fused) and the head's gradient while it is made."""
    residuals: int = 0
    """What a compressor of gradients has not sent yet."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def parts(self) -> dict[str, int]:
        """Bytes under the names that a measurement has, PARTS; but of what it can only tell together, `activations_and_logits`,
        each."""
        return {
            "student_weights": self.student_weights,
            "teacher_weights": self.teacher_weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "residuals": self.residuals,
            "logits": self.logits,
            "activations": self.student_casts + self.student_activations + self.teacher_activations,
        }


PARTS = ("student_weights", "teacher_weights", "gradients", "optimizer", "residuals", "activations_and_logits")


@dataclass(frozen=True, kw_only=True)
class DiskEstimate:
    """Bytes; `total` is what a run directory can hold at its fullest instant."""

    checkpoint: int
    checkpoints: int
    student: int

    @property
    def total(self) -> int:
        return self.checkpoints + self.student


def whole_logits_bytes(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Of the reference losses."""
    return EAGER_LOGIT_TENSORS * rows * vocabulary * max(dtype.itemsize, 4)


def estimate_training_memory(
    *,
    student: Shape,
    teacher: Shape | None,
    rows: int,
    compute_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    on_gpu: bool,
    sequence_length: int,
    logits: int,
    residuals: int = 0,
) -> MemoryEstimate:
    """For one micro-batch of `rows` tokens; fp32 master weights, AdamW. `logits`: bytes, of whole_logits_bytes or of the
    fused losses; `residuals`: bytes, of a compressor.

    `sequence_length` (the longest) matters only for attention dropout on a CPU.
    """
    autocast = compute_dtype != torch.float32
    width = compute_dtype.itemsize
    teacher_width = teacher_dtype.itemsize
    return MemoryEstimate(
        student_weights=4 * student.parameters,
        student_casts=width * student.parameters if autocast else 0,
        teacher_weights=teacher_width * teacher.parameters if teacher else 0,
        gradients=4 * student.parameters,
        optimizer=8 * student.parameters,
        student_activations=rows * student_activation_bytes(student, compute_dtype, on_gpu, sequence_length),
        teacher_activations=rows * _forward_only_bytes(teacher, teacher_width) if teacher else 0,
        logits=logits,
        residuals=residuals,
    )


def student_activation_bytes(shape: Shape, compute_dtype: torch.dtype, on_gpu: bool, sequence_length: int) -> int:
    """Kept by autograd per token, head transform (dense, GELU, norm) included, logits not: the table above, in bytes."""
    low = compute_dtype.itemsize
    autocast = compute_dtype != torch.float32
    inner = (4 if shape.gated else 6 if shape.gelu_written_out else 2) * shape.intermediate
    residual_sums = 2 * shape.hidden * 4 if autocast else 0  # in fp32 they are among the 8 D
    layer = (8 * shape.hidden + inner) * low + residual_sums + 4 * (shape.heads + 4)
    embedding = shape.hidden * 4 + 2 * 8
    if shape.dropout:
        layer += 2 * shape.hidden * (1 if on_gpu else low)
        embedding += shape.hidden * (1 if on_gpu else 4)
    if shape.attention_dropout and not on_gpu:
        layer += 3 * shape.heads * sequence_length * 4 + 3 * shape.hidden * (4 - low)
    head = shape.hidden * (3 * low + 4)
    return shape.layers * layer + embedding + head


def _forward_only_bytes(shape: Shape, width: int) -> int:
    """Per token of a forward without gradients: a layer's input and the wider of its two halves, and the last hidden state."""
    inner = (3 if shape.gated or shape.gelu_written_out else 2) * shape.intermediate
    return (2 * shape.hidden + max(4 * shape.hidden, inner)) * width


def estimate_disk(student: Shape, *, keep: int, best: bool = True) -> DiskEstimate:
    """`keep` checkpoints, the best one besides, and one more while it is written; the exported student, twice likewise."""
    checkpoint = 12 * student.parameters  # fp32 weights and AdamW's two moments
    return DiskEstimate(checkpoint=checkpoint, checkpoints=(keep + best + 1) * checkpoint, student=2 * 4 * student.parameters)


class MemoryMeter:
    """Memory of this process and of `device`, for a log line; nothing here waits for the device.

    On a GPU `phase` finds the peak of each part of an update. For that it resets torch's peak counters, so that whoever else
    reads them sees the peak of a phase; the meter keeps the whole run's, and does so only while `watching` (one update is
    enough). A processor's allocator has no such counters.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.watching = False
        self.phase_peaks: dict[str, int] = {}
        """Bytes allocated at the worst instant of each phase."""
        self.parts: dict[str, int | None] = {}
        """What `memory_parts` found last, for the text of an error."""
        self._peak_allocated = self._peak_reserved = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a phase of an update. Phases do not nest."""
        if self.device.type != "cuda" or not self.watching:
            yield
            return
        self._keep_peaks()
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            peak = torch.cuda.max_memory_allocated(self.device)
            self.phase_peaks[name] = max(self.phase_peaks.get(name, 0), peak)
            self._keep_peaks()

    def read(self, used_bytes: float | None = None) -> dict[str, Any]:
        """A log line's `memory`, in bytes: rss_bytes and peak_rss_bytes of the process; on a GPU allocated_bytes,
        reserved_bytes and their peaks since the start, fragmented_bytes (reserved beyond the most that was allocated), retries
        and ooms of the allocator (numbers), phase_peaks, used_bytes (of all processes, as given; None if not known) and
        outside_bytes (of it what this allocator has not reserved: contexts, communication buffers, other processes)."""
        host = host_memory()
        found: dict[str, Any] = {"rss_bytes": host.rss_bytes, "peak_rss_bytes": host.peak_rss_bytes}
        if self.device.type != "cuda":
            return found
        stats = torch.cuda.memory_stats(self.device)
        self._keep_peaks()
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        return found | {
            "allocated_bytes": allocated,
            "reserved_bytes": reserved,
            "peak_allocated_bytes": self._peak_allocated,
            "peak_reserved_bytes": self._peak_reserved,
            "fragmented_bytes": self._peak_reserved - self._peak_allocated,
            "used_bytes": used_bytes,
            "outside_bytes": None if used_bytes is None else max(0, used_bytes - reserved),
            "retries": int(stats.get("num_alloc_retries", 0)),
            "ooms": int(stats.get("num_ooms", 0)),
            "phase_peaks": dict(self.phase_peaks),
        }

    def outside_bytes(self) -> int | None:
        """Of a GPU: what is in use now and not reserved by this allocator, as the driver says when asked; None: not known."""
        if self.device.type != "cuda":
            return None
        try:
            free, whole = torch.cuda.mem_get_info(self.device)
        except RuntimeError:  # an error before this one has made the device unusable
            return None
        return max(0, whole - free - torch.cuda.memory_reserved(self.device))

    def peak_bytes(self) -> int:
        """The most that was allocated on a GPU, or resident of the process, so far."""
        if self.device.type != "cuda":
            return host_memory().peak_rss_bytes
        self._keep_peaks()
        return self._peak_allocated

    def _keep_peaks(self) -> None:
        self._peak_allocated = max(self._peak_allocated, torch.cuda.max_memory_allocated(self.device))
        self._peak_reserved = max(self._peak_reserved, torch.cuda.max_memory_reserved(self.device))


def memory_parts(
    *,
    students: Iterable[nn.Module],
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    residuals: Iterable[Tensor] = (),
    peak: int | None = None,
    kept: int | None = None,
) -> dict[str, int | None]:
    """Bytes that training holds, under the names PARTS: exact where tensors hold them, after an optimizer's step.

    students: student and projection; residuals: of the exchange. Activations and logits are what autograd `kept` of a
    micro-batch, where it was counted (Kept: fused losses hold logits of some rows, and only for a moment, so that these are not
    in it), else what is left of `peak` (an update's, on a GPU); None where neither is known, or where the parts are more than
    the peak, which was then reached without some of them.
    """
    modules = list(students)
    trained = [parameter for module in modules for parameter in module.parameters()]
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    found: dict[str, int | None] = {
        "student_weights": held_bytes(tensor for module in modules for tensor in _tensors(module)),
        "teacher_weights": held_bytes(_tensors(teacher)) if teacher is not None else 0,
        "gradients": held_bytes(parameter.grad for parameter in trained if parameter.grad is not None),
        "optimizer": held_bytes(state),
        "residuals": held_bytes(residuals),
    }
    if kept is None and peak is not None:
        rest = peak - sum(size or 0 for size in found.values())
        kept = rest if rest >= 0 else None
    return found | {"activations_and_logits": kept}


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind tensors, each once: a view holds the whole."""
    storages = [tensor.untyped_storage() for tensor in tensors]  # all at once, so that no address is given out again
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class Kept:
    """While entered: `bytes` that autograd keeps for backward, without the tensors of `modules`. Around one forward; it costs
    a call for each tensor kept, and is for code that is not compiled."""

    def __init__(self, *modules: nn.Module | None) -> None:
        self.bytes = 0
        own = (tensor for module in modules if module is not None for tensor in _tensors(module))
        self._seen = {tensor.untyped_storage()._cdata for tensor in own}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._held: list[torch.UntypedStorage] = []  # so that no address is given out again meanwhile

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        self._held.clear()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(storage)
            self.bytes += storage.nbytes()
        return tensor
