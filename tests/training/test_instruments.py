"""What a run measures of itself, and what it says when memory runs out: whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastdistil import train
from fastdistil.distributed.coordinator import Coordinator
from fastdistil.distributed.world import World
from fastdistil.errors import OutOfMemory
from fastdistil.profiling import trace
from fastdistil.training import instruments
from fastdistil.training.metrics import TensorBoard
from tests.small_run import events, quiet, saved_state, small


def test_running_out_of_memory_says_which_keys_help(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's own refusal, of more than any machine has."""

    def greedy(*arguments: Any) -> bool:
        torch.empty(2**58)
        return True

    monkeypatch.setattr(train, "train_step", greedy)
    with pytest.raises(OutOfMemory, match=r"data\.micro_batch_tokens") as caught:
        quiet(small(material, tmp_path))
    assert caught.value.exit_code == 11


@pytest.mark.parametrize("where", ["load_inputs", "_assemble", "learnt_tensors", "announce"])
def test_running_out_of_memory_before_the_first_update(
    where: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No traceback either: loading is a phase like others."""
    monkeypatch.setattr(train, where, lambda *_, **__: torch.empty(2**58))
    with pytest.raises(OutOfMemory, match=r"^out of memory in loading, for .* more; the most in use so far was"):
        quiet(small(material, tmp_path))


def test_running_out_of_memory_with_a_teacher_from_python(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dtype that no recipe can name: the recipe says `auto` to the end."""
    monkeypatch.setattr(train, "announce", lambda run: torch.empty(2**58))
    teacher = transformers.AutoModelForMaskedLM.from_pretrained(material / "teacher", dtype=torch.float64)
    with pytest.raises(OutOfMemory, match=r"^out of memory in loading, for .* more; .* teacher weights "):
        quiet(small(material, tmp_path), teacher=teacher)


Ranges = list[str]


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> Ranges:
    """Names of the spans and asides that a run was in, in order; "/" where one ended."""
    heard: Ranges = []

    class Listener:
        def range_push(self, name: str) -> None:
            heard.append(name)

        def range_pop(self) -> None:
            heard.append("/")

    original = train.announce

    def announce(run: train.Run) -> None:
        run.instruments.spans.ranges = Listener()
        original(run)

    monkeypatch.setattr(train, "announce", announce)
    return heard


def test_evaluations_and_checkpoints_are_ranges_for_nsight(material: Path, tmp_path: Path, ranges: Ranges) -> None:
    quiet(small(material, tmp_path, "checkpoint.every=4", "evaluation.every=null"))
    assert ranges.count("evaluation") == 1  # at the end
    assert ranges.count("checkpoint") == 2  # after update 4, and at the end, where it is the best
    assert ranges.count("optimizer") == 8
    assert ranges.count("/") == len(ranges) / 2


def test_memory_is_watched_in_the_last_update_of_the_warm_up(
    material: Path, tmp_path: Path, ranges: Ranges, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes time: no update that counts pays for it."""
    original, at = instruments.SavedTensorBytes, []

    class Kept(original):  # type: ignore[misc, valid-type]
        def __enter__(self) -> Any:
            at.append(ranges.count("optimizer"))  # updates done
            return super().__enter__()

    monkeypatch.setattr(instruments, "SavedTensorBytes", Kept)
    quiet(small(material, tmp_path, "logging.every=4", "profile.warmup=3"))
    assert at == [2]
    (event,) = events(tmp_path / "run", "memory")
    assert event["update"] == 4
    assert event["parts"]["activations_and_logits"] > 0 and "logits" not in event["parts"]
    assert event["parts"].keys() < {*event["estimate"], "activations_and_logits"}


def test_traced_updates_do_not_count(material: Path, tmp_path: Path, ranges: Ranges, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are slower; and the tracer's beginning and end are in no update's time, nor in the rate."""
    inside = []
    for name in ("start", "stop"):
        original = getattr(trace.Tracer, name)

        def watched(self: trace.Tracer, name: str = name, original: Any = original) -> Any:
            inside.append((name, ranges.count("optimizer"), ranges[-1]))
            return original(self)

        monkeypatch.setattr(trace.Tracer, name, watched)
    quiet(small(material, tmp_path, "logging.every=4", "profile.warmup=1", "profile.trace_steps=[6,7]"))
    assert inside[0] == ("start", 5, "trace")
    assert inside[1][0] == "stop" and len(inside) == 2
    assert [line["warmup"] for line in events(tmp_path / "run")] == [1, 3]
    (traced,) = events(tmp_path / "run", "trace")
    assert (traced["first"], traced["last"], traced["update"]) == (6, 7, 7)
    (message,) = [note["message"] for note in events(tmp_path / "run", "note") if "traced" in note["message"]]
    assert f"most of the time in {traced['kernels'][0]['name']} (" in message
    assert list((tmp_path / "run" / "trace").iterdir()) == [tmp_path / "run" / "trace" / "rank-0.json.gz"]


def test_histograms_are_no_part_of_training(
    material: Path, tmp_path: Path, ranges: Ranges, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = []
    monkeypatch.setattr(TensorBoard, "histograms", lambda self, update, tensors: at.append((update, ranges[-1])))
    quiet(small(material, tmp_path, "logging.tensorboard=true", "logging.histograms=3", "logging.every=2"))
    assert at == [(4, "histograms"), (6, "histograms")]


def test_tensorboard_gets_histograms_of_weights_and_moments(material: Path, tmp_path: Path) -> None:
    """The extremes and the sum of each are those of the checkpoint of the same update."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = ["logging.histograms=4", "logging.every=4", "checkpoint.every=4", "evaluation.every=null"]
    result = quiet(small(material, tmp_path, "logging.tensorboard=true", *overrides))
    read = EventAccumulator(str(result.run_dir / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    names = [name for name, _ in result.student.named_parameters()]
    tags = {f"{kind}/module.{name}" for kind in ("weights", "moments") for name in names}
    assert set(read.Tags()["histograms"]) == tags
    for update in (4, 8):
        state = saved_state(result.run_dir, update)
        moments = sum(float(tensor.sum()) for name, tensor in state.items() if name.endswith(".exp_avg"))
        in_histograms = 0.0
        for name in names:
            weights, moment = (
                next(event.histogram_value for event in read.Histograms(f"{kind}/module.{name}") if event.step == update)
                for kind in ("weights", "moments")
            )
            saved = state[f"model.student.{name}"].double()
            assert [weights.min, weights.max, weights.num] == [saved.min(), saved.max(), saved.numel()], name
            assert weights.sum == pytest.approx(float(saved.sum()), rel=1e-6, abs=1e-6), name
            in_histograms += moment.sum
        assert in_histograms == pytest.approx(moments, rel=1e-4)


def test_peaks_are_measured_when_all_ranks_have_loaded(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And before any goes on: on a processor they share its cores."""
    order = []

    def watch(of: Any, name: str) -> None:
        original = getattr(of, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            order.append(name)
            return original(*arguments, **keywords)

        monkeypatch.setattr(of, name, watched)

    for of, name in ((Coordinator, "share"), (Coordinator, "collect_bytes"), (instruments.peaks, "peaks"), (World, "barrier")):
        watch(of, name)
    quiet(small(material, tmp_path, "evaluation.every=null", "profile.measure_peaks=true"))
    assert order == ["share", "collect_bytes", "peaks", "barrier"]
    (environment,) = events(tmp_path / "run", "environment")
    (device,) = environment["devices"]
    assert device["rank"] == 0 and device["host"] == environment["host"] and device["cores"] == environment["cores"]
    (source,) = environment["peaks"]["flops"]
    assert source.startswith("measured here, fp32 product") and " TFLOP/s)" in source
    assert {line["mfu"]["peak_source"] for line in events(tmp_path / "run") if not line["warmup"]} == {source}


def test_both_peaks_are_written(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself: what is more than there is by one is not therefore by the other."""
    both = {"flops": {"a sheet": 1e18, "measured here": 1e3}, "bytes": {}}
    monkeypatch.setattr(instruments.peaks, "peaks", lambda *_, **__: both)
    quiet(small(material, tmp_path, "evaluation.every=null", "checkpoint.every=null"))
    mfu = events(tmp_path / "run")[-1]["mfu"]
    assert mfu["peak_source"] == "a sheet" and 0 < mfu["student"] < mfu["with_teacher"] <= mfu["hfu"] < 1
    assert "refused" not in mfu
    assert mfu["measured"]["peak_source"] == "measured here" and "student" not in mfu["measured"]
    assert "measured here" in mfu["measured"]["refused"]
