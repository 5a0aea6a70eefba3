"""Damage to a file that is read: seeded, of every kind, and a judgement of what comes of reading it."""

import io
import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import yaml

from fastdistil.errors import FastdistilError

HANG_S = 10
DEEP = 10_000

# As they stand in a document: some have no value that Python could write.
ODD_JSON = [
    "null", "true", "[]", "{}", '""', '"x"', "0", "-1", "1", "1.5", "-1e-300", "1e308", "1e999", "-1e999", "NaN", "-Infinity",
    "1" + "0" * 400, "9" * 5000, str(2**31), str(2**53 + 1), str(2**63), str(-(2**64)), "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP, "[null]", '[1, "a"]', "[[1]]", '{"a": 1}', '{"": null}', '"nan"', '"inf"', '"\\ud800"',
    '"\\u0000"', '"../x"', '"/etc/passwd"', '"[bold]"', '"' + "x" * 100_000 + '"', "[" + "1," * 5000 + "1]",
]  # fmt: skip
ALIASES = ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]" for n in range(9))
"""Of nothing but these 400 characters 43 million values could be made."""
ODD_YAML = [
    "null", "yes", "[]", "{}", '""', "x", "0", "-1", "1.5", "1.0e+308", "1.0e+999", ".nan", "-.inf", "1" + "0" * 400,
    "9" * 5000, "0x" + "f" * 300, str(2**31), str(2**63), "2026-13-45", "2026-01-02", "2026-01-02 25:61:61", "1:2:3",
    "[" * DEEP, "{a: " * DEEP, "[1, a]", "{a: 1}", "{1: 2}", "{[1]: 2}", "!!int x", "!!float x", "!!bool x", "!!int ''",
    "!!binary x", "!!set {a}", "!!timestamp x", "!!python/name:os.system", "*a", "&a [*a]", '"\\ud800"', '"\\0"', "../x",
    "x" * 100_000, "[" + "1," * 5000 + "1]", "'", "|", "? [", "%", "@", "!!omap [a: 1]", "<<", "=", f"[{ALIASES}]",
]  # fmt: skip
MARK = "XxODDxX"


@dataclass(frozen=True)
class Subject:
    folder: Path
    file: str
    """Within the folder."""
    read: Callable[[Path], object]
    """Of the folder."""
    kind: str
    """json, jsonl, yaml or bytes."""
    seal: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Gives a document the checksum that its damaged values have."""

    @property
    def path(self) -> Path:
        return self.folder / self.file


# Damage


def damaged(subject: Subject, data: bytes, draw: random.Random) -> bytes:
    if subject.kind == "bytes" or draw.random() < 0.35:
        return damaged_bytes(data, draw)
    if subject.kind == "jsonl":
        lines = data.splitlines()
        number = draw.randrange(len(lines))
        lines[number] = damaged_values(json.loads(lines[number]), draw, "json").replace("\n", "").encode()
        return b"\n".join(lines) + b"\n"
    values = json.loads(data) if subject.kind == "json" else yaml.safe_load(data)
    return damaged_values(values, draw, subject.kind, subject.seal).encode()


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    at = draw.randrange(len(data) + 1)
    match draw.randrange(6):
        case 0:
            return bytes(changed[:at])
        case 1:
            changed[at:at] = draw.randbytes(draw.choice([1, 2, 9, 1000]))
        case 2:
            del changed[at : at + draw.choice([1, 2, 9, 1000])]
        case 3:
            changed[at:at] = changed[draw.randrange(len(data) + 1) :][:200]
        case _:
            for _ in range(draw.choice([1, 1, 3, 30])):
                place = draw.randrange(len(data)) if data else 0
                likely = ord(draw.choice("0123456789,.:-{}[]e"))
                changed[place : place + 1] = bytes([draw.choice([draw.randrange(256), likely])])
    return bytes(changed)


def damaged_values(values: Any, draw: random.Random, kind: str, seal: Any = None) -> str:
    """One or two values lost, replaced or doubled. With `seal` the checksum is that of the damaged ones, where there is one."""
    replaced = MARK
    odd = draw.choice(ODD_JSON if kind == "json" else ODD_YAML)
    places = list(containers(values))
    for _ in range(draw.choice([1, 1, 2])):
        container = draw.choice(places)
        key = draw.choice(list(container) if isinstance(container, dict) else range(len(container)))
        match draw.randrange(6):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                name = draw.choice(["../x", "/tmp/x", "", ".", "a/b", "x" * 300, "tokenizer/../../x", "\0", f"{key} "])
                container[name] = container.pop(key)
            case 2 if isinstance(container, list):
                container.insert(key, container[key])
            case _:
                container[key] = replaced
        places = [inner for inner in containers(values) if inner]
        if not places:
            break
    if seal is not None and draw.random() < 0.8:
        with suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError):  # of what cannot be sealed
            values = seal(json.loads(json.dumps(values).replace(f'"{MARK}"', odd)))
    text = json.dumps(values) if kind == "json" else yaml.safe_dump(values, sort_keys=False, width=10**6)
    if draw.random() < 0.1 and kind == "json":
        text = text.replace("{", f'{{"update": {odd}, "format": {odd}, ', 1)
    return text.replace(f'"{MARK}"', odd).replace(MARK, odd)


def containers(values: Any) -> Iterator[Any]:
    if isinstance(values, dict | list) and values:
        yield values
        for member in values.values() if isinstance(values, dict) else values:
            yield from containers(member)


# Judgement


class Hang(BaseException):
    """Reading takes longer than HANG_S."""


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file; of directories nothing."""
    statuses = {str(path.relative_to(folder)): path.lstat() for path in sorted(folder.rglob("*"))}
    return {name: (0, 0) if S_ISDIR(stat.st_mode) else (stat.st_size, stat.st_mtime_ns) for name, stat in statuses.items()}


def outcome(read: Callable[[], object]) -> tuple[int, str]:
    """(exit code of a command that reads, its line of error)."""
    try:
        with no_hang(), redirect_stdout(io.StringIO()):
            read()
    except FastdistilError as error:
        return error.exit_code, str(error)
    return 0, ""


def check_subject(subject: Subject, count: int, seed: int = 0) -> None:
    """Read `count` damaged copies."""
    pristine = subject.path.read_bytes()
    assert outcome(lambda: subject.read(subject.folder)) == (0, "")
    around = subject.folder.parent
    before, codes, failures = files_of(around), {0: 0, 2: 0, 14: 0}, []
    for number in range(count):
        draw = random.Random(f"{seed} {subject.file} {number}")
        subject.path.write_bytes(damaged(subject, pristine, draw))
        try:
            code, text = outcome(lambda: subject.read(subject.folder))
            codes[code] += 1
            if len(text) > 2000:
                failures.append(f"{number}: {len(text)} characters: {text[:200]}")
        except (Exception, Hang) as error:  # noqa: BLE001 - whatever it is, it is a failure
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where is not None else ""
            failures.append(f"{number}: {type(error).__name__}: {str(error)[:200]} at {place}")
        finally:
            subject.path.write_bytes(pristine)
        after = {**files_of(around), str(subject.path.relative_to(around)): before[str(subject.path.relative_to(around))]}
        assert after == before, f"{number} changed other files"
    assert not failures, f"{len(failures)} of {count}: " + "\n".join(failures[:40])
    assert codes[2] + codes[14] > count // 10, f"hardly anything is damaged: {codes}"
