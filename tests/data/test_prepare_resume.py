"""What is on disk when prepare is interrupted, repeated, refused or out of space. Real processes, real kills."""

import fcntl
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdistil.data import prepare as prepare_module
from fastdistil.data import text_files
from fastdistil.data.corpus import Corpus, Manifest
from fastdistil.data.prepare import PrepareOptions, PrepareProgress, prepare
from fastdistil.data.tokenizer import train_wordpiece
from fastdistil.errors import CorruptData, DiskFull, OutOfMemory, UserError

LINES = [f"sentence {number} of a text that fills several shards, and says {number % 7}" for number in range(400)]

SCRIPT = """
import json, multiprocessing, os, signal, sys
from fastdistil.data import text_files
from fastdistil.data.prepare import PrepareOptions, prepare

def told(progress):
    global blocks
    blocks += not progress.note
    if blocks == 9:
        print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    blocks = 0
    text_files.BLOCK_CHARACTERS = 1000
    text_files.CHUNK_BYTES = 700
    out, inputs, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    prepare(inputs, out, PrepareOptions(**options), told)
"""


class Job:
    """Inputs and options of many small blocks and shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = folder / "text"
        text.mkdir()
        for part in range(4):
            lines = [line.encode() for line in LINES[part * 100 : part * 100 + 100]]
            lines[50] = b"\xff bad"
            (text / f"{part}.txt").write_bytes(b"\n".join(lines))
        self.inputs = [str(text)]
        tokenizer = str(train_wordpiece(LINES, 120, folder / "tokenizer"))
        self.options = {"tokenizer": tokenizer, "documents": "line", "shard_tokens": 600, "max_bad_fraction": 0.1, "workers": 1}

    def prepare(self, out: Path, progress: Any = None, **changes: Any) -> Manifest:
        return prepare(self.inputs, out, PrepareOptions(**{**self.options, **changes}), progress)

    def killed(self, out: Path, **changes: Any) -> list[int]:
        """Run in a process that kills itself after nine blocks; returns the ids of its workers."""
        script = self.folder / "script.py"
        script.write_text(SCRIPT)
        arguments = [str(out), json.dumps(self.inputs), json.dumps({**self.options, **changes})]
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run([sys.executable, script, *arguments], env=environment, stdout=subprocess.PIPE, check=False)
        assert done.returncode == -signal.SIGKILL
        workers: list[int] = json.loads(done.stdout)
        return workers


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(text_files, "BLOCK_CHARACTERS", 1000)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 700)
    return Job(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_repeated_gives_the_same_bytes(job: Job, tmp_path: Path, workers: int) -> None:
    reference, out = tmp_path / "whole", tmp_path / "out"
    job.prepare(reference)
    pids = job.killed(out, workers=workers)
    assert len(pids) == (workers if workers > 1 else 0)
    for pid in pids:  # those whose parent was killed leave by themselves
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([handle], [], [], 60)[0], "a worker outlived its parent"
        os.close(handle)
    written = json.loads((out / "progress.json").read_text())["written"]
    assert 1 < len(written["shards"]) < len(Corpus.open(reference).manifest.shards)
    with pytest.raises(UserError, match="was interrupted"):
        Corpus.open(out)
    mtimes = {name: (out / name).stat().st_mtime_ns for name in written["files"]}
    notes: list[PrepareProgress] = []
    job.prepare(out, notes.append)
    assert f"going on after {len(written['shards'])} finished shards" in [progress.note for progress in notes]
    assert len([progress for progress in notes if not progress.note]) < 40 - written["blocks"]  # the others were skipped
    assert mtimes == {name: (out / name).stat().st_mtime_ns for name in mtimes}
    assert contents(out) == contents(reference)
    Corpus.open(out)


def test_a_killed_call_cannot_go_on_otherwise(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job.killed(out)
    before = contents(out)
    with pytest.raises(UserError, match=r"prepared with other max_length; choose another --out, or delete it"):
        job.prepare(out, max_length=100)
    first = tmp_path / "text" / "0.txt"
    stat = first.stat()
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(UserError, match="prepared with other inputs"):
        job.prepare(out)
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    train_wordpiece(LINES, 60, tmp_path / "tokenizer")
    with pytest.raises(UserError, match="prepared with other tokenizer_sha256"):
        job.prepare(out)
    train_wordpiece(LINES, 120, tmp_path / "tokenizer")
    assert contents(out) == before
    job.prepare(out, workers=2, max_bad_fraction=0.5)  # neither shapes the bytes


def test_a_finished_shard_that_was_changed_meanwhile(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job.killed(out)
    shard = out / "tokens-00001.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    with pytest.raises(CorruptData, match=r"tokens-00001.bin is damaged: sha256 expected"):
        job.prepare(out)
    (out / "progress.json").write_text('{"written": ')
    with pytest.raises(CorruptData, match=r"progress.json is damaged"):
        job.prepare(out)


def test_before_the_first_shard_other_options_start_anew(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job.killed(out, shard_tokens=10**6)
    assert json.loads((out / "progress.json").read_text())["written"]["shards"] == []
    job.prepare(out, max_length=32)
    job.prepare(tmp_path / "whole", max_length=32)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_complete_corpus_is_up_to_date_or_refused_and_never_touched(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = job.prepare(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    notes: list[PrepareProgress] = []
    assert job.prepare(out, notes.append, workers=2) == manifest
    assert [progress.note for progress in notes] == [f"{out} is up to date"]
    with pytest.raises(UserError, match="prepared with other documents, min_tokens; choose another --out"):
        job.prepare(out, documents="file", min_tokens=3)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_directory_of_something_else_is_refused(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and no prepared corpus; choose another --out"):
        job.prepare(out)
    assert contents(out) == {"thesis.tex": b"x"}
    for path in (out / "thesis.tex", out / "thesis.tex" / "below"):
        with pytest.raises(UserError, match="a file is in the way; choose another --out"):
            job.prepare(path)


def test_two_at_once_are_refused(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # the weakest lock there is
    with pytest.raises(UserError, match="another fastdistil prepare is writing"):
        job.prepare(out)
    os.close(handle)
    job.prepare(out)


def test_a_full_disk_keeps_what_is_finished(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job.killed(out)
    finished = json.loads((out / "progress.json").read_text())["written"]
    next_shard = out / f"tokens-{len(finished['shards']):05d}.bin"
    next_shard.unlink(missing_ok=True)
    next_shard.symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="the disk is full while writing the prepared corpus") as caught:
        job.prepare(out)
    assert caught.value.exit_code == 13
    assert "\n" not in str(caught.value)
    assert json.loads((out / "progress.json").read_text())["written"] == finished
    next_shard.unlink()
    job.prepare(out)
    job.prepare(tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_place_that_cannot_be_written(job: Job) -> None:
    with pytest.raises(UserError, match=r"no permission while writing the prepared corpus: /sys/.*choose a directory you can"):
        job.prepare(Path("/sys/fastdistil"))


def test_a_killed_worker_is_told_as_such_and_the_shards_remain(job: Job, tmp_path: Path) -> None:
    def kill_one(progress: PrepareProgress) -> None:
        if progress.tokens > 1500:
            for child in multiprocessing.active_children():
                child.kill()
                child.join()

    with pytest.raises(OutOfMemory, match=r"a tokenising process died.*fewer --workers"):
        job.prepare(tmp_path / "out", kill_one, workers=2)
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["written"]["shards"]
    job.prepare(tmp_path / "out")
    job.prepare(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_exception_of_the_callback_stops_and_can_be_continued(job: Job, tmp_path: Path) -> None:
    def interrupt(progress: PrepareProgress) -> None:
        if progress.tokens > 1500:
            raise KeyboardInterrupt

    for workers in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            job.prepare(tmp_path / "out", interrupt, workers=workers)
    assert multiprocessing.active_children() == []
    assert "TOKENIZERS_PARALLELISM" in os.environ  # put back as it was
    job.prepare(tmp_path / "out")


def test_a_manifest_is_whole_or_absent(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between writing the manifest's bytes and giving them their name leaves a corpus that is not complete."""
    out = tmp_path / "out"

    replace = Path.replace

    class Killed(BaseException):
        pass

    def killed(self: Path, target: Path) -> None:
        if target.name == "manifest.json":
            raise Killed
        replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            job.prepare(out)
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="was interrupted"):
        Corpus.open(out)
    job.prepare(out)
    job.prepare(tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_workers_default_to_what_the_input_is_worth(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker_counts = []

    original = prepare_module.encoded_blocks

    def counted(*arguments: Any) -> Any:
        worker_counts.append(arguments[-1])
        return original(*arguments[:-1], 1)

    monkeypatch.setattr(prepare_module, "encoded_blocks", counted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    job.prepare(tmp_path / "small", workers=None)
    monkeypatch.setattr(prepare_module, "BYTES_PER_WORKER", 10_000)
    job.prepare(tmp_path / "medium", workers=None)
    monkeypatch.setattr(prepare_module, "BYTES_PER_WORKER", 10)
    job.prepare(tmp_path / "large", workers=None)
    assert worker_counts[0] == 1
    assert 1 < worker_counts[1] < 8
    assert worker_counts[2] == 8
