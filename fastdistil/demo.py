"""`fastdistil train demo`: everything from nothing, with honest numbers, in minutes on two cores.

    documentation of this Python -> WordPiece tokenizer -> token shards -> teacher (pre-trained with the same loop)
      -> student of half the layers, distilled            runs/demo-N
      -> control: same initialisation, data and steps, without the teacher's signal
      -> all of them, and the student before any step, on held-out documents

Each stage is an ordinary run beside the student's, so an interrupted demo continues with --resume auto.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import rich.console
import rich.table
import torch

from fastdistil.console import Console
from fastdistil.data.corpus import Corpus
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.python_docs import python_documents
from fastdistil.data.tokenizer import train_wordpiece
from fastdistil.errors import FellShort, Stopped, UserError, translated
from fastdistil.models import language_model, loading, students
from fastdistil.models.perplexity import HeldOut, held_out
from fastdistil.recipe import Recipe, load_recipe
from fastdistil.runs import choose_run
from fastdistil.train import Result, train
from fastdistil.training.inputs import Data, resolve
from fastdistil.training.memory_plan import show_plan

TEXT_BYTES = 4_000_000
VOCABULARY = 8192
_MAX_LENGTH = 128
_HELD_OUT = 20
"""One document in so many is held out."""
_FILLED_IN = "made-by-the-demo"
_KL_RATIO = 0.75
"""The student's held-out KL to the teacher must be at most this share of the control's."""


@dataclass(frozen=True)
class DemoRow:
    model: str
    parameters: int
    found: HeldOut
    tokens_per_second: float | None
    """While it was trained; None if it was not."""


def run_demo(recipe: Recipe, resume: str | None = None, teacher_recipe: Recipe | None = None) -> list[DemoRow]:
    """Run all stages and print the table. Raises FellShort if the student learnt too little from its teacher.

    `teacher_recipe`: how to pre-train the teacher; None: as the recipe demo-teacher says.
    """
    began = time.perf_counter()
    run, how = _place(recipe, resume)
    data, teacher_run, control_run = _stages(run)
    console = Console()
    try:
        console.note("1/4 collecting text from this Python installation, training a tokenizer")
        train_dir, heldout_dir = make_corpus(data, console)
        corpora = {"train": str(train_dir), "heldout": str(heldout_dir)}

        console.note("2/4 pre-training the teacher")
        same = {"runs_dir": recipe.runs_dir, "seed": recipe.seed, "device": recipe.device}
        same |= {"data": corpora, "loop": {"precision": recipe.loop.precision}}
        start = teacher_recipe or load_recipe("demo-teacher")
        teacher = train(start.with_(name=teacher_run.name, **same), resume=how)

        console.note("3/4 distilling the student")
        student_recipe = recipe.with_(data=corpora, name=run.name, teacher={"path": str(teacher.run_dir / "student")})
        student = train(student_recipe, resume=how)

        console.note("4/4 the control: the same without the teacher")
        without = {"a_ce": 0.0, "a_cos": 0.0, "a_mse": 0.0, "projection": False}
        control = train(student_recipe.with_(name=control_run.name, objective=without), resume=how)
    except Stopped as stopped:
        raise Stopped(f"{str(stopped).partition(';')[0]}; continue with fastdistil train demo --resume auto") from stopped

    rows = evaluate_all(resolve(student_recipe), heldout_dir, teacher, student, control)
    report(rows, run, time.perf_counter() - began)
    check_ratio(rows)
    return rows


def _stages(run: Path) -> tuple[Path, Path, Path]:
    """Where the text and shards, the teacher's run and the control's lie, beside the student's run."""
    return run.with_name(f"{run.name}-data"), run.with_name(f"{run.name}-teacher"), run.with_name(f"{run.name}-control")


def _place(recipe: Recipe, resume: str | None) -> tuple[Path, str | None]:
    """(the student's run, how every stage is to be resumed). Raises UserError."""
    named = [
        key
        for key, value in (("teacher.path", recipe.teacher and recipe.teacher.path), ("data.train", recipe.data.train))
        if value != _FILLED_IN
    ]
    if named or recipe.data.heldout != _FILLED_IN:
        raise UserError(
            f"the demo makes its own corpus and teacher; leave out {', '.join(named) or 'data.heldout'}, or use another recipe"
        )
    if resume not in (None, "auto"):
        raise UserError(f"the demo has several runs and continues with --resume auto, not with --resume {resume}")
    run, _ = choose_run(recipe, "demo", None if recipe.name is None else "auto")
    if resume == "auto" and recipe.name is None:
        number = int(run.name.rpartition("-")[2]) - 1  # the newest one, whichever stage it reached
        return (run.with_name(f"demo-{number}"), "auto") if number else (run, None)
    if resume is None and any(place.exists() for place in (run, *_stages(run))):
        raise UserError(f"{run}, or a stage beside it, exists; continue with --resume auto, or choose another name=...")
    return run, resume


def make_corpus(data: Path, console: Console) -> tuple[Path, Path]:
    """Text, tokenizer and shards below `data`; what is already there is kept. Returns (train, held-out) shards."""
    text, tokenizer = data / "text", data / "tokenizer"
    if not tokenizer.exists():
        with translated("writing the demo's text", data):
            text.mkdir(parents=True, exist_ok=True)
            documents = list(python_documents(TEXT_BYTES))
            if len(documents) < 10 * _HELD_OUT:
                raise UserError(f"this Python installation has only {len(documents)} documentation strings; was it stripped?")
            for name, chosen in zip(("train", "heldout"), split(documents), strict=True):
                lines = (json.dumps({"text": document}) + "\n" for document in chosen)
                (text / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            train_wordpiece(split(documents)[0], VOCABULARY, tokenizer)
    for name in ("train", "heldout"):
        options = PrepareOptions(tokenizer=str(tokenizer), max_length=_MAX_LENGTH)
        manifest = prepare([str(text / f"{name}.jsonl")], data / name, options)
        console.note(f"    {name}: {manifest.tokens:,} tokens of {manifest.documents:,} documents")
    return data / "train", data / "heldout"


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """(train, held-out) by each document's own hash, so that no document moves when others come or go."""
    out = [hashlib.sha256(document.encode("utf-8", "replace")).digest()[0] % _HELD_OUT == 0 for document in documents]
    training = [document for document, held in zip(documents, out, strict=True) if not held]
    return training, [document for document, held in zip(documents, out, strict=True) if held]


def evaluate_all(recipe: Recipe, heldout: Path, teacher: Result, student: Result, control: Result) -> list[DemoRow]:
    """Every model on all held-out text; the KL is to the teacher in float32."""
    corpus = Corpus.open(heldout)
    device = torch.device(recipe.device)
    reference = loading.load_model(str(teacher.run_dir / "student")).to(device)
    untrained = students.make_student(recipe.student, reference, corpus.facts.vocab_size).eval().to(device)
    distilled, controlled = (loading.load_model(str(run.run_dir / "student")).to(device) for run in (student, control))
    candidates = (
        ("teacher", reference, teacher.tokens_per_second),
        ("student", distilled, student.tokens_per_second),
        ("control (no teacher)", controlled, control.tokens_per_second),
        ("student, untrained", untrained, None),
    )
    rows = []
    for name, model, speed in candidates:
        losses = held_out(model, corpus, corpus.facts, teacher=reference)
        rows.append(DemoRow(name, language_model.parameter_count(model), losses, speed))
    return rows


def report(rows: Sequence[DemoRow], run: Path, seconds: float) -> None:
    heldout = rows[0].found
    table = rich.table.Table(
        title=f"Held-out text: {heldout.sequences:,} sequences, {heldout.labels:,} masked tokens. ± is one standard error.",
        title_justify="left",
    )
    columns = ("model", "MLM loss", "perplexity", "KL to teacher", "parameters", "training tokens/s")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.found.loss:.4f} ± {row.found.loss_se:.4f}",
            f"{row.found.perplexity:.1f}",
            f"{row.found.kl:.4f} ± {row.found.kl_se:.4f}",
            f"{row.parameters:,}",
            "not trained" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        )
    console = rich.console.Console()
    if not console.is_terminal:  # a file has no width of its own
        console = rich.console.Console(width=120)
    console.print(table)
    print(f"{seconds:.0f} s in all; the student is in {run / 'student'}, its numbers in {run / 'demo.json'}")
    values = {"seconds": seconds, "kl_ratio": kl_ratio(rows), "rows": [asdict(row) for row in rows]}
    with translated("writing the demo's results", run):
        (run / "demo.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def kl_ratio(rows: Sequence[DemoRow]) -> float:
    student, control = rows[1].found.kl, rows[2].found.kl
    return student / control if student is not None and control else math.nan


def check_ratio(rows: Sequence[DemoRow]) -> None:
    ratio = kl_ratio(rows)
    print(f"The student's KL to its teacher is {ratio:.2f} of the control's (wanted: at most {_KL_RATIO}).")
    if not ratio <= _KL_RATIO:
        raise FellShort(
            f"the student's KL is {ratio:.2f} of the control's, wanted at most {_KL_RATIO}; train longer: loop.updates=..."
        )


def plan_demo(recipe: Recipe, console: rich.console.Console) -> None:
    """--dry-run: both recipes with their estimates."""
    run, _ = choose_run(recipe, "demo", None)
    teacher_recipe = resolve(load_recipe("demo-teacher"))
    data = Data(vocabulary=VOCABULARY)
    config = loading.config_from(teacher_recipe.student.config or {}, VOCABULARY)
    console.print("# teacher", markup=False)
    show_plan(teacher_recipe, run.with_name(f"{run.name}-teacher"), console, data=data)
    console.print("\n# student (the control's is the same with objective a_ce, a_cos and a_mse 0)", markup=False)
    show_plan(resolve(recipe), run, console, data=data, teacher=loading.without_weights(config))
