"""The command line as a user meets it: what it prints, what it writes, and how it ends.

Bad input of every kind is one line on standard error, its documented exit code, no traceback, and nothing harmed.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Never

import pytest
import torch
import transformers

from fastdistil import __version__
from fastdistil.data.python_docs import docstrings
from fastdistil.data.tokenizer import train_wordpiece
from fastdistil.errors import EXIT_CODES
from fastdistil.events import Train, read_events
from tests.small_run import Run


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, a tokenizer and a two-layer teacher."""
    folder = tmp_path_factory.mktemp("cli")
    text = "\n\n".join(docstrings(Path(json.__file__))) * 3
    (folder / "text.txt").write_text(text, encoding="utf-8")
    train_wordpiece([text], 300, folder / "tokenizer")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder / "teacher")
    transformers.AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "teacher")
    return folder


def prepared(run: Run, material: Path, out: str = "corpus", *more: object) -> tuple[int, str, str]:
    text, tokenizer = material / "text.txt", material / "tokenizer"
    return run("prepare", text, "--tokenizer", tokenizer, "--out", out, "--max-length", 64, "--workers", 1, *more)


def overrides(material: Path) -> list[str]:
    return [
        f"teacher.path={material / 'teacher'}",
        "student.every=2",
        "student.architecture=same",
        "data.train=corpus",
        "data.micro_batch_tokens=256",
        "loop.updates=3",
        "loop.accumulation=2",
        "device=cpu",
        "logging.every=1",
    ]


def assert_refused(result: tuple[int, str, str], code: int, *says: str) -> None:
    exit_code, out, err = result
    assert exit_code == code, (exit_code, out, err)
    assert err.startswith("fastdistil: ") and err.count("\n") == 1 and "Traceback" not in out + err, err
    for text in says:
        assert text in err, err


def test_version_help_and_doctor(run: Run) -> None:
    assert run("--version") == (0, f"fastdistil {__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    for command in ("prepare", "train", "pretrain", "evaluate", "pause", "doctor"):
        assert command in out
        assert run(command, "--help")[0] == 0
    assert all(f"{exit_code}:" in out for exit_code in EXIT_CODES)
    assert "Example" in run("train", "--help")[1]
    code, out, _ = run("doctor", "--json")
    assert code == 0 and any(finding["name"] == "torch" for finding in json.loads(out)["findings"])


def test_from_text_to_a_measured_student(run: Run, material: Path, tmp_path: Path) -> None:
    """prepare, train, evaluate, and evaluate as JSON: the whole way through the commands."""
    code, out, err = prepared(run, material)
    assert code == 0 and "sequences" in out, err
    code, out, err = run("train", "distilbert", *overrides(material))
    assert code == 0, err
    assert "update 3/3" in out and "runs/distilbert-1/student" in out
    code, out, err = run("evaluate", "runs/distilbert-1/student", material / "text.txt", "--positions", 50, "--json")
    assert code == 0, err
    (corpus_report,) = json.loads(out)["corpora"]
    assert corpus_report["heldout"]["labels"] > 0 and corpus_report["pseudo"]["positions"] == 50
    code, out, err = run("evaluate", "runs/distilbert-1/student", "corpus", "--positions", 0)
    assert code == 0 and "masked tokens" in out and "pseudo" not in out, err
    assert run("train", "distilbert", *overrides(material))[0] == 0  # the next free number
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["distilbert-1", "distilbert-2"]
    code, out, _ = run("train", "distilbert", *overrides(material), "--resume", "auto")
    assert code == 0 and "continuing runs/distilbert-2" in out


def test_a_dry_run_starts_nothing(run: Run, material: Path, tmp_path: Path) -> None:
    assert prepared(run, material)[0] == 0
    code, out, err = run("train", "distilbert", *overrides(material), "--dry-run")
    assert code == 0, err
    student = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(material / "teacher", num_hidden_layers=1))
    parameters = sum(parameter.numel() for parameter in student.parameters())
    assert f"{parameters:,}" in out and "logits" in out and "one checkpoint" in out and "temperature: 2.0" in out
    assert not (tmp_path / "runs").exists()
    code, out, err = run("train", "demo", "--dry-run")
    assert code == 0 and out.count("student parameters") == 2, err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_refuses_what_a_run_would(run: Run, material: Path) -> None:
    assert prepared(run, material)[0] == 0
    for wrong, says in (
        ("student.layers=[0,5]", "below the teacher's 2 layers"),
        ("objective={a_clm: 2, a_mlm: 0}", "objective.a_mlm"),
        ("student.config={model_type: bert, hidden_size: 24, num_attention_heads: 2}", "objective.projection=true"),
        ("data.heldout=nowhere", "nowhere"),
    ):
        assert_refused(run("train", "distilbert", *overrides(material), wrong, "--dry-run"), 2, says)


def test_tensorboard_is_written_when_asked(run: Run, material: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs pip install fastdistil[tensorboard]")
    assert prepared(run, material)[0] == 0
    assert run("train", "distilbert", *overrides(material), "logging.tensorboard=true")[0] == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "runs" / "distilbert-1" / "tensorboard"))
    board.Reload()
    logged = [
        event.total for event in read_events(tmp_path / "runs" / "distilbert-1" / "events.jsonl") if isinstance(event, Train)
    ]
    assert [scalar.value for scalar in board.Scalars("train/total")] == pytest.approx(logged)
    tags = set(board.Tags()["scalars"])
    assert {"train/step_s", "train/lr", "phases/backward", "memory/rss_bytes", "flops/student"} <= tags
    assert not tags & {"train/update", "train/time"}, "they are the axes"


def test_pause(run: Run, tmp_path: Path) -> None:
    assert_refused(run("pause", tmp_path / "runs" / "none"), 2, "no run at")
    (tmp_path / "runs" / "some").mkdir(parents=True)
    assert_refused(run("pause", tmp_path / "runs" / "some"), 2, "no run at")  # nothing is written into other directories
    assert list((tmp_path / "runs" / "some").iterdir()) == []
    (tmp_path / "runs" / "some" / "recipe.yaml").write_text("")
    assert run("pause", tmp_path / "runs" / "some")[0] == 0
    assert (tmp_path / "runs" / "some" / "PAUSE").exists()
    (tmp_path / "runs" / "some" / "PAUSE").unlink()
    (tmp_path / "runs" / "some" / "events.jsonl").write_text(
        '{"event": "start", "update": 0}\n{"event": "done", "update": 9}\n'
    )
    assert_refused(run("pause", tmp_path / "runs" / "some"), 2, "is done")
    assert not (tmp_path / "runs" / "some" / "PAUSE").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "distillbert"], ["no recipe 'distillbert'", "did you mean distilbert"]),
        (["train", "distilbert", "optim.rl=3"], ["optim.rl", "optim.lr"]),
        (["train", "distilbert", "optim.lr=-3"], ["optim.lr", "greater than 0"]),
        (["train", "bert-small"], ["no teacher", "pretrain"]),
        (["pretrain", "distilbert"], ["has a teacher", "fastdistil train"]),
        (["train", "distilbert", "data.train=nowhere"], ["nowhere", "fastdistil prepare"]),
        (["train", "distilbert"], ["data.train is not set"]),
        (["train", "distilbert", "--resume", "nowhere"], ["nowhere", "run directory"]),
        (["evaluate", "nowhere", "nothing.txt"], ["nowhere"]),
        (["train", "distilbert", "name=a b"], ["letters, digits"]),
        (["evaluate", "nowhere", "nothing.txt", "--positions", "some"], ["--positions"]),
    ],
)
def test_wrong_arguments(arguments: list[str], says: list[str], run: Run) -> None:
    assert_refused(run(*arguments), 2, *says)


def test_arguments_that_are_missing_or_unknown(run: Run) -> None:
    for arguments in (["prepare"], ["train"], ["trian"], ["train", "demo", "--bogus"]):
        code, out, err = run(*arguments)
        assert code == 2 and "Traceback" not in out + err


def broken_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """What a user may hand to prepare by mistake -> what the message names."""
    folder.mkdir()
    (folder / "empty.txt").write_bytes(b"")
    (folder / "blank.txt").write_text("\n \n\t\n")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 50)
    (folder / "latin.txt").write_bytes("fa\xe7ade na\xefve\n".encode("latin-1") * 50)
    (folder / "utf16.txt").write_bytes("hello there\n".encode("utf-16") * 50)
    (folder / "torn.txt.gz").write_bytes(gzip.compress(b"hello there " * 5000)[:60])
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\nnot json\n')
    (folder / "other.jsonl").write_text('{"body": "no text field"}\n' * 20)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "hollow").mkdir()
    return {
        "missing": ([str(folder / "missing.txt")], "missing.txt"),
        "empty": ([str(folder / "empty.txt")], "empty"),
        "blank": ([str(folder / "blank.txt")], "no usable sequence"),
        "binary": ([str(folder / "binary.txt")], "binary.txt"),
        "latin": ([str(folder / "latin.txt")], "UTF-8"),
        "utf16": ([str(folder / "utf16.txt")], "UTF-16"),
        "torn": ([str(folder / "torn.txt.gz")], "torn.txt.gz"),
        "bad records": ([str(folder / "bad.jsonl")], "quarantine"),
        "no text field": ([str(folder / "other.jsonl")], "quarantine"),
        "unknown kind": ([str(folder / "picture.png")], "picture.png"),
        "hollow": ([str(folder / "hollow")], "hollow"),
    }


def test_broken_text_is_refused(run: Run, material: Path, tmp_path: Path) -> None:
    for number, (name, (inputs, says)) in enumerate(broken_inputs(tmp_path / "inputs").items()):
        result = run("prepare", *inputs, "--tokenizer", material / "tokenizer", "--out", f"out-{number}", "--workers", 1)
        assert result[0] == 2, (name, result)
        assert_refused(result, 2, says)
        assert not (tmp_path / f"out-{number}" / "manifest.json").exists(), name


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_corpus_is_corrupt_data(run: Run, material: Path, tmp_path: Path) -> None:
    assert prepared(run, material)[0] == 0
    shard = tmp_path / "corpus" / "tokens-00000.bin"
    content = shard.read_bytes()
    flip_last_byte(shard)
    assert_refused(run("train", "distilbert", *overrides(material)), 14, "tokens-00000.bin")
    shard.write_bytes(content[:-10])
    assert_refused(run("train", "distilbert", *overrides(material)), 14, "tokens-00000.bin")
    assert_refused(run("evaluate", material / "teacher", "corpus"), 14, "tokens-00000.bin")
    assert not (tmp_path / "runs").exists()
    shard.write_bytes(content)
    assert run("train", "distilbert", *overrides(material))[0] == 0


def test_damaged_checkpoints_are_corrupt_data(run: Run, material: Path, tmp_path: Path) -> None:
    assert prepared(run, material)[0] == 0
    assert run("train", "distilbert", *overrides(material))[0] == 0
    for path in (tmp_path / "runs" / "distilbert-1" / "checkpoints").glob("step-*/model.safetensors"):
        flip_last_byte(path)
    assert_refused(run("train", "distilbert", *overrides(material), "--resume", "auto"), 14, "model.safetensors")


def test_a_recipe_of_the_future_and_an_existing_run(run: Run, material: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("version: 2\nstudent: {every: 2}\nloop: {epochs: 1}\n")
    assert_refused(run("train", "mine.yaml"), 2, "version 2", "upgrade")
    assert prepared(run, material)[0] == 0
    assert run("train", "distilbert", *overrides(material), "name=mine")[0] == 0
    log = (tmp_path / "runs" / "mine" / "events.jsonl").read_bytes()
    assert_refused(run("train", "distilbert", *overrides(material), "name=mine"), 2, "--resume auto")
    assert_refused(
        run("train", "distilbert", *overrides(material), "name=mine", "seed=3", "--resume", "auto"), 2, "seed was 56, is 3"
    )
    assert (tmp_path / "runs" / "mine" / "events.jsonl").read_bytes() == log


def test_places_that_cannot_be_written(run: Run, material: Path, tmp_path: Path) -> None:
    assert prepared(run, material)[0] == 0
    (tmp_path / "file").write_text("in the way")
    assert_refused(run("train", "distilbert", *overrides(material), "runs_dir=file"), 2, "file")
    assert_refused(run("train", "distilbert", *overrides(material), "runs_dir=/proc/nope"), 2, "/proc/nope", "runs_dir")
    assert_refused(prepared(run, material, "file"), 2, "file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_read_only_place(run: Run, material: Path, tmp_path: Path, need: Callable[[str, str], Never]) -> None:
    assert prepared(run, material)[0] == 0
    place = tmp_path / "place"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(place)], capture_output=True, check=False)
    if mounted.returncode != 0:
        need("root-network", "mounting a read-only file system needs root")
    try:
        assert_refused(
            run("train", "distilbert", *overrides(material), f"runs_dir={place / 'runs'}"), 2, "place", "you can write to"
        )
        assert_refused(prepared(run, material, str(place / "corpus")), 2, "place")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(run: Run, material: Path, tmp_path: Path, need: Callable[[str, str], Never]) -> None:
    """On a real file system of one megabyte."""
    assert prepared(run, material)[0] == 0
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)], capture_output=True, check=False)
    if mounted.returncode != 0:
        need("root-network", "mounting a small file system needs root")
    try:
        assert_refused(
            run("train", "distilbert", *overrides(material), f"runs_dir={disk / 'runs'}", "checkpoint.every=1"), 13, "full"
        )
        (disk / "rest").write_bytes(b"")
        subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'rest'}", "bs=1k"], capture_output=True, check=False)
        assert_refused(prepared(run, material, str(disk / "corpus")), 13, "full")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_bug_shows_its_traceback_and_exit_code_1(tmp_path: Path) -> None:
    """In a process of its own, with a fault planted behind the command."""
    script = tmp_path / "planted.py"
    script.write_text(
        "import sys\nfrom fastdistil import cli, recipe\n"
        "def broken(*_): raise ZeroDivisionError('planted')\n"
        "recipe.load_recipe = broken\nsys.argv = ['fastdistil', 'train', 'demo']\ncli.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 1 and "Traceback" in process.stderr and "planted" in process.stderr


def test_a_real_process_ends_with_the_code(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "fastdistil.cli", "train", "nothing-like-it"]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and process.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_loading_is_one_line(number: signal.Signals, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr("fastdistil.start.load_recipe", lambda *_: os.kill(os.getpid(), number))
    assert run("train", "distilbert") == (130, "", "fastdistil: interrupted; what was saved before is whole\n")
    assert signal.getsignal(number) is before


def test_the_end_of_a_file_is_no_interruption(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that reads an empty file raises EOFError, of which typer makes what it makes of Ctrl-D at a prompt."""

    def ended(*_: object) -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr("fastdistil.start.load_recipe", ended)
    with pytest.raises(EOFError, match="Ran out of input"):
        run("train", "distilbert")


def test_an_interruption_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdistil.start.load_recipe", interrupted)
    assert run("train", "distilbert") == (130, "", "fastdistil: interrupted; what was saved before is whole\n")
