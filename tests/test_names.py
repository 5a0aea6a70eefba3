"""Names of files that are not UTF-8: read all the same, and printed and written with what is not UTF-8 escaped."""

import json
import os
import shutil
from pathlib import Path

import pytest

from fastdistil.console import Console
from fastdistil.data.corpus import Manifest
from fastdistil.profiling.report.report import write_text
from fastdistil.storage import canonical, text_sha256
from tests.small_run import Run

LATIN = os.fsdecode(b"caf\xe9")
ESCAPED = r"caf\udce9"


def test_texts_of_such_names_are_prepared(run: Run, material: Path, tmp_path: Path) -> None:
    """Notes on them included; the manifest is JSON for every reader; what an earlier version wrote is still up to date."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / f"{LATIN}.txt").write_text("A cup of coffee.\n" * 20)
    (texts / f"{LATIN}.pdf").write_text("no text")
    (texts / f"{LATIN}.jsonl").write_text('{"text": "another cup"}\n{"text": 3}\n')
    with (texts / f"{LATIN}.parquet").open("wb") as file:
        pq.write_table(pa.table({"text": ["a cup of coffee"] * 5}), file)
    call = ("prepare", "texts", "--tokenizer", material / "tokenizer", "--out", "out", "--workers", 1, "--strip-gutenberg")
    code, out, err = run(*call, "--max-bad-fraction", 0.5)
    assert code == 0, err
    assert f"ignored 1 files of other kinds: {ESCAPED}.pdf" in out and f"texts/{ESCAPED}.txt" in out
    path = tmp_path / "out" / "manifest.json"
    manifest = Manifest.read(path)
    names = [f"texts/{ESCAPED}.{kind}" for kind in ("jsonl", "parquet", "txt")]
    assert [source["path"] for source in manifest.inputs] == names
    assert manifest.documents == 7
    assert json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())["file"] == names[0]
    values = json.loads(path.read_bytes())
    del values["sha256"]
    for source in values["inputs"]:
        source["path"] = source["path"].replace(ESCAPED, LATIN)
    path.write_text(json.dumps({**values, "sha256": text_sha256(canonical(values))}))
    assert run(*call) == (0, out.splitlines()[0] + "\nout is up to date\n" + out.splitlines()[-1] + "\n", err)


def test_what_cannot_have_such_a_name_is_refused_in_a_line(run: Run, material: Path, tmp_path: Path) -> None:
    shutil.copytree(material / "teacher", tmp_path / LATIN)
    run_dir = tmp_path / "runs" / LATIN
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text("version: 1\n")
    text, tokenizer = material / "other.jsonl", material / "tokenizer"
    for arguments in (
        ("prepare", text, "--tokenizer", tokenizer, "--out", f"{LATIN}/corpus", "--workers", 1),
        ("prepare", text, "--tokenizer", LATIN, "--out", "corpus", "--workers", 1),
        ("evaluate", LATIN, text),
        ("train", "distilbert", f"teacher.path={LATIN}"),
        ("train", "distilbert", f"data.train={material / 'train'}", "--resume", run_dir),
        ("train", f"{LATIN}.yaml"),
        ("pause", run_dir / LATIN),
    ):
        code, out, err = run(*arguments)
        assert (code, err.count("\n")) == (2, 1), (arguments, out, err)
        assert ESCAPED in err or r"caf\\udce9" in err, err


def test_reports_and_the_console_escape_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(f"about {LATIN} ±", tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == f"about {ESCAPED} ±"
    Console().note(f"about {LATIN} ±")
    assert capsys.readouterr().out == f"about {ESCAPED} ±\n"
