"""The loop, run as users run it: whole runs, interrupted runs, runs that must not start, runs that must stop."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdistil import distil, train
from fastdistil.console import Console
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.sources import CorpusSource
from fastdistil.data.tokenizer import train_wordpiece
from fastdistil.errors import CorruptData, NonFinite, Stopped, UserError
from fastdistil.recipe import Recipe, load_recipe
from fastdistil.runs import sole_user
from fastdistil.training.inputs import resolve
from fastdistil.training.memory_plan import make_plan
from fastdistil.training.optim import LossScale
from tests.fork_server import ForkServer
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


DRIVER = """
import os, signal, sys
from pathlib import Path
from fastdistil import train
from fastdistil.training import checkpoint
from fastdistil.errors import FastdistilError
from fastdistil.console import Console
from fastdistil.recipe import load_recipe
how, at, resume = sys.argv[2], int(sys.argv[3]), sys.argv[4] or None
step, calls = train.train_step, 0
def counted(run, window, counts, waited_s):
    if run.update + 1 == at:
        if how == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if how in ("TERM", "INT", "HUP"):
            os.kill(os.getpid(), getattr(signal, "SIG" + how))
        if how == "PAUSE":
            (run.directory / "PAUSE").touch()
    return step(run, window, counts, waited_s)
train.train_step = counted
try:
    train.train(load_recipe(sys.argv[1]), resume=resume, console=Console(quiet=True))
except FastdistilError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def start(fork_server: ForkServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a recipe in a process of its own that a signal meets in the middle of a given update."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def run(recipe: Recipe, how: str = "", at: int = 0, resume: str = "") -> subprocess.CompletedProcess[str]:
        path = tmp_path / "asked.yaml"
        path.write_text(recipe.to_yaml())
        command = [sys.executable, str(driver), str(path), how, str(at), resume]
        process = fork_server.popen(command, {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode or 0, out, err)

    return run


@pytest.mark.parametrize(
    ("how", "at", "code"),
    [("KILL", 6, -9), ("TERM", 1, 75), ("HUP", 4, 75), ("INT", 5, 75), ("PAUSE", 3, 75)],
)
def test_an_interrupted_run_is_the_uninterrupted_one(
    how: str, at: int, code: int, material: Path, tmp_path: Path, start: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Bit for bit: weights, moments, steps, losses, gradient norms and rates, with dropout on."""
    quiet(small(material, tmp_path / "whole"))
    recipe = small(material, tmp_path / "cut")
    run = tmp_path / "cut" / "run"
    first = start(recipe, how, at)
    assert first.returncode == code, first.stderr
    assert not (run / "student").exists()
    if how == "PAUSE":
        assert events(run, "evaluation", update=at - 1) and not (run / "PAUSE").exists()
    if code == 75:
        # The open window is dropped: the last whole update is what is saved.
        assert saved_updates(run / "checkpoints")[-1] == at - 1
        assert "--resume" in first.stderr
    second = start(recipe, resume="auto")
    assert second.returncode == 0, second.stderr
    assert_same_bits(saved_state(tmp_path / "whole" / "run"), saved_state(run))
    assert learnt(tmp_path / "whole" / "run") == learnt(run)
    values = [
        [e["loss"] for e in events(place, "evaluation") if e["update"] == 8] for place in (tmp_path / "whole" / "run", run)
    ]
    assert values[0] == values[1]


def test_resuming_a_finished_run_changes_nothing(material: Path, tmp_path: Path) -> None:
    quiet(small(material, tmp_path))
    before = saved_state(tmp_path / "run")
    result = quiet(small(material, tmp_path), resume="auto")
    assert result.updates == 8 and result.tokens_per_second == 0
    assert_same_bits(before, saved_state(tmp_path / "run"))


def test_a_checkpoint_can_be_named(material: Path, tmp_path: Path) -> None:
    quiet(small(material, tmp_path, "checkpoint.keep=9"))
    before = saved_state(tmp_path / "run")
    quiet(small(material, tmp_path, "checkpoint.keep=9"), resume=tmp_path / "run" / "checkpoints" / "step-00000004")
    assert_same_bits(before, saved_state(tmp_path / "run"))
    assert [e["update"] for e in events(tmp_path / "run", "train")] == list(range(1, 9))


def test_a_flipped_bit_in_a_checkpoint_is_seen(material: Path, tmp_path: Path) -> None:
    quiet(small(material, tmp_path, "checkpoint.keep=2"))
    run = tmp_path / "run"
    names = saved_updates(run / "checkpoints")
    newest = run / "checkpoints" / f"step-{names[-1]:08d}"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptData, match=r"model\.safetensors"):
        quiet(small(material, tmp_path), resume=newest)
    said: list[str] = []
    console = Console(quiet=True)
    console.note = said.append  # type: ignore[method-assign]
    result = train.train(small(material, tmp_path), resume="auto", console=console)
    assert result.updates == 8
    assert any("step-00000008" in line for line in said), said


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.lr=1e-3"], "optim.lr was 0.0005, is 0.001"),
        (["loop.updates=9"], "loop.updates"),
        (["seed=1"], "seed"),
    ],
)
def test_resuming_with_another_recipe_is_refused(overrides: list[str], says: str, material: Path, tmp_path: Path) -> None:
    quiet(small(material, tmp_path, "loop.updates=2", "evaluation.every=null"))
    again = [] if overrides[0].startswith("loop.updates") else ["loop.updates=2"]
    with pytest.raises(UserError, match=says):
        quiet(small(material, tmp_path, "evaluation.every=null", *again, *overrides), resume="auto")
    # What changes nothing that is learnt may differ.
    quiet(
        small(material, tmp_path, "evaluation.every=null", "loop.updates=2", "logging.every=2", "checkpoint.keep=5"),
        resume="auto",
    )


def test_resuming_on_another_corpus_is_refused(material: Path, tmp_path: Path) -> None:
    place = tmp_path / "corpus"
    options = PrepareOptions(tokenizer=str(material / "tokenizer"), max_length=48, workers=1)
    prepare([str(material / "train.jsonl")], place, options)
    quiet(small(material, tmp_path, f"data.train={place}", "loop.updates=2"))
    place.rename(tmp_path / "old")
    prepare([str(material / "heldout.jsonl")], place, options)
    with pytest.raises(UserError, match="another corpus"):
        quiet(small(material, tmp_path, f"data.train={place}", "loop.updates=2"), resume="auto")


def test_an_existing_run_is_refused_and_unnamed_ones_count(material: Path, tmp_path: Path) -> None:
    recipe = small(material, tmp_path, "loop.updates=1", "evaluation.every=null")
    quiet(recipe)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match="--resume auto"):
        quiet(recipe)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    unnamed = recipe.with_(name=None)
    assert [quiet(unnamed, recipe_name="mine").run_dir.name for _ in range(2)] == ["mine-1", "mine-2"]


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_loss_that_is_not_finite_gates_the_update(
    mode: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments and steps stay as they were; the host hears of it at its next read, with step, term and batches."""
    real, calls = train.loss_terms, 0

    def poisoned(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        terms = real(*arguments, **keywords)
        factor = float("nan") if (calls - 1) // 2 + 1 == 3 else 1.0  # both micro-batches of update 3
        return terms._replace(hard=terms.hard * factor, total=terms.total * factor)

    recipe = small(
        material, tmp_path, "logging.every=5", "checkpoint.every=null", "evaluation.every=null", f"loop.nonfinite={mode}"
    )
    monkeypatch.setattr(train, "loss_terms", poisoned)
    if mode == "stop":
        with pytest.raises(NonFinite, match=r"update 3 \(epoch 0, batches 4 to 5\): total nan, hard nan") as caught:
            quiet(recipe)
        assert caught.value.exit_code == 10
        # What is saved is the state before it: the same as a clean run of two updates leaves.
        monkeypatch.undo()
        assert saved_updates(tmp_path / "run" / "checkpoints") == [2]
        clean = tmp_path / "clean"
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", stop_after(2))
            with pytest.raises(Stopped):
                quiet(small(material, clean, "evaluation.every=null", "checkpoint.every=null"))
        assert_same_bits(saved_state(tmp_path / "run", 2), saved_state(clean / "run", 2))
        # Without the poison the run continues to the end, as if nothing had been.
        quiet(recipe, resume="auto")
        quiet(small(material, tmp_path / "whole", "evaluation.every=null"))
        assert_same_bits(saved_state(tmp_path / "run"), saved_state(tmp_path / "whole" / "run"))
    else:
        quiet(recipe)
        assert [e["skipped"] for e in events(tmp_path / "run", "train")] == [1, 0]
        steps = {float(t) for name, t in saved_state(tmp_path / "run").items() if name.endswith(".step")}
        assert steps == {7.0}
        assert all(bool(torch.isfinite(t).all()) for t in saved_state(tmp_path / "run").values())


def test_a_corpus_damaged_behind_an_update_that_was_not_finite_leaves_the_state_before_it(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is not read before the next log line, and saving for the damage reads it."""
    real_terms, real_windows, calls = train.loss_terms, CorpusSource.windows, 0

    def poisoned(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        terms = real_terms(*arguments, **keywords)
        return terms._replace(total=terms.total * float("nan")) if (calls - 1) // 2 + 1 == 3 else terms

    @contextmanager
    def damaged_after_three(self: CorpusSource, first: int, end: int) -> Iterator[Any]:
        def windows_until_damaged() -> Iterator[Any]:
            with real_windows(self, first, first + 3) as windows:
                yield from windows
            raise CorruptData("tokens-00000.bin was shortened while it was in use")

        yield windows_until_damaged()

    recipe = small(material, tmp_path, "logging.every=8", "checkpoint.every=null", "evaluation.every=null")
    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_terms", poisoned)
        patch.setattr(CorpusSource, "windows", damaged_after_three)
        with pytest.raises(NonFinite, match=r"update 3 .*total nan.*; saved after update 2, continue with") as caught:
            quiet(recipe)
    assert "was shortened while it was in use" in str(caught.value.__cause__)
    assert saved_updates(tmp_path / "run" / "checkpoints") == [2]
    assert quiet(recipe, resume="auto").updates == 8


def stop_after(update: int) -> Callable[..., bool]:
    step = train.train_step

    def limited(run: train.Run, *arguments: Any) -> bool:
        if run.update == update:
            run.signals.requested = "SIGTERM"
        return step(run, *arguments)

    return limited


def test_a_bad_update_before_an_evaluation_is_not_evaluated(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, best loss and checkpoint are those of the last good update, though later ones ran before the host heard of it."""
    real, calls = train.loss_terms, 0

    def poisoned(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        terms = real(*arguments, **keywords)
        return terms._replace(total=terms.total * (float("nan") if calls == 3 else 1.0))  # the second update

    monkeypatch.setattr(train, "loss_terms", poisoned)
    with pytest.raises(NonFinite, match=r"update 2 .*--resume"):
        quiet(small(material, tmp_path, "logging.every=10", "evaluation.every=4", "checkpoint.every=null"))
    run = tmp_path / "run"
    assert saved_updates(run / "checkpoints") == [1] and not events(run, "evaluation")
    state = json.loads((run / "checkpoints" / "step-00000001" / "state.json").read_text())
    assert state["best_update"] is None
    monkeypatch.undo()
    quiet(small(material, tmp_path / "one", "loop.updates=1", "evaluation.every=null"))
    other = json.loads((tmp_path / "one" / "run" / "checkpoints" / "step-00000001" / "state.json").read_text())
    assert state["tokens"] == other["tokens"] > 0


def test_fp16_stops_when_no_scale_helps(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "PERSISTENT", 4)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(float("nan")))
    with pytest.raises(NonFinite, match=r"update 4 .*gradient norm nan"):
        quiet(small(material, tmp_path, "loop.precision=fp16", "evaluation.every=null"))


def test_a_second_process_is_refused(material: Path, tmp_path: Path) -> None:
    recipe = small(material, tmp_path, "loop.updates=1", "evaluation.every=null")
    quiet(recipe)
    with sole_user(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        quiet(recipe, resume="auto")


def test_the_advice_to_continue_works_as_it_is_printed(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the overrides that the run was started with."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stop_after(2))
        with pytest.raises(Stopped, match=r"continue with fastdistil train \S+/recipe\.yaml --resume \S+/run$") as caught:
            quiet(small(material, tmp_path))
    _, _, recipe, _, resume = str(caught.value).rpartition("continue with ")[2].split()
    assert quiet(load_recipe(recipe), resume=resume).updates == 8


def test_skipping_has_a_limit(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = train.loss_terms

    def poisoned(*arguments: Any, **keywords: Any) -> Any:
        terms = real(*arguments, **keywords)
        return terms._replace(total=terms.total * float("inf"))

    monkeypatch.setattr(train, "loss_terms", poisoned)
    with pytest.raises(NonFinite, match=r"more than loop\.nonfinite_limit=2"):
        quiet(small(material, tmp_path, "loop.nonfinite=skip", "loop.nonfinite_limit=2", "evaluation.every=null"))


@pytest.mark.parametrize("options", [["data.layout=packed"], ["data.layout=length-grouped"], ["loop.precision=fp16"]])
def test_one_host_sync_a_log_line(options: list[str], material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    result = quiet(small(material, tmp_path / precision, f"loop.precision={precision}", "teacher.dtype=fp32", *common))
    assert {p.dtype for p in result.student.parameters()} == {torch.float32}
    wide, low = (learnt(tmp_path / name / "run") for name in ("fp32", precision))
    for a, b in zip(wide, low, strict=True):
        assert a[1] == pytest.approx(b[1], rel=0.02)
    moves = []
    for name in ("fp32", precision):
        early, late = (saved_state(tmp_path / name / "run", update) for update in (2, 8))
        moves.append(torch.cat([(late[key] - early[key]).flatten() for key in late if key.startswith("model.")]))
    assert moves[0].norm() == pytest.approx(float(moves[1].norm()), rel=0.05)
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.9


def test_deterministic_algorithms_run_every_step(material: Path, tmp_path: Path) -> None:
    """Nothing on the step's path is an operation that torch knows to be indeterminate, and the switch is put back."""
    quiet(small(material, tmp_path / "plain", "loop.updates=2"))
    quiet(small(material, tmp_path / "switched", "loop.updates=2", "loop.deterministic=true"))
    assert_same_bits(saved_state(tmp_path / "plain" / "run", 2), saved_state(tmp_path / "switched" / "run", 2))
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
    recipe = small(material, tmp_path, f"teacher.path={tmp_path / 'teacher'}", "objective.a_mlm=0", "objective.a_clm=2")
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


class TinyModel(nn.Module):
    """A user's own model, not of transformers: an embedding, one mixing layer, a head."""

    causal = False

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def hidden(self, batch: Any) -> Tensor:
        out: Tensor = torch.tanh(self.mix(self.embedding(batch.ids_BS))).flatten(0, 1)
        return out

    def transform(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND


def test_a_module_as_teacher_gives_its_layers(material: Path, tmp_path: Path) -> None:
    teacher = transformers.AutoModelForMaskedLM.from_pretrained(material / "teacher")
    result = distil(
        "distilbert",
        teacher=teacher,
        student={"layers": [1], "architecture": "distilbert"},
        corpus=material / "train",
        data={"micro_batch_tokens": 256},
        loop={"updates": 1, "epochs": None},
        runs_dir=str(tmp_path),
        device="cpu",
    )
    assert type(result.student).__name__ == "DistilBertForMaskedLM"
    assert result.run_dir == tmp_path / "distilbert-1"
    assert "given from Python" in (result.run_dir / "recipe.yaml").read_text()


def test_the_python_interface_takes_your_own_parts(tmp_path: Path) -> None:
    """Own modules and own batches: the loss falls; an interrupted run continues; wrong modules are refused."""
    torch.manual_seed(0)
    batches = []
    for _ in range(6):
        ids = torch.randint(0, 50, (4, 10))
        labels = torch.where(torch.rand(ids.shape) < 0.2, ids, -100)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    teacher, student = TinyModel(50, 16), TinyModel(50, 16)
    keywords: dict[str, Any] = {
        "teacher": teacher,
        "corpus": batches,
        "loop": {"updates": 40, "accumulation": 3, "precision": "fp32"},
        "optim": {"lr": 0.01},
        "logging": {"every": 1},
        "runs_dir": str(tmp_path),
        "device": "cpu",
    }
    result = distil("distilbert", student=student, name="mine", **keywords)
    assert result.student is student
    losses = [e["total"] for e in events(result.run_dir, "train")]
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(UserError, match="hidden, transform, weight"):
        distil("distilbert", student=nn.Linear(3, 3), name="wrong", **keywords)
    with pytest.raises(UserError, match=r"batch 0 of your own iterable"):
        distil("distilbert", student=TinyModel(50, 16), name="bad", **{**keywords, "corpus": [{"ids": torch.zeros(1, 1)}]})


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
def test_what_cannot_run_is_refused_before_it_starts(overrides: list[str], says: str, material: Path, tmp_path: Path) -> None:
    if overrides == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=says) as caught:
        quiet(small(material, tmp_path, *overrides))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(material: Path, tmp_path: Path) -> None:
    """Same size, another token map."""
    other = train_wordpiece(["zebra quux " * 50, (material / "train.jsonl").read_text()], 300, tmp_path / "other")
    prepare(
        [str(material / "train.jsonl")], tmp_path / "corpus", PrepareOptions(tokenizer=str(other), max_length=48, workers=1)
    )
    with pytest.raises(UserError, match="another vocabulary"):
        quiet(small(material, tmp_path, f"data.train={tmp_path / 'corpus'}", "data.heldout=null"))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "breaks"])
def test_compiling_without_a_compiler_is_refused_before_there_is_a_run(compiler: str, material: Path, tmp_path: Path) -> None:
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


def test_updates_of_padding_only_have_no_speed_and_end(tmp_path: Path) -> None:
    """As a user's own batches may hold them."""
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (4, 10))
    padding = {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "labels": torch.full_like(ids, -100)}
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for name, batches in (("padding", [padding] * 3), ("mixed", [words, padding, words])):
        result = distil(
            "distilbert",
            teacher=TinyModel(50, 16),
            student=TinyModel(50, 16),
            corpus=batches,
            loop={"updates": 3, "accumulation": 1, "precision": "fp32"},
            logging={"every": 1},
            runs_dir=str(tmp_path),
            name=name,
            device="cpu",
        )
        logged = events(result.run_dir, "train")
        assert [event["tokens"] for event in logged] == ([0, 0, 0] if name == "padding" else [40, 0, 40])
        assert all(math.isfinite(float(event["total"])) for event in logged)
        assert (result.tokens_per_second > 0) == (name == "mixed")
