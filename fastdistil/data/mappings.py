"""The user's own mappings of tensors -> batches, checked.

Shapes: B rows of S, N = B * S.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdistil.data.batches import NO_LABEL, Batch, Counts
from fastdistil.errors import UserError


def from_mappings(iterable: Iterable[Mapping[str, Any]], *, causal: bool, vocab_size: int | None = None) -> Iterator[Batch]:
    """Batches from the user's own mappings of tensors (or what torch.as_tensor takes), each [B, S].

    input_ids: integers. attention_mask: 1 for tokens, 0 for padding on either side; absent: all are tokens. labels: -100
    where there is none. Masked models: the token to guess in this place; absent: no labels. Causal models: the token in this
    place, as in input_ids (shifted here; absent: all of them); a row's first token has nothing to be predicted from.
    weights: floats of at least 0. Other keys are ignored. Raises UserError, naming the batch, for anything else.
    """
    for number, mapping in enumerate(iterable):
        try:
            batch = _from_mapping(mapping, number, causal, vocab_size)
        except (TypeError, ValueError, RuntimeError) as error:  # all three come out of torch.as_tensor
            raise UserError(f"batch {number} of your own iterable: {' '.join(str(error).split())}") from error
        yield batch


def _from_mapping(mapping: Any, number: int, causal: bool, vocab_size: int | None) -> Batch:
    if not isinstance(mapping, Mapping) or mapping.get("input_ids") is None:
        raise ValueError(f"wanted a mapping with input_ids, got {type(mapping).__name__}; yield dicts of tensors [B, S]")
    ids_BS = _matrix(mapping, "input_ids", None)
    if ids_BS.numel() == 0:
        raise ValueError(f"input_ids are empty, shape {tuple(ids_BS.shape)}; leave out empty batches")
    given = {key: mapping.get(key) is not None for key in ("attention_mask", "labels", "weights")}
    mask_BS = _matrix(mapping, "attention_mask", ids_BS) if given["attention_mask"] else torch.ones_like(ids_BS)
    valid_BS = mask_BS == 1
    if not bool((valid_BS | (mask_BS == 0)).all()):
        raise ValueError("attention_mask must hold only 0 and 1")
    default_BS = ids_BS.masked_fill(~valid_BS, NO_LABEL) if causal else torch.full_like(ids_BS, NO_LABEL)
    labels_BS = _matrix(mapping, "labels", ids_BS) if given["labels"] else default_BS
    _check_ids(ids_BS, "input_ids", vocab_size)
    _check_ids(labels_BS[labels_BS != NO_LABEL], "labels", vocab_size)
    if bool(((labels_BS != NO_LABEL) & ~valid_BS).any()):
        raise ValueError("labels are given where attention_mask is 0; set them to -100 there")
    if causal:
        labels_BS = torch.cat([labels_BS[:, 1:], torch.full_like(labels_BS[:, :1], NO_LABEL)], 1)
        labels_BS = labels_BS.masked_fill(~valid_BS, NO_LABEL)
    weights_N = _matrix(mapping, "weights", ids_BS, floating=True).flatten() if given["weights"] else None
    positions_BS = (valid_BS.cumsum(1) - 1).masked_fill(~valid_BS, 0)
    valid_rows = valid_BS.flatten().nonzero().flatten()
    label_rows = (labels_BS.flatten() != NO_LABEL).nonzero().flatten()
    tokens = len(valid_rows)
    valid = float(tokens) if weights_N is None else float(weights_N[valid_rows].double().sum())
    return Batch(
        ids_BS=ids_BS,
        positions_BS=positions_BS,
        attention_mask_BS=mask_BS,
        packing=None,
        labels_N=labels_BS.flatten(),
        valid_rows=None if tokens == ids_BS.numel() else valid_rows,
        label_rows=label_rows,
        weights_N=weights_N,
        counts=Counts(valid, tokens, len(label_rows), int(valid_BS.any(1).sum()), 1),
        index=(0, number),
    )


def _matrix(mapping: Mapping[str, Any], key: str, like_BS: Tensor | None, floating: bool = False) -> Tensor:
    """mapping[key] as int64 or float32 [B, S] on the host."""
    tensor = torch.as_tensor(mapping[key]).cpu()
    if tensor.dim() != 2 or (like_BS is not None and tensor.shape != like_BS.shape):
        wanted = "[B, S]" if like_BS is None else f"that of input_ids, {tuple(like_BS.shape)}"
        raise ValueError(f"{key} has the shape {tuple(tensor.shape)}, wanted {wanted}")
    if floating:
        if not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise ValueError(f"{key} must be finite and at least 0")
        return tensor.to(torch.float32)
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{key} has the type {tensor.dtype}, wanted integers")
    return tensor.to(torch.int64)


def _check_ids(ids: Tensor, key: str, vocab_size: int | None) -> None:
    if ids.numel() and int(ids.min()) < 0:
        raise ValueError(f"{key} hold {int(ids.min())}; token ids are at least 0 (and only labels may be -100)")
    if ids.numel() and vocab_size is not None and int(ids.max()) >= vocab_size:
        raise ValueError(f"{key} hold {int(ids.max())}, the vocabulary has {vocab_size} ids; use the model's own tokenizer")
