"""`fastdistil cluster`: files that keep to their makers' schemas, and what is refused."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdistil import cli
from fastdistil.errors import UserError
from fastdistil.launch.cluster import KINDS, ClusterKind
from tests.launch.cluster_files import CONFIG_MAP, DSTACK, GIVEN, SCHEMAS, check, documents, text_of

VARIANTS: list[dict[str, Any]] = [{}, {"image": "registry/fastdistil:1"}, {"gpus": "0"}, {"nodes": 1}]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["mpijob", "skypilot", "dstack"])
def test_files_keep_to_their_schema(kind: ClusterKind, variant: dict[str, Any], recipe_text: Path) -> None:
    (document,) = documents(kind, **variant)
    check(document, SCHEMAS[kind], kind)
    *first, document = documents(kind, recipe=str(recipe_text), **variant)
    check(document, SCHEMAS[kind], kind)
    if kind == "mpijob":
        check(first[0], CONFIG_MAP, kind)
        assert first[0]["data"] == {"Mine.yaml": recipe_text.read_text()}
    else:
        assert first == []
    bare = {"storage": None, "time": None}
    check(documents(kind, **bare, **variant)[0], SCHEMAS[kind], kind)


@pytest.mark.parametrize("name", ["true", "null", "on", "Yes", "n", "y", "off"])
def test_a_runs_name_is_text_wherever_it_stands(name: str, recipe_text: Path) -> None:
    config_map, job = documents("mpijob", recipe=str(recipe_text), run_name=name)
    launcher = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]
    (mounted,) = (volume["configMap"]["name"] for volume in launcher["volumes"] if "configMap" in volume)
    others = [documents("skypilot", run_name=name)[0]["name"], documents("dstack", run_name=name)[0]["name"]]
    assert [config_map["metadata"]["name"], job["metadata"]["name"], mounted, *others] == [name.lower()] * 5


def test_the_checks_are_strict() -> None:
    (document,) = documents("dstack")
    for wrong in ({"node": 2}, {"nodes": "2"}, {"name": "Upper"}, {"retry": {"duration": "1d"}}):
        with pytest.raises(AssertionError):
            check(document | wrong, DSTACK)


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        ("slurm", {"nodes": 0}, "--nodes"),
        ("slurm", {"gpus": "many"}, "--gpus"),
        ("slurm", {"gpus": "-1"}, "--gpus"),
        ("slurm", {"time": "8 hours"}, "--time"),
        ("slurm", {"storage": "x"}, "--storage"),
        ("mpijob", {"image": None}, "--image"),
        ("mpijob", {"gpus": "H100:8"}, "--gpus 8"),
        ("skypilot", {"gpus": "8"}, "H100:8"),
        ("skypilot", {"time": "8h"}, "--time"),
        ("slurm", {"run_name": "x\n#SBATCH --uid=0"}, "name=NAME"),
        ("slurm", {"recipe": "a\nb.yaml"}, "recipe"),
        ("dstack", {"storage": "x\ny: z"}, "--storage"),
        ("skypilot", {"image": "x\0"}, "--image"),
        ("mpijob", {"recipe": "a b.yaml"}, "rename it"),
    ],
)
def test_what_cannot_be_had_is_refused(kind: ClusterKind, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        text_of(kind, **wrong)


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_slurm_is_asked_for_nodes_gpus_and_time() -> None:
    options = directives(text_of("slurm"))
    assert options == {
        "job-name": "distil-bert-7",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "H100:8",
        "time": "480",
        "exclusive": "",
        "output": "%x-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": "TERM@120",
    }
    assert "gpus-per-node" not in directives(text_of("slurm", gpus="0"))
    assert "--container-image=registry/fastdistil:1" in text_of("slurm", image="registry/fastdistil:1")


def test_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fastdistil", "cluster", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    out = tmp_path / "job.sh"
    options = ("--for", "slurm", "--nodes", "2", "optim.lr=1e-4", "--out", str(out))
    assert run("distilbert", *options) == 0
    assert re.search(
        r"train distilbert optim.lr=1e-4 'name=\"distilbert-\d{8}-\d{6}\"' --resume auto",
        out.read_text(),
    )
    assert str(out) in capsys.readouterr().out
    assert run("bert-small", "--for", "slurm", "--nodes", "2", "name=mine") == 0
    assert "pretrain bert-small name=mine 'name=\"mine\"'" in capsys.readouterr().out
    cpu = ("distilbert", "--for", "dstack", "--nodes", "2", "device=cpu", f"data.train={tmp_path}")
    assert run(*cpu) == 0
    printed = capsys.readouterr()
    assert "gpu:" not in printed.out and "--nproc-per-node=1" in printed.out and "horovod_build --cpu\n" in printed.out
    assert f"data.train={tmp_path} is a path of this machine" in printed.err and printed.err.count("\n") == 1
    assert run("distilbert", "--for", "slurm", "--nodes", "2", f"data.train={tmp_path}") == 0
    assert capsys.readouterr().err == ""
    for wrong, says in (
        ((*cpu, "--gpus", "8"), "device=cpu"),
        (("distilbert", "--for", "slurm", "--nodes", "2", "device=cuda", "--gpus", "0"), "device=cuda"),
        (("distilbert", "--for", "pbs", "--nodes", "2"), "mpijob"),
        (("demo", "--for", "slurm", "--nodes", "2"), "the demo"),
        (("distilbert", "--for", "slurm", "--nodes", "2", "optim.rate=1"), "optim.rate"),
        (("distilbert", "--for", "slurm", "--nodes", "0"), "--nodes"),
    ):
        assert run(*wrong) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1


def test_every_kind_is_tested() -> None:
    assert set(KINDS) == set(GIVEN) == {*SCHEMAS, "slurm"}
