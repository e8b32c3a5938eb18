"""The mean of the weights in every layout: saved, resumed, moved and used, and never saved for the weights."""

import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steps import opened_run
from common.errors import InputError
from data_prep.manifest import read_manifest
from model.checkpoint import load_model, model_tensors, read_state
from model.hf_bridge import main as bridge
from tests.distributed.test_exact import cut_back
from tests.distributed.test_modes import ONE, Layout, run_here
from tests.helpers.groups import kill_on_ranks, run_on_ranks
from tests.helpers.runs import (
    assert_same_tensors,
    called,
    curve,
    final_tensors,
    rows,
    status,
    tensors_of,
    tiny_config,
    validations,
    with_save,
)
from train import validate
from train.config import Config, SampleConfig, with_vocabulary
from train.evals import validation
from train.metrics.rows import read_lines
from train.parallel.apply import local
from train.processes.group import ProcessGroup
from train.run.checkpoint_files import seal, write_part

STEPS, FIRST = 20, 10  # the step after which the first averaged step is made
DECAY = 0.8
LAYOUTS = (ONE, Layout("fsdp", 1), Layout("ddp", 2), Layout("fsdp", 2))
OTHERS = (Layout("fsdp", 3), Layout("hsdp", 4, shard_size=2))  # rows that do not divide, and replicas of shards
ALONE = ProcessGroup(0, 1, torch.device("cpu"))


def configured(layout: Layout, data: Path, run_dir: Path) -> Config:
    config = with_save(tiny_config(data, run_dir, steps=STEPS), every=1)
    config = with_vocabulary(config, read_manifest(data).vocab_size)
    return replace(
        config,
        optim=replace(config.optim, average_fraction=0.5, average_decay=DECAY),
        validate=replace(config.validate, every=5),
        sample=SampleConfig(every=8, tokens=3),
        parallel=replace(config.parallel, mode=layout.mode, shard_size=layout.shard_size),
    )


def train_all(group: ProcessGroup, data: Path, folder: Path) -> None:
    """Train each layout of this world without a stop, from its own steps 8 and 15, and from step 15 of one process."""
    for layout in [layout for layout in (*LAYOUTS, *OTHERS) if layout.world == group.world]:
        if layout in LAYOUTS:
            run_here(group, configured(layout, data, folder / str(layout)))
        starts = [(ONE, 15)] if layout in OTHERS else [(layout, 8), (layout, 15), (ONE, 15)]
        for source, step in dict.fromkeys(starts):
            moved = configured(layout, data, folder / f"{layout}_from_{source}_{step}")
            group.on_main(partial(cut_back, folder / str(source), moved.directory, step=step))
            run_here(group, with_save(moved, every=5, mode="async"))


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaging")
    for world in (1, 2, 3, 4):
        run_on_ranks(world, train_all, tiny_data, folder)
    return folder


def checkpoint_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def means_in(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("average."): mean for name, mean in tensors.items() if name.startswith("average.")}


def assert_same_runs(run_dir: Path, reference: Path) -> None:
    assert curve(run_dir) == curve(reference)
    assert validations(run_dir) == validations(reference)
    assert_same_tensors(final_tensors(run_dir), final_tensors(reference))


def test_the_saved_mean_is_that_of_the_saved_weights(trained: Path) -> None:
    checkpoints = {step: tensors_of(checkpoint_of(trained / str(ONE), step)) for step in range(1, STEPS + 1)}
    for step, tensors in checkpoints.items():
        counts = {earlier: DECAY ** (step - earlier) for earlier in range(FIRST + 1, step + 1)}
        means = means_in(tensors)
        assert bool(means) == bool(counts)
        for name, mean in means.items():
            terms = [count * checkpoints[earlier][f"model.{name}"].double() for earlier, count in counts.items()]
            by_hand = torch.stack(terms).sum(0) / sum(counts.values())
            torch.testing.assert_close(mean.double(), by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_layouts_that_add_in_the_same_order_are_bitwise_equal(trained: Path, layout: Layout) -> None:
    assert_same_runs(trained / str(layout), trained / str(ONE))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("step", [8, 15])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(trained: Path, layout: Layout, step: int) -> None:
    assert_same_runs(trained / f"{layout}_from_{layout}_{step}", trained / str(ONE))


@pytest.mark.parametrize("layout", [*LAYOUTS[1:], *OTHERS], ids=str)
def test_a_mean_moves_to_another_layout(trained: Path, layout: Layout) -> None:
    moved = trained / f"{layout}_from_{ONE}_15"
    if layout in LAYOUTS:
        assert_same_runs(moved, trained / str(ONE))
    ours, theirs = final_tensors(moved), final_tensors(trained / str(ONE))
    assert ours.keys() == theirs.keys() and len(means_in(ours)) == 28
    for name, mean in means_in(ours).items():
        torch.testing.assert_close(mean, theirs[f"average.{name}"], rtol=0, atol=1e-5)


def test_what_reads_the_run_takes_the_mean_and_says_so(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    run_dir = trained / "fsdp2"
    tensors = final_tensors(run_dir)
    read = load_model(run_dir)
    assert read.is_averaged and not load_model(f"{run_dir}@{FIRST}").is_averaged
    names = [name.removeprefix("model.") for name in model_tensors(read.model)]
    assert_same_tensors(
        {name: tensor for name, tensor in read.model.state_dict().items() if name in names}, means_in(tensors)
    )
    assert any(not torch.equal(tensors[f"model.{name}"], mean) for name, mean in means_in(tensors).items())

    assert not read_lines(run_dir / "metrics.jsonl").damaged and not read_lines(run_dir / "samples.jsonl").damaged
    marked = {row["step"]: row.get("averaged") for row in rows(run_dir) if "val_loss" in row}
    assert marked == {0: None, 5: None, 10: None, 15: True, 20: True}
    assert [row.get("averaged") for row in rows(run_dir, "samples.jsonl")] == [None, True, True]
    log = (run_dir / "log.txt").read_text()
    assert ", mean of the weights over the last 50%" in log and log.count("  (mean of the weights)") == 4

    done = called(validate.main, str(run_dir), "--out", str(tmp_path / "results"))
    assert done.returncode == 0 and "at step 20, the mean of its weights" in done.stdout, done.stderr
    last = validations(run_dir)[-1]
    assert '"averaged": true' in done.stdout and f'"loss": {last[1]},' in done.stdout

    done = called(bridge, "export", str(run_dir), "--out", str(tmp_path / "out"), "--no-tokenizer")
    assert done.returncode == 0 and "step 20 of fsdp2, the mean of its weights" in done.stdout, done.stderr
    assert "an exponential mean over the last steps" in (tmp_path / "out" / "README.md").read_text()

    config = configured(ONE, tiny_data, tmp_path / "tuned")
    config = replace(config, optim=replace(config.optim, average_fraction=None, average_decay=None))
    run_on_ranks(1, run_here, replace(config, from_checkpoint=str(run_dir)))
    assert "step_00000020, the mean of its weights" in (tmp_path / "tuned" / "log.txt").read_text()
    assert validations(tmp_path / "tuned")[0] == (0, *last[1:])


def test_a_part_of_a_mean_is_refused_by_name(trained: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(trained / str(ONE), tmp_path / "run"))
    checkpoint, tensors = checkpoint_of(run_dir, 20), final_tensors(run_dir)
    state = read_state(checkpoint)
    del tensors["average.transformer.wpe.weight"]
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    seal(checkpoint, [write_part(checkpoint, tensors, 0)], state, is_first=True)
    with pytest.raises(InputError, match=r"average.transformer.wpe.weight is needed in shape \[32, 32\], but has none"):
        load_model(run_dir)


def losses_around(group: ProcessGroup, config: Config) -> list[float]:
    """Return a batch's loss with the weights, with the mean of other weights, and with the weights again."""
    tokens_BT, losses = torch.zeros((6, 32), dtype=torch.int64), list[float]()
    with opened_run(config, group) as (run, _):
        average, loss_model = run.state.optimizer.average, run.state.loss_model
        assert average is not None
        average.add(FIRST, torch.tensor(True))
        for parameter in loss_model.parameters():
            local(parameter.detach()).mul_(1.5)
        for weights in (nullcontext(), average.in_place_of_the_weights(), nullcontext()):
            with weights:
                losses.append(loss_model.token_losses(tokens_BT, tokens_BT).sum().item())
    return losses


def test_weights_that_fsdp2_has_gathered_are_exchanged_too(tiny_data: Path, tmp_path: Path) -> None:
    """The last block and the root stay gathered after a forward pass."""
    config = configured(Layout("fsdp", 2), tiny_data, tmp_path / "run")
    initial = run_on_ranks(1, losses_around, configured(ONE, tiny_data, tmp_path / "one"))[0]
    for before, inside, after in run_on_ranks(2, losses_around, config):
        assert before == after == initial[0] and inside == initial[1] != before


def test_a_killed_run_goes_on_bitwise(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    """kill -9 of both processes in the averaged part."""
    config = configured(Layout("ddp", 2), tiny_data, tmp_path / "run")
    kill_on_ranks(2, config.directory / "metrics.jsonl", b'"lr"', FIRST + 3, run_here, config)
    assert status(config.directory)["state"] == "running"
    run_on_ranks(2, run_here, config)
    assert_same_runs(config.directory, trained / str(ONE))


@pytest.mark.parametrize("how", ["stop", "error"])
def test_what_ends_an_evaluation_leaves_the_weights_themselves(
    trained: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """SIGTERM while the mean lies in the weights' place, and data that cannot be read then."""
    config = configured(ONE, tiny_data, tmp_path / "run")
    evaluate = validation.validate

    def interrupted(*args: Any) -> Any:
        if len(curve(config.directory)) == 15 and how == "error":
            raise InputError("unreadable")
        if len(curve(config.directory)) == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "validate", interrupted)
        if how == "error":
            with pytest.raises(InputError, match="unreadable"):
                run_here(ALONE, config)
        else:
            run_here(ALONE, config)
            assert status(config.directory)["state"] == "stopped"
            saved, expected = (tensors_of(checkpoint_of(run, 15)) for run in (config.directory, trained / str(ONE)))
            assert_same_tensors(saved, expected)
    run_here(ALONE, config)
    assert_same_runs(config.directory, trained / str(ONE))


def test_another_average_is_another_run(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    cut_back(trained / str(ONE), tmp_path / "run", step=15)
    config = configured(ONE, tiny_data, tmp_path / "run")
    with pytest.raises(InputError, match=r"--optim.average-decay 0.9 \(was 0.8\)"):
        run_here(ALONE, replace(config, optim=replace(config.optim, average_decay=0.9)))
