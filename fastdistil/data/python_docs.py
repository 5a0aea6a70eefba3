"""Text that every Python installation has: documentation strings of the standard library and of packages, and READMEs.

The demo learns from it, so that it needs no download. What there is depends on the installation; for one installation the
result is always the same.
"""

import ast
import hashlib
import importlib.metadata
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Well-documented packages that fastdistil itself needs; the standard library comes first.
_PACKAGES = (
    "numpy",
    "torch",
    "pydantic",
    "rich",
    "typer",
    "transformers",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "yaml",
)
# Not documentation: tests, and files whose text is generated or repeated.
_LEFT_OUT = frozenset(
    {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "_vendor"}
)
SHORTEST = 200
"""Characters: shorter strings say little."""
_LARGEST_FILE_BYTES = 400_000


def python_documents(limit_bytes: int) -> Iterator[str]:
    """Different documents (one string or README each) of at least SHORTEST characters until they come to `limit_bytes`."""
    keys: set[bytes] = set()
    total = 0
    for document in _all_documents():
        text = document.strip()
        key = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if len(text) < SHORTEST or key in keys:
            continue
        keys.add(key)
        total += len(text.encode("utf-8", "replace"))
        yield text
        if total >= limit_bytes:
            return


def _all_documents() -> Iterator[str]:
    paths = sysconfig.get_paths()
    for path in _sources(Path(paths["stdlib"])):
        yield from docstrings(path)
    yield from _readmes()
    for name in _PACKAGES:
        for root in {paths["purelib"], paths["platlib"]}:
            for path in _sources(Path(root) / name):
                yield from docstrings(path)


def _readmes() -> Iterator[str]:
    distributions = {(d.metadata["Name"] or "", d.version): d for d in importlib.metadata.distributions()}
    for _, distribution in sorted(distributions.items(), key=lambda item: item[0]):
        text = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(text, str):
            yield text


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.py")):
        if not _LEFT_OUT.intersection(path.relative_to(folder).parts) and path.stat().st_size <= _LARGEST_FILE_BYTES:
            yield path


def docstrings(path: Path) -> Iterator[str]:
    """Documentation strings of a module, its classes and functions; nothing from a file that is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                pending.extend(node.body)
