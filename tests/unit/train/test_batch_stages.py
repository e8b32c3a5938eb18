"""--train.batch-stages: the length of a run, the shares of its steps, and what is refused."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from data_prep.manifest import open_split
from launch.sweeps import build_sweep
from tests.helpers.runs import called, tiny_config, tiny_flags
from train.config import Config, TrainConfig
from train.config_checks import faults_of
from train.data import BatchPlan, Prefetcher, TrainingSequences, plan_batches
from train.main import main
from train.run.identity import differing

STAGES = ("3:768", "7:1152")  # sequences of 32: 12 in steps 0 to 2, 24 in steps 3 to 6, 36 from step 7 on
STARTS = [0, 12, 24, 36, 60, 84, 108, 132, 168, 204]


def staged(data: Path, *stages: str, **train: int) -> Config:
    return tiny_config(data, Path("unused"), **({"steps": 10} | train), batch_stages=stages)


def test_steps_and_tokens_agree_with_counting() -> None:
    train = TrainConfig(batch_tokens=384, batch_stages=STAGES, seq_len=32)
    sizes = [384] * 3 + [768] * 4 + [1152] * 5
    ends = list(itertools.accumulate(sizes))
    for steps, end in enumerate(ends, start=1):
        assert train.steps_of(end) == steps and train.steps_of(end - 1) == steps - 1
        if steps > 7:  # fewer are refused
            assert dataclasses.replace(train, steps=steps).total_tokens == end
    plain = TrainConfig(batch_tokens=384, steps=5)
    assert (plain.total_tokens, plain.steps_of(1920), plain.steps_of(1919)) == (1920, 5, 4)


def test_a_plan_holds_from_its_position_on(tiny_data: Path) -> None:
    plan = plan_batches(staged(tiny_data, *STAGES), 2)
    assert plan.later == ((36, BatchPlan(24, 12, 6, 2)), (132, BatchPlan(36, 18, 6, 3)))
    assert dataclasses.replace(plan, later=()) == BatchPlan(12, 6, 6, 1)
    assert [plan.at(position).sequences for position in STARTS] == [12] * 3 + [24] * 4 + [36] * 3
    assert plan.largest_accumulation == 3 and plan.micro_batches_that_fit == [1, 2, 3, 6]
    assert plan_batches(staged(tiny_data, "3:768"), 1).micro_batches_that_fit == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_read_each_sequence_of_every_step_once(tiny_data: Path, world: int) -> None:
    """Read ahead over the borders, and after a seek to any step."""
    sequences = TrainingSequences(open_split(tiny_data, "train"), 32, seed=7)
    plan = plan_batches(staged(tiny_data, *STAGES, micro_batch=2), world)
    ranks = [Prefetcher(sequences, plan, rank=rank, device=torch.device("cpu")) for rank in range(world)]
    for position in [*STARTS, 24, 132, 0]:
        expected = sequences.read(sequences.ids_at(position, plan.at(position).sequences))
        parts = [batches.take(position) for batches in ranks]
        assert all(inputs_BT.shape == (2, 32) for part in parts for inputs_BT, _ in part)
        for index, whole in enumerate(expected):
            assert torch.equal(torch.cat([batch[index] for part in parts for batch in part]), whole)
        ids = ranks[0].sequence_ids(position)
        assert ids == [number for batches in ranks for number in batches.own_ids(position)]
        assert ids == sequences.ids_at(position, plan.at(position).sequences)
    for batches in ranks:
        batches.close()


def test_no_sequence_is_read_twice_across_a_border(tiny_data: Path) -> None:
    """What is read ahead is what the next step takes."""
    read: list[int] = []

    class Counting(TrainingSequences):
        def read(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            read.extend(ids)
            return super().read(ids)

    sequences = Counting(open_split(tiny_data, "train"), 32, seed=7)
    plan = plan_batches(staged(tiny_data, *STAGES), 1)
    batches = Prefetcher(sequences, plan, rank=0, device=torch.device("cpu"))
    for position in STARTS:
        batches.take(position)
    batches.close()
    assert len(read) >= 240 and read == sequences.ids_at(0, len(read)), "reading ahead may have begun the next step"


def test_tokens_that_cannot_be_read_become_as_many_zeros_as_the_stage_needs(tiny_data: Path) -> None:
    class Unreadable(TrainingSequences):
        def read(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            raise InputError("gone")

    plan = plan_batches(staged(tiny_data, *STAGES), 1)
    batches = Prefetcher(
        Unreadable(open_split(tiny_data, "train"), 32, seed=7), plan, rank=0, device=torch.device("cpu")
    )
    assert [len(batches.take(position)) for position in (0, 36, 132)] == [2, 4, 6] and batches.has_fault
    batches.close()


@pytest.mark.parametrize(
    ("stages", "world", "message"),
    [
        (("3:768", "7:800"), 1, "batch-stages 7:800 is not divisible by micro_batch 6 x seq_len 32 x 1 ranks = 192; "
         "try --train.micro-batch 1 or --train.batch-stages 7:768 or 960"),
        (("3:800",), 2, "--train.batch-stages 3:800 is 25 sequences of 32, which 2 processes do not share evenly; try "
         "1 processes, or --train.batch-stages 3:768 or 832"),
        (("3:192",), 4, "--train.batch-stages 3:192 is 6 sequences of 32, which 4 processes do not share evenly; try "
         "3 processes, or --train.batch-stages 3:128 or 256"),
    ],
)  # fmt: skip
def test_stages_that_do_not_divide_are_refused_with_numbers_that_do(
    tiny_data: Path, stages: tuple[str, ...], world: int, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        plan_batches(staged(tiny_data, *stages), world)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("5", "--train.batch-stages 5: needs STEP:TOKENS, both at least 1, as in --train.batch-stages 1000:524288"),
        ("0:768", "--train.batch-stages 0:768: needs STEP:TOKENS"),
        ("3:-768", "--train.batch-stages 3:-768: needs STEP:TOKENS"),
        ("3:0", "--train.batch-stages 3:0: needs STEP:TOKENS"),
        ("3:770", "--train.batch-stages 3:770 is not divisible by --train.seq-len 32; try 768 or 800"),
        ("7:768 3:1152", "3:1152 does not come after --train.batch-stages 7:768; give the stages in the order of"),
        ("3:768 3:1152", "--train.batch-stages 3:1152 does not come after --train.batch-stages 3:768"),
        ("10:768", "--train.batch-stages 10:768: the run has only 10 steps; leave it out or train longer"),
    ],
)
def test_other_stages_are_refused_in_one_line(tiny_data: Path, stages: str, message: str) -> None:
    flags = [*tiny_flags(tiny_data, Path("unused")), "--train.steps", "10", "--dry-run"]
    done = called(main, *flags, "--train.batch-stages", *stages.split())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and message in done.stderr, done.stderr


def test_stages_count_in_the_length_and_on_the_card(tiny_data: Path, tmp_path: Path) -> None:
    """14,000 tokens are 3 x 384 + 4 x 768 + 8 x 1,152, and 560 more."""
    flags = [*tiny_flags(tiny_data, tmp_path / "run"), "--train.batch-stages", *STAGES, "--dry-run"]
    done = called(main, *flags, "--train.tokens", "14000")
    assert done.returncode == 0, done.stderr
    assert (
        "step      384 tokens = 1 processes x 2 micro-batches x 6 sequences x 32\n"
        "          after 3 steps 768 tokens = 1 processes x 4 micro-batches x 6 sequences x 32\n"
        "          after 7 steps 1,152 tokens = 1 processes x 6 micro-batches x 6 sequences x 32\n"
        "length    15 steps = 13,440 tokens; "
    ) in done.stdout
    assert "0.75 epochs" in done.stdout
    late = called(main, *flags, "--train.tokens", "4300")
    assert late.returncode == 2 and "7:1152: the run has only 7 steps" in late.stderr


def test_other_stages_are_another_run_and_the_same_ones_are_not(tiny_data: Path) -> None:
    config = staged(tiny_data, *STAGES)
    recorded = json.loads(json.dumps(config.to_json()))
    assert differing(recorded, config.to_json()) == []
    (line,) = differing(recorded, staged(tiny_data, "3:768").to_json())
    assert line == "--train.batch-stages ['3:768'] (was ['3:768', '7:1152'])"
    del recorded["train"]["batch_stages"]  # as an older version wrote it
    assert differing(recorded, staged(tiny_data).to_json()) == []


def test_sweeps_that_count_in_steps_of_one_size_refuse_them(tiny_data: Path) -> None:
    for name in ("batch", "budget", "epochs"):
        with pytest.raises(InputError, match=f"{name}: its runs have one batch size each"):
            build_sweep(name, staged(tiny_data, *STAGES), data_tokens=1000)


def test_the_presets_have_no_faults_of_stages(tiny_data: Path) -> None:
    assert faults_of(staged(tiny_data, *STAGES)) == []
