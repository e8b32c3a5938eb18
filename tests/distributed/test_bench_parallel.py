"""The benchmark of a step in several processes: its bare loop sends the same as ours."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.bench_parallel import Options, measure, table, ways_of
from benchmarks.steps import Step, bare_step, configured, opened_run
from common.errors import InputError
from tests.helpers.groups import run_on_ranks
from train.config import Config
from train.processes.group import ProcessGroup

OPTIONS = Options(sequences=8, micro_batch=2, rounds=2, block=1)


class Sent(TorchDispatchMode):
    """Collectives by name and bytes, without those that only add up a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[tuple[str, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            num_bytes = max((leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), default=0)
            if num_bytes > 1024:
                self.counts[str(func), num_bytes] += 1
        return func(*args, **(kwargs or {}))


def measured(
    group: ProcessGroup, ways: dict[str, Config]
) -> tuple[dict[str, Any], dict[str, list[Counter[tuple[str, int]]]]]:
    """Return the times of the last mode, and in each mode the collectives of our step and of a bare one."""
    sent = dict[str, list[Counter[tuple[str, int]]]]()
    for name, config in ways.items():
        with opened_run(config, group) as (run, ours):
            sent[name] = [
                collectives_of(step) for step in (ours, bare_step(config, run.processes.parallel_plan, group))
            ]
    return {name: measure(OPTIONS, config, group)}, sent


def collectives_of(step: Step) -> Counter[tuple[str, int]]:
    """Return the collectives of the third step, since DDP lays out its buckets in the second."""
    step()
    step()
    with Sent() as sent:
        step()
    return sent.counts


@pytest.mark.slow
def test_every_mode_is_timed_against_a_bare_loop_that_sends_the_same(tmp_path: Path) -> None:
    ways = ways_of(OPTIONS, tmp_path)
    assert list(ways) == ["ddp", "fsdp step", "fsdp micro_batch"]
    times, sent = run_on_ranks(2, measured, ways)[0]
    for ours, bare in sent.values():
        assert ours == bare
    assert len({frozenset(ours.items()) for ours, _ in sent.values()} - {frozenset()}) == len(ways)
    assert times["fsdp micro_batch"]["ours_step_ms"] > 0 and times["fsdp micro_batch"]["bare_step_ms"] > 0
    assert table(times).splitlines()[1].startswith("fsdp micro_batch  ")


def test_a_preset_that_fills_the_gpu_leaves_room_for_the_loop_beside_ours(tmp_path: Path) -> None:
    assert {config.train.micro_batch for config in ways_of(Options(preset="gpt2-medium"), tmp_path).values()} == {16}


def test_runs_that_cannot_be_timed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are gpt2-small, "):
        configured(tmp_path, preset="none", sequences=1, vocab_size=256)
