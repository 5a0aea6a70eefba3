"""How long the commands that read runs take to start, against Python's own start: wanted under 0.6 s on two idle cores.

Each round starts the interpreter alone and every command once, in turn; medians are printed and kept in `extra_info`. The runs
have 600 updates. `report` and `compare` are measured to their end, `watch` to the first byte of its page. Python keeps the
bytecode of what it imports, as it does for users, in a folder of the benchmark's: the warm-up round writes it.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from fastdistil.events import Environment, EventLog, Start, Train
from fastdistil.recipe import load_recipe

ROUNDS = 9
WANTED_S = 0.6
COMMAND = (sys.executable, "-m", "fastdistil")


def write_run(run: Path, step_s: float) -> Path:
    """A run of 60 log lines with 10 updates each, whose times vary by some percent as those of real steps do."""
    random = np.random.default_rng(0)

    def ten_times(mean_s: float) -> tuple[float, ...]:
        return tuple((mean_s * random.lognormal(sigma=0.05, size=10)).tolist())

    run.mkdir()
    (run / "recipe.yaml").write_text(load_recipe("distilbert", ["data.train=corpus", "teacher.path=teacher"]).to_yaml())
    parts = (("student", 0.3), ("backward", 0.4))
    with EventLog(run / "events.jsonl") as log:
        log.write(Start(updates=600, ranks=1, device="cpu", precision="fp32"))
        log.write(Environment(processor="a processor", versions={"torch": "2.13.0"}))
        for update in range(10, 601, 10):
            losses = {"total": 1 / update, "soft": 0.5 / update, "hard": 0.5 / update, "lr": 5e-4, "grad_norm": 1.0}
            times = {"step_s": ten_times(step_s), "phases": {name: ten_times(step_s * part) for name, part in parts}}
            log.write(Train(update=update, updates=10, tokens=9000, tokens_per_s=4e4, **times, **losses))
    return run


def seconds_of(command: list[str], environment: dict[str, str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - begun


def seconds_to_the_first_page(run: Path, environment: dict[str, str]) -> float:
    begun = time.perf_counter()
    command = [*COMMAND, "watch", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = next(word for line in process.stdout for word in line.split() if word.startswith("http://"))
        with urllib.request.urlopen(address) as page:
            page.read(1)
        return time.perf_counter() - begun
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def test_commands_that_read_runs_start_at_once(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", 0.1), write_run(tmp_path / "b", 0.11)
    commands = {
        "python": [sys.executable, "-c", ""],
        "fastdistil report --help": [*COMMAND, "report", "--help"],
        "fastdistil compare --help": [*COMMAND, "compare", "--help"],
        "fastdistil report RUN": [*COMMAND, "report", str(a), "--out", str(tmp_path / "report.html")],
        "fastdistil compare A B": [*COMMAND, "compare", str(a), str(b), "--anyway"],
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path / "bytecode")
    times: dict[str, list[float]] = {name: [] for name in (*commands, "fastdistil watch RUN")}

    def measure() -> None:
        for name, command in commands.items():
            times[name].append(seconds_of(command, environment))
        times["fastdistil watch RUN"].append(seconds_to_the_first_page(a, environment))

    benchmark.pedantic(measure, rounds=ROUNDS, warmup_rounds=1)
    print(f"\nmedians of {ROUNDS}, {os.cpu_count()} cores; wanted below {WANTED_S} s")
    for name, seconds in times.items():
        median = statistics.median(seconds[1:])
        benchmark.extra_info[name] = median
        print(f"{name:28} {median:.3f} s")
