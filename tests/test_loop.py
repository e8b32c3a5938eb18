"""What the loop does between steps, and what it must not do: compile again, collect garbage, lose a trace."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.runs import ROOT, curve, rows, status, tiny_config, tiny_flags
from train import loop
from train import losses as train_losses
from train.config import Config, SampleConfig
from train.main import run
from train.mesh import Mesh

ALONE = Mesh(0, 1, torch.device("cpu"))


def sampling(config: Config, every: int = 5) -> Config:
    return dataclasses.replace(config, sample=SampleConfig(every=every, prompts=("The ", "a", ""), tokens=12))


def graphs_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("loss", ["plain", "chunked"])
def test_nothing_is_compiled_once_training_has_begun(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Steps, validations (the last batch of each is short), samples and saves all meet graphs that are there."""
    monkeypatch.setattr(train_losses, "CHUNK_TOKENS", 64)
    counts: list[int] = []
    take_step = loop.take_step

    def counting(run: loop.Run) -> loop.Report:
        counts.append(graphs_compiled())
        return take_step(run)

    monkeypatch.setattr(loop, "take_step", counting)
    torch._dynamo.reset()
    counters.clear()
    config = tiny_config(tiny_data, tmp_path / "run", steps=20, compile=True, loss=loss)
    run(sampling(dataclasses.replace(config, validate=dataclasses.replace(config.validate, every=5))), ALONE)
    assert len([row for row in rows(tmp_path / "run") if "val_loss" in row]) == 5
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 4
    # Blocks and the last norm, the token losses: with and without gradients; the training loss.
    assert counts[0] <= 7
    assert counts == counts[:1] * 20
    assert graphs_compiled() == counts[0], "the last samples or validation compiled something"


def test_garbage_is_collected_between_steps_only(tiny_data: Path, tmp_path: Path) -> None:
    """No collection starts by itself while steps run; each boundary asks for one; then all is as before."""
    by_whom: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and not gc.isenabled():
            frame = sys._getframe(1)
            by_whom.append(frame.f_code.co_name)

    assert gc.isenabled()
    gc.callbacks.append(note)
    try:
        run(tiny_config(tiny_data, tmp_path / "run"), ALONE)
    finally:
        gc.callbacks.remove(note)
    assert by_whom == ["train"] * 6  # steps 10, 20, 25, 30, 40 and 50: saves and validations
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_steps_leave_no_cycles_behind(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else memory would grow until the next boundary."""
    found: list[int] = []
    take_step = loop.take_step

    def counting(run: loop.Run) -> loop.Report:
        found.append(gc.collect())
        return take_step(run)

    monkeypatch.setattr(loop, "take_step", counting)
    run(tiny_config(tiny_data, tmp_path / "run", steps=9), ALONE)
    assert found[2:] == [0] * 7


def test_samples_are_the_same_after_a_resume_and_do_not_touch_training(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_config(tiny_data, tmp_path / "silent", steps=20), ALONE)
    whole = sampling(tiny_config(tiny_data, tmp_path / "whole", steps=20))
    run(whole, ALONE)
    assert curve(tmp_path / "whole") == curve(tmp_path / "silent")
    drawn = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in drawn] == [5, 10, 15, 20]
    assert [sample["prompt"] for sample in drawn[0]["samples"]] == ["The ", "a", ""]
    assert all(len(sample["text"]) == 12 for row in drawn for sample in row["samples"])

    resumed = dataclasses.replace(whole, run_dir=tmp_path / "resumed")
    take_step = loop.take_step

    def stopping(this: loop.Run) -> loop.Report:
        if this.progress.step == 11:
            this.stops.reason = "test"  # as a signal would
        return take_step(this)

    monkeypatch.setattr(loop, "take_step", stopping)
    run(resumed, ALONE)
    monkeypatch.setattr(loop, "take_step", take_step)
    assert status(tmp_path / "resumed")["state"] == "stopped"
    run(resumed, ALONE)
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "resumed")]
    assert samples[0] == samples[1]


def test_a_prompt_that_cannot_be_encoded_is_refused_before_training(tiny_data: Path, tmp_path: Path) -> None:
    line = [sys.executable, "train/main.py", *tiny_flags(tiny_data, tmp_path / "run"), "--sample.prompts", "caf\u00e9"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--sample.prompts 'caf\u00e9'" in done.stderr


def test_an_out_of_memory_error_ends_with_what_to_set(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.53 GiB.")

    monkeypatch.setattr(train_losses, "plain_loss", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(tiny_config(tiny_data, tmp_path / "run"), ALONE)
    (note,) = caught.value.__notes__
    for flag in ("--train.micro-batch 3 (or auto)", "--train.loss chunked", "--train.activation-checkpointing"):
        assert flag in note
    assert "OutOfMemoryError: CUDA out of memory" in status(tmp_path / "run")["reason"]
    least = tiny_config(tiny_data, tmp_path / "least", micro_batch=1, loss="chunked", activation_checkpointing=True)
    monkeypatch.setattr(train_losses, "chunk_loss", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(least, ALONE)
    assert "set a smaller --train.seq-len or a smaller model" in caught.value.__notes__[0]


def test_the_command_says_how_long_it_took_to_the_first_step_and_traces(tiny_data: Path, tmp_path: Path) -> None:
    """The command line end to end, with a trace and offline tracking."""
    line = [sys.executable, "train/main.py", *tiny_flags(tiny_data, tmp_path / "run"), "--train.steps", "12"]
    line += ["--trace", "4:6", "--track.wandb", "offline", "--sample.every", "6", "--sample.tokens", "5"]
    done = subprocess.run(line, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "first step done after" in done.stdout and "imports" in done.stdout
    assert (tmp_path / "run" / "traces" / "steps_4_6_rank0.json.gz").is_file()
    assert "aten::" in done.stdout
    sync = next(text for text in done.stdout.splitlines() if "wandb sync" in text)
    saved = next((tmp_path / "run" / "checkpoints").glob("step_*/state.json"))
    assert json.loads(saved.read_text())["wandb_id"] in sync
    assert "--trace 5:2: needs FIRST:END" in refused("--trace", "5:2")


def refused(*flags: str) -> str:
    line = [sys.executable, "train/main.py", "shakespeare-char-cpu", *flags]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False).stderr
