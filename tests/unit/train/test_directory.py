"""The run directory's own files: lock, status, metrics, provenance and the STOP file."""

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from tests.helpers.runs import ROOT, rows, status, tiny_config
from train.config import parse_duration
from train.config_checks import faults_of
from train.main import run
from train.metrics.logger import RunLogger
from train.processes.group import ProcessGroup, Result
from train.processes.stop_requests import StopRequests
from train.run.directory import RunDirectory
from train.run.identity import differing
from train.run.lock import RunLock

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


def test_the_lock_is_refused_while_its_process_lives_but_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    with pytest.raises(InputError, match="another process is training here"):
        second.acquire()
    text = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(text | {"started": "1"}))
    second.acquire()
    second.release()
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_rows_after_the_restored_step_are_dropped_with_an_incomplete_line(tmp_path: Path) -> None:
    whole = [{"step": n, "loss": float(n)} for n in range(1, 6)] + [{"step": 5, "val_loss": 2.0}]
    lines = "".join(json.dumps(row) + "\n" for row in whole)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 6, "lo')
    stop_requests = StopRequests(tmp_path, is_main=True)
    for step, expected in ((5, whole), (3, whole[:3]), (None, [])):
        with RunLogger(tmp_path, step=step, group=ALONE, stop_requests=stop_requests) as logger:
            assert rows(tmp_path) == expected
            assert logger.validated_steps == ({5} if step == 5 else set())


def test_a_damaged_row_costs_itself_alone_and_the_file_is_kept(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 1.0}',
        '{"step": 2, "lo',
        "5",
        "{}",
        '{"step": 3, "loss": "x"}',
        '{"step": 4, "loss": null}',
    ]
    content = ("\n".join(lines) + "\n").encode() + b"\xff\n"
    (tmp_path / "metrics.jsonl").write_bytes(content)
    stop_requests = StopRequests(tmp_path, is_main=True)
    with RunLogger(tmp_path, step=4, group=ALONE, stop_requests=stop_requests) as logger:
        assert len(logger.remarks) == 1
        assert "2 rows up to step 4 can be read, 5 lines cannot (the first is line 2)" in logger.remarks[0]
    assert [row["step"] for row in rows(tmp_path)] == [1, 4]
    assert (tmp_path / "metrics.jsonl.aside_1").read_bytes() == content


def test_rows_that_were_altered_after_the_checkpoint_are_noticed(tmp_path: Path) -> None:
    stop_requests = StopRequests(tmp_path, is_main=True)
    with RunLogger(tmp_path, step=None, group=ALONE, stop_requests=stop_requests) as logger:
        for step in (1, 2):
            logger._write("metrics.jsonl", json.dumps({"step": step, "loss": 1.0}))
        logger.make_durable()
        logger._write("metrics.jsonl", '{"step": 3, "loss": 1.0}')
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for content, is_noticed in ((whole, False), (whole.replace(b"1.0", b"1.5", 1), True), (whole[30:], True)):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        with RunLogger(tmp_path, step=2, group=ALONE, stop_requests=stop_requests, seals=logger.seals) as again:
            assert bool(again.remarks) == is_noticed
            again.make_durable()
        assert is_noticed or again.seals == logger.seals


def test_a_run_directory_has_the_promised_files_and_rows_the_promised_keys(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run(tiny_config(tiny_data, run_dir, steps=5), ALONE)
    files = "config.json metrics.jsonl log.txt checkpoints status.json provenance.json tokenizer"
    assert {path.name for path in run_dir.iterdir()} - {"verified"} == set(files.split())  # of data as old as 2 s
    provenance = json.loads((run_dir / "provenance.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert provenance["commit"] == (head.stdout.strip() or None) and provenance["code"] == str(ROOT)
    assert provenance["torch"] == torch.__version__ and provenance["threads"] == 1
    config = json.loads((run_dir / "config.json").read_text())["config"]
    assert config["model"]["context_len"] == 32 and config["model"]["vocab_size"] == 33

    trained = [row for row in rows(run_dir) if "loss" in row]
    validated = [row for row in rows(run_dir) if "val_loss" in row]
    axes = ["step", "tokens", "seconds", "flops"]
    keys = "loss lr grad_norm tokens_per_second mfu step_seconds data_wait_fraction peak_memory_gib"
    assert list(trained[0]) == [*axes, *keys.split(), "memory_retries", "eta_seconds"]
    assert list(validated[0]) == [*axes, "val_loss", "val_loss_stderr", "val_bits_per_byte"]
    assert [row["eta_seconds"] > 0 for row in trained] == [True] * 4 + [False]
    assert [row["tokens"] for row in trained] == [384 * n for n in range(1, 6)]
    assert all(row["mfu"] is None and 0 <= row["data_wait_fraction"] <= 1 for row in trained)
    assert trained[-1]["seconds"] == pytest.approx(sum(row["step_seconds"] for row in trained), abs=1e-3)
    for row in trained:
        assert row["tokens_per_second"] == pytest.approx(384 / row["step_seconds"], rel=0.02)


def test_a_stop_file_made_before_the_start_is_honoured_and_the_next_start_runs(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", steps=5)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    assert not StopRequests(tmp_path / "run", is_main=False).wanted(), "only rank 0 looks for the file"
    run(config, ALONE)
    assert status(tmp_path / "run") == {"state": "stopped", "step": 0, "reason": "STOP file", "attempt": 1}
    run(config, ALONE)
    assert status(tmp_path / "run") == {"state": "done", "step": 5, "reason": None, "attempt": 2}
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 5]


def test_durations_are_read_or_refused(tiny_data: Path, tmp_path: Path) -> None:
    durations = {"3h50m": 13_800, "90m": 5400, "1d12h": 129_600, "45s": 45, "1d2h3m4s": 93_784, "0h5s": 5}
    assert {text: parse_duration(text) for text in durations} == durations
    for text in ("", "0m", "50m3h", "3.5h", "2 h", "10", "-5m", "3h 50m", "1w"):
        with pytest.raises(InputError, match="is not a duration; write it like 3h50m"):
            parse_duration(text)
    config = dataclasses.replace(tiny_config(tiny_data, tmp_path), stop_after="10")
    assert faults_of(config) == ["--stop-after 10 is not a duration; write it like 3h50m, 90m, 1d12h or 45s"]


def test_differences_are_named_as_flags() -> None:
    old = {"seed": 1, "model": {"width": 8}, "train": {"steps": 5, "compile": True}, "optim": {"lr_peak": 0.1}}
    new = {"seed": 1, "model": {"width": 16}, "train": {"steps": 5, "compile": False}, "optim": {"lr_peak": 0.2}}
    assert differing(old, new) == ["--model.width 16 (was 8)", "--optim.lr-peak 0.2 (was 0.1)"]
    newer = {"optim": {"lr_peak": 0.1, "beta1": 0.9}}  # the recorded configuration is of a version without beta1
    assert differing({"optim": {"lr_peak": 0.1}}, newer) == []
    newer["optim"]["beta1"] = 0.8
    assert differing({"optim": {"lr_peak": 0.1}}, newer) == ["--optim.beta1 0.8 (was 0.9)"]


class LosingARank(ProcessGroup):
    """A group in which the others are gone when rank 0 tells them what it has done."""

    def on_main(self, function: Callable[[], Result]) -> Result:
        function()
        raise RuntimeError("Connection closed by peer")


def test_a_rank_lost_while_rank_0_claims_the_directory_leaves_no_lock(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run")
    group = LosingARank(0, 2, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="closed by peer"), RunDirectory(config, "fingerprint", group):
        pass
    assert not (config.directory / "lock.json").exists()
    assert status(config.directory)["reason"] == "RuntimeError: Connection closed by peer"


def test_a_refused_claim_touches_nothing_of_the_run_that_holds_the_directory(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run")
    with RunDirectory(config, "fingerprint", ALONE):
        before = {path.name: path.read_bytes() for path in config.directory.iterdir() if path.is_file()}
        with pytest.raises(InputError, match="another process"), RunDirectory(config, "fingerprint", ALONE):
            pass
        assert {path.name: path.read_bytes() for path in config.directory.iterdir() if path.is_file()} == before


def test_a_status_that_a_link_leads_to_still_counts_the_attempts(tiny_data: Path, tmp_path: Path) -> None:
    """The link is moved aside like anything else in the way, but only once it is read."""
    config = tiny_config(tiny_data, tmp_path / "run", steps=5)
    for _ in range(2):
        run(config, ALONE)
    path = config.directory / "status.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    run(config, ALONE)
    assert status(config.directory) == {"state": "done", "step": 5, "reason": None, "attempt": 3}
    assert (config.directory / "status.json.aside_1").is_symlink() and not path.is_symlink()
