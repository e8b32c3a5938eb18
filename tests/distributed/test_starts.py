"""Starts at scale: all ranks together read a checkpoint once, draw no weights for nothing, and fail as one."""

import math
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.steps import opened_run
from common.errors import InputError
from model import dcp_reader
from model.checkpoint import fault_of, list_checkpoints, load_model, model_tensors
from model.dcp_reader import read_description
from model.hf_bridge import write_folder
from tests.distributed.test_modes import assert_parts_of
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import tensors_of, tiny_config, with_save
from train.config import Config, ParallelConfig, with_vocabulary
from train.main import run
from train.parallel import apply
from train.parallel.apply import local
from train.processes.group import ProcessGroup
from train.run import resume
from train.run.checkpoints import checkpoint_tensors
from train.run.resume import SoundCheckpoint, open_together

LAYOUTS = {
    "ddp": (3, ParallelConfig(mode="ddp")),
    "fsdp": (2, ParallelConfig(mode="fsdp")),
    "hsdp": (4, ParallelConfig(mode="hsdp", shard_size=2)),
}
Opened = Counter[str]


def configured(data: Path, run_dir: Path, mode: str) -> Config:
    """Return a run of 10 steps whose vocabulary gives FSDP2 ranks shards of different sizes."""
    config = tiny_config(data, run_dir, steps=10, batch_tokens=384, micro_batch=1)
    return replace(config, parallel=LAYOUTS[mode][1])


def count_opened(folder: Path) -> Opened:
    """Return a counter of the files under `folder` that this process opens from now on, whoever opens them."""
    opened: Opened = Counter()

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, Path)) and Path(args[0]).parent == folder:
            opened[Path(args[0]).name] += 1

    sys.addaudithook(note)  # nothing can remove it, but this process ends soon
    return opened


def fill_with_nan(patch: pytest.MonkeyPatch) -> None:
    """Let new parameters hold NaN until they are filled, and refuse to draw them."""
    to_empty = nn.Module.to_empty

    @torch.no_grad()
    def to_nan(module: nn.Module, **kwargs: Any) -> nn.Module:
        to_empty(module, **kwargs)
        for parameter in module.parameters():
            local(parameter).fill_(math.nan)
        return module

    patch.setattr(nn.Module, "to_empty", to_nan)
    patch.setattr(apply, "init_weights", lambda *args, **kwargs: pytest.fail("weights were drawn"))


def train_all(group: ProcessGroup, config: Config) -> None:
    run(config, group)


def resume_and_count(group: ProcessGroup, config: Config) -> tuple[Opened, Counter[int]]:
    """Continue a run, compare all of its tensors, and return the opened files and the lengths of the parts read."""
    checkpoint = list_checkpoints(config.directory)[-1]
    expected = tensors_of(checkpoint)
    lengths: Counter[int] = Counter()
    saved_tensor = dcp_reader.saved_tensor

    def counted(content: bytes) -> torch.Tensor:
        lengths[len(content)] += 1
        return saved_tensor(content)

    opened = count_opened(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        fill_with_nan(patch)
        patch.setattr(dcp_reader, "saved_tensor", counted)
        with opened_run(with_vocabulary(config, 33), group) as (this, _):
            assert this.state.progress.step == 10
            assert_parts_of(expected, checkpoint_tensors(this.state.model, this.state.optimizer))
    return opened, lengths


@pytest.mark.parametrize("mode", LAYOUTS)
def test_all_ranks_together_read_a_checkpoint_once(tiny_data: Path, tmp_path: Path, mode: str) -> None:
    config = configured(tiny_data, tmp_path / "run", mode)
    world = LAYOUTS[mode][0]
    run_on_ranks(world, train_all, config)
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    places = read_description(checkpoint).storage_data.values()
    outcomes = run_on_ranks(world, resume_and_count, config)

    assert sum((lengths for _, lengths in outcomes), Counter()) == Counter(place.length for place in places)
    most = max(sum(length * count for length, count in lengths.items()) for _, lengths in outcomes)
    assert most < 1.3 / world * sum(place.length for place in places)
    others = [opened for opened, _ in outcomes[1:]]
    small = [".metadata", "state.json", "SHA256SUMS"]
    assert all(opened[name] <= 1 for opened in others for name in small), "hashed by one rank, read by rank 0"
    assert sum(opened[".metadata"] for opened, _ in outcomes) == 2
    data_files = {path.name for path in checkpoint.glob("*.distcp")}
    assert len(data_files) == world
    for name in data_files:
        assert sum(opened[name] for opened, _ in outcomes) <= world + 1, "once to be hashed, once by each that reads"


def begin_with(group: ProcessGroup, config: Config, names: list[str], run_dir: Path) -> list[Opened]:
    """Begin with the weights of each name, compare them, and return the files of its folder that were opened."""
    all_opened = []
    for number, name in enumerate(names):
        expected = model_tensors(load_model(name).model)
        this_config = replace(config, run_dir=run_dir / str(number), from_checkpoint=name)
        all_opened.append(count_opened(Path(name)))
        with pytest.MonkeyPatch.context() as patch:
            fill_with_nan(patch)
            with opened_run(with_vocabulary(this_config, 33), group) as (this, _):
                assert_parts_of(expected, model_tensors(this.state.model))
    return all_opened


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_one_rank_reads_other_weights_for_all(tiny_data: Path, tmp_path: Path, mode: str) -> None:
    pytest.importorskip("safetensors")
    run(tiny_config(tiny_data, tmp_path / "old", steps=10), ProcessGroup(0, 1, torch.device("cpu")))
    write_folder(load_model(tmp_path / "old"), tmp_path / "folder")
    config = configured(tiny_data, tmp_path / "new", mode)
    names = [f"{tmp_path}/old@10", str(tmp_path / "folder")]
    opened = run_on_ranks(LAYOUTS[mode][0], begin_with, config, names, tmp_path / "runs")
    assert opened[0][1]["config.json"] == 1
    assert not any(opened_folder for _, opened_folder in opened[1:])


def note_communication(group: ProcessGroup, config: Config) -> tuple[int, set[str]]:
    """Train with asynchronous saves; return the number of process groups and the threads that communicated."""
    threads = set()

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            threads.add(threading.current_thread().name)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "all_reduce",
            "all_gather_object",
            "gather_object",
            "broadcast_object_list",
            "scatter_object_list",
        ):
            patch.setattr(dist, name, noted(getattr(dist, name)))
        run(config, group)
    return len(dist.distributed_c10d._world.pg_map), threads


def test_saves_need_no_process_group_and_their_threads_do_not_communicate(tiny_data: Path, tmp_path: Path) -> None:
    """The steps and what the ranks agree on use the same group meanwhile, in the order of the main threads."""
    config = with_save(configured(tiny_data, tmp_path / "run", "ddp"), every=2, mode="async")
    assert run_on_ranks(2, note_communication, config) == [(1, {"MainThread"})] * 2
    assert all(fault_of(path) is None for path in list_checkpoints(tmp_path / "run"))


def fail_on(group: ProcessGroup, rank: int, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise InputError("odd/file: cannot be read (Input/output error)")

    if group.rank == rank:
        patch.setattr(owner, name, refuse)


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except InputError as error:
        return str(error)
    return "no error"


def resume_with_faults(group: ProcessGroup, config: Config) -> tuple[list[str], str, str]:
    """Return the errors if one rank alone cannot read or hash, and what is found in a damaged checkpoint."""
    errors = []
    for owner, name in ((dcp_reader, "saved_tensor"), (resume, "require_hashes")):
        with pytest.MonkeyPatch.context() as patch:
            fail_on(group, 1, patch, owner, name)
            errors.append(error_of(lambda: run(config, group)))
    newest, before = list_checkpoints(config.directory)[:-3:-1]

    def damage() -> None:
        path = newest / "__1_0.distcp"
        path.write_bytes(path.read_bytes().replace(b"torch", b"hctor"))

    group.on_main(damage)
    found = open_together(newest, group)
    sound = open_together(before, group)
    assert isinstance(found, str) and isinstance(sound, SoundCheckpoint)
    return errors, found, sound.path.name


def test_a_fault_that_one_rank_meets_is_every_ranks(tiny_data: Path, tmp_path: Path) -> None:
    """A rank that cannot read stops the run, in place of a return to an earlier checkpoint; damage does not."""
    config = configured(tiny_data, tmp_path / "run", "ddp")
    config = replace(config, save=replace(config.save, every=5))
    run_on_ranks(3, train_all, config)
    outcomes = run_on_ranks(3, resume_with_faults, config)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    (reading, hashing), found, before = outcomes[0]
    error = "odd/file: cannot be read (Input/output error)"
    assert reading.startswith("rank 1: ") and reading.endswith(error)
    assert hashing == f"rank 1: {error}; rank 0 reads it well: mend the storage of that rank's host"
    assert found == fault_of(tmp_path / "run" / "checkpoints" / "step_00000010") and "__1_0.distcp is damaged" in found
    assert before == "step_00000005"
