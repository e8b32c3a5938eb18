"""Flags that change how a step is computed or sent: compile mode, CUDA graphs, the dtype of the reduction."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import assert_same_tensors, called, curve, final_tensors, losses, tiny_config, tiny_flags
from train import main as train_main
from train.config import Config, TrainConfig
from train.config_checks import faults_of, settings_without_effect
from train.data import plan_batches
from train.main import run
from train.parallel import apply
from train.parallel.graphs import GraphedPasses
from train.parallel.plan import choose_parallel_plan
from train.presets import PRESETS
from train.processes.group import ProcessGroup
from train.run.card import run_card

ALONE = ProcessGroup(0, 1, torch.device("cpu"))
STEPS = 12


def with_train(config: Config, **train: Any) -> Config:
    return replace(config, train=replace(config.train, **train))


def planned(config: Config, world: int) -> Any:
    return choose_parallel_plan(config, world=world, local_world=world, memory_bytes=10**12)


# --- --train.compile-mode ---------------------------------------------------------------------------------------------


def test_the_compile_mode_reaches_blocks_and_loss(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile itself is left out, since autotuning C++ takes minutes."""
    modes: list[str] = []

    def record(function: Callable[..., Any], *, mode: str, **options: Any) -> Callable[..., Any]:
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", record)
    config = tiny_config(tiny_data, tmp_path, compile=True, compile_mode="max-autotune-no-cudagraphs")
    apply.build_loss_model(config, planned(config, 1), ALONE)
    assert len(modes) >= 2 + 1 + 3 and set(modes) == {"max-autotune-no-cudagraphs"}


def test_a_compile_mode_without_compilation_has_no_effect(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path, compile_mode="max-autotune-no-cudagraphs")
    (line,) = settings_without_effect(config, "cuda", 1, "none")
    assert line == "--train.compile-mode max-autotune-no-cudagraphs has no effect with --train.no-compile"


# --- --train.cuda-graphs ----------------------------------------------------------------------------------------------


class Recorded:
    """What a CPU has in place of a captured graph: the same pass over the same tensors, run again."""

    def __init__(self, passes: GraphedPasses) -> None:
        self.passes, self.num_replays = passes, 0

    def replay(self) -> None:
        self.num_replays += 1
        self.passes._losses.copy_(self.passes._pass())


@pytest.mark.parametrize(
    ("options", "dropout"),
    [({"micro_batch": 4}, 0.0), ({"micro_batch": 4}, 0.2), ({"dtype": "fp16"}, 0.0), ({"loss": "chunked"}, 0.0)],
    ids=str,
)
def test_replayed_passes_are_the_same_run(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dropout: float
) -> None:
    """Gradients are summed in place; batches, seeds and the loss scale come through the graph's own tensors."""
    graphs: list[Recorded] = []

    def record(passes: GraphedPasses) -> Recorded:
        passes.prepare()
        graphs.append(Recorded(passes))
        return graphs[-1]

    plain = tiny_config(tiny_data, tmp_path / "plain", steps=STEPS, **options)
    plain = replace(plain, model=replace(plain.model, dropout=dropout))
    run(plain, ALONE)
    monkeypatch.setattr(train_main, "check_device", lambda *args: None)
    monkeypatch.setattr(GraphedPasses, "_capture", record)
    run(replace(with_train(plain, cuda_graphs=True), run_dir=tmp_path / "graphs"), ALONE)
    accumulation = 12 // int(plain.train.micro_batch)
    assert [graph.num_replays for graph in graphs] == [2 + STEPS * accumulation]
    assert curve(tmp_path / "graphs") == curve(tmp_path / "plain")
    assert_same_tensors(final_tensors(tmp_path / "graphs"), final_tensors(tmp_path / "plain"))


def test_cuda_graphs_are_refused_where_a_pass_communicates_or_cannot_be_captured(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_data, tmp_path, cuda_graphs=True)
    with pytest.raises(InputError, match=r"--train.cuda-graphs needs a GPU"):
        run(config, ALONE)
    with pytest.raises(InputError, match=r"--train.cuda-graphs needs one process .* not ddp with 2"):
        planned(config, 2)
    with pytest.raises(InputError, match=r"not fsdp with 1"):
        planned(replace(config, parallel=replace(config.parallel, mode="fsdp")), 1)
    flex = replace(config, model=replace(config.model, attention="flex"))
    assert ["flex; use sdpa" in fault for fault in faults_of(flex)] == [True]
    done = called(
        train_main.main, *tiny_flags(tiny_data, tmp_path), "--train.cuda-graphs", "--train.micro-batch", "auto"
    )
    assert done.returncode == 2 and "auto cannot see; give a number" in done.stderr


def test_the_flags_of_a_step_may_change_when_a_run_is_continued(tiny_data: Path, tmp_path: Path) -> None:
    """They change no identity, and the record of the run begins with their defaults."""
    config = tiny_config(tiny_data, tmp_path / "run", steps=STEPS)
    run(with_train(config, steps=STEPS), ALONE)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["train"]
    assert recorded["compile_mode"] == TrainConfig.compile_mode and recorded["cuda_graphs"] is False
    run(with_train(config, compile_mode="max-autotune-no-cudagraphs"), ALONE)  # eager, so only a warning
    assert "has no effect with --train.no-compile" in (tmp_path / "run" / "log.txt").read_text()


# --- The preset gpt2-small --------------------------------------------------------------------------------------------


def test_gpt2_small_on_a_cpu_is_planned_but_needs_a_number_to_train(tiny_data: Path, tmp_path: Path) -> None:
    """Its micro-batch is what fits a GPU, so a CPU gets one line before anything is computed."""
    words = ["gpt2-small", "--data.dir", str(tiny_data), "--run-dir", str(tmp_path / "run")]
    done = called(train_main.main, *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--train.micro-batch auto measures a GPU's memory; give a number on a CPU, such as 16" in done.stderr
    assert not (tmp_path / "run").exists()
    planned = called(train_main.main, *words, "--dry-run")
    assert planned.returncode == 0 and "512 (micro-batch auto) sequences" in planned.stdout, planned.stderr


# --- --parallel.reduce-dtype ------------------------------------------------------------------------------------------

TOLERANCE = 2e-4  # of the loss, over 12 steps


def train_both(group: ProcessGroup, configs: list[Config]) -> list[list[float]]:
    for config in configs:
        run(config, group)
    return [losses(config.directory).tolist() for config in configs]


def reduced(data: Path, run_dir: Path, mode: Any, dtype: Any, **train: Any) -> Config:
    config = tiny_config(data, run_dir, steps=STEPS, **train)
    config = replace(config, optim=replace(config.optim, lr_peak=2e-3))  # at 1e-2 the loss jumps
    return replace(config, parallel=replace(config.parallel, mode=mode, reduce_dtype=dtype))


def test_gradients_reduced_in_bf16_train_nearly_the_same_run(tiny_data: Path, tmp_path: Path) -> None:
    """DDP over micro-batches, FSDP2 with one micro-batch: gradients, moments and weights stay fp32."""
    cases = {"ddp": 3, "fsdp": 6}
    configs = [
        reduced(tiny_data, tmp_path / f"{mode}_{dtype}", mode, dtype, micro_batch=micro_batch)
        for mode, micro_batch in cases.items()
        for dtype in ("fp32", "bf16")
    ]
    results = run_on_ranks(2, train_both, configs)
    assert results[0] == results[1]
    curves = [torch.tensor(each, dtype=torch.float64) for each in results[0]]
    for index, mode in enumerate(cases):
        exact, rounded = curves[2 * index : 2 * index + 2]
        difference = (exact - rounded).abs()
        assert difference[0] == 0 and 0 < difference.max() <= TOLERANCE, (mode, difference)
        log = (tmp_path / f"{mode}_bf16" / "log.txt").read_text()
        assert "; gradients in bf16" in log
        assert all(value.dtype == torch.float32 for value in final_tensors(tmp_path / f"{mode}_bf16").values())
        assert "gradients in bf16" not in (tmp_path / f"{mode}_fp32" / "log.txt").read_text()


def test_bf16_is_refused_where_it_would_do_more_than_round_what_is_sent(tiny_data: Path, tmp_path: Path) -> None:
    hsdp = reduced(tiny_data, tmp_path, "hsdp", "bf16")
    hsdp = replace(hsdp, parallel=replace(hsdp.parallel, shard_size=2))
    with pytest.raises(InputError, match=r"not for --parallel.mode hsdp; leave it fp32"):
        planned(hsdp, 4)
    several = reduced(tiny_data, tmp_path, "fsdp", "bf16", micro_batch=2)
    with pytest.raises(InputError, match=r"would add up micro-batches in bf16; give a --train.micro-batch of all"):
        planned(several, 2)
    each = replace(several, parallel=replace(several.parallel, reduce_gradients="micro_batch"))
    assert (
        planned(each, 2).reduce_dtype == planned(with_train(several, micro_batch=6), 2).reduce_dtype == torch.bfloat16
    )
    assert "no effect with one process" in settings_without_effect(several, "cpu", 1, "none")[-1]


def test_the_card_warns_where_the_network_binds(tiny_data: Path, tmp_path: Path) -> None:
    """GPT-2 small on 16 hosts of 8 H100: 19.8 ms of sending at 50 GB/s, 8.8 ms of computing."""
    config = PRESETS["gpt2-small"]

    def card(world: int, **parallel: Any) -> str:
        changed = replace(config, parallel=replace(config.parallel, **parallel))
        changed = with_train(changed, micro_batch=512 // world)
        plan = choose_parallel_plan(changed, world=world, local_world=min(8, world), memory_bytes=80 * 10**9)
        return run_card(changed, None, plan_batches(changed, world), plan, "NVIDIA H100 80GB HBM3")

    warned = card(128)
    assert "WARNING: the network binds: 19.8 ms at 50 GB/s between hosts, 8.8 ms of computing at 40% of the" in warned
    assert "--parallel.reduce-dtype bf16 halves it" in warned
    halved = card(128, reduce_dtype="bf16")
    assert "gradients in bf16  WARNING: the network binds: 9.9 ms" in halved and "halves it" not in halved
    assert "WARNING" not in card(32) and "WARNING" not in card(8)
