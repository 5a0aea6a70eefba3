"""What happens once on every node before training: the recipe's commands, and copies of prepared corpora on its own disk.

    CACHE_DIR/NAME-0123456789abcdef            a copy of a corpus directory NAME; the digits are its manifest's sha256
    CACHE_DIR/.NAME-0123456789abcdef.partial   the same while it is made
    CACHE_DIR/.NAME-0123456789abcdef.lock      held by the run that makes or checks it

Files are checked against the manifest's sha256 while they are copied, and a copy gets its name only once it is whole and on
the disk. A corpus that changes gets another place; older copies stay until someone deletes them.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal

from fastdistil.data.corpus import PREPARE_AGAIN, Manifest, check_file, text_sha256
from fastdistil.distributed.rank_info import environment_of_no_rank
from fastdistil.errors import CorruptData, DiskFull, UserError, translated
from fastdistil.storage import locked
from fastdistil.untrusted import FileFacts

LAST_LINES = 5
_CHUNK_BYTES = 1 << 22


def run_once_per_node(
    commands: Sequence[str], local_rank: int, barrier: Callable[[], None], note: Callable[[str], None]
) -> None:
    """Run the shell commands in order on local rank 0, while the node's other ranks wait at `barrier`.

    They inherit the environment, have no input, and their output goes to stderr behind "pre_run: ". Raises UserError on
    local rank 0 for one that fails; the others must learn of it elsewhere (monitor.Monitor.failed).
    """
    if not commands:
        return
    if local_rank == 0:
        for command in commands:
            note(f"pre_run: {command}")
            _run(command)
    barrier()


def _run(command: str) -> None:
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        env=environment_of_no_rank(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    last: deque[str] = deque(maxlen=LAST_LINES)
    reader = threading.Thread(target=_pass_on, args=(process.stdout, last), daemon=True)
    reader.start()
    try:
        code = process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    reader.join(1.0)  # what it left in the background may hold its output open for ever
    if code:
        ending = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        words = f"; its last words: {' | '.join(last)}" if last else ""
        raise UserError(f"the pre_run command {command!r} failed ({ending}){words}; mend or remove it")


def _pass_on(output: IO[str], last: deque[str]) -> None:
    for line in output:
        line = line.rstrip()
        if line:
            last.append(line)
        print(f"pre_run: {line}", file=sys.stderr, flush=True)


def cached_corpus(
    path: Path,
    cache_dir: Path,
    local_rank: int,
    barrier: Callable[[], None],
    note: Callable[[str], None],
    *,
    verify: Literal["full", "size"] = "full",
) -> Path:
    """The copy of the prepared corpus `path` on the node's own disk, made by local rank 0 unless it is there and whole.

    verify: what a copy that is there is compared by, sha256 ("full") or size. All ranks of a node call this; runs that share
    a cache_dir wait for each other. Raises UserError (no complete corpus at `path`, no permission), DiskFull before anything
    is copied, CorruptData where the corpus itself does not match its manifest.
    """
    source = path / "manifest.json"
    if not source.is_file():
        raise UserError(f"{path} is no complete corpus (no manifest.json); make or finish it with fastdistil prepare")
    with translated("copying the corpus to data.cache_dir", cache_dir):
        manifest = Manifest.read(source)
        target = cache_dir / f"{path.resolve().name}-{text_sha256(manifest.to_json())[:16]}"
        if local_rank == 0:
            _make_directory(cache_dir)
            lock = _hidden(target, "lock")
            lock.touch()
            with locked(lock, f"another run makes or checks the copy that {lock} guards: waiting for it", note, wait=True):
                if not _whole(target, manifest, verify == "full", note):
                    note(f"copying {path} to {target}")
                    _copy(path, target, manifest)
    barrier()
    return target


def _make_directory(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"data.cache_dir={cache_dir} must be a directory, and a file is in the way; name another") from error


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _whole(target: Path, manifest: Manifest, full: bool, note: Callable[[str], None]) -> bool:
    if not target.exists():
        return False
    try:
        if Manifest.read(target / "manifest.json") == manifest:
            for name, expected in manifest.files.items():
                check_file(target / name, expected, full)
            return True
        reason = f"{target / 'manifest.json'} is another corpus's"
    except (CorruptData, UserError, FileNotFoundError, NotADirectoryError) as error:
        reason = str(error).partition(";")[0]
    note(f"the copy is made again: {reason}")
    return False


def _copy(source: Path, target: Path, manifest: Manifest) -> None:
    """Complete what an interrupted copy left, and give it its name."""
    partial = _hidden(target, "partial")
    if target.exists():
        # Before its space is counted. Renamed first: a half-removed copy must not pass for one.
        shutil.rmtree(partial, ignore_errors=True)
        target.rename(partial)
    missing = [name for name, expected in manifest.files.items() if not _matches(partial / name, expected)]
    needed = sum(manifest.files[name]["bytes"] - _size(partial / name) for name in missing)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise DiskFull(
            f"the copy of {source} needs {needed / 1e6:,.1f} MB in {target.parent}, {free / 1e6:,.1f} MB are free; free space, "
            "choose another data.cache_dir, or leave it out"
        )
    for name in missing:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        _copy_file(source / name, partial / name, manifest.files[name]["sha256"])
    (partial / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    _sync_tree(partial)
    partial.rename(target)
    _sync(target.parent)


def _matches(path: Path, expected: FileFacts) -> bool:
    try:
        check_file(path, expected, full=True)
    except CorruptData:
        return False
    return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _copy_file(source: Path, target: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    try:
        with source.open("rb") as reads, target.open("wb") as writes:
            while chunk := reads.read(_CHUNK_BYTES):
                digest.update(chunk)
                writes.write(chunk)
    except FileNotFoundError as error:
        raise CorruptData(f"{source} is missing; {PREPARE_AGAIN}") from error
    if (found := digest.hexdigest()) != sha256:
        raise CorruptData(f"{source} is damaged: sha256 expected {sha256}, found {found}; {PREPARE_AGAIN}")


def _sync_tree(directory: Path) -> None:
    for root, _, names in os.walk(directory, topdown=False):
        for name in (*names, "."):
            _sync(Path(root) / name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
