"""The benchmark of attention, in small: what it prints, what it leaves out, what it counts."""

import json

import pytest
import torch

from benchmarks import bench_attention
from benchmarks.bench_attention import KINDS, Options, main, measure
from tests.helpers.runs import called

SMALL = ["--seq-lens", "16", "64", "--num-heads", "2", "--head-size", "8", "--rounds", "2"]


def test_a_length_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "free_bytes", lambda device: 50_000)
    done = called(main, *SMALL)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and "naive left out" not in lines[1] and lines[2].endswith("its scores do not fit")
    found = json.loads(lines[-1])
    assert list(found["seq_lens"]["16"]) == ["naive", "sdpa"] and list(found["seq_lens"]["64"]) == ["sdpa"]


@pytest.mark.slow
def test_written_out_attention_takes_the_square_of_the_length() -> None:
    options = Options(num_heads=2, head_size=8, rounds=2)
    short, long = (measure(options, T, list(KINDS), torch.device("cpu")) for T in (256, 512))
    scores = 2 * 512**2 * 4
    assert 3 * scores <= long["naive"]["peak_bytes"] <= 5 * scores
    assert 3.5 <= long["naive"]["peak_bytes"] / short["naive"]["peak_bytes"] <= 4.1
    assert long["sdpa"]["peak_bytes"] < scores
    assert long["naive"]["seconds"] > 0 and long["sdpa"]["least_seconds"] <= long["sdpa"]["seconds"]


def test_bad_input_is_one_line() -> None:
    done = called(main, "--batch", "0")
    assert done.returncode == 2 and done.stderr == "bench_attention: --batch 0 must be at least 1\n"
