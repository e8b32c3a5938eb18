"""A rank whose own part of a step takes long is named, once, after two looks."""

import dataclasses
import itertools
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import tiny_config
from train.config import Config
from train.guards import stragglers
from train.guards.stragglers import Stragglers, slow_ranks
from train.main import run
from train.processes.group import ProcessGroup


def train_with_rank_2_slow(group: ProcessGroup, config: Config) -> None:
    """By a clock of its own, on which every reading is later by as much: a busy machine changes nothing."""
    stragglers.STEPS_BETWEEN_CHECKS = 5
    readings = itertools.count(step=0.3 if group.rank == 2 else 0.1)
    stragglers.time = SimpleNamespace(perf_counter=lambda: float(next(readings)))  # type: ignore[assignment]
    run(config, group)


@pytest.mark.parametrize(("mode", "factor"), [("ddp", 1), ("fsdp", 2)])
def test_the_slow_rank_is_named_in_the_log_and_no_other(
    tiny_data: Path, tmp_path: Path, mode: Literal["ddp", "fsdp"], factor: int
) -> None:
    """`factor`: pieces that a rank's own part of a step is made of, each as long as one reading of that clock."""
    config = tiny_config(tiny_data, tmp_path / "run", steps=11)
    config = dataclasses.replace(config, validate=dataclasses.replace(config.validate, every=None))
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, mode=mode))
    run_on_ranks(3, train_with_rank_2_slow, config)
    warnings = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "is slow" in line]
    assert warnings == [
        f"warning: rank 2 on {socket.gethostname()} is slow: its own part of a step takes {factor * 0.3:.3f} s, "
        f"the others' median {factor * 0.1:.3f} s"
    ]


def test_a_rank_is_said_to_be_slow_at_the_second_look_and_again_only_after_it_was_fine() -> None:
    said: list[str] = []
    looking = Stragglers(ProcessGroup(0, 4, torch.device("cpu")), ["a", "a", "b", "b"], said.append)
    fine, slow = [0.150, 0.140, 0.160, 0.150], [0.150, 0.140, 0.160, 0.300]
    lines = []
    for seconds in (fine, slow, fine, slow, slow, slow, slow, fine, slow, slow):
        before = len(said)
        looking._check(seconds)
        lines.append(len(said) - before)
    assert lines == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert set(said) == {
        "warning: rank 3 on b is slow: its own part of a step takes 0.300 s, the others' median 0.150 s"
    }


def test_slow_is_more_than_half_again_the_median_of_the_others() -> None:
    assert slow_ranks([1.0, 1.4, 1.4, 1.4]) == set()
    assert slow_ranks([1.0, 1.0, 1.6, 1.0]) == {2}
    assert slow_ranks([1.0, 1.6]) == {1}
    assert slow_ranks([5.0, 5.0, 1.0, 1.0]) == {0, 1}, "of two nodes the slow one"


def test_a_warm_up_is_no_step_and_a_world_of_one_measures_nothing() -> None:
    alone = Stragglers(ProcessGroup(0, 1, torch.device("cpu")), ["a"], print)
    alone.begin_step()
    alone.end_step()
    alone.record(100)
    many = Stragglers(ProcessGroup(0, 2, torch.device("cpu")), ["a", "b"], print)
    many.end_step()
    many.begin_step()
    many.end_step()
    many.record(1)
    assert not many._unread and many._num_steps == 1
