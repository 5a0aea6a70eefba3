"""Every file that is read, damaged in every way that a seeded generator thinks of: a line and exit code 2 or 14, or it is read.

A subject is a directory and what reads one of its files. The file is replaced by damaged copies, one after the other: bytes
are flipped, cut off and put in; keys are lost, doubled and renamed; values become others of every type and size, also behind
a checksum that is right. Nothing but FastdistilErrors of these codes may come of it, within HANG_S seconds, and no other file
may be changed, made or removed.
"""

import io
import json
import os
import random
import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from fastdistil.data import prepare
from fastdistil.data.corpus import Corpus, Manifest
from fastdistil.data.local_copy import cached_corpus
from fastdistil.data.shards import counted
from fastdistil.data.teacher_cache import TeacherCache, record, shard_name
from fastdistil.distributed.world import World
from fastdistil.errors import UserError
from fastdistil.gradients.exchange import LocalGradients
from fastdistil.launch.job import choose_slots, parse_elastic
from fastdistil.profiling.report.compare import run_compare
from fastdistil.profiling.report.history import load_history
from fastdistil.profiling.report.live import Live
from fastdistil.profiling.report.report import run_report
from fastdistil.profiling.report.summary import summarise
from fastdistil.recipe import load_recipe
from fastdistil.runs import request_pause, stored_recipe
from fastdistil.storage import canonical, text_sha256
from fastdistil.studies.scale import ScaleOptions, command
from fastdistil.training import checkpoint, saving
from fastdistil.training.saving import learnt_tensors
from fastdistil.training.teacher_identity import module_fingerprint
from tests.damage import ODD_YAML, Subject, check_subject, outcome
from tests.event_streams import Stream, write_run

FEW, MANY = 200, 1000
COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]

# Subjects


def recipe_file(folder: Path) -> Iterator[Subject]:
    recipe = load_recipe("distilbert", ["name=x", "profile.trace_steps=[2, 3]", "pre_run=[a, b]"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    yield Subject(folder, "recipe.yaml", lambda path: load_recipe(str(path / "recipe.yaml"), ["optim.lr=1e-4"]), "yaml")
    yield Subject(folder, "recipe.yaml", stored_recipe, "yaml")


def silent() -> Console:
    return Console(file=io.StringIO(), width=100)


def read_run(run: Path) -> None:
    """All that reads a run, the most lenient first: what one refuses the others would."""
    out, other = run.parent / "out", run.parent / "other"
    try:
        follow(run)
        pause(run)
        run_compare(other, run, fail_above=None, anyway=True, as_json=False, console=silent())
        run_report([run, other], out / "report.json", markdown=False, as_json=True)
        run_report([run], out / "report.md", markdown=True, as_json=False)
        run_report([run], out / "report.html", markdown=False, as_json=False)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def read_recipe(run: Path) -> None:
    """What shows a run's recipe."""
    follow(run)
    with redirect_stdout(io.StringIO()):
        run_report([run, run.parent / "other"], None, markdown=False, as_json=True)
        run_report([run], None, markdown=True, as_json=False)


def follow(run: Path) -> None:
    live = Live(run)
    live.refresh()
    live.page()
    live.strip()


def pause(run: Path) -> None:
    with suppress(UserError):  # it is done already
        request_pause(run)
    (run / "PAUSE").unlink(missing_ok=True)


def run_files(folder: Path) -> Iterator[Subject]:
    run = write_run(folder / "run", Stream(lines=4, every=1))
    write_run(folder / "other", Stream(lines=3, every=1, seed=1))
    yield Subject(run, "events.jsonl", read_run, "jsonl")
    yield Subject(run, "recipe.yaml", read_recipe, "yaml")


def old_run_files(folder: Path) -> Iterator[Subject]:
    run = write_run(folder / "run", Stream(lines=4, every=2, ranks=1, gpu=False, old=True, outcome=None))
    write_run(folder / "other", Stream(lines=3, every=2, old=True))
    yield Subject(run, "events.jsonl", read_run, "jsonl")


def profile_file(folder: Path) -> Iterator[Subject]:
    summary = summarise(load_history(write_run(folder / "run", Stream(lines=4, every=1))))
    (folder / "profile.json").write_text(json.dumps(summary))

    def read(path: Path) -> None:
        for as_json in (False, True):
            run_compare(path / "run", path / "profile.json", fail_above=None, anyway=True, as_json=as_json, console=silent())

    yield Subject(folder, "profile.json", read, "json")


def benchmark_file(folder: Path) -> Iterator[Subject]:
    machine = {"cpu": {"brand_raw": "a", "count": 2}, "python_version": "3.11"}
    details = {"processor": "a", "usable_cores": 2, "torch_threads": 1, "gpus": [{"name": "b"}], "versions": {"torch": "2"}}
    for name, info in (("a.json", machine), ("b.json", {**machine, "fastdistil": details})):
        marks = [{"fullname": f"t::{letter}", "stats": {"data": [0.1, 0.2, 0.3], "mean": 0.2}} for letter in "xy"]
        (folder / name).write_text(json.dumps({"machine_info": info, "benchmarks": marks, "datetime": "now"}))

    def read(path: Path) -> None:
        run_compare(path / "a.json", path / "b.json", fail_above=None, anyway=True, as_json=False, console=silent())

    yield Subject(folder, "b.json", read, "json")
    yield Subject(folder, "a.json", read, "json")


POINT = {
    "nodes": 1, "rings": 1, "accumulation": 4, "exchanges": 1, "slowdown": 1.0, "touched_bytes": 0.0, "link_bytes_per_s": None,
}  # fmt: skip


def study_file(folder: Path) -> Iterator[Subject]:
    sample = {"step_s": 1.0, "worked_s": None, "imbalance_s": None, "waited_s": None}
    one = {**POINT, "ranks": 1, "sent_bytes": 0.0, "collectives": 0, "hops": 0, "name": "one", "samples": [sample]}
    slower = {"step_s": 1.5, "worked_s": 1.1, "imbalance_s": 0.1, "waited_s": 0.3}
    two = {
        **POINT,
        "ranks": 2,
        "sent_bytes": 1e6,
        "collectives": 3,
        "hops": 6,
        "name": "two",
        "samples": [slower, slower],
    }
    study = {
        "device": {"kind": "cpu", "name": "p", "threads_per_rank": 1},
        "dtype": "fp32",
        "shape": {"micro_batch_tokens": 100, "student_parameters": 1000, "teacher_parameters": 2000},
        "workload": {"gradient_bytes": 4000, "buckets": 3, "engine": "torch", "accumulation": 4, "exchanges": 1},
        "model_points": [one, two, {**two, "ranks": 4, "nodes": 2, "link_bytes_per_s": 1e8}],
    }
    (folder / "scale.json").write_text(json.dumps(study))

    def read(path: Path) -> None:
        try:
            command(ScaleOptions(points=str(path / "scale.json"), predict="2,8", out=path / "out"))
        finally:
            shutil.rmtree(path / "out", ignore_errors=True)

    yield Subject(folder, "scale.json", read, "json")


def network_files(folder: Path) -> Iterator[Subject]:
    (subject,) = study_file(folder)
    constant = {"value": 1e9, "low": 5e8, "high": 2e9, "source": "made up"}
    network = {"title": "n", "ranks_per_node": 8, "link_bytes_per_s": constant, "flow_bytes_per_s": constant}
    network |= {"latency_s": {"value": 1e-5, "source": "x"}, "local_bytes_per_s": constant, "local_latency_s": None}
    (folder / "network.yaml").write_text(yaml.safe_dump(network))
    rows = [{"gpus": count, "minutes": minutes, "rings": 1} for count, minutes in ((1, 100.0), (2, 60), (8, 20))]
    table = {"title": "t", "rows": rows, "accumulation": 4, "gradient_bytes": 1000, "micro_batch_s": [0.1, 0.2]}
    (folder / "table.yaml").write_text(yaml.safe_dump(table))

    def read(path: Path, options: ScaleOptions) -> None:
        try:
            command(options)
        finally:
            shutil.rmtree(path / "out", ignore_errors=True)

    def predict(path: Path) -> None:
        read(path, ScaleOptions(points=str(subject.path), predict="8", network=str(path / "network.yaml"), out=path / "out"))

    yield Subject(folder, "network.yaml", predict, "yaml")
    table_options = ScaleOptions(table=str(folder / "table.yaml"), out=folder / "out")
    yield Subject(folder, "table.yaml", lambda path: read(path, table_options), "yaml")


def small_corpus(folder: Path, sequences: int = 12) -> Path:
    """A prepared corpus of two shards, without the tokenizer that reading it does not need."""
    draw = np.random.default_rng(0)
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    shards, counts = [], np.zeros(50, np.int64)
    for shard in range(2):
        lengths = draw.integers(1, 9, sequences, dtype=np.int32)
        tokens = draw.integers(0, 50, int(lengths.sum()), dtype=np.uint16)
        tokens.tofile(folder / f"tokens-{shard:05d}.bin")
        lengths.tofile(folder / f"lengths-{shard:05d}.bin")
        counts += np.bincount(tokens, minlength=50)
        shards.append({"tokens": len(tokens), "sequences": sequences})
    counts.tofile(folder / "counts.bin")
    files = {str(path.relative_to(folder)): facts(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    total = sum(shard["tokens"] for shard in shards)
    manifest = Manifest(
        sequences=2 * sequences, tokens=total, documents=3, dropped=0, records=3, bad_records=0, unmarked_files=0,
        vocab_size=50, fingerprint="f", tokenizer_sha256="t", dtype="uint16", options={"max_length": 9}, shards=shards,  # type: ignore[arg-type]
        inputs=[{"path": "a.txt", "bytes": 3, "mtime_ns": 5}], files=files,  # type: ignore[arg-type]
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": checkpoint.file_sha256(path)}


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    inner = {key: value for key, value in values.items() if key != "sha256"}
    return {**inner, "sha256": text_sha256(canonical(inner))}


def read_corpus(path: Path) -> None:
    for verify in ("full", "size"):
        corpus = Corpus.open(path, verify=verify)
        corpus.gather(np.arange(len(corpus)))


def corpus_files(folder: Path) -> Iterator[Subject]:
    corpus = small_corpus(folder / "corpus")
    yield Subject(corpus, "manifest.json", read_corpus, "json", sealed)

    def copy(path: Path) -> None:
        try:
            cached_corpus(path, folder / "cache" / "here", 0, lambda: None, lambda text: None)
        finally:
            shutil.rmtree(folder / "cache", ignore_errors=True)

    yield Subject(corpus, "manifest.json", copy, "json", sealed)
    for name in ("tokens-00000.bin", "lengths-00001.bin", "counts.bin"):
        yield Subject(corpus, name, read_corpus, "bytes")
        yield Subject(corpus, name, lambda path, name=name: read_any_size(path, name), "bytes")  # type: ignore[misc]


def read_any_size(path: Path, name: str) -> None:
    """As if the manifest had always said that size, and nobody compared checksums."""
    values = json.loads((path / "manifest.json").read_text())
    values["files"][name]["bytes"] = (path / name).stat().st_size
    with replaced(path / "manifest.json", sealed(values)):
        corpus = Corpus.open(path, verify="size")
        corpus.gather(np.arange(len(corpus)))


@contextmanager
def replaced(path: Path, values: dict[str, Any]) -> Iterator[None]:
    """Other values in a JSON file for a while; its time stays as it was."""
    text, status = path.read_text(), path.stat()
    path.write_text(json.dumps(values))
    try:
        yield
    finally:
        path.write_text(text)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def progress_file(folder: Path) -> Iterator[Subject]:
    corpus = small_corpus(folder / "corpus")
    manifest = Manifest.read(corpus / "manifest.json")
    identity = {"format": 1, "options": manifest.options, "inputs": manifest.inputs, "tokenizer_sha256": "t"}
    files = {name: facts for name, facts in manifest.files.items() if name.endswith(".bin") and name != "counts.bin"}
    written = {"blocks": 2, "documents": 3, "dropped": 0, "sequences": 24, "tokens": manifest.tokens, "shards": manifest.shards}
    expected = {**identity, "earlier_options": {}}
    (corpus / "progress.json").write_text(json.dumps(sealed({**identity, "written": {**written, "files": files}})))
    (corpus / "manifest.json").unlink()

    def read(path: Path) -> None:
        counted(path, prepare.resumed(path, expected), 50)

    yield Subject(corpus, "progress.json", read, "json", sealed)


def seal_checkpoint(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "sha256": checkpoint._own_sha256(values)}


def made_run(folder: Path) -> Any:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    recipe = load_recipe("distilbert")
    team = types.SimpleNamespace(alone=True, chief_does=lambda purpose, work: work(), share=lambda tensors, purpose: tensors)
    team.world = World(None, torch.device("cpu"))
    return types.SimpleNamespace(
        directory=folder, recipe=recipe, modules={"student": module}, optimizer=optimizer, team=team, loss_scale=None,
        exchange=LocalGradients(optimizer, recipe), console=types.SimpleNamespace(note=lambda text: None),
        tell=lambda text: None,
        inputs=types.SimpleNamespace(
            device=torch.device("cpu"), source=types.SimpleNamespace(identity="corpus", describe=lambda update: "")
        ),
    )  # fmt: skip


def checkpoint_files(folder: Path) -> Iterator[Subject]:
    run, teacher = made_run(folder / "run"), torch.nn.Linear(2, 2)
    state = {
        "tokens": 5, "best_update": 1, "best_loss": 0.5, "corpus": "corpus", "skipped": 0, "loss_scale": None, "exchange": None,
        "teacher": {"fingerprint": module_fingerprint(teacher), "files": []}, "recipe": "version: 1",
    }  # fmt: skip
    tensors = learnt_tensors(run.modules, run.optimizer)
    path = checkpoint.save(run.directory / "checkpoints", 3, tensors, state, keep=2)

    def read(_: Path) -> None:
        with torch.no_grad():
            saving.restore(run, path, teacher)

    for name in ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"):
        kind = "json" if name.endswith(".json") else "bytes"
        seal = seal_checkpoint if name == "manifest.json" else None
        yield Subject(path, name, read, kind, seal)
        if name != "manifest.json":
            yield Subject(path, name, lambda _, name=name: resealed(path, name, lambda: read(path)), kind)  # type: ignore[misc]


def resealed(path: Path, name: str, read: Callable[[], None]) -> None:
    """As if the checkpoint had been written so."""
    values = json.loads((path / "manifest.json").read_text())
    values["files"][name] = facts(path / name)
    with replaced(path / "manifest.json", seal_checkpoint(values)):
        read()


def cache_files(folder: Path) -> Iterator[Subject]:
    corpus = Corpus.open(small_corpus(folder / "corpus"))
    cache = folder / "cache"
    cache.mkdir()
    identity = {"format": 1, "vocabulary": 50, "teacher.top_k": 4, "teacher.min_probability": None}
    values = np.zeros(int(corpus.lengths.sum()), record(50, 4))
    name = shard_name(0, 0)
    np.save(cache / name, values)
    (cache / "identity.json").write_text(json.dumps({"identity": identity, "sha256": text_sha256(canonical(identity))}))
    (cache / name).with_suffix(".json").write_text(json.dumps(facts(cache / name)))

    def read(path: Path, verify: str = "full") -> None:
        teacher_cache = TeacherCache.open(path, identity, corpus, 1, verify)
        teacher_cache.rows(0, np.arange(len(corpus)))

    def seal_identity(document: dict[str, Any]) -> dict[str, Any]:
        return {**document, "sha256": text_sha256(canonical(document["identity"]))}

    def any_size(path: Path) -> None:
        with replaced((path / name).with_suffix(".json"), facts(path / name)):
            read(path)

    yield Subject(cache, "identity.json", read, "json", seal_identity)
    yield Subject(cache, "0-00000.json", read, "json")
    yield Subject(cache, name, read, "bytes")
    yield Subject(cache, name, any_size, "bytes")


SUBJECTS = [
    recipe_file, run_files, old_run_files, profile_file, benchmark_file, study_file, network_files, corpus_files, progress_file,
    checkpoint_files, cache_files,
]  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("subjects", SUBJECTS)
def test_a_damaged_file_is_refused_in_a_line(
    subjects: Callable[[Path], Iterator[Subject]], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "read"  # what lies around it is looked at after every copy: not the whole session's files
    folder.mkdir()
    monkeypatch.chdir(folder)
    for number, subject in enumerate(subjects(folder)):
        check_subject(subject, count, seed=number)


def reads_with(folder: Path, **fields: Any) -> None:
    """Read a run whose every log line has these fields as well, as everything that reads runs does."""
    run = write_run(folder / "run", Stream(lines=4, every=1))
    write_run(folder / "other", Stream(lines=3, every=1, seed=1))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    changed = [{**event, **fields} if event["event"] == "train" else event for event in events]
    (run / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in changed))
    read_run(run)


def test_a_log_of_memory_read_at_different_times_is_read(tmp_path: Path) -> None:
    reads_with(tmp_path, memory={"used_bytes": 2**20, "reserved_bytes": 2**21, "outside_bytes": -(2**20)})


BELOW = -1e-9
NO_TIME: dict[str, Any] = {
    "step_s": [0.0], "phases": {"data": [0.0], "exposed": [0.0]}, "rank_worked_s": [0.0, 0.0], "rank_0_waited_s": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"phases": {"data": [0.1], "exposed": [BELOW], "communication": [BELOW]}},
        {"rank_worked_s": [BELOW, 0.1], "rank_0_waited_s": BELOW, "rank_data_wait_s": [BELOW, BELOW]},
        {"rank_worked_s": [BELOW, BELOW]},
        NO_TIME,
        {**NO_TIME, "tokens": 0, "tokens_per_s": 0.0},
    ],
)
def test_a_log_of_differences_just_below_0_and_updates_without_time_is_read(fields: dict[str, Any], tmp_path: Path) -> None:
    reads_with(tmp_path, **fields)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_words_of_the_command_line_are_refused_in_a_line(count: int) -> None:
    kinds: list[tuple[str, Callable[[str], object]]] = [
        ("a:8,b:8", lambda text: choose_slots(None, text)),
        ("2:8", parse_elastic),
        ("compression={kind: int8, block: 16}", lambda text: load_recipe("distilbert", [text])),
        ("student.layers=[0, 2, 4]", lambda text: load_recipe("distilbert", [text])),
        ("name=2026", lambda text: load_recipe("distilbert", [text])),
    ]
    odd = ["9" * 5000, "1000000000", "0", "-1", "\u0663", "", ":", ",", "=", " ", "\x00", "\udce9", "x" * 300, *ODD_YAML]
    for text, read in kinds:
        for number in range(count):
            draw = random.Random(f"{text} {number}")
            places = sorted(draw.randrange(len(text) + 1) for _ in "ab")
            changed = text[: places[0]] + draw.choice(odd) + text[draw.choice(places) :]
            assert len(outcome(lambda: read(changed))[1]) < 2000  # noqa: B023
