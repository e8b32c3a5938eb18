"""What a step of each layout communicates, counted as it happens and held against the formula."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.steps import opened_run
from data_prep.manifest import read_manifest
from model.config import ModelConfig
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import tiny_config
from tests.unit.model.test_switches import MODERN
from train.config import Config, ParallelConfig, ValidateConfig, resolve, with_vocabulary
from train.loop import Run, evaluate, read_result, take_step
from train.parallel.communication import Collectives, Communication, step_communication
from train.parallel.plan import ParallelPlan
from train.parallel.precision import compute_dtype
from train.processes.group import ProcessGroup

ODD = ModelConfig(num_layers=3, num_heads=1, width=31)  # in blocks nearly no parameter's rows divide by 2, 4 or 8
WIDE = ModelConfig(num_layers=3, num_heads=8, width=512)  # more gradients than two of DDP's buckets hold

SWITCHED = ModelConfig(num_layers=3, num_heads=1, width=30, **MODERN)

ALL_GATHER = torch.ops.c10d._allgather_base_
REDUCE_SCATTER = torch.ops.c10d._reduce_scatter_base_
ALL_REDUCE = torch.ops.c10d.allreduce_


@dataclass(frozen=True)
class Case:
    mode: Literal["none", "ddp", "fsdp", "hsdp"]
    micro_batches: int
    reshard: bool = True
    reduce_gradients: Literal["step", "micro_batch"] = "step"
    dtype: Literal["fp32", "bf16"] = "fp32"
    model: ModelConfig = ODD
    checkpointing: bool = False

    def __str__(self) -> str:
        said = [self.mode, str(self.micro_batches), self.dtype, f"{self.model.width}wide"]
        if self.mode in ("fsdp", "hsdp"):
            said += [self.reduce_gradients, "reshard" if self.reshard else "keep"]
        return "-".join([*said, "checkpointing"] if self.checkpointing else said)

    def config(self, data: Path, run_dir: Path, world: int, shard_size: int) -> Config:
        """Three sequences for each rank; a validation after each step, in three rounds where the data suffice."""
        micro_batch = 3 // self.micro_batches
        config = tiny_config(
            data,
            run_dir,
            micro_batch=micro_batch,
            batch_tokens=3 * world * 32,
            dtype=self.dtype,
            activation_checkpointing=self.checkpointing,
        )
        parallel = ParallelConfig(
            mode=self.mode,
            shard_size=shard_size if self.mode == "hsdp" else None,
            reshard_after_forward=self.reshard,
            reduce_gradients=self.reduce_gradients,
        )
        validate = ValidateConfig(every=1, tokens=5 * world * micro_batch * 32 // 2)
        return resolve(replace(config, model=self.model, parallel=parallel, validate=validate))


FSDP = [
    Case("fsdp", 3, reshard=True, reduce_gradients="step", dtype="bf16"),
    Case("fsdp", 3, reshard=False, reduce_gradients="step"),
    Case("fsdp", 3, reshard=True, reduce_gradients="micro_batch"),
    Case("fsdp", 3, reshard=False, reduce_gradients="micro_batch", dtype="bf16"),
]
HSDP = [
    Case("hsdp", 3, reshard=True, reduce_gradients="step"),
    Case("hsdp", 3, reshard=False, reduce_gradients="step", dtype="bf16"),
    Case("hsdp", 3, reshard=True, reduce_gradients="micro_batch", dtype="bf16"),
    Case("hsdp", 3, reshard=False, reduce_gradients="micro_batch"),
]
MODERN_CASES = [
    Case("ddp", 3, model=SWITCHED),
    Case("fsdp", 3, reduce_gradients="micro_batch", dtype="bf16", model=SWITCHED),
    Case("fsdp", 3, reshard=False, model=SWITCHED, checkpointing=True),
]
ON_GLOO = {
    2: [Case("ddp", 1), Case("ddp", 3), Case("ddp", 1, model=WIDE), Case("fsdp", 1), *FSDP, *MODERN_CASES],
    4: [HSDP[2]],
}
ALSO_ON_4 = [Case("ddp", 3, dtype="bf16"), *(case for case in HSDP if case not in ON_GLOO[4])]
ON_512 = [Case("hsdp", 1), *HSDP, Case("hsdp", 3, checkpointing=True), Case("fsdp", 3)]


class Tape(CommDebugMode):
    """CommDebugMode that adds up bytes too.

    It sees what DDP sends from C++ as well: its reducer calls c10d's operators through the dispatcher, and the CPU's
    backward pass runs in this thread. Its module tracker stays out: its hooks change the backward pass, and it loses
    its place in a step of several micro-batches.
    """

    def __enter__(self) -> "Tape":
        tracker = self.advanced_module_tracker
        tracker.module_parents_dict[tracker.name] = set()
        self.num_bytes = dict.fromkeys((ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE), 0)
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "overloadpacket", None)
        if packet == ALL_REDUCE:
            self.num_bytes[packet] += sum(tensor.nbytes for tensor in args[0])
        elif packet in self.num_bytes:  # (output, input): of a gathering the first is whole, of a scattering the second
            self.num_bytes[packet] += max(args[0].nbytes, args[1].nbytes)
        if func.namespace == "aten" and DTensor not in types:  # no collective; it would keep a list of these, at length
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def counts(self) -> dict[str, int]:
        return {packet.__name__: count for packet, count in self.get_comm_counts().items()}

    def communication(self) -> Communication:
        counts = self.counts()
        kinds = [Collectives(counts.pop(packet.__name__, 0), total) for packet, total in self.num_bytes.items()]
        assert not counts, "a step has no other collectives"
        return Communication(*kinds)


@dataclass(frozen=True)
class Counted:
    """What one rank communicated in a step, in the validation after it and in the step after that."""

    config: Config
    parallel_plan: ParallelPlan
    rounds: int
    step: Communication
    validation: dict[str, int]
    next_step: Communication

    @property
    def expected(self) -> Communication:
        """By the formula."""
        micro_batches = 3 // int(self.config.train.micro_batch)
        dtype = compute_dtype(self.config.train)
        return step_communication(
            self.config.model, self.parallel_plan, micro_batches=micro_batches, compute_dtype=dtype
        )


def count_all(group: ProcessGroup, configs: dict[Case, Config]) -> dict[Case, Counted]:
    return {case: count(group, config) for case, config in configs.items()}


def count(group: ProcessGroup, config: Config) -> Counted:
    config = with_vocabulary(config, read_manifest(config.data.dir).vocab_size)
    with opened_run(config, group) as (run, _):
        step = count_step(run)
        num_batches = -(-(config.validate.tokens or 0) // (config.train.seq_len * run.data.batch_plan.micro_batch))
        with Tape() as validation:
            evaluate(run)
        next_step = count_step(run)
    rounds = -(-num_batches // group.world)
    return Counted(config, run.processes.parallel_plan, rounds, step, validation.counts(), next_step)


def count_step(run: Run) -> Communication:
    with Tape() as tape:
        report = take_step(run)
    run.state.progress = report.progress
    read_result(run, report)
    return tape.communication()


def check(counted: Counted, case: Case, world: int) -> None:
    assert (
        counted.parallel_plan.mode == case.mode
        and counted.parallel_plan.shards * counted.parallel_plan.replicas == world
    )
    assert counted.step == counted.expected
    assert counted.next_step == counted.expected, "validation left something gathered"


@pytest.fixture(scope="module")
def on_gloo(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, Case], list[Counted]]:
    """Every rank's counts, by world and case."""
    folder = tmp_path_factory.mktemp("communication")
    return {
        (world, case): ranks
        for world, cases in ON_GLOO.items()
        for case, ranks in counted_on(world, cases, tiny_data, folder).items()
    }


def counted_on(world: int, cases: list[Case], data: Path, folder: Path) -> dict[Case, list[Counted]]:
    configs = {case: case.config(data, folder / f"{world}-{case}", world, 2) for case in cases}
    ranks = run_on_ranks(world, count_all, configs)
    return {case: [rank[case] for rank in ranks] for case in cases}


ON_GLOO_IS_LONG = pytest.mark.long(reason="two dozen runs; `make test` has 512 ranks that are not there")


@ON_GLOO_IS_LONG
@pytest.mark.parametrize(("world", "case"), [(w, case) for w, cases in ON_GLOO.items() for case in cases], ids=str)
def test_a_step_communicates_what_the_formula_says(
    on_gloo: dict[tuple[int, Case], list[Counted]], world: int, case: Case
) -> None:
    for counted in on_gloo[world, case]:
        check(counted, case, world)


@ON_GLOO_IS_LONG
def test_more_gradients_are_reduced_in_more_buckets(on_gloo: dict[tuple[int, Case], list[Counted]]) -> None:
    small, large = (on_gloo[2, Case("ddp", 1, model=model)][0].expected for model in (ODD, WIDE))
    assert small.all_reduces.count == 2 and large.all_reduces.count == 4


@ON_GLOO_IS_LONG
def test_validation_gathers_each_block_in_each_round(on_gloo: dict[tuple[int, Case], list[Counted]]) -> None:
    for (_, case), ranks in on_gloo.items():
        for counted in ranks:
            check_validation(counted, case)


def check_validation(counted: Counted, case: Case) -> None:
    """What stays gathered (the last block and the rest; without resharding everything) only in the first round."""
    wanted = 0
    if case.mode in ("fsdp", "hsdp"):
        wanted = 2 * (3 if case.reshard else 1) + 2
    assert counted.rounds == 3
    assert counted.validation.get("_allgather_base_", 0) == wanted
    assert counted.validation["allreduce_"] == 3 + 1, "is a stop wanted, each round; the totals"
    assert "_reduce_scatter_base_" not in counted.validation


@pytest.mark.long(reason="four processes each")
def test_four_ranks_communicate_what_the_formula_says(tiny_data: Path, tmp_path: Path) -> None:
    for case, ranks in counted_on(4, ALSO_ON_4, tiny_data, tmp_path).items():
        for counted in ranks:
            check(counted, case, 4)
            check_validation(counted, case)


@pytest.fixture
def fake_group() -> Iterator[ProcessGroup]:
    """This process as rank 0 of 512 that are not there: torch's group for it copies where others would send."""
    if dist.is_initialized():  # a world of one, which another test left
        dist.destroy_process_group()
    new_group = dist.new_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", lambda *args, **given: new_group(*args, **given | {"backend": "fake"}))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=512)
        yield ProcessGroup(0, 512, torch.device("cpu"))
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Set timeout is now only supported for either nccl or gloo")
@pytest.mark.parametrize("case", ON_512, ids=str)
def test_the_formula_holds_for_512_ranks(fake_group: ProcessGroup, tiny_data: Path, tmp_path: Path, case: Case) -> None:
    """64 hosts of 8. DDP is left out: its reducer cannot use that group, and its count is that of any world."""
    check(count(fake_group, case.config(tiny_data, tmp_path / "run", 512, 8)), case, 512)


@pytest.mark.parametrize("mode", ["none", "fsdp"])
def test_one_process_communicates_nothing(tiny_data: Path, tmp_path: Path, mode: Literal["none", "fsdp"]) -> None:
    case = Case(mode, 3)
    (counted,) = run_on_ranks(1, count, case.config(tiny_data, tmp_path / "run", 1, 1))
    check(counted, case, 1)
    assert counted.step == Communication(*[Collectives(0, 0)] * 3)
    assert counted.validation == {}
