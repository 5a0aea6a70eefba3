"""The demo, small: its stages, its table, its verdict, and going on where it was stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastdistil import demo, train
from fastdistil.data.python_docs import SHORTEST, docstrings, python_documents
from fastdistil.errors import FellShort, Stopped, UserError
from fastdistil.recipe import Recipe, load_recipe


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Recipe, Recipe]:
    """(student's, teacher's), with little text and few updates."""
    monkeypatch.setattr(demo, "TEXT_BYTES", 400_000)
    monkeypatch.setattr(demo, "VOCABULARY", 600)
    student = load_recipe(
        "demo", ["loop.updates=30", "data.micro_batch_tokens=1024", f"runs_dir={tmp_path / 'runs'}", "device=cpu"]
    )
    teacher = load_recipe(
        "demo-teacher",
        [
            "loop.updates=40",
            "student.config.hidden_size=32",
            "student.config.intermediate_size=64",
            "student.config.num_attention_heads=2",
            "data.micro_batch_tokens=1024",
            "optim.lr=5e-3",
        ],
    )
    return student, teacher


def test_the_demo_measures_what_it_says(
    recipes: tuple[Recipe, Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = demo.run_demo(recipes[0], teacher_recipe=recipes[1])
    out = capsys.readouterr().out
    teacher, student, control, untrained = rows
    assert teacher.found.kl == pytest.approx(0.0, abs=1e-9)
    assert student.parameters < teacher.parameters and student.parameters == control.parameters == untrained.parameters
    assert student.found.kl is not None and control.found.kl is not None and student.found.kl <= 0.75 * control.found.kl
    assert len({row.found.labels for row in rows}) == 1  # all judged on the same masked tokens
    for row in rows:
        assert f"{row.found.loss:.4f}" in out and f"{row.parameters:,}" in out
    values = json.loads((tmp_path / "runs" / "demo-1" / "demo.json").read_text())
    assert values["kl_ratio"] == pytest.approx(student.found.kl / control.found.kl)
    # The control is the same run but for the teacher: initialisation, data and steps.
    configs = [load_recipe(str(tmp_path / "runs" / name / "recipe.yaml")) for name in ("demo-1", "demo-1-control")]
    assert configs[0].with_(name="x", objective=configs[1].objective.model_dump()) == configs[1].with_(name="x")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "runs" / "demo-1" / "student")
    assert model.config.num_hidden_layers == 2


def test_a_stopped_demo_goes_on_and_unnamed_ones_count(
    recipes: tuple[Recipe, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = (recipe.with_(loop={"updates": 3}) for recipe in recipes)
    step = train.train_step

    def interrupted(run: train.Run, *arguments: Any) -> bool:
        if run.directory.name == "demo-1-teacher" and run.update == 1:
            run.signals.requested = "SIGTERM"
        return step(run, *arguments)

    monkeypatch.setattr(demo, "check_ratio", lambda rows: None)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(Stopped, match="continue with fastdistil train demo --resume auto"):
            demo.run_demo(student, teacher_recipe=teacher)
    demo.run_demo(student, "auto", teacher)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "demo-1",
        "demo-1-control",
        "demo-1-data",
        "demo-1-teacher",
    ]
    demo.run_demo(student, None, teacher)
    assert (tmp_path / "runs" / "demo-2" / "demo.json").exists()
    named = student.with_(name="mine")
    (tmp_path / "runs" / "mine-data").mkdir()
    with pytest.raises(UserError, match="--resume auto"):
        demo.run_demo(named, None, teacher)
    with pytest.raises(UserError, match="--resume auto"):
        demo.run_demo(student, "runs/demo-1", teacher)


def test_the_verdict() -> None:
    def row(kl: float) -> demo.DemoRow:
        heldout = demo.HeldOut(5.0, 0.1, 148.4, 100, 10, kl, 0.001, 1000)
        return demo.DemoRow("m", 1, heldout, None)

    demo.check_ratio([row(0.0), row(0.075), row(0.1), row(0.5)])
    with pytest.raises(FellShort, match=r"0\.76 of the control") as caught:
        demo.check_ratio([row(0.0), row(0.076), row(0.1), row(0.5)])
    assert caught.value.exit_code == 3


def test_held_out_documents_are_no_training_documents() -> None:
    documents = [f"document {number} " * 30 for number in range(2000)]
    training, held = demo.split(documents)
    assert set(training).isdisjoint(held) and sorted(training + held) == sorted(documents)
    assert 60 < len(held) < 180  # a twentieth, by the documents' own hashes
    assert demo.split(documents[:1000])[1] == held[: len(demo.split(documents[:1000])[1])]


def test_documents_are_docstrings_and_differ(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        '"""Of the module."""\nx = """not one"""\nclass A:\n    """Of the class."""\n    def f(self):\n        """Of f."""\n'
    )
    assert list(docstrings(source)) == ["Of the module.", "Of the class.", "Of f."]
    source.write_text("def broken(:\n")
    assert list(docstrings(source)) == []
    documents = list(python_documents(100_000))
    assert len(set(documents)) == len(documents) and min(map(len, documents)) >= SHORTEST
    assert 100_000 <= sum(len(document.encode()) for document in documents) < 300_000
    assert documents == list(python_documents(100_000))
