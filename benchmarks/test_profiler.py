"""What the profiler costs: updates at the demo's sizes with it and without, taking turns in one process.

Both sides run the trainer's own step and log line. With: what every run has on (spans, memory, counted arithmetic); what is
done once a run is done before. Without: an object that measures nothing. They alternate update by update, in opposite order
every other pair, with a log line after each, twenty times as many as the demo writes. The sampler's thread runs beside both.

On a machine whose updates vary by several per cent such pairs cannot tell a thousandth from a hundredth. So further updates,
logged as the demo's are, have the profiler's own calls timed where they happen, and its thread's processor time counted.
"""

from pathlib import Path
from typing import Any

from .ranks import run_program, train_command

PAIRS, UPDATES = 150, 100

SIDES = """
import json, sys, time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
import torch
from fastdistil import train
from fastdistil.training import metrics
from fastdistil.training import reporting
from fastdistil.training.inputs import load_inputs, resolve
from fastdistil.profiling.report.bootstrap import ratio_of
from fastdistil.profiling.spans import unmeasured
from fastdistil.recipe import load_recipe
from fastdistil.distributed.coordinator import joined
from fastdistil.training.guards import Signals

pairs, updates, folder, *settings = sys.argv[1:]
pairs, updates = int(pairs), int(updates)
torch.set_num_threads(2)


class Nothing:
    def begin(self): pass
    def end(self): pass
    def read(self): return {}
    def parts(self, *_): return None
    def micro_batch(self, batch): return nullcontext()
    span = staticmethod(unmeasured)


class Timed:
    # Instruments, and the seconds that their calls took.
    def __init__(self, inner):
        self.inner, self.seconds = inner, 0.0

    def call(self, method, *given):
        begun = time.perf_counter()
        found = method(*given)
        self.seconds += time.perf_counter() - begun
        return found

    @contextmanager
    def within(self, make, *given):
        context = self.call(make, *given)
        self.call(context.__enter__)
        yield
        self.call(context.__exit__, None, None, None)

    def begin(self): self.call(self.inner.begin)
    def end(self): self.call(self.inner.end)
    def read(self): return self.call(self.inner.read)
    def parts(self, *given): return self.call(self.inner.parts, *given)
    def micro_batch(self, batch): return self.within(self.inner.micro_batch, batch)
    def span(self, name): return self.within(self.inner.span, name)


recipe = resolve(load_recipe(settings[0], settings[1:]))
times = {"with": [], "without": []}
with ExitStack() as stack:
    console = metrics.Console(quiet=True)
    team = stack.enter_context(joined(None, recipe, console.note))
    inputs = load_inputs(recipe, teacher=None, student=None, batches=None, note=console.note)
    signals = stack.enter_context(Signals(console.note))
    run = train._assemble(stack, recipe, Path(folder), inputs, team, console, signals)
    windows = stack.enter_context(inputs.source.windows(0, 2 * pairs + updates + 2))

    def update():
        run.instruments.begin()
        with run.instruments.span("data"):
            window, counts = next(windows)
        train.train_step(run, window, counts, 0.0)
        run.instruments.end()

    def on_processor_s():
        # Of the sampler's thread (Linux), in nanoseconds.
        return int(Path(f"/proc/self/task/{inner._sampler._thread.native_id}/schedstat").read_text().split()[0]) / 1e9

    def measured(side):
        run.instruments = inner if side == "with" else Nothing()
        begun = time.perf_counter()
        update()
        reporting.log(run)
        return time.perf_counter() - begun

    inner = run.instruments
    inner._kept, inner._watched = 1, True  # what a run does in its first updates alone
    for side in times:
        measured(side)
    for number in range(pairs):
        for side in ("with", "without") if number % 2 else ("without", "with"):
            times[side].append(measured(side))

    run.instruments, shares, whole = Timed(inner), [], time.perf_counter()
    thread_s = on_processor_s()
    for number in range(updates):
        begun, before = time.perf_counter(), run.instruments.seconds
        update()
        if number % 20 == 19:
            reporting.log(run)
        shares.append((run.instruments.seconds - before) / (time.perf_counter() - begun))
    whole = time.perf_counter() - whole
    thread_s = on_processor_s() - thread_s
    inner.close()
calls, calls_low, calls_high = ratio_of([1.0] * updates, shares, "mean")
ratios = [a / b for a, b in zip(times["with"], times["without"])]
value, low, high = ratio_of([1.0] * len(ratios), ratios)
paired = {"overhead": value - 1, "low": low - 1, "high": high - 1, "times": times}
print(json.dumps({**paired, "calls": calls, "calls_low": calls_low, "calls_high": calls_high, "thread": thread_s / whole}))
"""


def test_the_profilers_cost(benchmark: Any, demo_material: Path, tmp_path: Path) -> None:
    benchmark.group = "a demo step with the profiler and without"
    command = train_command(demo_material, tmp_path / "run", "loop.updates=1000")
    settings = command[command.index("train") + 1 :]
    (figures,) = benchmark.pedantic(lambda: run_program(SIDES, 1, PAIRS, UPDATES, tmp_path / "run", *settings), rounds=1)
    benchmark.extra_info.update(
        unit=f"shares of an update of a micro-batch; times in s, of {PAIRS} pairs with a log line each; calls of {UPDATES}",
        **figures,
    )
    print(
        f"\nthe profiler's calls take {figures['calls']:.3%} of an update (95%: {figures['calls_low']:.3%} to "
        f"{figures['calls_high']:.3%}), its thread {figures['thread']:.3%} of a core; updates with it take "
        f"{figures['overhead']:+.2%} longer (median of {PAIRS} pairs; 95%: {figures['low']:+.2%} to {figures['high']:+.2%})"
    )
