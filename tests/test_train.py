"""The loop, run as users run it: what a run leaves, what it learns, and runs that must not start."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from fastdistil import train
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.tokenizer import train_wordpiece
from fastdistil.errors import UserError
from fastdistil.recipe import load_recipe
from fastdistil.training.inputs import resolve
from fastdistil.training.memory_plan import make_plan
from tests.small_run import TINY, assert_same_bits, events, learnt, quiet, saved_state, saved_updates, small


def test_a_run_leaves_what_it_promises(material: Path, tmp_path: Path) -> None:
    result = quiet(small(material, tmp_path))
    run = tmp_path / "run"
    assert result.run_dir == run and result.updates == 8
    assert load_recipe(str(run / "recipe.yaml")).student.every == 2
    assert [e["update"] for e in events(run, "train")] == list(range(1, 9))
    fields = events(run, "train")[-1]
    assert {
        "total",
        "soft",
        "hard",
        "cosine",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "data_wait_share",
        "host_peak_bytes",
        "time",
    } <= fields.keys()
    weighted = 5 * fields["soft"] + 2 * fields["hard"] + fields["cosine"]
    assert fields["total"] == pytest.approx(weighted, rel=1e-5)
    evaluations = events(run, "evaluation")
    assert [e["update"] for e in evaluations] == [3, 6, 8]
    best = min(evaluations, key=lambda e: e["loss"])["update"]
    checkpoints = saved_updates(run / "checkpoints")
    assert best in checkpoints and 8 in checkpoints and len(checkpoints) <= 3
    # The student is transformers' alone, with tokenizer and card.
    student = transformers.AutoModelForMaskedLM.from_pretrained(run / "student")
    assert student.config.num_hidden_layers == 1
    assert_same_bits(student.state_dict(), result.student.state_dict())
    assert transformers.AutoTokenizer.from_pretrained(run / "student").vocab_size == 300
    card = (run / "student" / "README.md").read_text()
    assert f"{result.evaluation.loss:.4f}" in card and "accumulation: 2" in card  # type: ignore[union-attr]


def test_the_weights_move_and_the_teacher_does_not(material: Path, tmp_path: Path) -> None:
    before = load_file(material / "teacher" / "model.safetensors")
    teacher = transformers.AutoModelForMaskedLM.from_pretrained(material / "teacher")
    result = quiet(small(material, tmp_path), teacher=teacher)
    after = teacher.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not teacher.training
    student = result.student.state_dict()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(student[name], before[name])


def test_an_existing_run_is_refused_and_unnamed_ones_count(material: Path, tmp_path: Path) -> None:
    recipe = small(material, tmp_path, "loop.updates=1", "evaluation.every=null")
    quiet(recipe)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match="--resume auto"):
        quiet(recipe)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    unnamed = recipe.with_(name=None)
    assert [quiet(unnamed, recipe_name="mine").run_dir.name for _ in range(2)] == ["mine-1", "mine-2"]


@pytest.mark.parametrize(
    "options",
    [["data.layout=packed"], ["data.layout=length-grouped"], ["loop.precision=fp16"]],
)
def test_one_host_sync_a_log_line(
    options: list[str],
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensor -> number conversions are counted: none in a step, one at a log line.

    The kernels' path for the CPU looks at numbers, which is no wait there; test_distill.py sees to a GPU's. flops.py reads
    lengths from a batch that is still on the host.
    """
    counts = {"inside": 0, "all": 0}
    inside = False

    def counting(name: str) -> None:
        original = getattr(Tensor, name)

        def counted(self: Tensor, *arguments: Any, **keywords: Any) -> Any:
            caller = Path(sys._getframe(1).f_code.co_filename)
            if caller.parent.name != "kernels" and caller.name != "flops.py":
                counts["all"] += 1
                counts["inside"] += inside
            return original(self, *arguments, **keywords)

        monkeypatch.setattr(Tensor, name, counted)

    step = train.train_step

    def watched(*arguments: Any) -> bool:
        nonlocal inside
        inside = True
        try:
            return step(*arguments)
        finally:
            inside = False

    monkeypatch.setattr(train, "train_step", watched)
    logged = train.log

    def log(run: train.Run) -> None:
        before = counts["all"]
        logged(run)
        assert counts["all"] - before == 1

    monkeypatch.setattr(train, "log", log)
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        counting(name)
    monkeypatch.setattr(train, "_evaluate", lambda run: None)
    monkeypatch.setattr(train, "save", lambda run: None)
    quiet(small(material, tmp_path, "logging.every=4", *options))
    assert counts["inside"] == 0


@pytest.mark.parametrize("layout", ["packed", "length-grouped"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32(layout: str, precision: str, material: Path, tmp_path: Path) -> None:
    """Master weights stay float32 and move as float32's do; the losses stay within the precision of float32's."""
    common = [f"data.layout={layout}", "evaluation.every=null", "student.dropout=0", "checkpoint.keep=9"]
    quiet(small(material, tmp_path / "fp32", *common))
    result = quiet(
        small(material, tmp_path / precision, f"loop.precision={precision}", "teacher.dtype=fp32", *common),
    )
    assert {p.dtype for p in result.student.parameters()} == {torch.float32}
    wide, low = (learnt(tmp_path / name / "run") for name in ("fp32", precision))
    for a, b in zip(wide, low, strict=True):
        assert a[1] == pytest.approx(b[1], rel=0.02)
    moves = []
    for name in ("fp32", precision):
        early, late = (saved_state(tmp_path / name / "run", update) for update in (2, 8))
        moves.append(
            torch.cat([(late[key] - early[key]).flatten() for key in late if key.startswith("model.")]),
        )
    assert moves[0].norm() == pytest.approx(float(moves[1].norm()), rel=0.05)
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.9


def test_deterministic_algorithms_run_every_step(material: Path, tmp_path: Path) -> None:
    """Nothing on the step's path is an operation that torch knows to be indeterminate, and the switch is put back."""
    quiet(small(material, tmp_path / "plain", "loop.updates=2"))
    quiet(small(material, tmp_path / "switched", "loop.updates=2", "loop.deterministic=true"))
    assert_same_bits(
        saved_state(tmp_path / "plain" / "run", 2),
        saved_state(tmp_path / "switched" / "run", 2),
    )
    assert not torch.are_deterministic_algorithms_enabled()


def test_layouts_give_the_same_losses(material: Path, tmp_path: Path) -> None:
    """One update over the whole corpus: packed or padded, the tokens, masks and losses are the same."""
    lines = []
    for layout in ("packed", "length-grouped"):
        recipe = small(
            material,
            tmp_path / layout,
            f"data.layout={layout}",
            "loop.accumulation=1000",
            "loop.updates=1",
            "student.dropout=0",
            "evaluation.every=null",
        )
        quiet(recipe)
        lines.append(events(tmp_path / layout / "run", "train")[0])
    for name in ("soft", "hard", "cosine", "total", "grad_norm"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=2e-5)
    assert lines[0]["tokens"] == lines[1]["tokens"]


def test_pretraining_learns_without_a_teacher(material: Path, tmp_path: Path) -> None:
    config = "{" + ", ".join(f"{k}: {v}" for k, v in TINY.items()) + "}"
    recipe = load_recipe(
        "bert-small",
        [
            f"student.config={config}",
            f"data.train={material / 'train'}",
            f"data.heldout={material / 'heldout'}",
            "data.micro_batch_tokens=512",
            "loop.updates=60",
            "optim.lr=5e-3",
            "loop.precision=fp32",
            f"runs_dir={tmp_path}",
            "name=run",
            "device=cpu",
            "evaluation.every=30",
        ],
    )
    result = quiet(recipe)
    losses = [e["loss"] for e in events(result.run_dir, "evaluation")]
    assert losses[-1] < losses[0] < math.log(300) + 0.5
    assert "kl" not in events(result.run_dir, "evaluation")[-1]


def test_gpt2_distils(material: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_layer=2, n_embd=32, n_head=2, n_positions=48)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "teacher")
    recipe = small(
        material,
        tmp_path,
        f"teacher.path={tmp_path / 'teacher'}",
        "objective.a_mlm=0",
        "objective.a_clm=2",
    )
    result = quiet(recipe)
    assert type(transformers.AutoModelForCausalLM.from_pretrained(result.run_dir / "student")).__name__ == "GPT2LMHeadModel"
    with pytest.raises(UserError, match=r"objective\.a_clm"):
        quiet(recipe.with_(objective={"a_mlm": 2.0, "a_clm": 0.0}, name="wrong"))


def test_different_widths_need_a_projection(material: Path, tmp_path: Path) -> None:
    narrow = "{" + ", ".join(f"{k}: {v}" for k, v in {**TINY, "hidden_size": 16}.items()) + "}"
    recipe = small(material, tmp_path, f"student.config={narrow}", "loop.updates=3", "evaluation.every=null")
    with pytest.raises(UserError, match=r"objective\.projection=true"):
        quiet(recipe)
    assert not (tmp_path / "run").exists()
    result = quiet(recipe.with_(objective={"projection": True}))
    state = saved_state(tmp_path / "run", 3)
    assert state["model.projection.weight"].shape == (32, 16)
    assert "projection" not in "".join(load_file(result.run_dir / "student" / "model.safetensors"))
    quiet(recipe.with_(objective={"a_cos": 0.0}, name="soft-only"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.train=null-and-void"], "no prepared corpus|not exist|no directory|prepare"),
        (["teacher.path=/nowhere/at/all"], "no model directory /nowhere"),
        (["student.layers=[0,7]"], "below the teacher's 2 layers"),
        (["student.layers=[1,0]"], "ascending"),
        (["data.micro_batch_tokens=20"], "data.micro_batch_tokens"),
        (["student.config={model_type: t5}"], "model_type"),
        (["student.config={model_type: bert, hiden_size: 3}"], "hiden_size"),
        (["student.config={model_type: bert, vocab_size: 10}"], "vocabulary"),
        (["objective.a_mlm=0", "objective.a_clm=1"], "objective.a_mlm"),
        (["device=cuda"], "finds no GPU"),
    ],
)
def test_what_cannot_run_is_refused_before_it_starts(
    overrides: list[str],
    says: str,
    material: Path,
    tmp_path: Path,
) -> None:
    if overrides == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=says) as caught:
        quiet(small(material, tmp_path, *overrides))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(material: Path, tmp_path: Path) -> None:
    """Same size, another token map."""
    other = train_wordpiece(
        ["zebra quux " * 50, (material / "train.jsonl").read_text()],
        300,
        tmp_path / "other",
    )
    prepare(
        [str(material / "train.jsonl")],
        tmp_path / "corpus",
        PrepareOptions(tokenizer=str(other), max_length=48, workers=1),
    )
    with pytest.raises(UserError, match="another vocabulary"):
        quiet(small(material, tmp_path, f"data.train={tmp_path / 'corpus'}", "data.heldout=null"))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "breaks"])
def test_compiling_without_a_compiler_is_refused_before_there_is_a_run(
    compiler: str,
    material: Path,
    tmp_path: Path,
) -> None:
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    if compiler == "breaks":  # it names its version and compiles nothing
        script = tmp_path / "g++"
        script.write_text('#!/bin/sh\ntest "$1" = --version\n')
        script.chmod(0o755)
        compiler = str(script)
    torch.compiler.reset()
    recipe = small(material, tmp_path / "runs", "loop.compile=true")
    with fresh_cache(), config.patch({"cpp.cxx": (None, compiler)}):
        for call in (lambda: quiet(recipe), lambda: make_plan(resolve(recipe), print)):
            with pytest.raises(UserError, match=r"loop\.compile: .*CXX, g\+\+") as caught:
                call()
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_compile_gives_the_same_losses(material: Path, tmp_path: Path) -> None:
    common = ["student.dropout=0", "loop.updates=3", "evaluation.every=null", "data.layout=packed"]
    quiet(small(material, tmp_path / "eager", *common))
    quiet(small(material, tmp_path / "compiled", *common, "loop.compile=true"))
    eager, compiled = learnt(tmp_path / "eager" / "run"), learnt(tmp_path / "compiled" / "run")
    for a, b in zip(eager, compiled, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
