"""Run directories that the tests of the report read."""

from pathlib import Path

import pytest

from tests.event_streams import Stream, write_events, write_run
from tests.profiling.known_run import RECIPE, known_events


@pytest.fixture
def known_run(tmp_path: Path) -> Path:
    """Write the run whose figures are known."""
    return write_events(tmp_path / "known", known_events(), RECIPE)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a run of every kind; by name."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "gpu": write_run(folder / "gpu"),
        "faster": write_run(folder / "faster", Stream(speed=1.25, ranks=4, seed=3), {"optim": {"lr": 1e-4}}),
        "cpu": write_run(folder / "cpu", Stream(gpu=False, ranks=1, lines=12)),
        "old": write_run(folder / "old", Stream(old=True)),
        "short": write_run(folder / "short", Stream(lines=1, every=1, outcome=None)),
        "empty": write_events(folder / "empty", []),
    }
