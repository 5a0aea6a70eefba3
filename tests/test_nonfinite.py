"""Runs whose loss or gradient is not finite: no update is made of it, and the state before it is saved."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistil import train
from fastdistil.data.sources import CorpusSource
from fastdistil.errors import CorruptData, NonFinite, Stopped
from fastdistil.training.optim import LossScale
from tests.small_run import assert_same_bits, events, quiet, saved_state, saved_updates, small, stop_after


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
        material,
        tmp_path,
        "logging.every=5",
        "checkpoint.every=null",
        "evaluation.every=null",
        f"loop.nonfinite={mode}",
    )
    monkeypatch.setattr(train, "loss_terms", poisoned)
    if mode == "stop":
        with pytest.raises(
            NonFinite,
            match=r"update 3 \(epoch 0, batches 4 to 5\): total nan, hard nan",
        ) as caught:
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
        with pytest.raises(
            NonFinite,
            match=r"update 3 .*total nan.*; saved after update 2, continue with",
        ) as caught:
            quiet(recipe)
    assert "was shortened while it was in use" in str(caught.value.__cause__)
    assert saved_updates(tmp_path / "run" / "checkpoints") == [2]
    assert quiet(recipe, resume="auto").updates == 8


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
    other = json.loads(
        (tmp_path / "one" / "run" / "checkpoints" / "step-00000001" / "state.json").read_text(),
    )
    assert state["tokens"] == other["tokens"] > 0


def test_fp16_stops_when_no_scale_helps(
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LossScale, "PERSISTENT", 4)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(float("nan")))
    with pytest.raises(NonFinite, match=r"update 4 .*gradient norm nan"):
        quiet(small(material, tmp_path, "loop.precision=fp16", "evaluation.every=null"))


def test_skipping_has_a_limit(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = train.loss_terms

    def poisoned(*arguments: Any, **keywords: Any) -> Any:
        terms = real(*arguments, **keywords)
        return terms._replace(total=terms.total * float("inf"))

    monkeypatch.setattr(train, "loss_terms", poisoned)
    with pytest.raises(NonFinite, match=r"more than loop\.nonfinite_limit=2"):
        quiet(
            small(
                material,
                tmp_path,
                "loop.nonfinite=skip",
                "loop.nonfinite_limit=2",
                "evaluation.every=null",
            ),
        )
