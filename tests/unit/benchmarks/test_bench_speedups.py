"""Each row of benchmarks/bench_speedups.py adds one thing; one of them measured; what is refused."""

import dataclasses

import pytest

from benchmarks import bench_speedups
from benchmarks.bench_speedups import IMPROVEMENTS, START, Options, Setup, line_of, setups, start
from tests.helpers.runs import called


def test_each_row_adds_one_thing_to_the_one_above() -> None:
    rows = setups(())
    assert list(rows) == [START, *(f"+ {name}" for name in IMPROVEMENTS)]
    above = Setup()
    for row in list(rows.values())[1:]:
        changed = [f.name for f in dataclasses.fields(Setup) if getattr(row, f.name) != getattr(above, f.name)]
        assert len(changed) == 1
        above = row
    assert setups(["bf16"])["+ chunked loss"] == dataclasses.replace(above, dtype="fp32")


@pytest.mark.long(reason="a process of its own, which gives all memory back at once")
def test_a_row_is_measured_in_a_process_of_its_own() -> None:
    options = Options(
        layers=1,
        seq_len=16,
        sequences=4,
        micro_batch=2,
        larger=4,
        vocab_size=300,
        blocks=2,
        block=1,
        without=("bf16", "compile"),
    )
    found = start(options, "+ chunked loss")
    assert found["tokens"] == 64 and len(found["step_seconds"]) == 2 and min(found["step_seconds"]) > 0
    # GPT-2 small's width, one block: 7.4M parameters with their gradients and AdamW's moments, 4 bytes each.
    assert 4 * 4 * 7.3e6 < found["peak_bytes"] < 2 * 4 * 4 * 7.4e6
    assert line_of(START, found, found, found).split()[-2:] == ["1.00", "1.00"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--without", "magic"], "--without magic: there are bf16, fused attention, "),
        (["--larger", "3"], "--larger 3 must divide --sequences 4"),
        (["--block", "0"], "--block 0 must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], line: str) -> None:
    done = called(bench_speedups.main, *words)
    assert done.returncode == 2 and done.stderr.startswith(f"bench_speedups: {line}") and done.stderr.count("\n") == 1
