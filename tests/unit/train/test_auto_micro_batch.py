"""The largest micro-batch that fits: the search on a model of memory, when its result is reused, and CPUs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from data_prep.manifest import read_manifest
from tests.helpers.runs import tiny_config
from train.config import Config, with_vocabulary
from train.data import divisors
from train.main import run
from train.parallel.auto_micro_batch import kept_micro_batch, largest_that_fits
from train.processes.group import ProcessGroup
from train.run.directory import RunDirectory

ALONE = ProcessGroup(0, 1, torch.device("cpu"))
SIZES = divisors(512)


class Memory:
    """A device with 1000 bytes on which a step takes 100 bytes and `per_sequence` more for each sequence."""

    def __init__(self, per_sequence: float) -> None:
        self.per_sequence = per_sequence
        self.tried: list[int] = []

    def measure(self, sequences: int) -> int | None:
        self.tried.append(sequences)
        peak = int(100 + self.per_sequence * sequences)
        return peak if peak <= 1000 else None


@pytest.mark.parametrize(
    ("per_sequence", "expected"),
    [(0, 512), (1, 512), (10, 64), (15.5, 32), (120, 4), (300, 2), (400, 2), (500, 1), (819, 1)],
)
def test_the_largest_share_within_the_budget(per_sequence: float, expected: int) -> None:
    memory = Memory(per_sequence)
    assert largest_that_fits(SIZES, memory.measure, budget=920) == expected
    assert len(memory.tried) <= 3, "a trial costs a compilation"


def test_a_size_that_unexpectedly_does_not_fit_is_passed_over() -> None:
    """Memory jumps at 17 sequences, as when a kernel takes another workspace."""

    def measure(sequences: int) -> int | None:
        return 100 + 10 * sequences + (10_000 if sequences > 16 else 0)

    assert largest_that_fits(SIZES, measure, budget=920) == 16


def test_a_sharded_model_tries_nothing_that_might_not_fit() -> None:
    """If one rank ran out of memory, the others would wait for it."""

    def measure(sequences: int) -> int | None:
        assert 100 + 500 * sequences <= 1000, "ran out of memory"
        return 100 + 500 * sequences

    assert largest_that_fits(SIZES, measure, budget=920, may_fail=False) == 1
    assert largest_that_fits(SIZES, Memory(per_sequence=10).measure, budget=920, may_fail=False) == 64


def test_an_error_if_not_even_one_sequence_fits() -> None:
    with pytest.raises(InputError, match=r"not even --train.micro-batch 1 fits .* --train.activation-checkpointing"):
        largest_that_fits(SIZES, lambda sequences: None, budget=920)


def test_a_result_is_reused_only_under_the_same_conditions() -> None:
    conditions = {"device": "NVIDIA H200", "loss": "plain"}
    assert kept_micro_batch({"micro_batch": 32, "conditions": conditions}, dict(conditions)) == 32
    assert kept_micro_batch({"micro_batch": 32, "conditions": conditions}, conditions | {"loss": "chunked"}) is None
    assert kept_micro_batch({}, conditions) is None


def test_config_json_keeps_the_result(tiny_data: Path, tmp_path: Path) -> None:
    """A resumed run keeps it, also with other settings that may change. A new run in the directory does not."""
    result = {"micro_batch": 3, "conditions": {"device": "NVIDIA H200"}}
    config = tiny_config(tiny_data, tmp_path / "run", steps=5)
    with RunDirectory(config, read_manifest(tiny_data).fingerprint, ALONE) as directory:
        directory.record(result)
    run(config, ALONE)  # there is no checkpoint, so this is a new run
    assert found_in(config) == {}
    with RunDirectory(with_vocabulary(config, 33), read_manifest(tiny_data).fingerprint, ALONE) as directory:
        directory.record(result)
    run(dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=4)), ALONE)
    assert found_in(config) == result


def found_in(config: Config) -> Any:
    return json.loads((config.directory / "config.json").read_text())["found"]


def test_a_cpu_needs_a_number(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", micro_batch="auto")
    with pytest.raises(InputError, match="give a number on a CPU"):
        run(config, ALONE)
