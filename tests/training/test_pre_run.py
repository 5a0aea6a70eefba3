"""Commands and copies that are made once on each node: real directories, real processes, also killed ones."""

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from fastdistil.data import local_copy
from fastdistil.data.corpus import Corpus
from fastdistil.data.local_copy import cached_corpus
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.tokenizer import train_wordpiece
from fastdistil.errors import CorruptData, DiskFull, UserError
from fastdistil.training.pre_run import run_once_per_node

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = [f"sentence {number} of a small corpus about {number * 7 % 31} things" for number in range(60)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "lines.txt").write_text("\n".join(SENTENCES), "utf-8")
    tokenizer = train_wordpiece(SENTENCES, 120, folder / "wordpiece")
    options = PrepareOptions(tokenizer=str(tokenizer), max_length=16, documents="line", workers=1)
    prepare([str(folder / "lines.txt")], folder / "corpus", options)
    return folder / "corpus"


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "corpus"))


class Calls(list[str]):
    """Barrier and notes of one rank, in order."""

    def barrier(self) -> None:
        self.append("barrier")


def cached(corpus: Path, cache: Path, local_rank: int = 0, **options: str) -> tuple[Path, Calls]:
    calls = Calls()
    return cached_corpus(corpus, cache, local_rank, calls.barrier, calls.append, **options), calls  # type: ignore[arg-type]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- pre_run ---


@contextmanager
def input_waiting(text: str) -> Iterator[None]:
    """As this process's standard input."""
    before, (reads, writes) = os.dup(0), os.pipe()
    os.write(writes, text.encode())
    os.close(writes)
    os.dup2(reads, 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reads)


def test_commands_run_in_order_on_local_rank_0_with_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path / "log"))
    commands = ('echo one >> "$PLACE"; echo to stdout; echo to stderr >&2', 'cat "$PLACE" && echo two >> "$PLACE"', "cat")
    calls = Calls()
    with input_waiting("not theirs"):
        run_once_per_node(commands, 0, calls.barrier, calls.append)
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    assert calls == [*(f"pre_run: {command}" for command in commands), "barrier"]
    out, err = capfd.readouterr()
    assert out == ""
    assert sorted(err.splitlines()[:2]) == ["pre_run: to stderr", "pre_run: to stdout"]
    assert err.splitlines()[2:] == ["pre_run: one"]


def test_the_nodes_other_ranks_only_wait(tmp_path: Path) -> None:
    calls = Calls()
    run_once_per_node([f"touch {tmp_path / 'made'}"], 1, calls.barrier, calls.append)
    assert calls == ["barrier"]
    assert not (tmp_path / "made").exists()


def test_a_command_that_fails_ends_it_and_says_how(tmp_path: Path) -> None:
    calls = Calls()
    command = "for i in 1 2 3 4 5 6 7; do echo line $i; done; exit 3"
    expected = (
        r"pre_run command 'for .* failed \(exit code 3\); its last words: line 3 \| line 4 \| line 5 \| line 6 \| line 7;"
    )
    with pytest.raises(UserError, match=expected):
        run_once_per_node([command, f"touch {tmp_path / 'made'}"], 0, calls.barrier, calls.append)
    assert "barrier" not in calls
    assert not (tmp_path / "made").exists()
    with pytest.raises(UserError, match=r"\(killed by SIGKILL\); mend"):
        run_once_per_node(["kill -9 $$"], 0, calls.barrier, calls.append)


def test_what_a_command_leaves_in_the_background_is_not_waited_for(tmp_path: Path) -> None:
    calls = Calls()
    begin = time.monotonic()
    run_once_per_node([f"sleep 600 & echo $! > {tmp_path / 'pid'}; echo started"], 0, calls.barrier, calls.append)
    os.kill(int((tmp_path / "pid").read_text()), 9)
    assert time.monotonic() - begin < 60  # it sleeps for 600
    assert calls[-1] == "barrier"


# --- copies ---


def test_a_copy_is_whole_and_made_once(corpus: Path, tmp_path: Path) -> None:
    target, calls = cached(corpus, tmp_path / "a" / "cache")
    assert target.parent == tmp_path / "a" / "cache"
    assert contents(target) == contents(corpus)
    assert len(Corpus.open(target)) == len(Corpus.open(corpus))
    assert calls == [f"copying {corpus} to {target}", "barrier"]
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    for local_rank in (0, 1):
        assert cached(corpus, tmp_path / "a" / "cache", local_rank) == (target, ["barrier"])
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_other_local_ranks_copy_nothing(corpus: Path, tmp_path: Path) -> None:
    target, calls = cached(corpus, tmp_path / "cache", 1)
    assert calls == ["barrier"]
    assert not target.exists()


def test_a_changed_corpus_gets_another_place(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    first, _ = cached(corpus, tmp_path / "cache")
    options = PrepareOptions(tokenizer=str(prepared / "tokenizer"), max_length=12, documents="line", workers=1)
    shutil.rmtree(corpus)
    prepare([str(prepared.parent / "lines.txt")], corpus, options)
    second, _ = cached(corpus, tmp_path / "cache")
    assert first != second
    assert contents(second) == contents(corpus)
    assert contents(first) == contents(prepared)


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokenizer/tokenizer.json"])
def test_a_damaged_copy_is_made_again(corpus: Path, tmp_path: Path, name: str) -> None:
    target, _ = cached(corpus, tmp_path / "cache")
    good = (target / name).read_bytes()
    (target / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # a flipped bit: the size is right
    assert cached(corpus, tmp_path / "cache", verify="size") == (target, ["barrier"])
    again, calls = cached(corpus, tmp_path / "cache")
    assert again == target
    assert f"{target / name} is damaged" in calls[0]
    assert contents(target) == contents(corpus)
    (target / name).write_bytes(good[:-1])
    assert len(cached(corpus, tmp_path / "cache", verify="size")[1]) == 3
    (target / name).unlink()
    assert len(cached(corpus, tmp_path / "cache", verify="size")[1]) == 3
    (target / "manifest.json").write_text("{}")
    assert len(cached(corpus, tmp_path / "cache", verify="size")[1]) == 3
    assert contents(target) == contents(corpus)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f".{target.name}.lock", target.name]


def test_a_corrupt_corpus_is_found_while_it_is_copied(corpus: Path, tmp_path: Path) -> None:
    shard = corpus / "tokens-00000.bin"
    good = shard.read_bytes()
    for bad in (bytes([good[0] ^ 1]) + good[1:], good[:-2], good + b"x"):
        shard.write_bytes(bad)
        with pytest.raises(CorruptData, match=r"corpus/tokens-00000\.bin is damaged: .*fastdistil prepare again"):
            cached(corpus, tmp_path / "cache")
        assert not any(path.name.startswith("corpus-") for path in (tmp_path / "cache").iterdir())
    shard.unlink()
    with pytest.raises(CorruptData, match=r"tokens-00000\.bin is missing"):
        cached(corpus, tmp_path / "cache")
    shard.write_bytes(good)
    assert contents(cached(corpus, tmp_path / "cache")[0]) == contents(corpus)
    (corpus / "manifest.json").write_text("{}")
    with pytest.raises(CorruptData, match="manifest"):
        cached(corpus, tmp_path / "cache")
    (corpus / "manifest.json").unlink()
    with pytest.raises(UserError, match="is no complete corpus"):
        cached(corpus, tmp_path / "cache")


def test_what_will_not_fit_is_told_before_anything_is_copied(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(len(data) for name, data in contents(corpus).items() if name != "manifest.json")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(local_copy.shutil, "disk_usage", lambda _: usage._replace(free=total - 1))
    with pytest.raises(DiskFull, match=r"needs 0\.\d MB in .*data\.cache_dir"):
        cached(corpus, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    monkeypatch.setattr(local_copy.shutil, "disk_usage", lambda _: usage._replace(free=total))
    assert contents(cached(corpus, tmp_path / "cache")[0]) == contents(corpus)


def test_a_disk_that_fills_up_all_the_same(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_copy, "_copy_file", full)
    with pytest.raises(DiskFull, match=r"copying the corpus to data\.cache_dir"):
        cached(corpus, tmp_path / "cache")


def test_a_file_in_the_way(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    for place in (tmp_path / "cache", tmp_path / "cache" / "deeper"):
        with pytest.raises(UserError, match=r"data\.cache_dir=.* must be a directory"):
            cached(corpus, place)


# --- processes ---

PROGRAM = """
import sys
from pathlib import Path
from fastdistil.data.local_copy import cached_corpus
note = lambda text: print(text, flush=True)
print(cached_corpus(Path(sys.argv[1]), Path(sys.argv[2]), 0, lambda: None, note), flush=True)
"""


@contextmanager
def started(corpus: Path, cache: Path) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(corpus), str(cache)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def slow_shard(corpus: Path, name: str) -> Iterator[Callable[[], None]]:
    """The file becomes a pipe, which gives half of its bytes at first and the rest when the function is called."""
    path, data = corpus / name, (corpus / name).read_bytes()
    path.unlink()
    os.mkfifo(path)
    # For both directions, so that opening does not wait for the reader.
    handle = os.open(path, os.O_RDWR)
    os.write(handle, data[: len(data) // 2])

    def finish() -> None:
        writer = os.open(path, os.O_WRONLY)
        os.close(handle)
        os.write(writer, data[len(data) // 2 :])
        os.close(writer)

    try:
        yield finish
    finally:
        path.unlink()
        path.write_bytes(data)


def test_a_copy_that_was_killed_is_completed(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    slow = "tokens-00000.bin"
    with slow_shard(corpus, slow), started(corpus, cache) as (process, output):
        assert output.readline().startswith("copying ")
        until(lambda: any(cache.glob(f".*.partial/{slow}")))
        process.kill()
        assert process.wait() == -9
    (partial,) = cache.glob(".*.partial")
    done = {path: path.stat().st_mtime_ns for path in partial.rglob("*") if path.is_file() and path.name != slow}
    assert not any(path.name.startswith("corpus-") for path in cache.iterdir())
    target, calls = cached(corpus, cache)
    assert calls == [f"copying {corpus} to {target}", "barrier"]
    assert contents(target) == contents(corpus)
    assert len(done) > 2
    mtimes = {target / path.relative_to(partial): when for path, when in done.items()}
    assert all(path.stat().st_mtime_ns == when for path, when in mtimes.items() if path.name != "manifest.json")


def test_two_runs_on_one_node_copy_once(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    slow = "tokens-00000.bin"
    with slow_shard(corpus, slow) as finish, started(corpus, cache) as (first, its_output):
        assert its_output.readline().startswith("copying ")
        until(lambda: any(cache.glob(f".*.partial/{slow}")))
        with started(corpus, cache) as (second, output):
            assert output.readline().startswith("another run makes or checks the copy")
            finish()
            target = its_output.readline().strip()
            assert output.readline().strip() == target
            assert (first.wait(30), second.wait(30)) == (0, 0)
            assert (its_output.read(), output.read()) == ("", "")
    assert contents(Path(target)) == contents(corpus)
