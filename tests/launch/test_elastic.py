"""The launcher when ranks are lost: it goes on with those that remain, and grows back."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdistil.launch.job import Elastic, Job, choose_slots
from fastdistil.launch.launcher import launch
from tests.launch.stand_ins import Ranks

KILLED, OTHERS = "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(0.2); sys.exit(12)"


def elastic(ranks: Ranks, np: int, low: int, hosts: str | None = None, **more: Any) -> Job:
    slots, count = choose_slots(np, hosts)
    options = Elastic(
        min_ranks=low,
        again=lambda: ranks.command("again"),
        progress=more.pop("progress", lambda: None),
        grow_after_s=more.pop("grow_after_s", 3600.0),
    )
    return Job(command=ranks.command("first"), slots=slots, ranks=count, timeout_s=5.0, elastic=options, **more)


def test_elastic_goes_on_without_the_lost_rank(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.plan(default=[OTHERS, "pass"], rank1=[KILLED, "pass"])
    assert launch(elastic(ranks, 3, 1)) == 0
    assert ranks.sizes() == [3, 2]
    assert [start["arguments"] for start in ranks.starts] == 3 * [["first"]] + 2 * [["again"]]
    err = capsys.readouterr().err
    assert "rank 1 was killed by SIGKILL" in err and "going on with 2 ranks" in err
    # The lost slot was GPU 1: the two ranks that remain use GPUs 0 and 2.
    assert {start["environ"].get("CUDA_VISIBLE_DEVICES") for start in ranks.starts[3:]} == {"0,2"}
    ports = {start["environ"]["MASTER_PORT"] for start in ranks.starts[3:]}
    assert len(ports) == 1


def test_elastic_ends_below_its_minimum(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.plan(default=[OTHERS, OTHERS, "pass"], rank1=[KILLED, KILLED, "pass"])
    assert launch(elastic(ranks, 3, 2)) == 12
    assert ranks.sizes() == [3, 2]
    assert "1 ranks remain" in capsys.readouterr().err


@pytest.mark.parametrize("code", [2, 10, 11, 13, 14, 75])
def test_elastic_starts_nothing_again_that_would_fail_again(ranks: Ranks, code: int) -> None:
    ranks.plan(default=f"sys.exit({code})")
    assert launch(elastic(ranks, 2, 1)) == code
    assert ranks.sizes() == [2]


def test_elastic_a_bug_on_one_rank_or_on_all(ranks: Ranks) -> None:
    ranks.plan(default=[OTHERS, "pass"], rank1="sys.exit(1)")
    assert launch(elastic(ranks, 2, 1)) == 0
    assert ranks.sizes() == [2, 1]
    (ranks.folder / "starts.jsonl").unlink()
    ranks.plan(default="sys.exit(1)")
    assert launch(elastic(ranks, 2, 1)) == 1
    assert ranks.sizes() == [2]


def test_elastic_uses_spare_slots_first(ranks: Ranks, ssh: Path) -> None:
    ranks.plan(default=[OTHERS, "pass"], rank1=[KILLED, "pass"])
    assert launch(elastic(ranks, 2, 2, "a:2,b:2")) == 0
    assert ranks.sizes() == [2, 2]
    assert [start["environ"]["LOCAL_WORLD_SIZE"] for start in ranks.starts] == ["2", "2", "1", "1"]


def test_elastic_does_without_a_host_that_cannot_be_reached(ranks: Ranks, ssh: Path) -> None:
    (ssh / "down-b").touch()
    ranks.plan(default=[OTHERS, "pass"])
    assert launch(elastic(ranks, 3, 1, "a:2,b:2")) == 0
    assert ranks.sizes() == [3, 2]  # b's other slot is no better


def test_elastic_is_given_up_without_progress(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is known to be lost: the same ranks start again, but not for ever; a new checkpoint counts anew."""
    monkeypatch.setattr("fastdistil.launch.launcher.RESTARTS", 3)
    ranks.plan(default="sys.exit(12)")
    assert launch(elastic(ranks, 1, 1, progress=lambda: min(len(ranks.starts), 2))) == 12
    assert ranks.sizes() == 5 * [1]
    assert "given up after 3 starts" in capsys.readouterr().err


def test_elastic_grows_back(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    """After a while, in which the rank that is left has started, the run is stopped as by SIGTERM, which saves it, and started
    with all its ranks."""
    ranks.plan(default=[OTHERS, "wait()", "pass"], rank1=[KILLED, "pass"])
    assert launch(elastic(ranks, 2, 1, grow_after_s=5.0)) == 0
    assert ranks.sizes() == [2, 1, 2]
    out, err = capsys.readouterr()
    assert "saved by SIGTERM" in out
    assert "trying slot 1 of this machine again" in err
    assert "CUDA_VISIBLE_DEVICES" not in ranks.starts[-1]["environ"]


def test_elastic_over_hosts_goes_on_with_the_slots_that_remain(ranks: Ranks, ssh: Path) -> None:
    ranks.plan(default=[OTHERS, "time.sleep(0.5)"], rank1=KILLED)
    assert launch(elastic(ranks, 2, 1, "a,b", grow_after_s=0.0)) == 0
    assert ranks.sizes() == [2, 1]
    assert (ssh / "hosts").read_text().split().count("b") == 1, "it is not asked again either"


@pytest.mark.parametrize(
    ("deed", "code"),
    [("wait()", 75), ("signal.signal(15, lambda *_: os._exit(12)); (folder / f'ready-{rank}').touch(); time.sleep(300)", 12)],
)
def test_elastic_obeys_the_user(ranks: Ranks, deed: str, code: int) -> None:
    """A run that was told to stop is not started again, not even if its ranks could not save."""
    ranks.plan(default=deed)
    job = elastic(ranks, 2, 1)
    program = (
        "import sys; from fastdistil.launch.job import *; from fastdistil.launch.launcher import launch\n"
        f"elastic = Elastic(min_ranks=1, again=lambda: {job.command!r}, progress=lambda: None)\n"
        f"job = Job(command={job.command!r}, slots=(Slot(None, 0), Slot(None, 1)), ranks=2, timeout_s=5.0, elastic=elastic)\n"
        "sys.exit(launch(job))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program])
    try:
        ranks.ready(2)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(30) == code
    finally:
        launcher.kill()
    assert ranks.sizes() == [2]
