"""Secrets, taken out of what a run shows to others: the student's README.md, reports, comparisons, the watched page.

What is replaced by [redacted]:

    in a mapping        all but numbers under a key that names a token (hub.token, api_key, accessToken), anything under one
                        that names another secret (password, credentials), and every command of pre_run
    https://me:pw@host  what stands before the @ of an address
    token=..., "key": . the value of a parameter, a variable, a header or an option whose name says secret, and of ?key= in an
                        address
    Bearer ...          what follows it, and the whole value of an Authorization header
    hf_..., sk-..., ... what begins as the tokens of widespread services do, JSON web tokens, private keys
    pre_run: ...        the command that a note or an error repeats
"""

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

_SECRET = frozenset(
    [
        "password",
        "passwords",
        "passwd",
        "passphrase",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "auth",
        "authorization",
        "bearer",
        "pwd",
        "pass",
        "pat",
    ]
)
_TOKENS = frozenset({"token", "tokens", "apikey", "key"})
# With these, a token is one of the vocabulary, or tokens are counted.
_NO_SECRET = frozenset(["pad", "unk", "mask", "bos", "eos", "cls", "sep", "special", "added", "batch", "min", "max", "per"])
_WORD_STARTS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NAME = r"(?:password|passwd|passphrase|secret|credential|api[_-]?key|access[_-]?key|private[_-]?key)[\w.-]{0,64}"
_TOKEN = r"(?<!(?:pad|unk|bos|eos|cls|sep)_)(?<!mask_)(?:token|auth|signature)"  # noqa: S105 - a pattern
_QUOTE = r"""(?:\\?["'])"""
# In quotes, within quoted text, with its end cut off, or a word.
_VALUE = r"""(?!\[redacted\])(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\\"[^"]*"|\\'[^']*'|["']?[^\s"'&#,;})\]]+)"""
# Numbers are settings: batch_tokens=4096.
_NO_NUMBER = r"(?!-?[\d.,_]+(?![\w-]))"
_PREFIXES = (
    r"(?:hf|api_org|gh[oprsu]|github_pat|glpat|sk|pk|rk|xox[abeoprs]|npm|pypi|dckr_pat|ya29)[._-][\w-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,2048}\.eyJ[\w-]{8,4096}\.[\w-]*"
)
# Runs are bounded, and what may come before a name is no part of its pattern: else time grows with the square of the length.
_PATTERNS = [
    (re.compile(pattern, flags), replacement)
    for pattern, flags, replacement in (
        (r"(?<=://)(?:[^\s/?#]{0,1024}|[^\s/:@]{1,256}:(?!\d{1,5}/)[^\s@]{0,1024})@", 0, f"{REDACTED}@"),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL, REDACTED),
        (r"""(authorization["']?\s*[:=]\s*["']?)[^"'\n]+""", re.IGNORECASE, rf"\1{REDACTED}"),
        (rf"\b(bearer\s+{_QUOTE}?)[\w.~+/=-]{{6,}}", re.IGNORECASE, rf"\1{REDACTED}"),
        (rf"({_NAME}{_QUOTE}?\s*[:=]\s*){_VALUE}", re.IGNORECASE, rf"\1{REDACTED}"),
        (r"([?&;](?:key|sig|code|pass|pwd)=)[^\s&#]+", re.IGNORECASE, rf"\1{REDACTED}"),
        (rf"([?&][\w.-]{{0,64}}{_TOKEN}=)[^\s&#]+", re.IGNORECASE, rf"\1{REDACTED}"),
        # An environment variable is no setting of ours, also where its value is a number.
        (rf"((?:\bTOKEN=|[A-Z0-9]_(?:TOKEN|AUTH|SIGNATURE){_QUOTE}?\s*[:=]\s*)){_VALUE}", 0, rf"\1{REDACTED}"),
        (rf"({_TOKEN}(?:{_QUOTE}?=|{_QUOTE}\s*[:=]\s*)){_NO_NUMBER}{_VALUE}", re.IGNORECASE, rf"\1{REDACTED}"),
        (rf"([_-]{_TOKEN}\s*:\s*){_NO_NUMBER}{_VALUE}", re.IGNORECASE, rf"\1{REDACTED}"),
        (rf"((?:^|\s)--?[\w.-]{{0,64}}(?:{_NAME}|{_TOKEN})\s+){_VALUE}", re.IGNORECASE, rf"\1{REDACTED}"),
        (rf"\b(?:{_PREFIXES})", 0, REDACTED),
        (r"(pre_run(?: command|:|=) ?).*", re.DOTALL, rf"\1{REDACTED}"),
    )
]


def redacted(value: Any, key: str = "") -> Any:
    """Return a text, a recipe or an event without its secrets; `key` is the name under which it lies."""
    words = set(re.split(r"[^a-z]+", _WORD_STARTS.sub("_", key).lower()))
    if words & _SECRET or key == "pre_run":
        return _hidden(value, numbers=True)
    if words & _TOKENS and not words & _NO_SECRET:
        return _hidden(value, numbers=False)
    match value:
        case Mapping():
            return {redacted(str(name)): redacted(inner, str(name)) for name, inner in value.items()}
        case list() | tuple():
            return [redacted(inner, key) for inner in value]
        case str():
            for pattern, replacement in _PATTERNS:
                value = pattern.sub(replacement, value)
            return value
        case _:
            return value


def _hidden(value: Any, numbers: bool) -> Any:
    """Return what lies under a secret's name with nothing of it; where not `numbers`, these are settings and stay."""
    match value:
        case None | bool():
            return value
        case int() | float() if not numbers:
            return value
        case list() | tuple():
            return [_hidden(inner, numbers) for inner in value]
        case _:
            return REDACTED
