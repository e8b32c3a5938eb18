"""The table of runs, some of whose files are damaged."""

import json
from pathlib import Path

import pytest

from launch.runs import find_runs, inspect_runs, table
from tests.unit.launch.test_requeue import DAMAGES, make_damage

CONFIG = {"config": {"train": {"steps": 50}}}


def make_run(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step_00000020").mkdir(parents=True)
    (run_dir / "status.json").write_text(json.dumps({"state": "done", "step": 50, "reason": None, "attempt": 1}))
    (run_dir / "config.json").write_text(json.dumps(CONFIG))
    (run_dir / "submitted.json").write_text(json.dumps({"job": None, "args": []}))
    (run_dir / "metrics.jsonl").write_text('{"step": 50, "loss": 1.5, "val_loss": 1.25}\n')


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_hides_neither_its_run_nor_the_others(tmp_path: Path, damage: str) -> None:
    for name in ("status.json", "config.json", "sound"):
        make_run(tmp_path / name)
        if name != "sound":
            make_damage(tmp_path / name / name, damage)
    config, sound, status = table(inspect_runs(find_runs(tmp_path))).splitlines()[1:]
    assert sound.split()[1:] == ["done", "50", "50", "1.5000", "1.2500", "-"]
    assert config.split()[1:4] == ["done", "50", "-"] and f"{tmp_path}/config.json/config.json: " in config
    assert status.split()[1:4] == ["killed", "20", "50"] and f"{tmp_path}/status.json/status.json: " in status


def test_damaged_rows_of_metrics_are_passed_over(tmp_path: Path) -> None:
    make_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n{}\n["loss"]\n{"loss": "x"}\n\xff"loss"\x00\n{"loss": ' + b"9" * 5000 + b'}\n{"loss": 1.4')
    assert table(inspect_runs([tmp_path])).splitlines()[1].split()[3:6] == ["50", "1.5000", "1.2500"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(', "step": 51}\n{"step": 52, "loss": null}\n')
    assert table(inspect_runs([tmp_path])).splitlines()[1].split()[3:6] == ["50", "-", "1.2500"]
