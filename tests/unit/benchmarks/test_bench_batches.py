"""The benchmark of the data reader: its counts add up, and what it says of the cache is what the kernel says."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_batches import (
    START_LINES,
    Options,
    Reading,
    Round,
    bring_into_cache,
    check,
    cold_steps,
    drop_from_cache,
    name_of_state,
    read_around_kb,
    read_for,
    resident_share,
    shard_paths,
    summary,
    write_random_shards,
)
from common.errors import InputError
from data_prep.shards import open_shard

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    write_random_shards(tmp_path, 2_000_000)
    return shard_paths(tmp_path)


@pytest.mark.long(reason="a script of nobody's training, end to end; its parts are tested below")
def test_the_script_at_a_tiny_size() -> None:
    sizes = ["--gigabytes", "0.002", "--seq-len", "64", "--sequences", "12", "--seconds", "0.05", "--rounds", "2"]
    command = [sys.executable, "benchmarks/bench_batches.py", *sizes, "--readers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    told = json.loads(lines[-1])
    assert (told["seq_len"], told["sequences_per_step"], told["rounds"], told["shards"]) == (64, 12, 2, 1)
    assert told["data_bytes"] == 2_000_000 + 1024
    assert [(case["asked"], case["readers"]) for case in told["cases"]] == [("cold", 2), ("warm", 2)]
    for case in told["cases"]:
        assert case["sequences_per_reader_step"] * case["readers"] == 12
        assert [len(steps) for steps in case["steps"]] == [case["readers"]] * 2
        assert case["sequences"] == [sum(steps) * case["sequences_per_reader_step"] for steps in case["steps"]]
        rate = case["sequences_per_second"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert case["tokens_per_second"]["median"] == pytest.approx(rate["median"] * 64, rel=0.01)
        assert case["megabytes_per_second"]["median"] == pytest.approx(rate["median"] * 65 * 2 / 1e6, abs=0.06)
        if case["cache"] == "cold":
            assert case["asked"] == "cold" and case["resident_before"]["high"] <= 0.05
        if case["asked"] == "warm":
            assert case["cache"] == "warm" and case["resident_before"]["low"] >= 0.9
    warned = any("warning: the cache" in line for line in lines)
    assert warned == any(case["cache"] != case["asked"] for case in told["cases"])


def test_random_shards_are_shards(shards: list[Path]) -> None:
    shard = open_shard(shards[0])
    assert len(shard.tokens) == 1_000_000
    assert 50_000 < int(shard.tokens.max()) < shard.vocab_size == 50_257


def test_what_is_read_is_resident_and_what_is_dropped_is_not(shards: list[Path]) -> None:
    bring_into_cache(shards)
    assert resident_share(shards) == 1.0
    drop_from_cache(shards)
    kept = resident_share(shards)
    assert kept in (0.0, 1.0)  # 1.0: a file system that has no other place for them
    with shards[0].open("rb") as file:
        os.pread(file.fileno(), 1, 0)
    assert resident_share(shards) >= max(kept, 1 / 489)


def test_a_reader_stops_at_its_time_or_its_steps(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(START_LINES, 2, multiprocessing.get_context("spawn").Barrier(1))
    options = Options(seq_len=64, sequences=12, seconds=0.05)
    timed = read_for(shards, options, readers=2, rank=1, first_step=5, max_steps=None)
    counted = read_for(shards, options, readers=2, rank=1, first_step=5, max_steps=3)
    assert timed.steps > 3 and timed.seconds >= 0.05
    assert counted.steps == 3


def test_a_cold_round_is_short_enough_to_stay_cold(shards: list[Path]) -> None:
    around = read_around_kb(shards[0])
    assert around >= 0
    assert cold_steps(shards, Options(sequences=10**9)) == 1
    assert cold_steps(shards, Options(sequences=1)) == max(1, int(0.25 * 2_001_024 / (max(1, around) * 1024)))


def test_rates_are_summed_over_readers_and_the_state_is_the_kernels() -> None:
    options = Options(seq_len=100, sequences=12)
    rounds = [
        Round((Reading(10, 2.0), Reading(5, 0.5)), resident_before=0.0, resident_after=0.3),
        Round((Reading(10, 1.0), Reading(10, 1.0)), resident_before=0.02, resident_after=0.3),
    ]
    case = summary("cold", 2, rounds, options)
    assert case["sequences"] == [15 * 6, 20 * 6]
    assert case["sequences_per_second"] == {"median": 105.0, "low": 90.0, "high": 120.0}
    assert case["tokens_per_second"] == {"median": 10_500.0, "low": 9_000.0, "high": 12_000.0}
    assert case["cache"] == "cold"
    assert name_of_state([Round((), 1.0, 1.0)]) == "warm"
    assert name_of_state([Round((), 0.0, 1.0), Round((), 0.5, 1.0)]) == "partly cached"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(sequences=64), "--sequences 64 is not divisible by --readers 3"),
        (Options(sequences=100, readers=(1, 3, 8)), "try --sequences 120"),
        (Options(readers=()), r"--readers \[\] must be"),
        (Options(readers=(5, 0)), r"--readers \[5, 0\] must be"),
        (Options(seconds=0.0), "--seconds 0.0 must be above 0"),
        (Options(gigabytes=-1.0), "--gigabytes -1.0 must be above 0"),
    ],
)
def test_impossible_options_are_refused(options: Options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(options)


def test_a_directory_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no train_\*\.bin"):
        shard_paths(tmp_path)
