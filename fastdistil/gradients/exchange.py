"""How an update's gradients become those of all ranks: not at all on one rank, else through buckets, perhaps compressed."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.distributed.coordinator import Coordinator
from fastdistil.distributed.world import Counters, World
from fastdistil.errors import CorruptData, UserError
from fastdistil.gradients.auto import measure_copy, measure_exchange
from fastdistil.gradients.buckets import MIB, BucketOptions, Buckets
from fastdistil.gradients.compressors import make_compressor, starts_at
from fastdistil.gradients.cost_model import MeasuredExchange, choose
from fastdistil.profiling.spans import Spans
from fastdistil.recipe import Compression, Recipe

ReadRank = Callable[[int], Mapping[str, Tensor]]


class LocalGradients:
    """Autograd's own gradients; nothing travels."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        self._optimizer, self._recipe = optimizer, recipe
        self._parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self._owed: list[Tensor] = []

    @property
    def owes(self) -> bool:
        """True if memory alone holds what the next update is to bring."""
        return bool(self._owed)

    def excluded(self, seconds: float) -> None:
        """Leave `seconds`, spent on something else than updates, out of what `auto` measures."""

    def begin(self, update: int) -> None:
        """Clear the gradients before an update's first micro-batch; `update` is its number, from 0."""
        self._optimizer.zero_grad(set_to_none=True)

    def leaves_in(self, number: int, rounds: int) -> bool:
        """Return whether gradients travel in round `number` of an update's: all ranks agree to go on before it."""
        return False

    def backward(self, total: Tensor | None, number: int, rounds: int) -> None:
        """Backward of round `number`; gradients leave in it if they do so. None: this rank has no micro-batch in it."""
        if total is not None:
            torch.autograd.backward(total)

    def finish(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn gradients, and the scalars `sums`, into those of all ranks, after the last micro-batch."""
        for parameter, owed in zip(self._parameters, self._owed, strict=False):
            parameter.grad = owed if parameter.grad is None else parameter.grad.add_(owed)
        self._owed = []
        return sums

    def drop(self) -> None:
        """Give up the rest of the update."""
        self._optimizer.zero_grad(set_to_none=True)

    def done(self, updates: int, left_out: Tensor) -> list[str]:
        """End an update, after the optimizer, and return what is to be told.

        `updates`: the number of updates done; `left_out`: 1.0 where the optimizer left this one out.
        """
        return []

    def fields(self) -> dict[str, Any]:
        """Return the fields of a log line, counted since the last one."""
        return {}

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps beside the tensors."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this rank."""
        return {}

    def restore(self, state: Mapping[str, Any] | None, read: ReadRank, team: Coordinator) -> list[str]:
        """Restore the exchange's state, after weights and moments, and return what is to be told.

        `state`: what `state()` was in a world of any size, None if there was none; on rank 0 `read(r)` gives what its rank r's
        `tensors()` were.
        """
        if state is None or state["layout"] is None or state["kind"] == "auto":
            return []
        # Ranks that compressed had not sent all yet: it joins the next update's gradient, and is lost if that is skipped.
        config = self._recipe.compression.model_copy(update={"kind": state["kind"]})
        compressor = make_compressor(config, ranks=state["ranks"], rank=0, engine="torch", seed=self._recipe.seed)
        if set(compressor.state_kinds.values()) <= {"shared"}:
            return []
        buckets = Buckets(self._parameters, team.world, compressor=compressor, uncompressed=compressor)
        buckets.set_layout(state["layout"])
        buckets.fill_with_owed([_complete(read(rank), buckets.states(), rank) for rank in range(state["ranks"])])
        buckets.close()
        self._owed = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._optimizer.zero_grad(set_to_none=True)
        return [f"what {state['ranks']} ranks had not sent yet joins this rank's next update"]


class SharedGradients(LocalGradients):
    """Buckets over the ranks of a world."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, world: World, spans: Spans | None = None) -> None:
        super().__init__(optimizer, recipe)
        self._world = world
        self._kind = recipe.compression.kind
        self._undecided = self._kind == "auto"
        options = recipe.world
        self._every = options.sync == "every-micro-batch"
        none = Compression(kind="none")
        self._chosen = none if self._undecided else recipe.compression
        uncompressed = self._compressor(none)
        if options.topology != "flat" and not self._compressor(self._chosen).linear:
            raise UserError(
                f"world.topology={options.topology} is of allreduce, and compression.kind={self._kind} does not travel by one; "
                "set world.topology=flat, or compression.kind=fp16"
            )
        # With "auto" updates leave uncompressed until enough is measured for a choice.
        self._buckets = Buckets(
            self._parameters,
            world,
            compressor=self._compressor(self._chosen),
            uncompressed=uncompressed,
            starts_at=starts_at(self._chosen),
            options=BucketOptions(int(options.bucket_mib * MIB), int(options.first_bucket_mib * MIB), self._every),
            spans=spans,
        )
        self._update = 0
        self._logged_counters = Counters(ring_bytes=[0] * world.rings)
        self._logged_wait_s = 0.0
        self._timed: tuple[int, float] | None = None

    def _compressor(self, config: Compression) -> Any:
        world = self._world
        return make_compressor(config, ranks=world.size, rank=world.rank, engine=world.engine, seed=self._recipe.seed)

    def excluded(self, seconds: float) -> None:
        if self._timed is not None:
            self._timed = self._timed[0], self._timed[1] + seconds

    def begin(self, update: int) -> None:
        self._update = update
        self._buckets.zero()

    def leaves_in(self, number: int, rounds: int) -> bool:
        return self._every or number == rounds - 1

    def backward(self, total: Tensor | None, number: int, rounds: int) -> None:
        if self.leaves_in(number, rounds):
            self._buckets.arm(self._update)
        super().backward(total, number, rounds)
        if self._every and number < rounds - 1:
            self._buckets.finish(last=False)

    def finish(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._buckets.finish(sums)

    def drop(self) -> None:
        self._buckets.drop()

    def done(self, updates: int, left_out: Tensor) -> list[str]:
        self._buckets.settle(left_out)
        self._buckets.reorder()
        if not self._undecided:
            return []
        if self._timed is None:  # the first update is slower than others: from its end on
            self._timed = updates, time.perf_counter()
        if updates - self._timed[0] < max(2, self._recipe.compression.warmup_updates):
            return []
        return [self._decide(updates)]

    def _decide(self, updates: int) -> str:
        """compression: auto. Measured once, decided by rank 0, and kept."""
        assert self._timed is not None
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        update_s = (time.perf_counter() - self._timed[1]) / (updates - self._timed[0])
        gradient_bytes = sum(bucket.flat.nbytes for bucket in self._buckets.buckets)
        latency_s, bandwidth = measure_exchange(self._world, gradient_bytes)
        measured = MeasuredExchange(
            ranks=self._world.size,
            gradient_bytes=gradient_bytes,
            update_s=update_s,
            accumulation=self._recipe.loop.accumulation,
            bandwidth_bytes_per_s=bandwidth,
            latency_s=latency_s,
            buckets=len(self._buckets.buckets),
            engine=self._world.engine,
            device=self._world.device.type,
            compress_bytes_per_s=measure_copy(self._world.device),
        )
        # A topology is of allreduce: where there is one, what travels by another collective would do without it.
        choice = choose(measured, allreduce_only=self._recipe.world.topology != "flat")
        decision = self._world.broadcast_bytes(f"{choice.kind}\n{choice.reason}".encode(), "fastdistil.auto").decode()
        kind, reason = decision.split("\n", 1)
        self._settle(kind)
        return f"compression auto: {kind}: {reason}"

    def _settle(self, kind: str) -> None:
        self._undecided, self._kind = False, kind  # type: ignore[assignment]
        self._chosen = self._recipe.compression.model_copy(update={"kind": kind})
        if kind != "none":
            self._buckets.change_compressor(self._compressor(self._chosen), starts_at(self._chosen))

    def fields(self) -> dict[str, Any]:
        now, wait_s = self._world.counters.copy(), self._buckets.wait_s
        statistics = {
            "engine": self._world.engine,
            "compression": self._kind,
            "buckets": len(self._buckets.buckets),
            **now.since(self._logged_counters),
            "exchange_wait_s": wait_s - self._logged_wait_s,
        }
        self._logged_counters, self._logged_wait_s = now, wait_s
        return statistics

    def state(self) -> dict[str, Any] | None:
        return {"kind": self._kind, "ranks": self._world.size, "layout": self._buckets.layout()}

    def tensors(self) -> dict[str, Tensor]:
        return self._buckets.states()

    def restore(self, state: Mapping[str, Any] | None, read: ReadRank, team: Coordinator) -> list[str]:
        self._buckets.remember_used(parameter for parameter in self._parameters if parameter in self._optimizer.state)
        if state is None or state["layout"] is None:
            return []  # of one rank, or before its first update: nothing is owed
        if self._undecided and state["kind"] != "auto":
            self._settle(state["kind"])
        fits, current = self._buckets.set_layout(state["layout"]), self._buckets.states()
        if not current:
            return []
        messages = []
        if not fits:
            messages = [
                "compression's states lie in the buckets that the run began with: world.bucket_mib and rings leave them so"
            ]
        if state["ranks"] != self._world.size:
            messages += [f"what {state['ranks']} ranks had not sent yet is shared among {self._world.size}"]
            if self._world.is_chief:
                states = [_complete(read(rank), current, rank) for rank in range(state["ranks"])]
                read = self._buckets.redistributed(states).__getitem__
        team.send_each(lambda rank: _complete(read(rank), current, rank), current, "residuals")
        self._buckets.load_states(current)
        return messages


def _complete(states: Mapping[str, Tensor], current: Mapping[str, Tensor], rank: int) -> Mapping[str, Tensor]:
    """Return the states of a rank that a checkpoint holds. Raises CorruptData where it lacks one that this run's ranks have."""
    if missing := sorted(current.keys() - states.keys()):
        raise CorruptData(f"the checkpoint's rank-{rank}.safetensors lacks {missing[0]}; start anew")
    return states


def make_exchange(recipe: Recipe, world: World, optimizer: torch.optim.Optimizer, spans: Spans | None = None) -> LocalGradients:
    """Raises UserError for a compression that cannot be had here."""
    if recipe.loop.precision == "fp16" and recipe.compression.kind != "none":
        raise UserError(
            "compression keeps a part of gradients for later, and with loop.precision=fp16 their scale changes meanwhile; set "
            "loop.precision=bf16 or fp32, or compression.kind=none"
        )
    if world.size == 1:
        return LocalGradients(optimizer, recipe)
    return SharedGradients(optimizer, recipe, world, spans)
