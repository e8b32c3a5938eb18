"""Steps that are not finite: all ranks agree, the sequence is named, the run stops or skips, nothing before is lost."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from data_prep.manifest import open_split
from model.checkpoint import list_checkpoints, step_of
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, rows, status, tiny_config, with_save
from train import optim
from train.config import Config
from train.data import TrainingSequences
from train.guards import nonfinite
from train.guards.nonfinite import NonFiniteError
from train.losses import LossModel
from train.main import run
from train.processes.group import ProcessGroup

STEPS = 20
BAD_STEP = 13  # reads positions 144 to 155


def sequences_of(data: Path) -> TrainingSequences:
    return TrainingSequences(open_split(data, "train"), 32, seed=1337)


def bad_sequence(data: Path) -> int:
    """Return the eighth sequence of the bad step: in one process in the second micro-batch, of two on the second."""
    return sequences_of(data).ids_at((BAD_STEP - 1) * 12, 12)[7]


def poisoned(bad_T: Tensor, by: tuple[float, float]) -> Callable[..., Tensor]:
    """Return LossModel.forward with (scaled loss, loss) times `by` if the sequence is among the inputs."""
    sound = LossModel.forward

    def forward(self: LossModel, inputs_BT: Tensor, targets_BT: Tensor, scale: Tensor, *seeds: Tensor) -> Tensor:
        loss = sound(self, inputs_BT, targets_BT, scale, *seeds)
        return loss * torch.tensor(by) if (inputs_BT == bad_T).all(dim=1).any() else loss

    return forward


def train_poisoned(group: ProcessGroup, config: Config, by: tuple[float, float] = (math.inf, math.inf)) -> str:
    """Train with one bad sequence and return the error that ended the run."""
    inputs_BT, _ = sequences_of(config.data.dir).read([bad_sequence(config.data.dir)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossModel, "forward", poisoned(inputs_BT[0], by))
        try:
            run(config, group)
        except NonFiniteError as error:
            return str(error)
    return "no error"


def train(group: ProcessGroup, *configs: Config) -> None:
    for config in configs:
        run(config, group)


def tiny(data: Path, run_dir: Path, **changes: Any) -> Config:
    return tiny_config(data, run_dir, steps=STEPS, **changes)


def in_mode(config: Config, mode: Literal["auto", "fsdp"]) -> Config:
    return replace(config, parallel=replace(config.parallel, mode=mode))


def noted_steps(run_dir: Path) -> list[dict[str, Any]]:
    return rows(run_dir, "nonfinite.jsonl")


one_and_two = pytest.mark.parametrize(("world", "mode"), [(1, "auto"), (2, "fsdp")])


@one_and_two
def test_a_run_stops_at_a_bad_step_with_everything_before_it_saved(
    tiny_data: Path, tmp_path: Path, world: int, mode: Literal["auto", "fsdp"]
) -> None:
    config = in_mode(with_save(tiny(tiny_data, tmp_path / "run"), mode="async"), mode)
    outcomes = run_on_ranks(world, train_poisoned, config)
    assert len(set(outcomes)) == 1 and "\n" not in outcomes[0]
    bad = bad_sequence(tiny_data)
    assert outcomes[0].startswith(
        "step 13: loss inf, gradient norm nan; its update was not made, and step 12 is saved."
    )
    assert f"Not finite by themselves: sequences {bad}; to read them: python data_prep/verify.py" in outcomes[0]
    assert f"--seq-len 32 --sequence {bad}; to skip them: --data.skip-sequences {bad};" in outcomes[0]
    ended = status(tmp_path / "run")
    assert ended["state"] == "failed" and ended["step"] == 12 and "step 13: loss inf" in ended["reason"]
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [10, 12]
    assert [step for step, *_ in curve(tmp_path / "run")] == list(range(1, 13))
    (noted,) = noted_steps(tmp_path / "run")
    assert (noted["step"], noted["suspects"], noted["attempt"]) == (13, [bad], 1) and len(noted["sequences"]) == 12
    # The saved state is the one before the bad step: without the fault it goes on as a run that never had one.
    whole = in_mode(tiny(tiny_data, tmp_path / "whole"), mode)
    run_on_ranks(world, train, config, whole)
    assert curve(tmp_path / "run") == curve(whole.directory)
    assert_same_tensors(final_tensors(tmp_path / "run"), final_tensors(whole.directory))


@one_and_two
def test_skip_skips_a_gradient_that_is_not_finite(
    tiny_data: Path, tmp_path: Path, world: int, mode: Literal["auto", "fsdp"]
) -> None:
    config = in_mode(tiny(tiny_data, tmp_path / "run", on_nonfinite="skip"), mode)
    assert set(run_on_ranks(world, train_poisoned, config, (math.inf, 1.0))) == {"no error"}
    steps = {row["step"]: row for row in rows(tmp_path / "run") if "loss" in row}
    assert [step for step, row in steps.items() if row["grad_norm"] is None] == [BAD_STEP]
    assert all(math.isfinite(row["loss"]) for row in steps.values()) and len(steps) == STEPS
    assert steps[STEPS]["loss"] < steps[1]["loss"] and status(tmp_path / "run")["state"] == "done"
    (noted,) = noted_steps(tmp_path / "run")
    assert noted["sequences"] == sequences_of(tiny_data).ids_at((BAD_STEP - 1) * 12, 12)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("(--train.on-nonfinite skip); its sequences are in nonfinite.jsonl") == 1


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_sequence_whose_gradient_alone_is_not_finite_is_named(
    tiny_data: Path, tmp_path: Path, dropout: float
) -> None:
    """Two ranks have two micro-batches each, and every loss is finite."""
    config = in_mode(tiny(tiny_data, tmp_path / "run", micro_batch=3), "fsdp")
    config = replace(config, model=replace(config.model, dropout=dropout))
    (outcome,) = set(run_on_ranks(2, train_poisoned, config, (math.inf, 1.0)))
    assert re.match(r"step 13: loss \d\.\d+, gradient norm (nan|inf); ", outcome)
    assert f"Not finite by themselves: sequences {bad_sequence(tiny_data)}; " in outcome


def test_weights_that_are_not_finite_are_not_blamed_on_sequences(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a batch of zeros is not finite then either."""
    sound = optim.update

    def spoil(optimizer: optim.Optimizer, *args: Any) -> None:
        sound(optimizer, *args)
        if next(iter(optimizer.state.values()))["step"] == BAD_STEP - 1:
            optimizer.groups[0].parameters[0].data[0, 0] = math.nan

    monkeypatch.setattr(optim, "update", spoil)
    with pytest.raises(NonFiniteError, match=r"step 13: loss nan.* No sequence of it is the cause by itself"):
        run(tiny(tiny_data, tmp_path / "run"), ProcessGroup(0, 1, torch.device("cpu")))
    (noted,) = noted_steps(tmp_path / "run")
    assert noted["suspects"] == []


def test_skipping_ends_if_every_step_is_bad(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "MOST_IN_A_ROW", 4)
    sound = LossModel.forward
    monkeypatch.setattr(LossModel, "forward", lambda *args: sound(*args) * math.nan)
    with pytest.raises(NonFiniteError, match=r"step 4: loss nan.* nor were those of the 3 before it"):
        run(tiny(tiny_data, tmp_path / "run", on_nonfinite="skip"), ProcessGroup(0, 1, torch.device("cpu")))
    assert status(tmp_path / "run")["state"] == "failed"
    # Step 5 had begun. It is saved, so that the same command goes on after the bad steps.
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [5]
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "run")[1:]] == [(n, None) for n in range(1, 6)]


def test_fp16_keeps_its_scale_when_it_stops(tiny_data: Path, tmp_path: Path) -> None:
    """The loss itself is not finite, so that no scale helps; the scale before it is saved."""
    alone = ProcessGroup(0, 1, torch.device("cpu"))
    config = tiny(tiny_data, tmp_path / "run", dtype="fp16")
    assert train_poisoned(alone, config).startswith("step 13: loss inf")
    run(config, alone)
    run(tiny(tiny_data, tmp_path / "whole", dtype="fp16"), alone)
    kept, whole = ([row["loss_scale"] for row in rows(tmp_path / name) if "loss" in row] for name in ("run", "whole"))
    assert kept == whole
    assert_same_tensors(final_tensors(tmp_path / "run"), final_tensors(tmp_path / "whole"))
