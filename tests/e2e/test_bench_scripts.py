"""benchmarks/bench_data_prep.py with real processes: the whole script at a tiny size, memory, a command that fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from benchmarks import bench_data_prep
from common.errors import InputError
from tests.helpers.corpus import make_text
from tests.helpers.runs import ROOT


@pytest.mark.slow
def test_the_script_at_a_tiny_size(tmp_path: Path) -> None:
    """tests/unit/benchmarks has its parts."""
    text = tmp_path / "text.txt"
    text.write_text(make_text(20_000), encoding="utf-8")
    sizes = ["--megabytes", "2", "--files", "2", "--rounds", "1", "--workers", "1", "--slice-megabytes", "0.2"]
    command = [sys.executable, "benchmarks/bench_data_prep.py", *sizes, "--text", str(text), "--backends", "tiktoken"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    report = json.loads(lines[-1])
    assert (report["workers"], report["rounds"], report["files"]) == (1, 1, 2)
    assert 1.8e6 < report["text_bytes"] < 2.5e6 and report["tokens"] > 100_000
    assert set(report["commands"]) == {"usual", "tiktoken"}
    for case in report["commands"].values():
        assert case["seconds"]["median"] > 0 and case["cpu_seconds"]["median"] > 0 and case["parent_peak_mb"] > 50
    tiktoken = report["commands"]["tiktoken"]
    stages = [tiktoken[f"{stage}_seconds"] for stage in ("before_first_part", "encode", "pack")]
    assert all(stage is not None for stage in stages)
    for limit in report["limits"]:
        assert limit["holds"] == (limit["median"] >= limit["needed"])
        assert sum("needed" in line and limit["over"] in line for line in lines[:-1]) == 1


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_memory_of_a_process_and_of_its_children() -> None:
    with subprocess.Popen([sys.executable, "-c", "b = b'x' * 60_000_000; input()"], stdin=subprocess.PIPE) as child:
        deadline = time.monotonic() + 20
        while bench_data_prep.peak_bytes(child.pid) < 60_000_000 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert 60_000_000 <= bench_data_prep.peak_bytes(child.pid) < 200_000_000
        assert child.pid in bench_data_prep.children_of(os.getpid())
        child.communicate(b"\n")
    assert bench_data_prep.peak_bytes(child.pid) == 0
    assert bench_data_prep.children_of(child.pid) == []


def test_a_command_that_fails_is_reported_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data_prep/fineweb\.py failed: .*no .parquet file there"):
        bench_data_prep.run_ours([tmp_path / "none.parquet"], 1, tmp_path / "out", "tiktoken")
