"""`fastdistil prepare` against the tokenizer alone: the share of `encode_batch_fast`'s throughput that reaches the disk.

Both read the same text in the same run, turn about; the ratio of the medians is printed and kept in `extra_info`, not
asserted. The rival gets its text as strings in memory, in the stretches in which it is fastest (it takes up to 1.6 times
as long for whole books), and as many threads as prepare has processes. The time a worker process needs to start is
measured apart, by a corpus of one line a process, and taken off: it does not grow with the corpus.
"""

import os
import shutil
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer

from fastdistil.data import text_files
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.tokenise import cut_at_spaces
from fastdistil.data.tokenizer import load_tokenizer, plain, train_wordpiece

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3
CHARACTERS = 5_000_000
STRETCH = 32_768


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str, list[str]]:
    """Files, tokenizer directory, and the files' text in stretches."""
    data = Path(os.environ.get("FASTDISTIL_DATA", ROOT.parent / "shared" / "data"))
    folder = tmp_path_factory.mktemp("prepare")
    if (data / "gutenberg").is_dir():
        sources, tokenizer = sorted((data / "gutenberg").glob("*.txt")), data / "bert-base-uncased"
    else:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        tokenizer = train_wordpiece((path.read_text("utf-8") for path in sources[:40]), 8000, folder / "tokenizer")
    texts: list[str] = []
    for source in sources:
        text = source.read_text("utf-8", errors="ignore")
        (folder / f"{len(texts):04d}.txt").write_text(text, "utf-8")
        texts.append(text)
        if sum(map(len, texts)) > CHARACTERS:
            break
    files = [str(path) for path in sorted(folder.glob("*.txt"))]
    return files, str(tokenizer), [stretch for text in texts for stretch in cut_at_spaces(text, STRETCH)]


@pytest.fixture
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The tokenizers library reads these when it first uses threads: one count a process."""
    count: int = request.param
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true" if count > 1 else "false")
    monkeypatch.setenv("RAYON_NUM_THREADS", str(count))
    return count


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float
    """Processor time of this process and of those it waited for: other work on the machine disturbs it less."""


def cost(work: Any) -> Cost:
    wall, before = time.perf_counter(), os.times()
    work()
    after = os.times()
    return Cost(time.perf_counter() - wall, sum(after[:4]) - sum(before[:4]))


def medians(costs: list[Cost]) -> Cost:
    return Cost(statistics.median(cost.wall_s for cost in costs), statistics.median(cost.cpu_s for cost in costs))


@pytest.mark.benchmark(group="prepare")
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_prepare_against_the_tokenizer_alone(
    benchmark: Any, setting: tuple[list[str], str, list[str]], threads: int, tmp_path: Path
) -> None:
    if threads > (os.cpu_count() or 1):
        pytest.skip(f"needs {threads} cores")
    files, tokenizer_dir, stretches = setting
    options = PrepareOptions(tokenizer=tokenizer_dir, max_length=128, workers=threads)
    tokenizer: Tokenizer = load_tokenizer(tokenizer_dir).backend_tokenizer
    plain(tokenizer)
    out = tmp_path / "out"
    lines = [tmp_path / f"{index}.txt" for index in range(threads)]
    for line in lines:
        line.write_text("one line\n")

    def run(inputs: list[str]) -> Cost:
        shutil.rmtree(out, ignore_errors=True)
        return cost(lambda: prepare(inputs, out, options))

    def run_start() -> Cost:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_files, "BLOCK_CHARACTERS", 1)  # a block, and so a process, for each line
            return run([str(line) for line in lines])

    ours: list[Cost] = []
    start: list[Cost] = []
    rival: list[Cost] = []

    def round_of_three() -> None:
        rival.append(cost(lambda: tokenizer.encode_batch_fast(stretches, add_special_tokens=False)))
        ours.append(run(files))
        start.append(run_start())

    round_of_three()
    for costs in (ours, start, rival):
        costs.clear()
    benchmark.pedantic(round_of_three, rounds=ROUNDS)
    megabytes = sum(Path(file).stat().st_size for file in files) / 1e6
    total, fixed, alone = medians(ours), medians(start), medians(rival)
    ratio = alone.wall_s / (total.wall_s - fixed.wall_s)
    cpu_ratio = alone.cpu_s / (total.cpu_s - fixed.cpu_s)
    benchmark.extra_info.update(
        ratio=ratio,
        cpu_ratio=cpu_ratio,
        ratio_with_start=alone.wall_s / total.wall_s,
        megabytes=megabytes,
        prepare_s=total.wall_s,
        start_s=fixed.wall_s,
        encode_batch_fast_s=alone.wall_s,
    )
    print(
        f"\nprepare, {threads} workers: {megabytes:.1f} MB in {total.wall_s:.2f} s, of which {fixed.wall_s:.2f} s start; "
        f"encode_batch_fast, {threads} threads: {alone.wall_s:.2f} s; ratio {ratio:.3f} "
        f"({alone.wall_s / total.wall_s:.3f} with the start), in processor time {cpu_ratio:.3f}; medians of {ROUNDS}"
    )
