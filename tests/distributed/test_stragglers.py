"""A slow rank is named in the log after two checks in a row."""

import itertools
import socket
from dataclasses import replace
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
    """Train with a clock that advances with every reading, more on rank 2: a busy machine changes nothing."""
    stragglers.STEPS_BETWEEN_CHECKS = 5
    readings = itertools.count(step=0.3 if group.rank == 2 else 0.1)
    stragglers.time = SimpleNamespace(perf_counter=lambda: float(next(readings)))  # type: ignore[assignment]
    run(config, group)


@pytest.mark.parametrize(("mode", "num_pieces"), [("ddp", 1), ("fsdp", 2)])
def test_only_the_slow_rank_is_named(
    tiny_data: Path, tmp_path: Path, mode: Literal["ddp", "fsdp"], num_pieces: int
) -> None:
    """A rank's own time consists of `num_pieces` pieces, each as long as one reading of the clock."""
    config = tiny_config(tiny_data, tmp_path / "run", steps=11)
    config = replace(config, validate=replace(config.validate, every=None))
    config = replace(config, parallel=replace(config.parallel, mode=mode))
    run_on_ranks(3, train_with_rank_2_slow, config)
    warnings = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "is slow" in line]
    assert warnings == [
        f"warning: rank 2 on {socket.gethostname()} is slow: its own part of a step takes {num_pieces * 0.3:.3f} s, "
        f"the others' median {num_pieces * 0.1:.3f} s"
    ]


def test_a_slow_rank_is_named_at_the_second_check_and_again_only_after_it_recovered() -> None:
    warnings: list[str] = []
    watched = Stragglers(ProcessGroup(0, 4, torch.device("cpu")), ["a", "a", "b", "b"], warnings.append)
    fine, slow = [0.150, 0.140, 0.160, 0.150], [0.150, 0.140, 0.160, 0.300]
    counts = []
    for seconds in (fine, slow, fine, slow, slow, slow, fine, slow, slow):
        watched._check(seconds)
        counts.append(len(warnings))
    assert counts == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert warnings[0].startswith("warning: rank 3 on b is slow")


def test_slow_is_more_than_one_and_a_half_times_the_median_of_the_others() -> None:
    assert slow_ranks([1.0, 1.4, 1.4, 1.4]) == set()
    assert slow_ranks([1.0, 1.0, 1.6, 1.0]) == {2}
    assert slow_ranks([1.0, 1.6]) == {1}
    assert slow_ranks([5.0, 5.0, 1.0, 1.0]) == {0, 1}, "the slow one of two nodes"


def test_a_warm_up_is_no_step_and_one_process_measures_nothing() -> None:
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
