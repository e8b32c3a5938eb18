"""A grid of flags as runs; and that they are what train/main.py understands."""

from pathlib import Path

import pytest

from common.errors import InputError
from launch import grid
from launch.grid import points_of, run_dir_in, split
from tests.helpers.runs import called
from train.config import parse
from train.presets import PRESETS


def test_every_combination_is_a_run_of_its_own() -> None:
    points = points_of("gpt2-small", ["optim.lr-peak=6e-4,1e-3", "seed=1,2"], ["--train.steps", "100"])
    configs = [parse(point.args, PRESETS) for point in points]
    assert [(config.optim.lr_peak, config.seed) for config in configs] == [(6e-4, 1), (6e-4, 2), (1e-3, 1), (1e-3, 2)]
    assert [str(config.directory) for config in configs] == [
        f"runs/gpt2-small-grid/optim.lr-peak={rate},seed={seed}" for rate in ("6e-4", "1e-3") for seed in (1, 2)
    ]
    assert all(config.directory == point.run_dir for config, point in zip(configs, points, strict=True))
    assert {(config.train.steps, config.track.group) for config in configs} == {(100, "gpt2-small-grid")}


def test_flags_win_over_the_group_and_the_grid_over_the_flags() -> None:
    (point, _) = points_of("quickstart", ["seed=1,2"], ["--track.group", "mine", "--seed=5", "--run-dir=runs/here"])
    config = parse(point.args, PRESETS)
    assert (config.track.group, config.seed, str(config.directory)) == ("mine", 1, "runs/here/seed=1")


def test_without_a_grid_there_is_one_run() -> None:
    (point,) = points_of("gpt2-small", [], [])
    assert point.run_dir == parse(point.args, PRESETS).directory == Path("runs/gpt2-small")
    (point,) = points_of("gpt2-small", [], ["--run-dir", "runs/a", "--run_dir=runs/b"])
    assert point.run_dir == parse(point.args, PRESETS).directory == Path("runs/b")


def test_values_that_are_paths_make_no_folders() -> None:
    (point, _) = points_of("gpt2-small", ["data.dir=data/a,data/b"], [])
    assert point.run_dir == Path("runs/gpt2-small-grid/data.dir=data_a")


@pytest.mark.parametrize("entry", ["seed", "seed=", "=1,2", "seed=1,,2", "seed=1,1"])
def test_what_is_no_axis_is_refused(entry: str) -> None:
    with pytest.raises(InputError, match=f"--grid {entry}: write FLAG=VALUE,VALUE with different values"):
        points_of("gpt2-small", [entry], [])


def test_a_flag_may_not_stand_there_twice() -> None:
    with pytest.raises(InputError, match="a flag stands there twice; put all its values behind one ="):
        points_of("gpt2-small", ["seed=1", "--seed=2"], [])


def test_the_command_lists_runs_and_gives_one_for_a_shell() -> None:
    words = ("quickstart", "--grid", "seed=1,2", "--", "--train.steps", "7")
    assert called(grid.main, *words).stdout == "0  runs/quickstart-grid/seed=1\n1  runs/quickstart-grid/seed=2\n"
    one = called(grid.main, words[0], "--point", "1", *words[1:]).stdout.splitlines()
    assert tuple(one) == points_of("quickstart", ["seed=1,2"], ["--train.steps", "7"])[1].args
    beyond = called(grid.main, words[0], "--point", "2", *words[1:])
    assert (beyond.returncode, beyond.stderr) == (2, "grid: --point 2: the grid has 2; --array=0-1 takes all\n")


def test_helpers() -> None:
    assert split(["a", "--", "b", "--", "c"]) == (["a"], ["b", "--", "c"])
    assert split(["a"]) == (["a"], [])
    assert run_dir_in(["--seed", "1"]) is None
