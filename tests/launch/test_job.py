"""What a command line asks the launcher for: hosts, numbers of ranks, elastic ranges, and the ranks' own command."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdistil.errors import UserError
from fastdistil.launch.attempt import free_port
from fastdistil.launch.job import Job, choose_slots, parse_elastic, parse_hosts
from fastdistil.launch.launcher import launch
from fastdistil.launch.rank_process import Slot, rank_environment
from tests.launch.stand_ins import Ranks


def test_hosts_and_numbers() -> None:
    assert parse_hosts("a:2,b") == (Slot("a", 0), Slot("a", 1), Slot("b", 0))
    assert parse_hosts(f"localhost:1,{'other'}:1") == (Slot(None, 0), Slot("other", 0))
    assert parse_hosts(socket.gethostname()) == (Slot(None, 0),)
    assert choose_slots(None, "a:2,b:2")[1] == 4
    assert choose_slots(3, "a:2,b:2")[1] == 3
    assert parse_elastic("2:8") == (2, 8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a:0",
        "a:",
        "a:x",
        ":2",
        "a,,b",
        "a:2,a:2",
        "localhost,localhost",
        "-oProxyCommand=x:1",
        "a;b",
        "a b",
        "$(x)",
        "a\0",
    ],
)
def test_hosts_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--hosts"):
        parse_hosts(text)


def test_without_ssh_no_rank_is_started_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDISTIL_SSH", "/nowhere/ssh -q")
    with pytest.raises(UserError, match=r"/nowhere/ssh, which is not here.*FASTDISTIL_SSH"):
        launch(Job(command=("true",), slots=parse_hosts("localhost:1,elsewhere:1"), ranks=2, timeout_s=1))


@pytest.mark.parametrize("text", ["", "2", "3:2", "0:2", "a:b", "1:2:3"])
def test_elastic_ranges_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="MIN:MAX"):
        parse_elastic(text)


def test_more_ranks_than_room() -> None:
    with pytest.raises(UserError, match="5 ranks are more than the 4"):
        choose_slots(5, "a:2,b:2")
    with pytest.raises(UserError, match="1 to 65,536"):
        choose_slots(0, None)


def test_ranks_start_no_ranks(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="rank 1 of 2 already"):
        launch(ranks.job(2))


def test_gpus_of_the_slots_in_use() -> None:
    rank_variables = {"LOCAL_WORLD_SIZE": "2"}
    assert rank_environment({"CUDA_VISIBLE_DEVICES": "4,5,6"}, rank_variables, [0, 2])["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert rank_environment({}, rank_variables, [1, 3])["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert "CUDA_VISIBLE_DEVICES" not in rank_environment({}, rank_variables, None)
    # Two ranks share the one GPU that is visible: there is nothing to choose.
    assert rank_environment({"CUDA_VISIBLE_DEVICES": "4"}, rank_variables, [1, 3])["CUDA_VISIBLE_DEVICES"] == "4"


def test_a_free_port_is_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port("127.0.0.1")))
    assert 20000 <= free_port("no-such-host.invalid") < 30000


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, list[Job]]]:
    """Calls the command line; its exit code, and the jobs that it would have launched."""
    from fastdistil import cli

    jobs: list[Job] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdistil.launch.launcher.launch", lambda job: jobs.append(job) or 75)

    def run(*arguments: str) -> tuple[int, list[Job]]:
        monkeypatch.setattr(sys, "argv", ["fastdistil", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), jobs

    return run


RECIPE = ("distilbert", "data.train=corpus", "world.timeout_s=7")


def test_ranks_run_the_same_command(command_line: Callable[..., tuple[int, list[Job]]]) -> None:
    code, (job,) = command_line("train", *RECIPE, "--np", "3", "--resume", "auto")
    assert code == 75  # the ranks' own
    assert job.command == (sys.executable, "-m", "fastdistil", "train", *RECIPE, "--resume", "auto")
    assert (job.ranks, len(job.slots), job.timeout_s, job.elastic) == (3, 3, 7.0, None)
    _, jobs = command_line("pretrain", "bert-small", "--hosts", "a:2,b")
    assert jobs[1].command[3:] == ("pretrain", "bert-small")
    assert jobs[1].slots == (Slot("a", 0), Slot("a", 1), Slot("b", 0))


def test_an_elastic_run_has_one_directory(command_line: Callable[..., tuple[int, list[Job]]], tmp_path: Path) -> None:
    _, (job,) = command_line("train", *RECIPE, "--elastic", "2:4", "--grow-after", "9")
    pinned = (sys.executable, "-m", "fastdistil", "train", *RECIPE, 'name="distilbert-1"', 'runs_dir="runs"')
    assert job.command == pinned
    assert job.elastic is not None
    assert job.elastic.again() == (*pinned, "--resume", "auto")
    assert (job.ranks, job.elastic.min_ranks, job.elastic.grow_after_s) == (4, 2, 9.0)
    before = job.elastic.progress()
    assert job.elastic.progress() == before
    (tmp_path / "runs/distilbert-1/checkpoints/step-00000010").mkdir(parents=True)
    assert job.elastic.progress() != before
    # From here on a host that does not find the run is at fault, and must not begin anew.
    (tmp_path / "runs/distilbert-1/recipe.yaml").touch()
    assert job.elastic.again() == (*pinned, "--resume", "runs/distilbert-1")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--np", "0"], "1 to 65,536"),
        (["--elastic", "3:2"], "MIN:MAX"),
        (["--np", "8", "--elastic", "2:4"], "outside --elastic 2:4"),
        (["--hosts", "a:0"], "--hosts"),
        (["--np", "3", "--hosts", "a:2"], "3 ranks are more than the 2"),
    ],
)
def test_options_that_make_no_ranks(
    command_line: Callable[..., tuple[int, list[Job]]], capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    code, jobs = command_line("train", *RECIPE, *options)
    err = capsys.readouterr().err
    assert (code, jobs) == (2, []) and says in err and err.count("\n") == 1


def test_the_demo_has_one_rank(command_line: Callable[..., tuple[int, list[Job]]], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("train", "demo", "--np", "2") == (2, [])
    assert "the demo trains" in capsys.readouterr().err
