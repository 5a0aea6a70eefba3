"""Secrets stay out of what a run shows: of texts by every way in which they are usually written, of cards and reports."""

import json
from pathlib import Path

import pytest

from fastdistil.profiling.report import report
from fastdistil.profiling.report.history import load_history
from fastdistil.profiling.report.live import Live
from fastdistil.redaction import REDACTED, redacted
from tests.event_streams import write_events
from tests.small_run import quiet, small

TOKEN = "hf_" + "aBcDeFgHiJ0123456789"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:s3cr3t@host/corpus", "https://[redacted]@host/corpus"),
        (
            "from https://s3cr3t@host and s3://me:s3c@r3t@bucket/x@y",
            "from https://[redacted]@host and s3://[redacted]@bucket/x@y",
        ),
        ("postgres://me:s3/cr3t@db/x", "postgres://[redacted]@db/x"),
        ("https://host/a?token=s3cr3t&page=2", "https://host/a?token=[redacted]&page=2"),
        ("https://host/a?page=2&key=s3cr3t#top", "https://host/a?page=2&key=[redacted]#top"),
        ("https://host/a?X-Amz-Signature=s3cr3t", "https://host/a?X-Amz-Signature=[redacted]"),
        ("curl -H 'Authorization: Bearer s3cr3t' https://host", "curl -H 'Authorization: [redacted]' https://host"),
        ("Authorization: Basic czNjcjN0", "Authorization: [redacted]"),
        ("sent bearer s3cr3t.x-y to it", "sent bearer [redacted] to it"),
        ("HF_TOKEN=s3cr3t AWS_SECRET_ACCESS_KEY='s3 cr3t' run", "HF_TOKEN=[redacted] AWS_SECRET_ACCESS_KEY=[redacted] run"),
        ('{"password": "s3cr3t", "page": 2}', '{"password": [redacted], "page": 2}'),
        ("api_key: s3cr3t", "api_key: [redacted]"),
        ("login --token s3cr3t --password s3cr3t now", "login --token [redacted] --password [redacted] now"),
        ("X-Api-Key: s3cr3t", "X-Api-Key: [redacted]"),
        ('{"token": "abcdef123secret", "n": 1}', '{"token": [redacted], "n": 1}'),
        ("{'token': 'abc'}", "{'token': [redacted]}"),
        (r'"{\"hub_token\": \"abc\", \"n\": 1}"', r'"{\"hub_token\": [redacted], \"n\": 1}"'),
        ("X-Auth-Token: abcdef123", "X-Auth-Token: [redacted]"),
        ("GITHUB_TOKEN: abc", "GITHUB_TOKEN: [redacted]"),
        ("HF_TOKEN=12345678 TOKEN=1234 run", "HF_TOKEN=[redacted] TOKEN=[redacted] run"),
        ("https://h/x?token=12345678&n=1", "https://h/x?token=[redacted]&n=1"),
        ("https://h/x?n=1&access_token=1234", "https://h/x?n=1&access_token=[redacted]"),
        ("Bearer 'abcdefgh'", "Bearer '[redacted]'"),
        ("--password 'a b c' now", "--password [redacted] now"),
        ("--token abc now", "--token [redacted] now"),
        (r'password="a\"b c" now', "password=[redacted] now"),
        ("password='a b", "password=[redacted] b"),
        (f"use {TOKEN}.", "use [redacted]."),
        ("AKIA" + "A1B2" * 4, REDACTED),
        ("a sk-proj-" + "x1" * 12 + " b", "a [redacted] b"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.s3cr3t", REDACTED),
        ("-----BEGIN RSA PRIVATE KEY-----\ns3cr3t\n-----END RSA PRIVATE KEY-----\nx", "[redacted]\nx"),
        ("pre_run: cp s3cr3t /tmp\nnow", "pre_run: [redacted]"),
        ("the pre_run command 'cp s3cr3t' failed", "the pre_run command [redacted]"),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert redacted(text) == expected


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "piece",
    ["://a:x", "a.b-", "-eyJaaaaaaaa", "password", "&a.b-", "--a.b-", "token='", "-----BEGIN ", "bearer ", 'password: \\"'],
)
def test_long_texts_take_time_by_their_length(piece: str, tmp_path: Path) -> None:
    """A pattern that looks at all that follows each place would take minutes here."""
    note = {"event": "note", "time": 0.0, "update": 1, "message": piece * 30_000}
    events = [{"event": "start", "time": 0.0, "update": 0, "updates": 1}, note]
    assert load_history(write_events(tmp_path, events)).notes[0].message


@pytest.mark.parametrize(
    "text",
    [
        "bert-base-uncased",
        "s3://bucket/key/corpus-2026@v2",
        "http://127.0.0.1:8642/x@y",
        "data.micro_batch_tokens=4096 and batch_tokens=8,192",
        "2 ranks over torch; the next token: [UNK], key: value",
        "a masked token is never the last; tokens=3 a second",
        "sha256 " + "0f" * 32,
        "task-specific-distillation-of-a-teacher",
        'micro_batch_token: 4096, {"token": 5}',
        'pad_token: [PAD], "mask_token": "[MASK]", unk_token=[UNK]',
    ],
)
def test_texts_without_secrets_stay(text: str) -> None:
    assert redacted(text) == text


def test_what_lies_under_a_secrets_name() -> None:
    recipe = {
        "hub": {"accessToken": "s3cr3t", "api_key": ["s3cr3t"], "password": 53273, "auth": {"user": "s3cr3t"}},
        "pre_run": ["s3cr3t", "s3cr3t"],
        "https://me:s3cr3t@host": True,
        "batch_tokens": 4096,
        "deterministic": False,
    }
    assert redacted(recipe) == {
        "hub": {"accessToken": REDACTED, "api_key": [REDACTED], "password": REDACTED, "auth": REDACTED},
        "pre_run": [REDACTED, REDACTED],
        "https://[redacted]@host": True,
        "batch_tokens": 4096,
        "deterministic": False,
    }


@pytest.mark.parametrize(
    "name",
    ["auth", "credentials", "password", "passwords", "db_password", "secrets", "clientSecret", "pre_run", "pwd", "pass", "pat",
     "bearer", "authorization"],
)  # fmt: skip
def test_all_that_lies_under_a_secrets_name(name: str) -> None:
    for value in ("v1", 5273, {"value": "v1", "page": 5273}, ["v1", {"a": ["v1", 5273]}], {"a": {"b": "v1"}}):
        shown = str(redacted({name: value}))
        assert "v1" not in shown and "5273" not in shown and REDACTED in shown, value


@pytest.mark.parametrize("name", ["token", "tokens", "hub_token", "HFToken", "hfToken", "apikey", "api_key", "APIKey"])
def test_all_texts_that_lie_under_a_tokens_name(name: str) -> None:
    for value in ("v1", {"value": "v1"}, ["v1", {"a": ["v1"]}], {"a": {"b": "v1"}}):
        shown = str(redacted({name: value}))
        assert "v1" not in shown and REDACTED in shown, value


def test_settings_with_names_like_a_secrets_stay() -> None:
    recipe = {
        "micro_batch_tokens": 4096, "max_tokens": 512, "tokens_per_s": "nan", "rank_tokens": [1, 2], "pad_token_id": 0,
        "pad_token": "[PAD]", "special_tokens": ["[UNK]"], "special_tokens_in_text": True, "num_key_value_heads": 8,
        "tokenizer": "bert-base-uncased", "tokenizers": {"teacher": "t"}, "path": "/a", "pattern": "*.txt", "author": "me",
        "passes": 2, "sort_keys": "yes", "token": None, "key": 3,
    }  # fmt: skip
    assert redacted(recipe) == recipe


def test_a_run_shows_none_of_its_secrets(material: Path, tmp_path: Path) -> None:
    """In the student's card, the reports and the watched page; the run's directory has its recipe as it was."""
    hidden = tmp_path / TOKEN
    hidden.symlink_to(material)
    recipe = small(hidden, tmp_path / "runs", "loop.updates=2").with_(pre_run=["S3CR3T=pw1 true", "true https://me:pw2@host"])
    run = quiet(recipe).run_dir
    assert TOKEN in (run / "recipe.yaml").read_text()
    with (run / "events.jsonl").open("a") as events:
        events.write(json.dumps({"event": "note", "time": 0.0, "update": 2, "message": f"pre_run: pw1, {TOKEN}"}) + "\n")
    reported = report.read_runs([run])
    watched = Live(run)
    watched.refresh()
    shown = {
        "card": (run / "student" / "README.md").read_text(),
        "html": report.as_html(reported),
        "markdown": report.as_markdown(reported),
        "json": report.json_text(reported),
        "watched": (watched.page()[0] + watched.strip()).decode(),
    }
    for name, text in shown.items():
        assert all(secret not in text for secret in (TOKEN, "pw1", "pw2", "S3CR3T")), name
        if name != "markdown":  # which has no recipe
            assert REDACTED in text, name
    assert "batch_tokens: 8192" in shown["card"]
