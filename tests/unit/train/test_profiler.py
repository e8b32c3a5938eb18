"""Real steps on the CPU, really profiled; the trace is read back."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import InputError
from train.config import parse_steps
from train.metrics.profiler import Trace, open_trace


def train(trace: Trace | None, steps: range) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in steps:
        if trace is not None:
            trace.before_step(step)
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if trace is not None:
            trace.after_step(step)
        torch.ones(8).exp()  # work between two steps
    if trace is not None:
        trace.close()


def open_here(run_dir: Path, steps: range | None, *, first: int = 0, rank: int = 0) -> tuple[Trace | None, list[str]]:
    messages: list[str] = []
    device = torch.device("cpu")
    return open_trace(
        steps, first=first, ranks=(0, 2), rank=rank, run_dir=run_dir, device=device, log=messages.append
    ), messages


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        trace_events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return trace_events


def operators(path: Path, name: str) -> int:
    return sum(event["name"] == name and event["ph"] == "X" for event in events(path))


def marks(path: Path) -> list[str]:
    steps = (event for event in events(path) if event.get("cat") == "user_annotation" and event["ph"] == "X")
    return sorted(event["name"] for event in steps if event["name"].startswith("step "))


def written(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.rglob("*") if path.is_file())


def test_the_chosen_steps_are_in_the_trace_and_no_others(tmp_path: Path) -> None:
    trace, messages = open_here(tmp_path, range(3, 6))
    train(trace, range(10))
    assert written(tmp_path) == ["steps_3_6_rank0.json.gz", "steps_3_6_rank0.txt"]
    path = tmp_path / "traces" / "steps_3_6_rank0.json.gz"
    assert marks(path) == ["step 3", "step 4", "step 5"]
    assert operators(path, "aten::addmm") == 3 * 2
    assert operators(path, "aten::exp") == 2, "between the steps, not before or after them"
    (text,) = messages
    assert text == f"trace of steps 3 to 5: {path}\n{path.with_name('steps_3_6_rank0.txt').read_text().strip()}"


def test_the_table_names_the_kernels_that_took_longest(tmp_path: Path) -> None:
    trace, _ = open_here(tmp_path, range(0, 5), rank=2)
    train(trace, range(5))
    table = (tmp_path / "traces" / "steps_0_5_rank2.txt").read_text()
    lines = [line.split() for line in table.splitlines() if "%" in line][1:]
    assert 5 <= len(lines) <= 15
    assert [line[-1] for line in lines if line[0] == "aten::addmm"] == ["10"], "calls"
    assert not any(line[0].startswith(("step", "Optimizer", "ProfilerStep")) for line in lines)
    shares = [float(re.findall(r"([\d.]+)%", " ".join(line))[0]) for line in lines]  # names may have blanks
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 101


@pytest.mark.parametrize(
    ("steps", "warning"),
    [
        (range(5), "warning: --trace 8:12: the run ended after 0 of these steps"),
        (range(9, 20), "warning: --trace 8:12 has no effect: this attempt begins at step 9"),
        (range(8), "warning: --trace 8:12: the run ended after 0 of these steps"),  # only prepared
    ],
)
def test_steps_that_never_come_are_a_warning_and_write_nothing(tmp_path: Path, steps: range, warning: str) -> None:
    trace, messages = open_here(tmp_path, range(8, 12), first=steps.start)
    train(trace, steps)
    assert messages == [warning]
    assert written(tmp_path) == []


def test_a_stopped_run_writes_its_traced_steps_and_other_ranks_have_no_trace(tmp_path: Path) -> None:
    trace, messages = open_here(tmp_path, range(3, 100))
    train(trace, range(6))
    assert marks(tmp_path / "traces" / "steps_3_6_rank0.json.gz") == ["step 3", "step 4", "step 5"]
    assert messages[0] == "warning: --trace 3:100: the run ended after 3 of these steps"
    assert open_here(tmp_path, None)[0] is None
    assert open_here(tmp_path, range(1, 2), rank=1)[0] is None


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "traces").touch()
    trace, messages = open_here(tmp_path, range(1, 2))
    train(trace, range(3))
    (text,) = messages
    assert text.startswith("warning: no trace of steps 1 to 1: ")


def test_a_trace_that_cannot_take_its_name_leaves_no_part_of_itself(tmp_path: Path) -> None:
    (tmp_path / "traces" / "steps_1_2_rank0.json.gz").mkdir(parents=True)
    trace, messages = open_here(tmp_path, range(1, 2))
    train(trace, range(3))
    (text,) = messages
    assert text.startswith("warning: no trace of steps 1 to 1: ")
    assert written(tmp_path) == ["steps_1_2_rank0.txt"]


def test_steps_are_parsed_or_refused() -> None:
    assert parse_steps("10:15") == range(10, 15) and parse_steps("0:1") == range(0, 1)
    for text in ("15:10", "5:5", "a:b", "-1:3", "3", "1:2:3", "", "1: 2", "1:"):
        with pytest.raises(InputError, match=rf"--trace {text}: needs FIRST:END .* --trace 10:15"):
            parse_steps(text)
