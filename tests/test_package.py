"""What `pip install .` brings: the three packages under their fastdistil.* names, their data, and nothing else."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import fastdistil

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("LICENSE", "README.md", "setup.py", "pyproject.toml", "fastdistil", "kernels", "profiling")


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built from, so that no build product lands in the repository; the links stay links."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


def build_wheel(source: Path, out: Path) -> Path:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def expected_members() -> set[str]:
    expected = {"fastdistil/py.typed"}
    expected |= {f"fastdistil/{path.name}" for path in (ROOT / "fastdistil").glob("*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "fastdistil").glob("*/*.py") if not path.parent.is_symlink()}
    expected |= {f"fastdistil/recipes/{path.name}" for path in (ROOT / "fastdistil" / "recipes").glob("*.yaml")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "fastdistil" / "studies").glob("*/*.yaml")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "fastdistil" / "launch" / "templates").iterdir()}
    expected.add("fastdistil/install/horovod-0.28.1.patch")
    report = ROOT / "profiling" / "report"
    expected |= {f"fastdistil/profiling/report/static/{path.name}" for path in (report / "static").iterdir()}
    expected |= {f"fastdistil/profiling/report/templates/{path.name}" for path in (report / "templates").glob("*.j2")}
    for folder in ("kernels", "profiling", "profiling/report"):
        expected |= {f"fastdistil/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    return expected


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    assert members(wheel) == expected_members()
    assert "fastdistil/kernels/distill.py" in members(wheel)
    assert "fastdistil/profiling/device.py" in members(wheel)


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        (entries,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert f"Version: {fastdistil.__version__}\n" in archive.read(metadata).decode()
        assert "fastdistil = fastdistil.cli:main" in archive.read(entries).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_installed_wheel_imports_from_its_place(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = ("install", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", "--target", target)
    run(sys.executable, "-m", "pip", *install, wheel, cwd=tmp_path)
    code = (
        "import fastdistil, fastdistil.kernels.distill as kernel, fastdistil.profiling.device as device;"
        "print(fastdistil.__file__, kernel.__file__, device.__file__, sep='\\n')"
    )
    # -P and a path of its own: the checkout that this test runs from must not answer.
    script = f"import sys; sys.path.insert(0, {str(target)!r}); {code}"
    for file in run(sys.executable, "-P", "-c", script, cwd=tmp_path).split("\n")[:-1]:
        assert Path(file).is_relative_to(target)


def test_source_distribution_builds_the_same_wheel(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    build = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    archive = tmp_path / run(sys.executable, "-c", build, tmp_path, cwd=checkout).splitlines()[-1]
    (tmp_path / "wheel").mkdir()
    assert members(build_wheel(archive, tmp_path / "wheel")) == members(wheel)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def names(requirements: Sequence[str]) -> set[str]:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    required = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    assert names(required) <= set(pinned)
    for text in required:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text
    assert pins()["torch"] == "2.13.0", "without a local suffix: CPU and CUDA builds must both satisfy it"


def test_doctor_judges_by_the_declared_versions() -> None:
    from packaging.requirements import Requirement

    from fastdistil.install.doctor import TESTED

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {(r := Requirement(text)).name: r.specifier for text in project["dependencies"]}
    for name, (lowest, highest) in TESTED.items():
        assert str(bounds[name]).split(",")[-1].removeprefix(">=") == ".".join(map(str, lowest))
        assert pins()[name].startswith(".".join(map(str, highest)) + ".")
