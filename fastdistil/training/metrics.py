"""What an update is measured by: a meter on the device, the load of the ranks, TensorBoard."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistil.distributed.world import World
from fastdistil.errors import UserError, translated
from fastdistil.profiling.memory import device_memory, host_memory
from fastdistil.training.guards import FiniteGuard


class Meter:
    """Gathers the scalars of updates on their device; only `read`, once a log line, waits for it.

    `clock` gives seconds; tokens per second and the data-wait share are over the time since the last read.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.elapsed_s = 0.0
        """Of training, between the last read and the one before it."""
        self._names: tuple[str, ...] = ()
        self._device = torch.device("cpu")
        self.restart()

    def restart(self) -> None:
        """Forget everything and start the clock anew: right before the first update, say."""
        self._sums: Tensor | None = None  # [k + 1] float64: sums of the terms and of the gradient norm, count of both
        self._peak: Tensor | None = None  # [] float64: largest gradient norm
        self._updates = self._tokens = 0
        self._waited_s = self._excluded_s = 0.0
        self._since = self._clock()

    @torch.no_grad()
    def add(
        self,
        terms: Mapping[str, Tensor],
        grad_norm: Tensor,
        tokens: int,
        data_wait_s: float,
        found_inf: Tensor | None = None,
    ) -> None:
        """Take in one update: scalar tensors, the same names at every call, on one device; nothing is waited for.

        An update whose `found_inf` (float []) is 1 was not applied: it counts in tokens and time, but in no mean.
        """
        named = {**terms, "grad_norm": grad_norm}
        values = torch.stack([value.detach().reshape(()).double() for value in named.values()])
        counted = torch.cat([values, values.new_ones(1)])
        if found_inf is not None:
            counted = torch.where(found_inf > 0, 0.0, counted)
        largest = counted[-2]
        if self._sums is None or self._peak is None:
            self._names, self._device = tuple(named), values.device
            self._sums, self._peak = counted, largest
        else:
            assert tuple(named) == self._names, f"terms changed from {self._names} to {tuple(named)}"
            self._sums, self._peak = self._sums + counted, torch.maximum(self._peak, largest)
        self._updates += 1
        self._tokens += tokens
        self._waited_s += data_wait_s

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time spent in the block (evaluation, a checkpoint) does not count as training time."""
        start = self._clock()
        try:
            yield
        finally:
            self._excluded_s += self._clock() - start

    def read(self, guard: FiniteGuard | None = None) -> dict[str, Any]:
        """Means over the applied updates since the last read, and rates; waits for the device once, then starts afresh.

        Keys: one per term, grad_norm, grad_norm_max, updates, skipped, tokens, tokens_per_s, data_wait_share, host_peak_bytes
        and, on a GPU, device_allocated_bytes, device_peak_bytes. The verdict of a `guard` comes with the same wait: it adds
        skipped_in_all, or raises NonFinite. Raises ValueError if nothing was added.
        """
        if self._sums is None or self._peak is None:
            raise ValueError("nothing to read: no update was added since the last read")
        flags = guard.pending() if guard is not None else None
        tensors = [self._sums, self._peak.reshape(1)]
        values = torch.cat(tensors if flags is None else [*tensors, flags]).tolist()
        *sums, applied, largest = values[: len(self._sums) + 1]
        skipped_in_all = guard.judge(values[len(self._sums) + 1 :]) if guard is not None and flags is not None else None
        fields: dict[str, Any] = {
            name: total / applied if applied else math.nan for name, total in zip(self._names, sums, strict=True)
        }
        fields["grad_norm_max"] = largest if applied else math.nan
        self.elapsed_s = elapsed_s = self._clock() - self._since - self._excluded_s
        fields |= {"updates": self._updates, "skipped": self._updates - int(applied), "tokens": self._tokens}
        if skipped_in_all is not None:
            fields["skipped_in_all"] = skipped_in_all
        fields["tokens_per_s"] = self._tokens / elapsed_s if elapsed_s > 0 else math.nan
        fields["data_wait_share"] = self._waited_s / elapsed_s if elapsed_s > 0 else math.nan
        fields["host_peak_bytes"] = host_memory().peak_rss_bytes
        on_device = device_memory(self._device)
        if on_device is not None:
            fields["device_allocated_bytes"] = on_device.allocated_bytes
            fields["device_peak_bytes"] = on_device.peak_allocated_bytes
        self.restart()
        return fields


class TensorBoard:
    """Writes a run's numbers for TensorBoard. Trouble while writing is told once through `warn` and never stops training."""

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logging.tensorboard needs a package that is not installed; pip install fastdistil[tensorboard], "
                "or set logging.tensorboard=false"
            ) from error
        self._warn: Callable[[str], None] | None = warn
        with translated("opening TensorBoard's directory", directory):
            self._writer: Any = SummaryWriter(str(directory))

    def write(self, update: int, fields: Mapping[str, Any]) -> None:
        """One curve per number in `fields`; other values are not for TensorBoard."""
        with self._harmless():
            for name, value in fields.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(name, value, update)

    def text(self, name: str, text: str) -> None:
        """Write a text as it is, in a fixed width."""
        with self._harmless():
            self._writer.add_text(name, "    " + text.replace("\n", "\n    "))

    def histograms(self, update: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        with self._harmless():
            for name, tensor in tensors:
                self._writer.add_histogram(name, tensor.detach().float().cpu(), update)

    def close(self) -> None:
        with self._harmless():
            self._writer.close()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (whatever it is, training is worth more than a curve)
            if self._warn is not None:
                self._warn(f"TensorBoard: {type(error).__name__}: {error}; its curves may have gaps, events.jsonl has them all")
                self._warn = None


class Imbalance:
    """What this rank did since the last log line, to find out who keeps the others waiting."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._tokens, self._data_wait_s = 0, 0.0

    def add(self, tokens: int, data_wait_s: float) -> None:
        self._tokens += tokens
        self._data_wait_s += data_wait_s

    def read(self, step_s: Sequence[float], phases: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """Return the imbalances of all ranks (the most over the mean, less 1) and who was the slowest, on every rank.

        It also returns, true on rank 0 alone, how long rank 0 waited for the slowest in each update: another time it may be
        another one.

        Work is the updates' time, as this rank's spans have it in seconds of each update, without what was waited for other
        ranks (`exposed`): whoever is fast waits for whoever is slow. On a GPU that is the stream's waiting, the host's is none.
        """
        exposed = phases.get("exposed") or [0.0] * len(step_s)
        worked_s = [step - waited for step, waited in zip(step_s, exposed, strict=True)]
        rows = self._world.gather([self._tokens, self._data_wait_s, *worked_s], "fastdistil.load")
        ranks = [_Load(tokens, data_wait_s, worked_s) for tokens, data_wait_s, *worked_s in rows]
        self._tokens, self._data_wait_s = 0, 0.0
        tokens, seconds = [load.tokens for load in ranks], [sum(load.worked_s) for load in ranks]
        behind_s = [max(update) - update[0] for update in zip(*(load.worked_s for load in ranks), strict=True)]
        return {
            "imbalance_tokens": max(tokens) * len(ranks) / sum(tokens) - 1 if sum(tokens) else 0.0,
            "imbalance_time": max(seconds) * len(ranks) / sum(seconds) - 1 if sum(seconds) > 0 else 0.0,
            "slowest_rank": seconds.index(max(seconds)),
            "rank_tokens": [int(number) for number in tokens],
            "rank_data_wait_s": [load.data_wait_s for load in ranks],
            "rank_worked_s": seconds,
            # Ranks do not begin an update at once: more than it waited at all was no wait.
            "rank_0_waited_s": sum(map(min, behind_s, exposed)),
        }


class _Load(NamedTuple):
    tokens: float
    data_wait_s: float
    worked_s: list[float]
    """In each update; all ranks did as many."""
