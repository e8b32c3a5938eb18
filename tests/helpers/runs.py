"""Tiny runs: configuration, command line, and the results that tests compare."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any
from unittest import mock

import torch
from torch import Tensor

from data_prep.textfiles import Options, prepare
from model.checkpoint import list_checkpoints, read_tensors, step_of
from model.config import ModelConfig
from model.ladder import make_model
from tests.helpers.corpus import make_text
from train.config import (
    Config,
    DataConfig,
    OptimConfig,
    SampleConfig,
    SaveConfig,
    TrackConfig,
    TrainConfig,
    ValidateConfig,
    resolve,
)
from train.losses import LossModel
from train.optim import build_optimizer
from train.parallel.averaging import WeightAverage
from train.run.checkpoints import checkpoint_tensors

ROOT = Path(__file__).resolve().parents[2]


def make_tiny_data(folder: Path) -> Path:
    """Write a character data set of 20,000 generated characters in several shards, and return its folder."""
    (folder / "text.txt").write_text(make_text(20_000), encoding="utf-8")
    out = folder / "data"
    prepare(Options(input=(str(folder / "text.txt"),), out=out, tokenizer="char", shard_tokens=7_000))
    return out


def tiny_config(data: Path, run_dir: Path, **train: Any) -> Config:
    """Return a run of 2 layers, 32 wide, 12 sequences of 32 a step, clipping active; `train`: TrainConfig's fields."""
    defaults: dict[str, Any] = {
        "seq_len": 32,
        "steps": 50,
        "batch_tokens": 384,
        "micro_batch": 6,
        "dtype": "fp32",
        "compile": False,
    }
    config = Config(
        preset="tiny",
        run_dir=run_dir,
        data=DataConfig(data),
        model=ModelConfig(num_layers=2, num_heads=2, width=32),
        train=TrainConfig(**(defaults | train)),
        optim=OptimConfig(lr_peak=1e-2, warmup_steps=5, clip_norm=0.3),
        validate=ValidateConfig(every=25, tokens=1000),
        save=SaveConfig(every=10, keep=100),
        sample=SampleConfig(every=None),
        track=TrackConfig(every=1, wandb="disabled"),
    )
    return resolve(config)


def tiny_flags(data: Path, run_dir: Path) -> list[str]:
    """Return the same run as command-line flags on top of a preset."""
    return [
        "shakespeare-char-cpu",
        *("--data.dir", str(data), "--run-dir", str(run_dir)),
        *("--model.num-layers", "2", "--model.num-heads", "2", "--model.width", "32"),
        *("--train.seq-len", "32", "--train.batch-tokens", "384", "--train.micro-batch", "6"),
        *("--optim.lr-peak", "1e-2", "--optim.warmup-steps", "5", "--optim.clip-norm", "0.3"),
        *("--validate.every", "25", "--validate.tokens", "1000"),
        *("--save.every", "10", "--save.keep", "3", "--track.every", "1"),
    ]


def torchrun(
    world: int,
    *args: str,
    script: str = "train/main.py",
    launcher_flags: Sequence[str] = (),
    env: dict[str, str] | None = None,
    stdout: IO[str] | int = subprocess.PIPE,
) -> "subprocess.Popen[str]":
    """Start torchrun with train/main.py or another script, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *launcher_flags, script, *args]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        text=True,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def called(main: Callable[[list[str]], None], *args: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Call a command's main here, which saves a new interpreter's import of torch; return its output and status."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    # patch.dict restores the whole environment, also what the command itself sets in it.
    with mock.patch.dict(os.environ, env), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(args))
        except SystemExit as leaving:
            assert isinstance(leaving.code, int)
            status = leaving.code
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the rows of a JSONL file of a run; none if it does not exist."""
    path = run_dir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(run_dir: Path) -> list[tuple[int, float, float, float]]:
    """Return (step, loss, norm, lr) of each training row, which is all of it but timings."""
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows(run_dir) if "loss" in row]


def losses(run_dir: Path) -> Tensor:
    return torch.tensor([row["loss"] for row in rows(run_dir) if "loss" in row], dtype=torch.float64)


def validations(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["val_loss"], r["val_bits_per_byte"]) for r in rows(run_dir) if "val_loss" in r]


def final_tensors(run_dir: Path) -> dict[str, Tensor]:
    """Return weights and optimizer state of the newest checkpoint, by name."""
    return tensors_of(list_checkpoints(run_dir)[-1])


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Return weights and optimizer state of a checkpoint, by name."""
    saved = json.loads((checkpoint.parents[1] / "config.json").read_text())["config"]
    model, optim = make_model(ModelConfig(**saved["model"])), OptimConfig(**saved["optim"])
    optimizer = build_optimizer(model, optim)
    if optim.average_fraction is not None:
        optimizer.average = WeightAverage(LossModel(model, chunk_tokens=None), optim, saved["train"]["steps"])
    tensors = checkpoint_tensors(model, optimizer, step=step_of(checkpoint))
    read_tensors(checkpoint, tensors)
    return tensors


def assert_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def status(run_dir: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return value


def forget_checkpoints(run_dir: Path) -> None:
    """Make a run look as if its attempt had ended before its first checkpoint."""
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "status.json").write_text(json.dumps(status(run_dir) | {"state": "running", "step": 0}))


def with_save(config: Config, **save: Any) -> Config:
    return dataclasses.replace(config, save=dataclasses.replace(config.save, **save))
