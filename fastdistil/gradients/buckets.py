"""Gradients in flat buckets that travel between ranks once an update, overlapping the last backward.

Parameters lie in a row, in the order in which backward finishes them; the row is cut into buckets, the first
one small, and each parameter's `.grad` is a view into it: what travels is what autograd wrote. Hooks tell
when a parameter's gradient is whole. On an update's last micro-batch a bucket leaves as soon as it is full,
in the buckets' order, which is the same on all ranks; `finish` sends the rest and waits. In the micro-batches
before, nothing travels.

The order is the reverse of the model's at first; after the first update it is rank 0's observed one.

What ranks get is the sum of their gradients: losses are divided by the tokens of the whole update, so nothing
is averaged. A parameter that had no gradient on this rank adds zero. One that had none on any rank has
`.grad` None after `finish`, so that the optimizer leaves it alone, as on one rank; all ranks know since a bit
per parameter is summed with every update. But where compression keeps residuals, one that ever had a gradient
may be owed a part of it: it keeps what arrived, perhaps zero, which AdamW takes for a gradient of zero.

An update that is dropped, or that the optimizer leaves out because something was not finite, leaves no trace
in compression's states: each is copied before it changes. That costs another gradient's memory and five
passes over it.

Legend: P parameters, R ranks.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.distributed.world import Handle, World
from fastdistil.errors import CorruptData
from fastdistil.gradients.compressor import BucketLayout, CompressionState, CompressionSteps, Compressor, redistribute
from fastdistil.profiling.spans import SpanName, Spans

_ALIGNED = 64  # bytes: every parameter and bucket starts on a cache line
MIB = 2**20


@dataclass
class _Bucket:
    layout: BucketLayout
    flat: Tensor
    parameters: frozenset[int]
    ring: int
    state: CompressionState
    before: CompressionState | None = None
    """What `state` was before the update under way; None between updates."""
    missing: set[int] = field(default_factory=set)
    exchange: CompressionSteps | None = None
    handle: Handle | None = None
    step: int = 0


@dataclass(frozen=True)
class BucketOptions:
    bucket_bytes: int = 25 * MIB
    first_bucket_bytes: int = MIB
    every_micro_batch: bool = False


class Buckets:
    """The gradients of `parameters` (trainable, each once), for a world of several ranks.

    An update: `zero`; backward for each micro-batch but the last; `arm`; the last backward; `finish`. With
    `every_micro_batch` arm and finish go around each backward. A rank without a micro-batch calls them all
    the same.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        world: World,
        *,
        compressor: Compressor,
        uncompressed: Compressor,
        starts_at: int = 0,
        options: BucketOptions = BucketOptions(),
        spans: Spans | None = None,
    ) -> None:
        self.parameters = list(parameters)
        assert len(set(self.parameters)) == len(self.parameters)
        self.world, self._options, self._spans = world, options, spans
        self.compressor, self._uncompressed, self.starts_at = compressor, uncompressed, starts_at
        self._ordered = False
        self._order = list(reversed(range(len(self.parameters))))
        self._cuts: list[list[int]] | None = None
        self._flats: dict[torch.dtype, Tensor] = {}
        self.wait_s = 0.0
        """Seconds that the host has waited for communication, in all `finish` calls."""
        self._armed, self._update, self._sent = False, 0, 0
        self._seen: list[int] = []
        self._used: set[int] = set()
        self._ever_used: set[int] = set()
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._lay_out()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(number))  # type: ignore[no-untyped-call]
            for number, parameter in enumerate(self.parameters)
        ]

    def zero(self) -> None:
        """Set all gradients to zero, before an update's first micro-batch."""
        for bucket in self.buckets:
            bucket.flat.zero_()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view
        self._used.clear()
        self._armed = False

    def arm(self, update: int) -> None:
        """Let full buckets leave from here on. `update` is the update's number, from 0."""
        if self._options.every_micro_batch:
            self._put_aside()
        self._armed, self._update, self._sent = True, update, 0
        self._seen.clear()
        for bucket in self.buckets:
            bucket.missing = set(bucket.parameters)

    def finish(self, extra: Mapping[str, Tensor] | None = None, last: bool = True) -> dict[str, Tensor]:
        """Turn gradients, after backward, into their sums over ranks, and return the sums of `extra`'s scalars.

        `last`: of the update; only then the parameters without a gradient anywhere are told apart.
        """
        self._armed = False
        # Buckets first: on a GPU scalars share a communicator with them, and all ranks must post in one order.
        while self._sent < len(self.buckets):
            self._send_next()
        used = self._post_used() if last else None
        names, terms = list(extra or ()), None
        if extra and last:
            terms = self.world.sum_terms(torch.stack([term.detach().double() for term in extra.values()]), "fastdistil.terms")
        begun = time.perf_counter()
        with self._span("exposed"):
            self._await_all()
            if self._spans is not None:
                self._spans.awaited()
            for flat, before in self._sums:
                flat.add_(before)
            self._sums.clear()
            if used is not None:
                self._drop_unused(self.world.wait(used).tolist())
            totals = dict(extra or {})
            if terms is not None:
                totals = dict(zip(names, self.world.wait(terms).unbind(), strict=True))
        self.wait_s += time.perf_counter() - begun
        return totals

    def _span(self, name: SpanName) -> AbstractContextManager[Any]:
        return self._spans(name) if self._spans is not None else nullcontext()

    def _compression(self) -> AbstractContextManager[Any]:
        """Return the span of what compressing costs; nothing is measured before it begins."""
        return self._span("compression") if self._compressing else nullcontext()

    def _await_all(self) -> None:
        # A bucket's second collective is posted when its first is done, in the buckets' order: on every rank alike.
        while flying := [bucket for bucket in self.buckets if bucket.handle is not None]:
            for bucket in flying:
                assert bucket.handle is not None
                self._post(bucket, self.world.wait(bucket.handle))

    def drop(self) -> None:
        """Give up the rest of an update: what was exchanged in it is as if it had not been."""
        for bucket in self.buckets:
            if bucket.before is not None:
                bucket.state, bucket.before = bucket.before, None
        self.zero()

    def settle(self, left_out: Tensor) -> None:
        """Settle the compressor's state, after the optimizer.

        Where `left_out` (0-dimensional, on the device) is 1 the optimizer did not take the update.
        """
        with self._compression():
            for bucket in self.buckets:
                for name, before in (bucket.before or {}).items():
                    if before is not bucket.state[name]:
                        bucket.state[name] = torch.where(left_out > 0, before, bucket.state[name], out=before)
                bucket.before = None

    def reorder(self) -> None:
        """Once, after the first update: lay the buckets out in the order in which rank 0's gradients got ready.

        The gradients are lost: call it after the optimizer, before `zero`. Compression states start after it.
        """
        if self._ordered:
            return
        ready = list(dict.fromkeys(self._seen))
        others = [number for number in self._order if number not in set(ready)]
        # In two bytes each: a control message.
        order = torch.tensor(ready + others, dtype=torch.int16 if len(self.parameters) < 2**15 else torch.int32)
        self.world.broadcast(order.view(torch.uint8), "fastdistil.order")
        self._ordered, self._order, self._cuts = True, order.tolist(), None
        self._lay_out()

    def remember_used(self, parameters: Iterable[nn.Parameter]) -> None:
        """Those that had a gradient on some rank before a resume."""
        numbers = {parameter: number for number, parameter in enumerate(self.parameters)}
        self._ever_used |= {numbers[parameter] for parameter in parameters}

    def change_compressor(self, compressor: Compressor, starts_at: int) -> None:
        """Use another compressor from the next update on; its state starts at zero. The gradients are lost."""
        self.compressor, self.starts_at, self._cuts = compressor, starts_at, None
        self._lay_out()

    def layout(self) -> dict[str, Any] | None:
        """What `set_layout` takes, as JSON does; None before the order is known."""
        return {"order": self._order, "cuts": self._cuts, "made_for": self._made_for} if self._ordered else None

    def set_layout(self, layout: Mapping[str, Any]) -> bool:
        """A checkpoint's, before anything is sent. Returns whether it is what this run's own options and rings give.

        If it is not, its buckets are kept where compression's states lie in them, and made anew, in its order, where none do.
        """
        dtypes = {parameter.dtype for parameter in self.parameters}
        if sorted(layout["order"]) != list(range(len(self.parameters))) or len(layout.get("cuts") or ()) != len(dtypes):
            raise CorruptData("the checkpoint's buckets are of other parameters; start anew")
        self._ordered, self._order, self._cuts = True, list(layout["order"]), None
        made_for = list(layout.get("made_for") or [])
        fits = made_for == self._options_and_rings
        if fits or self.compressor.state_kinds:
            self._cuts = [list(cuts) for cuts in layout["cuts"]]
        else:
            made_for = self._options_and_rings
        self._lay_out()
        self._made_for = made_for
        return fits

    @property
    def _options_and_rings(self) -> list[int]:
        return [self._options.bucket_bytes, self._options.first_bucket_bytes, self.world.rings]

    def states(self) -> dict[str, Tensor]:
        """Return the states of this rank's compression: "bucket.name" -> tensor."""
        return {f"{bucket.layout.index}.{name}": value for bucket in self.buckets for name, value in bucket.state.items()}

    def load_states(self, states: Mapping[str, Tensor]) -> None:
        """What `states` gave on this rank, or `redistributed`."""
        for bucket in self.buckets:
            for name, value in bucket.state.items():
                value.copy_(states[f"{bucket.layout.index}.{name}"])

    def redistributed(self, old: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return the states of this world's ranks, made from those of a world of another size, both by rank."""
        new: list[dict[str, Tensor]] = [{} for _ in range(self.world.size)]
        for bucket in self.buckets:
            index = bucket.layout.index
            states = [{name: old_state[f"{index}.{name}"] for name in bucket.state} for old_state in old]
            for rank, state in enumerate(redistribute(self.compressor.state_kinds, states, bucket.layout, self.world.size)):
                new[rank] |= {f"{index}.{name}": value for name, value in state.items()}
        return new

    def fill_with_owed(self, old: Sequence[Mapping[str, Tensor]]) -> None:
        """Gradients become all that the ranks with these states had kept back."""
        kinds = {name: kind for name, kind in self.compressor.state_kinds.items() if kind != "shared"}
        for bucket in self.buckets:
            index = bucket.layout.index
            states = [{name: old_state[f"{index}.{name}"] for name in kinds} for old_state in old]
            (total,) = redistribute(kinds, states, bucket.layout, 1)
            for owed in total.values():
                bucket.flat += owed.reshape(-1)[: bucket.layout.numel].to(bucket.flat)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def ready(_: Tensor) -> None:
            self._used.add(number)
            if not self._armed:
                return
            self._seen.append(number)
            for bucket in self._buckets_of[number]:
                bucket.missing.discard(number)
            while self._sent < len(self.buckets) and not self.buckets[self._sent].missing:
                self._send_next()

        return ready

    @property
    def _compressing(self) -> bool:
        """Not before the order is known: the buckets' states would not outlive it."""
        return self._ordered and self._update >= self.starts_at

    def _send_next(self) -> None:
        bucket = self.buckets[self._sent]
        self._sent += 1
        chosen = self.compressor if self._compressing else self._uncompressed
        if bucket.before is None:
            # What only observes makes new tensors.
            copied = self._compressing
            with self._compression():
                bucket.before = {name: value.clone() if copied else value for name, value in bucket.state.items()}
        bucket.exchange, bucket.step = chosen.exchange(bucket.flat, bucket.state, bucket.layout), 0
        self._post(bucket, None)

    def _post(self, bucket: _Bucket, answer: Tensor | None) -> bool:
        """Run the exchange up to its next collective. False when it has ended: then `flat` holds the sum."""
        assert bucket.exchange is not None
        with self._compression():
            try:
                request = bucket.exchange.send(answer)  # type: ignore[arg-type]
            except StopIteration as ended:
                summed, state = ended.value
                if summed.data_ptr() != bucket.flat.data_ptr():
                    bucket.flat.copy_(summed)
                if self._compressing:
                    bucket.state = state
                else:
                    bucket.state = self.compressor.observe(bucket.flat, bucket.state, bucket.layout)
                bucket.exchange = bucket.handle = None
                return False
        if self._spans is not None:
            self._spans.departed()
        start = getattr(self.world, request.kind)
        name = f"fastdistil.b{bucket.layout.index}.{bucket.step}"
        bucket.handle = start(request.tensor, name=name, ring=bucket.ring)
        bucket.step += 1
        return True

    def _post_used(self) -> Handle:
        """A counter of bits(R) bits for each parameter, as many in a 63-bit integer as fit: sums cannot run over."""
        bits = self.world.size.bit_length()
        per_word = 63 // bits
        words = [0] * -(-len(self.parameters) // per_word)
        for number in self._used:
            words[number // per_word] |= 1 << (number % per_word * bits)
        return self.world.sum_async(words, "fastdistil.used")

    def _drop_unused(self, words: Sequence[int]) -> None:
        bits = self.world.size.bit_length()
        per_word = 63 // bits
        owing = self._compressing and "residual" in self.compressor.state_kinds
        for number, parameter in enumerate(self.parameters):
            if words[number // per_word] >> (number % per_word * bits) & ((1 << bits) - 1):
                self._ever_used.add(number)
            elif not (owing and number in self._ever_used):
                parameter.grad = None

    def _put_aside(self) -> None:
        """every-micro-batch: what earlier micro-batches summed stays out of this exchange."""
        self._sums = [(bucket.flat, bucket.flat.clone()) for bucket in self.buckets]
        for bucket in self.buckets:
            bucket.flat.zero_()

    def _lay_out(self) -> None:
        self.buckets: list[_Bucket] = []
        self._views: list[Tensor] = [torch.empty(0)] * len(self.parameters)
        cuts, self._made_for = [], self._options_and_rings
        for number, dtype in enumerate(dict.fromkeys(parameter.dtype for parameter in self.parameters)):
            order = [index for index in self._order if self.parameters[index].dtype == dtype]
            cuts.append(self._lay_out_one(order, dtype, None if self._cuts is None else self._cuts[number]))
        self._cuts = cuts
        loads = [0] * self.world.rings
        for bucket in self.buckets:  # each on the ring that has the least to carry so far
            bucket.ring = loads.index(min(loads))
            loads[bucket.ring] += bucket.flat.nbytes
        self._buckets_of: list[list[_Bucket]] = [
            [bucket for bucket in self.buckets if number in bucket.parameters] for number in range(len(self.parameters))
        ]
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view

    def _lay_out_one(self, order: Sequence[int], dtype: torch.dtype, cuts: list[int] | None) -> list[int]:
        """`cuts`: as they were, or None. Returns where the buckets begin, and the end."""
        unit = _ALIGNED // dtype.itemsize
        starts, numel = {}, 0
        for number in order:
            starts[number] = numel
            numel += -(-self.parameters[number].numel() // unit) * unit
        cuts = self._cut([starts[number] for number in order], numel, dtype.itemsize) if cuts is None else cuts
        if len(cuts) < 2 or (cuts[0], cuts[-1]) != (0, numel) or any(first >= end for first, end in pairwise(cuts)):
            raise CorruptData(f"the checkpoint's buckets do not hold {numel} elements, one after the other; start anew")
        if dtype not in self._flats:
            self._flats[dtype] = self.world.empty(numel, dtype)
        flat = self._flats[dtype].zero_()  # another order has its padding elsewhere
        for number in order:
            parameter = self.parameters[number]
            part = flat[starts[number] : starts[number] + parameter.numel()]
            self._views[number] = part.view(parameter.shape)
        for first, end in pairwise(cuts):
            inside = [n for n in order if starts[n] < end and starts[n] + self.parameters[n].numel() > first]
            pieces = tuple(
                (starts[n] - first, tuple(self.parameters[n].shape))
                for n in inside
                if starts[n] >= first and starts[n] + self.parameters[n].numel() <= end
            )
            layout = BucketLayout(end - first, pieces, len(self.buckets))
            part = flat[first:end]
            state = self.compressor.start(layout, part)
            self.buckets.append(_Bucket(layout, part, frozenset(inside), 0, state))
        return cuts

    def _cut(self, starts: Sequence[int], numel: int, itemsize: int) -> list[int]:
        """Where buckets begin, and the end. Parameters are cut too, unless the compressor needs them whole."""
        unit = _ALIGNED // itemsize
        # Several buckets for each ring, so that none waits for another's last one.
        largest = min(self._options.bucket_bytes, max(_ALIGNED, numel * itemsize // (2 * self.world.rings)))
        size = max(unit, largest // itemsize // unit * unit)
        first = min(size, max(unit, self._options.first_bucket_bytes // itemsize // unit * unit))
        if not self.compressor.whole_parameters:
            return [0, *range(min(first, numel), numel, size), numel] if numel > first else [0, numel]
        cuts, limit = [0], first
        for start, end in zip(starts, [*starts[1:], numel], strict=True):
            if end - cuts[-1] > limit and start > cuts[-1]:
                cuts.append(start)
                limit = size
        return [*cuts, numel]
