"""A request to stop is honoured in the warm-up, in sampling and by the clock."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.checkpoint import list_checkpoints, step_of
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, rows, status, tiny_config
from tests.helpers.steps import before_each_step
from train import loop
from train.config import Config, SampleConfig
from train.evals import samples
from train.main import run
from train.metrics.meters import Startup
from train.processes import stop_requests
from train.processes.group import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


def test_a_run_stops_when_its_time_is_over_and_continues_at_the_next_start(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock on which a step takes 10 s."""
    config = replace(tiny_config(tiny_data, tmp_path / "run", steps=100_000), stop_after="1m5s")
    clock = [time.perf_counter()]
    now = SimpleNamespace(monotonic=lambda: clock[-1], perf_counter=lambda: clock[-1])
    monkeypatch.setattr(stop_requests, "time", now)
    for attempt in (1, 2):
        with before_each_step(lambda _: clock.append(clock[-1] + 10)):
            run(config, ALONE, Startup(clock[-1]))
        # The time is over in the seventh step; the host reads that one step later.
        expected = {"state": "stopped", "step": 8 * attempt, "reason": "--stop-after 1m5s", "attempt": attempt}
        assert status(tmp_path / "run") == expected
        assert step_of(list_checkpoints(tmp_path / "run")[-1]) == 8 * attempt


def stop_in_warm_up(group: ProcessGroup, config: Config) -> int:
    """Train; the last rank gets SIGUSR1 in the first pass of the warm-up. Return the number of passes."""
    accumulate, num_passes = loop.accumulate_gradients, [0]

    def signalled(*args: Any) -> Any:
        num_passes[0] += 1
        if num_passes[0] == 1 and group.rank == group.world - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return accumulate(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", signalled)
        run(config, group)
    return num_passes[0]


def test_a_stop_in_the_warm_up_trains_nothing(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", steps=5)
    assert run_on_ranks(2, stop_in_warm_up, config) == [1, 1]
    assert status(tmp_path / "run") == {"state": "stopped", "step": 0, "reason": "SIGUSR1", "attempt": 1}
    assert rows(tmp_path / "run") == [] and list_checkpoints(tmp_path / "run") == []


def stop_in_sampling(group: ProcessGroup, interrupted: Config, whole: Config) -> int:
    """Train; stop the last rank at the fifth token; continue; train a whole run. Return the number of tokens drawn."""
    generate, drawn = samples.generate_rows, []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        for row in generate(*args, **kwargs):
            drawn.append(row)
            if len(drawn) == 5 and group.rank == group.world - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "generate_rows", signalled)
        run(interrupted, group)
    if group.is_main:
        ended = status(interrupted.directory)
        assert (ended["state"], ended["step"], ended["reason"]) == ("stopped", 10, "SIGTERM"), ended
        assert not (interrupted.directory / "samples.jsonl").exists()
    run(interrupted, group)
    run(whole, group)
    return len(drawn)


def test_a_stop_in_sampling_leaves_the_sample_to_the_next_start(tiny_data: Path, tmp_path: Path) -> None:
    sample = SampleConfig(every=10, prompts=("The ",), tokens=40)
    interrupted, whole = (
        replace(tiny_config(tiny_data, tmp_path / name, steps=10), sample=sample) for name in ("interrupted", "whole")
    )
    assert run_on_ranks(2, stop_in_sampling, interrupted, whole) == [5, 5]
    assert status(tmp_path / "interrupted")["state"] == "done"
    assert curve(tmp_path / "interrupted") == curve(tmp_path / "whole")
    assert_same_tensors(final_tensors(tmp_path / "interrupted"), final_tensors(tmp_path / "whole"))
    both = [(tmp_path / name / "samples.jsonl").read_text() for name in ("interrupted", "whole")]
    assert both[0] == both[1] and both[0].count("\n") == 1


def sample_differently(group: ProcessGroup, config: Config) -> None:
    """Train; rank 1 draws other tokens, as other rounding may cause, and its samples end with them."""
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
    config = replace(tiny_config(tiny_data, tmp_path / "run", steps=10), sample=sample)
    run_on_ranks(2, sample_differently, config)
    assert status(tmp_path / "run")["state"] == "done"
    assert (tmp_path / "run" / "samples.jsonl").read_text().count("\n") == 2


def test_two_signals_are_one_stop_and_the_handlers_come_back(tiny_data: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def send() -> None:
        path = tmp_path / "run" / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < 10:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    run(tiny_config(tiny_data, tmp_path / "run", steps=2000), ALONE)
    sender.join()
    ended = status(tmp_path / "run")
    assert ended["state"] == "stopped" and ended["reason"] in ("SIGHUP", "SIGTERM")
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step_{ended['step']:08d}"
    assert signal.getsignal(signal.SIGTERM) is before
