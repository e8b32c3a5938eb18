"""A request to stop is honoured wherever it comes: before the first step, in sampling, when the time is over."""

import dataclasses
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import InputError
from model.checkpoint import list_checkpoints, step_of
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, rows, status, tiny_config
from train import loop
from train.config import Config, SampleConfig
from train.config_checks import faults_of, parse_duration
from train.evals import samples
from train.main import run
from train.metrics.meters import Startup
from train.processes import stop_requests
from train.processes.group import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13_800), ("90m", 5400), ("1d12h", 129_600), ("45s", 45), ("1d2h3m4s", 93_784), ("0h5s", 5)],
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "50m3h", "3.5h", "2 h", "10", "-5m", "3h 50m", "1w"])
def test_what_is_no_duration(text: str, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a duration; write it like 3h50m"):
        parse_duration(text)
    config = dataclasses.replace(tiny_config(tiny_data, tmp_path), stop_after=text)
    assert faults_of(config) == [f"--stop-after {text} is not a duration; write it like 3h50m, 90m, 1d12h or 45s"]


def test_a_run_stops_when_its_time_is_over_and_goes_on_at_the_next_start(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock on which a step takes 10 s."""
    config = dataclasses.replace(tiny_config(tiny_data, tmp_path / "run", steps=100_000), stop_after="1m5s")
    take_step, clock = loop.take_step, [time.perf_counter()]

    def ticking(this: loop.Run) -> loop.StepResult:
        clock[0] += 10
        return take_step(this)

    monkeypatch.setattr(loop, "take_step", ticking)
    monkeypatch.setattr(
        stop_requests, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: clock[0])
    )
    for attempt in (1, 2):
        run(config, ALONE, Startup(clock[0]))
        # The seventh step knows that the time is over; the host hears it one step later.
        found = {"state": "stopped", "step": 8 * attempt, "reason": "--stop-after 1m5s", "attempt": attempt}
        assert status(tmp_path / "run") == found
        assert step_of(list_checkpoints(tmp_path / "run")[-1]) == 8 * attempt


def hear_in_warm_up(group: ProcessGroup, config: Config) -> int:
    """One rank hears SIGUSR1 in the first pass of the warm-up; how many passes there were."""
    reduce_gradients, calls = loop.accumulate_gradients, []

    def hearing(*args: Any) -> Any:
        calls.append(group.rank)
        if len(calls) == 1 and group.rank == group.world - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return reduce_gradients(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", hearing)
        run(config, group)
    return len(calls)


@pytest.mark.parametrize("world", [1, 2])
def test_a_stop_in_warm_up_and_compilation_trains_nothing(tiny_data: Path, tmp_path: Path, world: int) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", steps=5)
    assert run_on_ranks(world, hear_in_warm_up, config) == [1] * world
    assert status(tmp_path / "run") == {"state": "stopped", "step": 0, "reason": "SIGUSR1", "attempt": 1}
    assert rows(tmp_path / "run") == [] and list_checkpoints(tmp_path / "run") == []


def hear_in_sampling(group: ProcessGroup, interrupted: Config, whole: Config) -> int:
    """One rank hears SIGTERM at the fifth token; then to the end; then a run that heard nothing. Tokens until then."""
    generate, drawn = samples.generate_rows, []

    def hearing(*args: Any, **kwargs: Any) -> Any:
        for row in generate(*args, **kwargs):
            drawn.append(row)
            if len(drawn) == 5 and group.rank == group.world - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "generate_rows", hearing)
        run(interrupted, group)
    if group.is_main:
        found = status(interrupted.directory)
        assert (found["state"], found["step"], found["reason"]) == ("stopped", 10, "SIGTERM"), found
        assert not (interrupted.directory / "samples.jsonl").exists()
    run(interrupted, group)
    run(whole, group)
    return len(drawn)


@pytest.mark.parametrize("world", [1, 2])
def test_a_stop_in_sampling_leaves_the_sample_to_the_next_start(tiny_data: Path, tmp_path: Path, world: int) -> None:
    sample = SampleConfig(every=10, prompts=("The ",), tokens=40)
    interrupted, whole = (
        dataclasses.replace(tiny_config(tiny_data, tmp_path / name, steps=10), sample=sample)
        for name in ("interrupted", "whole")
    )
    assert run_on_ranks(world, hear_in_sampling, interrupted, whole) == [5] * world
    assert status(tmp_path / "interrupted")["state"] == "done"
    assert curve(tmp_path / "interrupted") == curve(tmp_path / "whole")
    assert_same_tensors(final_tensors(tmp_path / "interrupted"), final_tensors(tmp_path / "whole"))
    both = [(tmp_path / name / "samples.jsonl").read_text() for name in ("interrupted", "whole")]
    assert both[0] == both[1] and both[0].count("\n") == 1


def sample_unequally(group: ProcessGroup, config: Config) -> None:
    """Rank 1 draws other tokens, as another rounding of its logits may have it; its samples end with them."""
    generate = samples.generate_rows

    def differing(*args: Any, **kwargs: Any) -> Any:
        for number, row in enumerate(generate(*args, **kwargs)):
            yield [0 for _ in row] if group.rank == 1 and number == 3 else row

    def until_end(sampler: samples.Sampler, tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(0)] if group.rank == 1 else tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "generate_rows", differing)
        patch.setattr(samples.Sampler, "_until_end", until_end)
        run(config, group)


def test_ranks_that_draw_different_samples_do_not_wait_for_each_other(tiny_data: Path, tmp_path: Path) -> None:
    sample = SampleConfig(every=5, prompts=("The ",), tokens=10)
    config = dataclasses.replace(tiny_config(tiny_data, tmp_path / "run", steps=10), sample=sample)
    run_on_ranks(2, sample_unequally, config)
    assert status(tmp_path / "run")["state"] == "done"
    assert (tmp_path / "run" / "samples.jsonl").read_text().count("\n") == 2
