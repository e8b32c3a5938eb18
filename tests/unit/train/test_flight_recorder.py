"""What is set for torch's recorder, and what of its dumps goes where. The real thing, on gloo: test_watchdog.py."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.groups import run_with_own_mounts
from train.processes import flight_recorder

NAMES = (
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
)


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found: dict[str, str] = {}
    monkeypatch.setattr(flight_recorder, "os", SimpleNamespace(environ=found))
    return found


def test_it_is_on_and_a_collective_that_times_out_leaves_its_file_in_the_run(env: dict[str, str]) -> None:
    flight_recorder.turn_on(Path("/runs/a"))
    assert env == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": "/runs/a/nccl_trace_rank_",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_the_environment_says_by_either_name_stays(env: dict[str, str], name: str) -> None:
    env[name] = "7"
    flight_recorder.turn_on(Path("/runs/a"))
    assert env[name] == "7" and len(env) == 3


def test_nccls_record_lies_beside_gloos_and_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c10d = torch._C._distributed_c10d
    gloo = json.dumps({"entries": [{"record_id": 2000}, {"record_id": 2001}]}).encode()
    nccl = json.dumps({"entries": [{"record_id": 39}]}).encode()
    monkeypatch.setattr(c10d, "_dump_fr_trace_json", lambda: gloo)
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda: nccl, raising=False)
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: b"for torchfrtrace", raising=False)
    assert flight_recorder.num_collectives(tmp_path / "rank_00003.txt") == 2002 + 40
    flight_recorder.write_for_torchfrtrace(tmp_path, rank=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "rank_00003.gloo.json": gloo,
        "rank_00003.nccl.json": nccl,
        "nccl_trace_rank_3": b"for torchfrtrace",
    }


def count_in_a_new_process(can_mount: bool, path: Path) -> int:
    return flight_recorder.num_collectives(path)


def test_a_process_without_a_group_has_called_none_and_writes_nothing(tmp_path: Path) -> None:
    """A new one: the recorder remembers the groups of tests before this in the same process."""
    assert run_with_own_mounts(count_in_a_new_process, tmp_path / "rank_00000.txt") == 0
    assert list(tmp_path.iterdir()) == []
