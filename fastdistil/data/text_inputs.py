"""Which files are read as text, as what, and how they are opened.

The end of a file's name says what it holds (SUFFIXES), and an ending of COMPRESSIONS behind it how it is compressed.
"""

import errno
import gzip
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

from fastdistil.errors import UserError

TextKind = Literal["txt", "jsonl", "parquet"]
SUFFIXES: dict[str, TextKind] = {
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".raw": "txt",
    ".tokens": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
"""Suffixes of JSON that is one record a line; with others it may be one array."""
COMPRESSIONS = (".gz", ".xz", ".zst")
"""Suffixes of compressed files, of all kinds but parquet, which compresses its own columns."""
_READABLE = f"{', '.join(SUFFIXES)} (text and JSON also with {', '.join(COMPRESSIONS)})"
_BACKUPS = ("~", "#", ".bak", ".orig", ".swp", ".tmp")


class InputFile(NamedTuple):
    path: Path
    size: int
    """Bytes on disk."""
    mtime_ns: int
    kind: TextKind


class Inputs(NamedTuple):
    sources: list[InputFile]
    ignored: list[Path]
    """Files of directories that are of no kind that can be read."""
    passed_over: list[Path]
    """Hidden and backup files of directories; of a hidden folder, the folder alone."""


def find_inputs(inputs: Sequence[str], out: Path, read_as: TextKind | None = None) -> Inputs:
    """Return the files named by paths, directories (recursive, sorted) and globs, each once, as `read_as` if it is given.

    Raises UserError for what is missing, unreadable, or of a kind that cannot be read.
    """
    sources: dict[Path, InputFile] = {}
    ignored: list[Path] = []
    passed_over: list[Path] = []
    if not inputs:
        raise UserError("no inputs; give text files, directories or globs")
    for pattern in inputs:
        for path in _named_by(pattern):
            files = [path]
            if path.is_dir():
                files, hidden = _files_below(path, out)
                passed_over += hidden
            elif _kind_of(path, read_as) is None:
                raise UserError(
                    f"{path} is of no kind that can be read; wanted {_READABLE}; "
                    "rename it, or say what it holds with --as txt|jsonl|parquet"
                )
            for file in files:
                kind = _kind_of(file, read_as)
                if kind is None:
                    ignored.append(file)
                elif file.resolve() not in sources:
                    with reading(file):
                        stat = file.stat()
                    sources[file.resolve()] = InputFile(file, stat.st_size, stat.st_mtime_ns, kind)
    if not sources:
        raise UserError(
            f"no {_READABLE} files in {', '.join(inputs)} ({len(ignored)} files of other kinds, {len(passed_over)} hidden or "
            "backup files); give others, or say what they hold with --as txt|jsonl|parquet"
        )
    return Inputs(list(sources.values()), ignored, passed_over)


def _files_below(directory: Path, out: Path) -> tuple[list[Path], list[Path]]:
    """Return a directory's files, sorted, and what is passed over. Hidden folders are not looked into, nor is `out`."""
    files: list[Path] = []
    passed_over: list[Path] = []
    out_below = directory.resolve() in out.resolve().parents  # written below its input: its own quarantine is not text
    for folder, folders, names in os.walk(directory, onerror=_refuse_folder, followlinks=True):
        if out_below:
            place = directory.resolve() / Path(folder).relative_to(directory)
            folders[:] = [name for name in folders if place / name != out.resolve()]
        passed_over += [Path(folder) / name for name in folders if _is_hidden(name)]
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in names:
            is_passed_over = _is_hidden(name) or name.lower().endswith(_BACKUPS)
            (passed_over if is_passed_over else files).append(Path(folder) / name)
    return sorted(files), sorted(passed_over)


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _named_by(pattern: str) -> list[Path]:
    """Return the path, or what the glob matches. Raises UserError where that is nothing."""
    if os.path.lexists(pattern):
        return [Path(pattern)]
    matches = sorted(glob(pattern, recursive=True))
    if not matches:
        raise UserError(f"no file, directory or glob matches {pattern!r}; check the path")
    return [Path(match) for match in matches]


def _is_hidden(name: str) -> bool:
    """Tell whether a file or folder is hidden (.git, ._a.txt) or an archive's shadow."""
    return name.startswith(".") or name == "__MACOSX"


def _kind_of(path: Path, read_as: TextKind | None = None) -> TextKind | None:
    """Return what a file holds by the end of its name; None: nothing that can be read."""
    kind = read_as or SUFFIXES.get(kind_suffix(path))
    compressed_parquet = kind == "parquet" and read_as is None and path.suffix.lower() in COMPRESSIONS
    return None if compressed_parquet else kind


def kind_suffix(path: Path) -> str:
    """Return the name's last suffix in lower case, but for a compression's."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return plain.suffix.lower()


def decompressed(path: Path, file: BinaryIO) -> BinaryIO:
    """Return the stream of what an open file holds."""
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=file))
        case ".xz":
            return cast(BinaryIO, lzma.LZMAFile(file))
        case ".zst":
            import pyarrow as pa

            return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))
    return file


@contextmanager
def reading(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what the system, decompression and `kinds` raise while `path` is read into UserError."""
    corrupt: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, *kinds)
    try:
        yield
    except ImportError as error:
        raise UserError(f"{path} needs {error.name} to be read; pip install {error.name}") from error
    except corrupt as error:
        raise UserError(f"{path} is truncated or corrupt ({error}); fetch or compress it again") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of the quarantine file
            raise
        if error.errno is None:  # pyarrow's word for a damaged stream
            raise UserError(f"{path} is truncated or corrupt ({error}); fetch or compress it again") from error
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
