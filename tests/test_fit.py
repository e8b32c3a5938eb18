"""The largest micro-batch that fits: the search on a model of memory, what is kept, and what a CPU is told."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from data_prep.errors import InputError
from model.gpt import build_model
from tests.runs import tiny_config
from train.config import Config
from train.fit import divisors, find_micro_batch, largest_that_fits, recorded_micro_batch
from train.losses import Objective
from train.mesh import Mesh

SIZES = divisors(512)


class Memory:
    """`fixed` bytes and `per_window` for each window, on a device that has `capacity`."""

    def __init__(self, fixed: int, per_window: float, capacity: int) -> None:
        self.fixed, self.per_window, self.capacity = fixed, per_window, capacity
        self.tried: list[int] = []

    def measure(self, windows: int) -> int | None:
        self.tried.append(windows)
        peak = int(self.fixed + self.per_window * windows)
        return peak if peak <= self.capacity else None


@pytest.mark.parametrize(
    ("per_window", "expected"),
    [(0, 512), (1, 512), (10, 64), (15.5, 32), (120, 4), (300, 2), (400, 2), (500, 1), (819, 1)],
)
def test_the_largest_share_within_the_budget(per_window: float, expected: int) -> None:
    memory = Memory(fixed=100, per_window=per_window, capacity=1000)
    assert largest_that_fits(SIZES, memory.measure, budget=920) == expected
    assert len(memory.tried) <= 3, "a trial costs a compilation"


def test_one_that_was_thought_to_fit_and_does_not_is_passed_over() -> None:
    """A jump at 17 windows, as when a kernel takes another workspace."""

    def measure(windows: int) -> int | None:
        return 100 + 10 * windows + (10_000 if windows > 16 else 0)

    assert largest_that_fits(SIZES, measure, budget=920) == 16


def test_not_even_one_window() -> None:
    with pytest.raises(InputError, match=r"not even --train.micro-batch 1 fits .* --train.activation-checkpointing"):
        largest_that_fits(SIZES, lambda windows: None, budget=920)


def automatic(data: Path, run_dir: Path) -> Config:
    config = tiny_config(data, run_dir)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch="auto"))


@pytest.mark.parametrize(("recorded", "world", "expected"), [(4, 1, 4), (4, 2, 3), (12, 3, 4), (1, 4, 1)])
def test_what_was_found_is_kept_or_fitted_to_another_world(
    tiny_data: Path, tmp_path: Path, recorded: int, world: int, expected: int
) -> None:
    saved = {"config": {"train": {"micro_batch": recorded}}, "data": ""}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert recorded_micro_batch(automatic(tiny_data, tmp_path), world).train.micro_batch == expected


def test_nothing_is_kept_of_a_run_that_found_nothing(tiny_data: Path, tmp_path: Path) -> None:
    config = automatic(tiny_data, tmp_path)
    assert recorded_micro_batch(config, 1) == config
    for text in ('{"config": {"train": {"micro_batch": "auto"}}}', "{", "[]"):
        (tmp_path / "config.json").write_text(text)
        assert recorded_micro_batch(config, 1) == config


def test_a_number_on_the_command_line_wins(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"config": {"train": {"micro_batch": 4}}}')
    assert recorded_micro_batch(tiny_config(tiny_data, tmp_path), 1).train.micro_batch == 6


def test_a_cpu_cannot(tiny_data: Path, tmp_path: Path) -> None:
    config = automatic(tiny_data, tmp_path)
    objective = Objective(build_model(config.model, seed=1), chunked=False)
    with pytest.raises(InputError, match="give a number on a CPU"):
        find_micro_batch(config, objective, Mesh(0, 1, torch.device("cpu")))
