"""What training will need of memory and disk, from shapes alone.

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

from dataclasses import dataclass

import torch

EAGER_LOGIT_TENSORS = 7
"""[rows, vocabulary] tensors in compute width that are alive at the worst instant of an eager distillation loss: student and
teacher logits, their two log-softmaxes, the teacher's probabilities, the product under the sum and its gradient."""


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
    """Return what the reference losses hold."""
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
    """Estimate one micro-batch of `rows` tokens; fp32 master weights, AdamW. `logits`: bytes, of whole_logits_bytes or of the
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
