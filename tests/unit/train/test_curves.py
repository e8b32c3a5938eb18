"""The table and the picture of runs, on metrics written here: every value read off the table is exact."""

import dataclasses
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from model.config import NAMED_SHAPES
from tests.helpers.names import LONG, ODD
from tests.helpers.runs import called
from train.curves import Axis, labels_of, main, plot, read_runs, table

BATCH_TOKENS = 1000


def train_row(step: int, loss: float, **values: Any) -> dict[str, Any]:
    row = {"step": step, "tokens": step * BATCH_TOKENS, "seconds": step * 0.5, "flops": step * 10**9, "loss": loss}
    return row | {"grad_norm": 1.0, "tokens_per_second": 2000.0 + step, "mfu": None} | values


def val_row(step: int, loss: float, **values: Any) -> dict[str, Any]:
    row = {"step": step, "tokens": step * BATCH_TOKENS, "val_loss": loss, "val_bits_per_byte": loss / 2}
    return row | values


def write_run(run_dir: Path, rows: list[dict[str, Any]], *, shape: str | None = None) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if shape is not None:
        model = dataclasses.asdict(NAMED_SHAPES[shape])
        (run_dir / "config.json").write_text(json.dumps({"config": {"model": model}, "data": "x"}))
    return run_dir


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Ten training rows, one of a skipped step, and three validations, the best of them in the middle."""
    rows = [train_row(step, 5.0 - step / 10) for step in range(1, 11)]
    rows[7]["grad_norm"] = None
    rows[-1]["mfu"] = 0.4125
    later = {"seconds": 2.5, "flops": 5 * 10**9}
    validations = [
        val_row(0, 6.0, val_loss_stderr=0.02, seconds=0.0, flops=0),
        val_row(5, 4.25, val_loss_stderr=0.01, **later),
        val_row(10, 4.5, val_loss_stderr=0.0125, seconds=5.0, flops=10**10),
    ]
    return write_run(tmp_path / "whole", [validations[0], *rows, *validations[1:]], shape="gpt2-small")


def cells_of(*run_dirs: Path) -> dict[str, str]:
    """The first run's cells by column, read back from the Markdown."""
    lines = table(read_runs(run_dirs)).splitlines()
    assert len({len(line) for line in lines}) == 1
    header, rule, first = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[:3])
    assert all(set(cell) <= {"-", ":"} and len(cell) >= 2 for cell in rule)
    return dict(zip(header, first, strict=True))


def test_the_table_of_a_whole_run(whole: Path) -> None:
    assert cells_of(whole) == {
        "run": "whole",
        "parameters": "124,439,808",
        "steps": "10",
        "tokens": "10,000",
        "val loss": "4.5000 +- 0.0125",
        "bits/byte": "2.2500",
        "best val loss": "4.2500 at 5",
        "train loss": "4.2000",  # mean of 4.4, 4.3, 4.2, 4.1 and 4.0
        "seconds": "5.0",
        "tokens/s": "2,006",
        "MFU": "41.2%",
    }


def test_training_rows_alone(tmp_path: Path) -> None:
    cells = cells_of(write_run(tmp_path / "run", [train_row(step, 3.0 + step) for step in (1, 2)]))
    absent = ("parameters", "val loss", "bits/byte", "best val loss", "MFU")
    assert {cells[name] for name in absent} == {"-"}
    assert [cells[name] for name in ("steps", "tokens", "train loss", "tokens/s")] == ["2", "2,000", "4.5000", "2,002"]


def test_validation_rows_alone_and_of_an_older_version(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", [val_row(4, 2.0), val_row(8, 2.0)])
    cells = cells_of(run_dir)
    assert {cells[name] for name in ("parameters", "train loss", "seconds", "tokens/s", "MFU")} == {"-"}
    assert (cells["val loss"], cells["best val loss"], cells["tokens"]) == ("2.0000", "2.0000 at 4", "8,000")
    plot(read_runs([run_dir]), "tokens", tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 5_000


def test_a_diverged_run_shows_it(tmp_path: Path) -> None:
    rows = [train_row(1, 5.0), val_row(1, 5.0), train_row(2, float("nan")), val_row(2, float("nan"))]
    cells = cells_of(write_run(tmp_path / "run", rows))
    assert (cells["val loss"], cells["best val loss"], cells["train loss"]) == ("nan", "5.0000 at 1", "nan")


def test_a_config_of_another_version_costs_only_the_parameters(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (whole / "config.json").write_text(json.dumps({"config": {"model": {"depth": 3}}}))
    cells = cells_of(whole)
    assert (cells["parameters"], cells["steps"]) == ("-", "10")
    assert "config.json" in capsys.readouterr().err


def test_any_name_is_drawn_as_it_is(tmp_path: Path) -> None:
    """Warnings are errors here: a name may have no glyphs in the font, or be wider than the picture."""
    run_dirs = [write_run(tmp_path / name, [train_row(1, 4.0), val_row(1, 4.0)]) for name in (ODD, LONG, "$1", "_x")]
    out = tmp_path / "curves.png"
    done = called(main, *map(str, run_dirs), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 10_000 and ODD.replace("|", "\\|") in out.with_suffix(".md").read_text(encoding="utf-8")


def test_a_folder_that_is_not_utf_8_is_written_with_escapes(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / os.fsdecode(b"r\xff"), [train_row(1, 4.0)])
    done = called(main, str(run_dir))
    assert done.returncode == 0 and "r\\udcff" in (run_dir / "curves.md").read_text(encoding="utf-8"), done.stderr


def test_labels_tell_runs_of_the_same_name_apart(tmp_path: Path) -> None:
    names = ["one/seed1/run", "two/seed1/run", "two/seed2/run", "alone"]
    assert labels_of([tmp_path / name for name in names]) == ["one/seed1/run", "two/seed1/run", "seed2/run", "alone"]
    run_dir = write_run(tmp_path / "a|b", [val_row(1, 1.0)])
    assert table(read_runs([run_dir])).splitlines()[2].startswith("| a\\|b |")


@pytest.mark.parametrize("x", ["step", "tokens", "seconds", "flops"])
def test_every_axis_is_drawn_from_the_command_line(whole: Path, tmp_path: Path, x: Axis) -> None:
    out = tmp_path / x / "picture.png"
    main([str(whole), "--x", x, "--out", str(out)])
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (960, 600)
    assert len(data) > 10_000
    assert out.with_suffix(".md").read_text() == table(read_runs([whole]))


def test_without_matplotlib_the_table_is_there_and_the_error_names_the_extra(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = called(main, str(whole))
    assert done.returncode == 2 and "4.5000 +- 0.0125" in done.stdout
    assert "pip install -e '.[plots]'" in done.stderr
    assert (whole / "curves.md").is_file() and not (whole / "curves.png").exists()


def test_bad_input_is_refused_in_one_line(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    old = write_run(tmp_path / "old", [train_row(1, 3.0), val_row(1, 3.0)])
    for args, message in [
        ([], "at least one run"),
        ([str(whole), str(whole / ".." / "whole")], "given twice"),
        ([str(tmp_path / "empty")], "no metrics.jsonl"),
        ([str(whole), "--out", str(tmp_path / "curves.md")], "must end in .png"),
        ([str(old), "--x", "seconds"], "the validation row of step 1 has no 'seconds'"),
    ]:
        done = called(main, *args)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and message in done.stderr
    assert done.stdout.startswith("| run ")  # the table needs no such column
