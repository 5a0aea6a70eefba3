"""What the profiler costs: updates at the demo's sizes with it and without, taking turns in one process.

Both sides run the trainer's own step and log line. With: everything that every run has on (spans, the sampler's thread,
memory, counted arithmetic); what is done once a run is done before. Without: an object that measures nothing. They alternate
update by update, in opposite order every other pair. A log line after each is twenty times what the demo writes.
"""

from pathlib import Path
from typing import Any

from .ranks import run_program, train_command

PAIRS = 300

SIDES = """
import json, sys, time
from contextlib import ExitStack, nullcontext
from pathlib import Path
import torch
from fastdistil import metrics, reporting, train
from fastdistil.inputs import load_inputs, resolve
from fastdistil.instruments import Instruments
from fastdistil.profiling.intervals import ratio_of
from fastdistil.profiling.spans import unmeasured
from fastdistil.recipe import load_recipe
from fastdistil.team import joined
from fastdistil.watchdog import Signals

pairs, folder, *settings = sys.argv[1:]
pairs = int(pairs)
torch.set_num_threads(2)


class Nothing:
    def begin(self): pass
    def end(self): pass
    def read(self): return {}
    def parts(self, *_): return None
    def micro_batch(self, batch): return nullcontext()
    span = staticmethod(unmeasured)


recipe = resolve(load_recipe(settings[0], settings[1:]))
times = {"with": [], "without": []}
with ExitStack() as stack:
    console = metrics.Console(quiet=True)
    team = stack.enter_context(joined(None, recipe, console.note))
    inputs = load_inputs(recipe, teacher=None, student=None, batches=None, note=console.note)
    signals = stack.enter_context(Signals(console.note))
    run = train._assemble(stack, recipe, Path(folder), inputs, team, console, signals)
    windows = stack.enter_context(inputs.source.windows(0, 2 * pairs + 1))

    def measured(side):
        if side == "with":
            run.instruments = Instruments(recipe, inputs, True, console.note)
            run.instruments._kept = 1  # what autograd keeps is counted in a run's first micro-batch alone
        else:
            run.instruments = Nothing()
        begun = time.perf_counter()
        run.instruments.begin()
        with run.instruments.span("data"):
            window, counts = next(windows)
        train.train_step(run, window, counts, 0.0)
        run.instruments.end()
        reporting.log(run)
        seconds = time.perf_counter() - begun
        if side == "with":
            run.instruments.close()
        return seconds

    run.instruments.close()
    measured("without")
    for number in range(pairs):
        for side in ("with", "without") if number % 2 else ("without", "with"):
            times[side].append(measured(side))
ratios = [a / b for a, b in zip(times["with"], times["without"])]
value, low, high = ratio_of([1.0] * len(ratios), ratios)
print(json.dumps({"overhead": value - 1, "low": low - 1, "high": high - 1, "times": times}))
"""


def test_the_profilers_cost(benchmark: Any, demo_material: Path, tmp_path: Path) -> None:
    benchmark.group = "a demo step with the profiler and without"
    command = train_command(demo_material, tmp_path / "run", "loop.updates=1000")
    settings = command[command.index("train") + 1 :]
    (found,) = benchmark.pedantic(lambda: run_program(SIDES, 1, PAIRS, tmp_path / "run", *settings), rounds=1)
    benchmark.extra_info.update(unit=f"s, an update of a micro-batch and a log line, {PAIRS} pairs", **found)
    print(
        f"\nthe profiler costs {found['overhead']:+.2%} of an update (median of {PAIRS} pairs; 95%: {found['low']:+.2%} to "
        f"{found['high']:+.2%})"
    )
