"""Documents that others wrote: JSON and YAML as bounded, plain values, and checked against a type before anything uses them.

Files of a recipe, a run, a corpus or a measurement are passed about, cut short, edited by hand and written by other versions.
Every reader of one goes through here, once, so that nothing behind it meets a wrong type:

    parse_json, parse_yaml    text -> dictionaries, lists, strings, numbers. No document may be too long, nested too deeply or,
                              by YAML's aliases, larger than it looks; whole numbers are ones that floating point can
                              approximate; a date is text.
    check, converted          those values against a pydantic type

What is wrong is a ValueError whose text `reason` makes one line of. The reader adds the file's name, what to do, and whether
that is damage of our own file (CorruptData) or a mistake of the user (UserError).
"""

import json
import math
import re
import reprlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict

JSON_BYTES = 2**28
"""Of a document. Manifests list every input file, and measurements every step."""
YAML_BYTES = 2**18
"""Of a document: people write it, and its parser takes seconds for a megabyte."""
DEPTH = 64
"""Dictionaries and lists within each other. Python's own functions on values give up at some hundreds."""
YAML_NODES = 100_000
"""Values of a document, those behind an alias counted at each."""
JSON_DIGITS = 100
_UNFIT = re.compile("[\0\ud800-\udfff]")  # no file can have such a name, nor can a file hold it
LARGEST = 1e60
"""Of a finite number: sums and squares of such numbers are finite too."""
YAML_INT = 2**64
"""Beyond this a number that a person writes is a mistake."""

Whole = Annotated[int, Field(strict=True, ge=0, le=2**53)]
"""A count that floating point holds exactly."""
Positive = Annotated[int, Field(strict=True, ge=1, le=2**53)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]
"""A number whose square, or sum with others of its kind, is finite."""
Amount = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=LARGEST)]
Sha256 = Annotated[str, StringConstraints(strict=True, pattern=r"^[0-9a-f]{64}$")]

Kind = TypeVar("Kind")


def _text(text: str) -> str:
    if _UNFIT.search(text):
        raise ValueError("wanted text without NUL and half surrogate pairs")
    return text


Text = Annotated[str, StringConstraints(strict=True, max_length=10_000), AfterValidator(_text)]
"""Text that a file can hold and a terminal can show."""


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError("wanted the plain name of a file, without directories")
    return name


PlainName = Annotated[str, StringConstraints(strict=True, max_length=255), AfterValidator(_plain_name)]
"""The name of a file right inside the directory that a manifest describes: nothing else may be read or written by it."""


class FileFacts(TypedDict):
    """Size and checksum of a file, as a manifest has them."""

    bytes: Whole
    sha256: Sha256


class Fields(BaseModel):
    """An object in a document of any version: what is not listed passes as it is."""

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)


class Sealed(TypedDict):
    """Fields that the manifest of every format has."""

    format: Whole
    sha256: Sha256


def parse_json(text: str | bytes) -> Any:
    """Return the values of a JSON document; of equal keys the last counts, NaN and Infinity are read. Raises ValueError."""
    if len(text) > JSON_BYTES:
        raise ValueError(f"longer than {JSON_BYTES:,} bytes")
    try:
        values = _JSON.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    brackets = (text.count("["), text.count("{")) if isinstance(text, str) else (text.count(b"["), text.count(b"{"))
    if sum(brackets) > DEPTH:
        _check_depth(values)
    return values


def read_json(path: Path) -> Any:
    """Return the values of a JSON file. Raises ValueError, OSError."""
    return parse_json(_read(path, JSON_BYTES))


def parse_yaml(text: str | bytes) -> Any:
    """Return the values of a YAML document. Raises ValueError."""
    if len(text) > YAML_BYTES:
        raise ValueError(f"longer than {YAML_BYTES:,} bytes")
    try:
        values = yaml.load(text if isinstance(text, str) else text.decode(), _Loader)  # noqa: S506 - a safe one
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    except (LookupError, AttributeError, TypeError, ArithmeticError) as error:  # of a tag and a value that do not fit
        raise ValueError(f"not valid YAML: {type(error).__name__}: {error}") from error
    _check_depth(values)  # aliases may lie within aliases
    return values


def read_yaml(path: Path) -> Any:
    """Return the values of a YAML file. Raises ValueError, OSError."""
    return parse_yaml(_read(path, YAML_BYTES))


def check(kind: Any, values: Any) -> None:
    """Raise ValueError unless `values` are of the type `kind`, anything that pydantic knows."""
    converted(kind, values)


def converted(kind: type[Kind], values: Any) -> Kind:
    """Return `values` as the type `kind`, anything that pydantic knows. Raises ValueError, which names the fields at fault."""
    adapter: TypeAdapter[Kind] = _adapter(kind)  # type: ignore[arg-type]
    return adapter.validate_python(values)


def reason(error: BaseException) -> str:
    """Say what is wrong with a document, on one line of a bounded length."""
    match error:
        case ValidationError():
            problems = [_problem(problem) for problem in error.errors(include_url=False, include_context=False)[:3]]
            text = "; ".join(problems)
        case UnicodeDecodeError():
            text = f"not UTF-8 text: {error.reason} at byte {error.start}"
        case KeyError():
            text = f"no {error}"
        case _:
            text = str(error)
    text = " ".join(text.split())
    return text if len(text) <= 500 else f"{text[:497]}..."


def shown(value: object) -> str:
    """Return the beginning of a value, as an error quotes it."""
    return _SHORT.repr(value)


def _problem(problem: Any) -> str:
    place = ".".join(_SHORT.repr(part).strip("'") for part in problem["loc"]) or "the document"
    if problem["type"] == "missing":
        return f"{place} is missing"
    if problem["type"] in ("model_type", "dict_type", "dataclass_type"):
        return f"{place}: wanted names with values, got {shown(problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message[0].lower()}{message[1:]}, got {shown(problem['input'])}"


def _read(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most + 1)


def _whole_number(text: str) -> int:
    if len(text) > JSON_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits, wanted at most {JSON_DIGITS}")
    return int(text)


def _check_depth(values: Any) -> None:
    level = [values]
    for _ in range(DEPTH):
        inner = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        level = [value for node in inner for value in node if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {DEPTH} deep")


_NOT_PLAIN = re.compile(":(set|binary|omap|pairs)$")


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, with what it costs bounded while the document is read: expanding aliases may be too late."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._sizes: dict[yaml.Node, int] = {}
        """Nodes below each that an alias may stand for, itself included."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        by_alias = self.check_event(yaml.AliasEvent)
        mark, before = self.peek_event().start_mark, self._nodes  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > DEPTH + 1:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEPTH} deep", problem_mark=mark)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and _UNFIT.search(node.value):
            raise yaml.MarkedYAMLError(problem="text with a NUL or half a surrogate pair", problem_mark=mark)
        if not by_alias:
            self._nodes += 1
            self._sizes[node] = self._nodes - before
        elif node in self._sizes:
            self._nodes += self._sizes[node]
        else:
            raise yaml.MarkedYAMLError(problem="an alias within what it stands for", problem_mark=mark)
        if self._nodes > YAML_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {YAML_NODES:,} values", problem_mark=mark)
        return node

    def construct_date_as_text(self, node: yaml.ScalarNode) -> str:
        return self.construct_yaml_str(node)

    def construct_bounded_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) <= 100 and abs(number := int(self.construct_yaml_int(node))) < YAML_INT:
            return number
        raise ValueError(f"a whole number of {len(node.value)} digits, wanted at most 64 bits")


# Sets, bytes and lists of pairs are nothing that JSON, and with it a type of ours, has.
_Loader.yaml_constructors = {
    tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if not _NOT_PLAIN.search(str(tag))
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_bounded_int)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_date_as_text)
_JSON = json.JSONDecoder(parse_int=_whole_number)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def real(value: object) -> float:
    """Return a number, also of the texts "nan" and "inf", as the log writes them; nan for no number or one beyond LARGEST."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return math.nan if LARGEST < abs(number) < math.inf else number


def at(values: object, *path: str) -> Any:
    """What lies at a path of keys, or of the fields of an event; None where it ends."""
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
    return values
