"""Damage to any one file of a run: the run goes on bit for bit, or one line says what to do. Never anything else."""

import dataclasses
import functools
import json
import os
import random
import resource
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import one_line_errors
from tests.helpers.damage import damage, reseal
from tests.helpers.runs import assert_same_tensors, called, curve, final_tensors, make_tiny_data, rows
from train.command_line import parse
from train.config import Config
from train.main import main, run
from train.presets import PRESETS
from train.processes.group import open_process_group

FIXED = settings(
    deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
STEPS = 12
MOST_BYTES = 8 * 2**30  # of address space, torch included
SECONDS = 60  # in which a start ends, or hangs
NOBODY = 65534
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where a flush costs nothing


class Case(NamedTuple):
    """A folder with a run that was killed before step 12 was saved, and how it ends undisturbed."""

    folder: Path
    curve: list[tuple[int, float, float, float]]
    samples: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def flags(folder: Path) -> list[str]:
    return [
        *("shakespeare-char-cpu", "--run-dir", str(folder / "run"), "--data.dir", str(folder / "data")),
        *("--model.num-layers", "1", "--model.num-heads", "2", "--model.width", "16", "--train.seq-len", "16"),
        *("--train.batch-tokens", "64", "--train.micro-batch", "4", "--train.steps", str(STEPS)),
        *("--optim.lr-peak", "1e-2", "--optim.warmup-steps", "2", "--validate.every", "4", "--validate.tokens", "64"),
        *("--save.every", "4", "--save.keep", "3", "--track.every", "1", "--track.wandb", "disabled"),
        *("--sample.every", "4", "--sample.tokens", "4", "--sample.prompts", "a"),
    ]


def start(folder: Path) -> None:
    main(flags(folder))


def start_without_parsing(folder: Path) -> None:
    """Do as `start` does, but parse the flags once for all folders: that is a third of a start here."""
    with one_line_errors("train"):
        config = parsed()
        data = dataclasses.replace(config.data, dir=folder / "data")
        config = dataclasses.replace(config, run_dir=folder / "run", data=data)
        with open_process_group(config.parallel.init_timeout_seconds, config.directory) as group:
            run(config, group)


@functools.cache
def parsed() -> Config:
    return parse(flags(Path()), PRESETS)


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    # Not below pytest's own folder, which nobody but its owner may enter.
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        folder.chmod(0o755)
        run_dir = folder / "run"
        make_tiny_data(folder)
        whole = called(main, *flags(folder))
        assert whole.returncode == 0, whole
        case = Case(folder, curve(run_dir), rows(run_dir, "samples.jsonl"), final_tensors(run_dir))
        shutil.rmtree(run_dir / "checkpoints" / f"step_{STEPS:08d}")
        (run_dir / "status.json").write_text('{"state": "running", "step": 8, "reason": null, "attempt": 1}\n')
        holder = {"host": socket.gethostname(), "pid": 1, "started": "another process", "job": None}
        (run_dir / "lock.json").write_text(json.dumps(holder) + "\n")
        (run_dir / "submitted.json").write_text('{"job": null, "args": []}\n')
        yield case


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def give_up(number: int, frame: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

    previous, memory = signal.signal(signal.SIGALRM, give_up), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, memory[1]))  # a device is read for ever
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Give a folder to a user for whom permissions count, and be that user; root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    for path in [folder, *folder.rglob("*")]:
        os.lchown(path, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def files_of(folder: Path) -> list[str]:
    """Return every file of the run and of its data."""
    files = [path for name in ("run", "data") for path in (folder / name).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in files)


def start_after_damage(case: Case, rng: random.Random, start: Callable[[Path], None]) -> None:
    """Damage a file and start the run; raise AssertionError unless it goes on bit for bit or says why not."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder, outside = Path(name) / "here", Path(name) / "outside"
        Path(name).chmod(0o755)
        outside.mkdir()
        shutil.copytree(case.folder, folder)
        run_dir = folder / "run"
        path = folder / rng.choice(files_of(case.folder))
        how = damage(path, rng, outside)
        sealed = path.name in ("state.json", ".metadata") and path.is_file() and how != "unreadable"
        if sealed and rng.random() < 0.5:
            reseal(path.parent)
            how += ", under correct hashes"
        if path.name == "lock.json" and path.is_file():
            os.utime(path, (0, 0))  # or the start waits a minute for a heartbeat
        with limited(SECONDS), as_nobody(Path(name)) if how == "unreadable" else nullcontext():
            done = called(lambda _: start(folder))
        context = f"{path.relative_to(folder)}, {how}: status {done.returncode}\n{done.stderr}\n{done.stdout[-500:]}"
        assert "Traceback" not in done.stdout + done.stderr, context
        if done.returncode != 0:
            lines = done.stderr.splitlines()
            assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("train: "), context
            return
        assert_same_tensors(final_tensors(run_dir), case.tensors)
        if "warning" not in done.stdout:
            assert curve(run_dir) == case.curve, context
            assert rows(run_dir, "samples.jsonl") == case.samples, context


@pytest.mark.timeout(600)
@settings(FIXED, max_examples=200)
@given(st.randoms(use_true_random=True))
def test_a_run_with_one_damaged_file_goes_on_bitwise_or_says_why_not(case: Case, rng: random.Random) -> None:
    start_after_damage(case, rng, start)


@pytest.mark.long(reason="2,000 cases; the test before has 200 in `make test`")
@pytest.mark.timeout(1800)
@settings(FIXED, max_examples=2000)
@given(st.integers(0, 2**64))
def test_two_thousand_damages(case: Case, number: int) -> None:
    start_after_damage(case, random.Random(number), start_without_parsing)
