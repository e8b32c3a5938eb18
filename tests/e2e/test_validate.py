"""train/validate.py: the training loop's numbers again, and no number computed twice."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.textfiles import Options, prepare
from model.checkpoint import STATE_FILE
from model.hf_bridge import main as bridge
from tests.distributed.test_checkpoints import sign_again
from tests.helpers.corpus import make_text
from tests.helpers.groups import run_on_ranks
from tests.helpers.hellaswag_items import write_items
from tests.helpers.runs import called, rows, tiny_config
from train import validate
from train.evals.validation import Validation
from train.main import run
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests
from train.validate import main

NUM_ITEMS = 60


@pytest.fixture(scope="module")
def trained_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny run, with HellaSwag items beside it."""
    folder = tmp_path_factory.mktemp("validate")
    items = write_items(folder / "items.jsonl", NUM_ITEMS)
    config = tiny_config(tiny_data, folder / "run", steps=50)
    config = replace(config, validate=replace(config.validate, hellaswag=items, hellaswag_every=10))
    run(config, ProcessGroup(0, 1, torch.device("cpu")))
    return folder / "run"


@pytest.fixture
def own_run(trained_run: Path, tmp_path: Path) -> Path:
    """Copy the run without its evaluations."""
    return Path(shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations")))


def evaluated(*args: str | Path) -> tuple[str, dict[str, Any]]:
    """Return the printed table and the report."""
    done = called(main, *map(str, args))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.rpartition('{"model"')[0], json.loads(done.stdout.splitlines()[-1])


def check_refused(message: str, *args: str | Path) -> None:
    done = called(main, *map(str, args))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and message in done.stderr, (args, done.stderr)


def logged(run_dir: Path, step: int) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for row in rows(run_dir):
        merged |= row if row["step"] == step else {}
    return merged


@pytest.mark.parametrize("step", [50, 20])
def test_the_numbers_are_those_that_the_training_loop_logged(
    trained_run: Path, tiny_data: Path, tmp_path: Path, step: int
) -> None:
    items = trained_run.parent / "items.jsonl"
    flags = ["--data", str(tiny_data), "--hellaswag", str(items), "--out", str(tmp_path)]
    text, report = evaluated(trained_run, "--step", str(step), *flags)
    row = logged(trained_run, step)
    if step == 50:  # validated every 25 steps
        result = report["validation"]
        assert [result[name] for name in ("loss", "stderr", "bits_per_byte", "tokens")] == [
            *(row[f"val_{name}"] for name in ("loss", "loss_stderr", "bits_per_byte")),
            1000,
        ]
        assert f"loss                  {row['val_loss']:.4f} +- {row['val_loss_stderr']:.4f}\n" in text
    for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "items"):
        assert report["hellaswag"][name] == row[f"hellaswag_{name}"]
    assert "so the score is not comparable" in text
    assert report["step"] == step
    assert evaluated(f"{trained_run}@{step}", *flags)[1] == report


def test_the_runs_own_data_is_the_default_and_no_result_is_computed_twice(
    own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = own_run / "items.jsonl"
    write_items(items, NUM_ITEMS)
    text, report = evaluated(own_run)
    assert report["hellaswag"] is None and report["validation"]["tokens"] == 1000
    _, scored = evaluated(own_run, "--hellaswag", items)
    assert scored["validation"] is None
    names = sorted(path.name.rpartition("_")[0] + path.suffix for path in (own_run / "evaluations").iterdir())
    assert names == ["hellaswag_step_00000050.json", "validation_step_00000050.json"]

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(validate, "validate", refuse)
    monkeypatch.setattr(validate, "ending_losses", refuse)
    again, report_again = evaluated(own_run)
    assert report_again == report
    assert again.splitlines()[2:] == text.splitlines()[2:] and "; from " in again
    again, report_again = evaluated(own_run, "--hellaswag", items)
    assert report_again == scored and "; from " in again
    with pytest.raises(AssertionError, match="evaluated again"):
        main([str(own_run), "--hellaswag", str(items), "--items", "59"])


def in_ranks(group: ProcessGroup, args: dict[str, Any]) -> dict[str, Any]:
    return validate.evaluate(validate.Options(**args), group, StopRequests(None, is_main=group.is_main))


def test_two_processes_give_the_scores_of_one(own_run: Path, trained_run: Path, tiny_data: Path) -> None:
    """Both report all of it, also with batches that they cannot share evenly."""
    items = trained_run.parent / "items.jsonl"
    args = {"path": str(own_run), "data": tiny_data, "hellaswag": items, "micro_batch": 7}
    row = logged(trained_run, 50)
    for report in run_on_ranks(2, in_ranks, args):
        assert report["validation"]["loss"] == pytest.approx(row["val_loss"], abs=1e-6)
        assert (report["hellaswag"]["acc"], report["hellaswag"]["items"]) == (row["hellaswag_acc"], NUM_ITEMS)


@pytest.mark.long(reason="kernels to compile")
def test_compilation_changes_nothing_but_rounding(own_run: Path, trained_run: Path, tiny_data: Path) -> None:
    items, row = trained_run.parent / "items.jsonl", logged(trained_run, 50)
    _, report = evaluated(own_run, "--data", tiny_data, "--hellaswag", items, "--compile")
    assert report["validation"]["loss"] == pytest.approx(row["val_loss"], abs=1e-6)
    assert [report["hellaswag"][name] for name in ("acc", "acc_norm")] == [
        row[f"hellaswag_{name}"] for name in ("acc", "acc_norm")
    ]


def test_a_stop_ends_it_and_the_same_command_starts_again(
    own_run: Path, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation before HellaSwag was finished, and is kept."""
    items, sound = trained_run.parent / "items.jsonl", validate.ending_losses
    data = json.loads((own_run / "config.json").read_text())["config"]["data"]["dir"]
    args = [str(own_run), "--data", data, "--hellaswag", str(items), "--micro-batch", "1"]

    def stopping(*args: Any) -> Any:
        args[-1].stop_requests.reason = "SIGTERM"
        return sound(*args)

    monkeypatch.setattr(validate, "ending_losses", stopping)
    done = called(main, *args)
    assert (done.returncode, done.stderr) == (
        1,
        "validate: stopped (SIGTERM); the same command starts again what was not finished\n",
    )
    assert [path.name[:10] for path in (own_run / "evaluations").iterdir()] == ["validation"]
    monkeypatch.setattr(validate, "ending_losses", sound)
    text, report = evaluated(*args)
    assert text.count("; from ") == 1
    assert report["hellaswag"] == evaluated(*args, "--out", own_run / "other")[1]["hellaswag"]


def test_a_result_of_another_form_or_key_is_refused_in_one_line(own_run: Path, trained_run: Path) -> None:
    items = trained_run.parent / "items.jsonl"
    for args in ([str(own_run)], [str(own_run), "--hellaswag", str(items)]):
        evaluated(*args)
        path = max((own_run / "evaluations").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        record = json.loads(path.read_text())
        first = next(iter(record["result"]))
        contents: list[Any] = [
            *("", path.read_text()[:-40], "[" * 100_000, "[1]", "{}", "9" * 5_000, "\udcff"),
            record | {"key": record["key"] | {"dtype": "bf16"}},
            *(record | {"result": other} for other in (None, {"loss": 1.0}, record["result"] | {first: "1"})),
        ]
        for content in contents:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_text(text, encoding="utf-8", errors="surrogateescape")
            check_refused(f"{path}: not the result that its name says; remove the file", *args)
        path.unlink()
        os.mkfifo(path)
        check_refused(f"{path}: a FIFO, not a regular file", *args)
        path.unlink()
        path.symlink_to(own_run / "config.json")
        check_refused(f"{path}: a link out of", *args)
        path.unlink()
        evaluated(*args)


def test_a_hugging_face_folder_scores_as_its_run_and_nothing_is_written_there(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With bytes, which both tokenizers have."""
    (tmp_path / "text.txt").write_text(make_text(20_000), encoding="utf-8")
    data = tmp_path / "data"
    prepare(Options(input=(str(tmp_path / "text.txt"),), out=data, tokenizer="byte"))
    items = write_items(tmp_path / "items.jsonl", NUM_ITEMS)
    config = tiny_config(data, tmp_path / "run", steps=5)
    config = replace(config, validate=replace(config.validate, hellaswag=items))
    run(config, ProcessGroup(0, 1, torch.device("cpu")))
    assert called(bridge, "export", str(tmp_path / "run"), "--out", str(tmp_path / "folder")).returncode == 0
    row = logged(tmp_path / "run", 5)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert (
        f"HellaSwag, {NUM_ITEMS} items in the completion style, at step 5: acc {row['hellaswag_acc']:.4f} +- " in card
    )
    assert "It is not comparable with published scores: the items are not the whole validation set." in card
    before = sorted(path.name for path in (tmp_path / "folder").iterdir())
    flags = ["--data", str(data), "--hellaswag", str(items), "--tokens", "1000"]
    _, wanted = evaluated(tmp_path / "run", *flags)
    _, result = evaluated(tmp_path / "folder", *flags)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == before
    assert result["step"] is None and result["hellaswag"] == wanted["hellaswag"]
    assert result["validation"]["loss"] == pytest.approx(wanted["validation"]["loss"], abs=1e-6)
    _, kept = evaluated(tmp_path / "folder", *flags, "--out", tmp_path / "kept")
    assert kept == result and len(list((tmp_path / "kept").iterdir())) == 2
    check_refused("is no run directory", tmp_path / "folder", "--step", "5")
    check_refused("names no data; give --data or --hellaswag", tmp_path / "folder")


def test_bad_input_is_one_line(own_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 3)
    line = items.read_text().splitlines()[0]
    (tmp_path / "label.jsonl").write_text(line.replace('"label": ', '"label": 7') + "\n")
    (tmp_path / "other.jsonl").write_text(line.replace('"ctx": "', '"ctx": "\\u4e00') + "\n")
    (tmp_path / "text.txt").write_text(make_text(5_000))
    prepare(Options(input=(str(tmp_path / "text.txt"),), out=tmp_path / "bytes", tokenizer="byte"))
    for flags, message in {
        "--step 7": "no checkpoint of step 7; there are 10, 20, 30, 40, 50",
        "--items 0": "--items 0 must be at least 1",
        "--items 3": "--items counts HellaSwag's",
        "--split test": "has no split 'test', only train, val",
        f"--data {tmp_path}/absent": "no such data directory",
        f"--data {tmp_path}/bytes": "its tokenizer is byte (256 ids, sha256 40aff2e9), the model's is",
        f"--hellaswag {tmp_path}/absent": "no such HellaSwag file or directory",
        f"--hellaswag {tiny_data}": "not HellaSwag's",
        f"--hellaswag {items} --tokens 9": "with --hellaswag give --data too",
        f"--hellaswag {tmp_path}/label.jsonl": "label is 7",
        f"--hellaswag {tmp_path}/other.jsonl": "1 of 1 items cannot be encoded with this tokenizer",
    }.items():
        check_refused(message, own_run, *flags.split())
    check_refused("no such run directory or checkpoint", tmp_path / "absent")
    shutil.rmtree(own_run / "tokenizer")
    check_refused("codec.json: missing", own_run)
    assert not (own_run / "evaluations").exists()
    shutil.move(own_run / "checkpoints", tmp_path / "elsewhere")
    assert called(main, str(own_run)).returncode == 2


def test_results_that_cannot_be_kept_are_printed_all_the_same(own_run: Path) -> None:
    (own_run / "evaluations").write_text("in the way")
    done = called(main, str(own_run))
    assert done.returncode == 2 and "  perplexity  " in done.stdout
    assert len(done.stderr.splitlines()) == 1 and "evaluations: cannot be written" in done.stderr


def test_a_model_that_diverged_still_ends_with_json(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Validation(loss=math.nan, stderr=math.nan, bits_per_byte=math.inf, bits_per_byte_stderr=None, tokens=5)
    monkeypatch.setattr("train.validate.validate", lambda *args, **given: nowhere)
    done = called(main, str(own_run))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    result = json.loads(done.stdout.splitlines()[-1], parse_constant=refuse)["validation"]
    assert (result["loss"], result["perplexity"], result["bits_per_byte"], result["tokens"]) == (None, None, None, 5)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("data", "dir", "gone", "gone: the data of this run is not here; give --data or --hellaswag"),
        (None, "data", "0" * 64, "the run was trained on other data; give --data"),
        *(("train", *change, "no configuration of this code") for change in [("dtype", "fp8"), ("micro_batch", "6")]),
        ("train", "loss", None, "its state.json has no configuration of this code"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    own_run: Path, section: str | None, name: str, value: Any, message: str
) -> None:
    """The hashes fit, as if a later version of this code had written the state."""
    checkpoint = own_run / "checkpoints" / "step_00000050"
    state = json.loads((checkpoint / "state.json").read_text())
    settings = state if section is None else state["config"][section]
    settings[name] = value
    if value is None:
        del settings[name]
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    sign_again(checkpoint)
    check_refused(message, own_run)
