"""Sweeps that train in the test's own process and are interrupted once."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launch import submit
from launch.grid import Point
from launch.options import Options
from tests.helpers.runs import called
from train import main as trainer

Interrupt = Callable[[int | None], list[str]]


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[str]]:
    """Train in this process, with one Ctrl-C after a number of runs; the function returns the names of the runs."""

    def set_up(num_runs: int | None) -> list[str]:
        trained: list[str] = []

        def train_here(options: Options, base: Path, code: Path, points: Sequence[Point]) -> None:
            for point in points:
                if len(trained) == num_runs:
                    trained.append("interrupt")
                    raise KeyboardInterrupt
                trained.append(point.run_dir.name)
                assert called(trainer.main, *point.args).returncode in (0, 2)

        monkeypatch.setattr(submit, "train_here", train_here)
        return trained

    return set_up
