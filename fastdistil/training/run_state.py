"""What the loop holds from its first update to its last."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.console import Console
from fastdistil.data.batch import Counts
from fastdistil.distributed.coordinator import Coordinator, Decision
from fastdistil.events import Event, EventLog, Note
from fastdistil.gradients.exchange import LocalGradients
from fastdistil.models import language_model
from fastdistil.recipe import Recipe
from fastdistil.runs import PAUSE, RECIPE, pause_requested
from fastdistil.training import metrics
from fastdistil.training.guards import FiniteGuard, Signals
from fastdistil.training.inputs import Inputs
from fastdistil.training.instruments import Instruments
from fastdistil.training.metrics import Imbalance
from fastdistil.training.optim import LossScale


@dataclass
class Run:
    """Everything the loop holds. `update` counts the updates done: it is the position of the run."""

    recipe: Recipe
    directory: Path
    inputs: Inputs
    team: Coordinator
    exchange: LocalGradients
    optimizer: torch.optim.AdamW
    loss_scale: LossScale | None
    guard: FiniteGuard
    meter: metrics.Meter
    events: EventLog | None
    """None but on rank 0."""
    console: Console
    board: metrics.TensorBoard | None
    signals: Signals
    load: Imbalance
    instruments: Instruments
    stopping: Decision | None = None
    update: int = 0
    best_update: int | None = None
    best_loss: float | None = None
    tokens: int = 0
    """Of all updates done."""
    unread: list[int] = field(default_factory=list)
    """Tokens of each update since the last log line: what a bad one among them takes back."""
    logged_tokens: int = 0
    logged_s: float = 0.0
    saved_update: int | None = None
    histograms_at: int = 0
    """Update of TensorBoard's last histograms."""
    teacher: dict[str, Any] | None = None
    """See teacher_identity; None but on rank 0, and without a teacher."""

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def modules(self) -> dict[str, nn.Module | None]:
        return {"student": self.inputs.student, "projection": self.inputs.projection}

    @property
    def stop_wanted(self) -> str | None:
        """SIGTERM, SIGINT, SIGHUP or PAUSE, here or on another rank."""
        reason = self.signals.requested
        if reason is None and self.team.is_chief and pause_requested(self.directory):
            reason = PAUSE
        return self.team.stop_wanted(reason)

    @property
    def way_on(self) -> str:
        """What continues this run, whatever it was started with; --resume auto does too, beside the same arguments."""
        command = "train" if self.recipe.teacher is not None else "pretrain"
        return f"continue with fastdistil {command} {self.directory / RECIPE} --resume {self.directory}"

    def agree_to_stop(self, counts: Counts) -> bool:
        """The same answer on all ranks, which all ask; whoever is fast waits here for whoever is slow."""
        pause = self.team.is_chief and pause_requested(self.directory)
        with self.instruments.span("exposed"):
            self.stopping = self.team.decide(self.signals.requested, pause, counts)
        return self.stopping.stop

    def count(self) -> None:
        """Count the tokens of updates that are no longer to be taken back."""
        self.tokens += sum(self.unread)
        self.unread.clear()

    def take_back(self, update: int) -> None:
        """Go back to before an update that was not applied (loop.nonfinite=stop); those after it were not either."""
        self.unread = self.unread[: len(self.unread) - (self.update - update + 1)]
        self.update = update - 1

    def tell(self, text: str) -> None:
        """Tell a person, and write it to the log."""
        self.event(Note(update=self.update, message=text))
        self.console.note(text)

    def event(self, event: Event) -> None:
        if self.events is not None:
            self.events.write(event)

    @contextmanager
    def aside(self, activity: str) -> Iterator[None]:
        """Keep an evaluation, a checkpoint, a trace's beginning and end out of what updates are measured by.

        These are no part of updates, and take as long as they need. All ranks enter it.
        """
        begun = time.perf_counter()
        with self.meter.excluded(), self.team.unhurried(activity), self.instruments.aside(activity):
            yield
        self.exchange.excluded(time.perf_counter() - begun)

    def autocast(self) -> AbstractContextManager[Any]:
        precision = self.recipe.loop.precision
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.inputs.device.type, language_model.DTYPES[precision])
