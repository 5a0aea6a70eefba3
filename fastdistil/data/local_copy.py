"""Copies of prepared corpora on a node's own disk.

    CACHE_DIR/NAME-0123456789abcdef            a copy of a corpus directory NAME; the digits are its manifest's sha256
    CACHE_DIR/.NAME-0123456789abcdef.partial   the same while it is made
    CACHE_DIR/.NAME-0123456789abcdef.lock      held by the run that makes or checks it

Files are checked against the manifest's sha256 while they are copied, and a copy gets its name only once it is whole and on
the disk. A corpus that changes gets another place; older copies stay until someone deletes them.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fastdistil.data.corpus import PREPARE_AGAIN, Manifest, check_file
from fastdistil.errors import CorruptData, DiskFull, UserError, translated
from fastdistil.storage import locked, sync, sync_tree, text_sha256
from fastdistil.untrusted import FileFacts

_CHUNK_BYTES = 1 << 22


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
    present = sum((partial / name).stat().st_size for name in missing if (partial / name).is_file())
    needed = sum(manifest.files[name]["bytes"] for name in missing) - present
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
    sync_tree(partial)
    partial.rename(target)
    sync(target.parent)


def _matches(path: Path, expected: FileFacts) -> bool:
    try:
        check_file(path, expected, full=True)
    except CorruptData:
        return False
    return True


def _copy_file(source: Path, target: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    try:
        with source.open("rb") as reads, target.open("wb") as writes:
            while chunk := reads.read(_CHUNK_BYTES):
                digest.update(chunk)
                writes.write(chunk)
    except FileNotFoundError as error:
        raise CorruptData(f"{source} is missing; {PREPARE_AGAIN}") from error
    if (actual_sha256 := digest.hexdigest()) != sha256:
        raise CorruptData(f"{source} is damaged: sha256 expected {sha256}, found {actual_sha256}; {PREPARE_AGAIN}")
