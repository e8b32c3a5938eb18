"""A grid of flags becomes runs that train/main.py understands."""

import subprocess
from pathlib import Path

import pytest

from common.errors import InputError
from launch import grid
from launch.grid import expand_grid, find_run_dir, split_at_dashes
from tests.helpers.runs import called
from train.command_line import parse
from train.presets import PRESETS


def test_every_combination_is_a_run_of_its_own() -> None:
    points = expand_grid("gpt2-small", ["optim.lr-peak=6e-4,1e-3", "seed=1,2"], ["--train.steps", "100"])
    configs = [parse(point.args, PRESETS) for point in points]
    assert [(config.optim.lr_peak, config.seed) for config in configs] == [(6e-4, 1), (6e-4, 2), (1e-3, 1), (1e-3, 2)]
    assert [str(config.directory) for config in configs] == [
        f"runs/gpt2-small-grid/optim.lr-peak={rate},seed={seed}" for rate in ("6e-4", "1e-3") for seed in (1, 2)
    ]
    assert [point.run_dir for point in points] == [config.directory for config in configs]
    assert {(config.train.steps, config.track.group) for config in configs} == {(100, "gpt2-small-grid")}


def test_flags_override_the_group_and_the_grid_overrides_the_flags() -> None:
    flags = ["--track.group", "mine", "--seed=5", "--run-dir=runs/here"]
    config = parse(expand_grid("quickstart", ["seed=1,2"], flags)[0].args, PRESETS)
    assert (config.track.group, config.seed, str(config.directory)) == ("mine", 1, "runs/here/seed=1")


def test_run_directories_are_those_of_the_trainer() -> None:
    assert find_run_dir(["--seed", "1"]) is None
    for flags, expected in (([], "runs/gpt2-small"), (["--run-dir", "runs/a", "--run_dir=runs/b"], "runs/b")):
        (point,) = expand_grid("gpt2-small", [], flags)
        assert point.run_dir == parse(point.args, PRESETS).directory == Path(expected)
    path_values = expand_grid("gpt2-small", ["data.dir=data/a,data/b"], [])
    assert path_values[0].run_dir == Path("runs/gpt2-small-grid/data.dir=data_a"), "a path is one folder"


def test_entries_that_make_no_grid_are_refused() -> None:
    for entry in ("seed", "seed=", "=1,2", "seed=1,,2", "seed=1,1"):
        with pytest.raises(InputError, match=f"--grid {entry}: write FLAG=VALUE,VALUE with different values"):
            expand_grid("gpt2-small", [entry], [])
    with pytest.raises(InputError, match="a flag is given twice; put all its values behind one ="):
        expand_grid("gpt2-small", ["seed=1", "--seed=2"], [])
    with pytest.raises(InputError, match="two values give one folder name; make them differ in more than / and _"):
        expand_grid("gpt2-small", ["data.dir=a/b,a_b"], [])


def test_the_command_lists_runs_and_prints_one_for_a_shell() -> None:
    words = ("quickstart", "--grid", "seed=1,2", "--", "--train.steps", "7")
    assert called(grid.main, *words).stdout == "0  runs/quickstart-grid/seed=1\n1  runs/quickstart-grid/seed=2\n"
    odd = ["--sample.prompts", "two\nlines", "", "'\"`$(touch pwned)\\ * ~ # ;|&", "-x"]
    shell = called(grid.main, words[0], "--point", "1", *words[1:4], *odd).stdout
    script = 'eval "run=($1)"; printf "%s\\0" "${run[@]}"'
    done = subprocess.run(["bash", "-c", script, "-", shell], capture_output=True, text=True, check=True)
    assert tuple(done.stdout.split("\0")[:-1]) == expand_grid("quickstart", ["seed=1,2"], odd)[1].args
    beyond = called(grid.main, words[0], "--point", "2", *words[1:])
    assert (beyond.returncode, beyond.stderr) == (2, "grid: --point 2: the grid has 2 runs; --array=0-1 takes all\n")
    assert split_at_dashes(["a", "--", "b", "--", "c"]) == (["a"], ["b", "--", "c"])
