"""--train.diverged-above ends a run on every rank after two rows above it, and not after one."""

import itertools
from dataclasses import replace
from pathlib import Path

import torch

from launch.requeue import NEEDS_A_PERSON
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import rows, status, tiny_config
from train.guards.nonfinite import DivergedError
from train.main import run
from train.processes.group import ProcessGroup


def train_at_a_high_rate(group: ProcessGroup, data: Path, run_dir: Path) -> str:
    config = tiny_config(data, run_dir, diverged_above=3.3)
    config = replace(config, optim=replace(config.optim, lr_peak=30.0, clip_norm=None))
    try:
        run(config, group)
    except DivergedError as error:
        return str(error)
    return "learned"


def test_a_run_that_diverges_ends_as_failed_on_every_rank(tiny_data: Path, tmp_path: Path) -> None:
    messages = run_on_ranks(2, train_at_a_high_rate, tiny_data, tmp_path / "run")
    assert messages[0] == messages[1]
    assert "is above --train.diverged-above 3.3, as in the row before" in messages[0]
    above = [row["loss"] > 3.3 for row in rows(tmp_path / "run") if "loss" in row]
    assert above[-2:] == [True, True] or above[-3:-1] == [True, True]  # one more step is under way when it is read
    assert not any(first and second for first, second in itertools.pairwise(above[:-2]))
    ended = status(tmp_path / "run")
    assert ended["state"] == "failed" and ended["step"] % 10 == 0, "what diverged is not saved"
    assert ended["reason"].startswith("DivergedError") and ended["reason"].startswith(NEEDS_A_PERSON)


def test_one_row_above_the_limit_is_a_bad_batch(tiny_data: Path, tmp_path: Path) -> None:
    """The first loss is ln 33 = 3.5, for 33 characters; the losses after it are lower."""
    config = tiny_config(tiny_data, tmp_path / "run", steps=4, diverged_above=3.49)
    run(config, ProcessGroup(0, 1, torch.device("cpu")))
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[0] > 3.49 > losses[1] and status(tmp_path / "run")["state"] == "done"
