"""What is set for torch's recorder, and where its dumps go. e2e/test_watchdog.py has the real one, on gloo."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from train.processes import flight_recorder

NAMES = (
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",
)
SET = {NAMES[0]: "2000", NAMES[2]: "/runs/a/nccl_trace_rank_", NAMES[4]: "1", NAMES[5]: "1861"}


def test_the_recorder_is_on_and_settings_in_the_environment_win(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (None, *NAMES):
        environ = {} if name is None else {name: "7"}
        monkeypatch.setattr(flight_recorder, "os", SimpleNamespace(environ=environ))
        flight_recorder.turn_on(Path("/runs/a"), 1860.5)
        assert len(environ) == 4 and (name is None or environ[name] == "7")
        if name is None:
            assert environ == SET


def test_the_records_of_nccl_and_gloo_are_counted_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(c10d, "_dump_fr_trace_json", lambda: b"{}")
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda: b"{}")
    assert flight_recorder.num_collectives(tmp_path / "rank_00000.txt") == 0, "no process group"
    assert len(list(tmp_path.iterdir())) == 3
