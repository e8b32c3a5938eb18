"""The benchmark of generation at a tiny size: who takes part, that all give the same tokens, and the bytes per step."""

import json

from benchmarks.bench_generate import main, step_bytes
from model.config import ModelConfig
from model.gpt import build_model
from tests.helpers.runs import called

SMALL = ["--num-layers", "2", "--num-heads", "2", "--width", "32", "--vocab-size", "100", "--prefill-tokens", "8"]


def test_all_generators_give_the_same_tokens() -> None:
    done = called(main, *SMALL, "--tokens", "20", "--block", "10", "--batches", "2", "1")
    assert done.returncode == 0, done.stderr
    batches = json.loads(done.stdout.splitlines()[-1])["batches"]
    runs = {
        size: {name: run for name, run in batch.items() if isinstance(run, dict)} for size, batch in batches.items()
    }
    assert {size: list(names) for size, names in runs.items()} == {
        **{"2": ["cached", "transformers", "whole"], "1": ["cached", "transformers"]}
    }
    for size, batch in batches.items():
        assert all(run["same_tokens"] and run["slower"] > 0 for run in runs[size].values())
        assert batch["triad_gb_per_second"] > 0 and batch["prefill_ms"] > 0


def test_the_bytes_of_a_step_are_those_of_its_matrices_and_keys_and_values() -> None:
    model = build_model(ModelConfig(2, 2, 32, vocab_size=100, vocab_multiple=1, context_len=64, norm="none"), seed=1)
    biases = 2 * (3 + 1 + 4 + 1) * 32
    assert step_bytes(model, 0, 1) == 4 * (2 * 12 * 32**2 + biases + 100 * 32)
    assert step_bytes(model, 10, 3) - step_bytes(model, 0, 3) == 3 * 10 * 2 * 2 * 32 * 4


def test_bad_input_is_one_line() -> None:
    for args, message in (
        (["--batches", "0"], "--batches 0: give sizes of at least 1"),
        (["--tokens", "2000"], "2018 tokens exceed the model's context of 1024; lower --tokens"),
        (["--tokens", "10"], "--tokens 10 must be at least --block 50"),
        (["--num-heads", "5"], "--width 32 is not divisible by --num-heads 5"),
    ):
        done = called(main, *SMALL, *args)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
