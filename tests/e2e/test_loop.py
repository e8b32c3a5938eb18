"""The loop between steps: evaluations, samples, garbage, rates; and no graph compiled anew."""

import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.distributed.test_exact import cut_back
from tests.helpers.groups import run_on_ranks
from tests.helpers.hellaswag_items import write_items
from tests.helpers.runs import assert_same_tensors, called, curve, final_tensors, rows, status, tiny_config, tiny_flags
from tests.helpers.steps import before_each_step
from train import loop
from train import losses as train_losses
from train.config import Config, SampleConfig
from train.data import Prefetcher
from train.evals import hellaswag, validation
from train.main import main, run
from train.parallel.apply import build_loss_model
from train.parallel.plan import agree_on_parallel_plan
from train.processes.group import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


def sampling(config: Config, every: int = 5) -> Config:
    return replace(config, sample=SampleConfig(every=every, prompts=("The ", "a", ""), tokens=12))


def graphs_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


def counts_before_each_step(config: Config) -> list[int]:
    """Return the number of compiled graphs before each step and at the end."""
    counts: list[int] = []
    torch._dynamo.reset()
    counters.clear()
    with before_each_step(lambda _: counts.append(graphs_compiled())):
        run(config, ALONE)
    return [*counts, graphs_compiled()]


def scoring(config: Config, folder: Path, every: int = 5, num_items: int = 12) -> Config:
    path = write_items(folder / "items.jsonl", num_items)
    check = replace(config.validate, hellaswag=path, hellaswag_every=every)
    return replace(config, validate=check)


def scores(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run_dir) if "hellaswag_acc" in row]


LONG_KERNELS = pytest.mark.long(reason="kernels of its own to compile; test_precision.py has them in `make test`")


@pytest.mark.parametrize(
    ("activation_checkpointing", "loss"), [(False, "plain"), pytest.param(True, "chunked", marks=LONG_KERNELS)]
)
def test_nothing_is_compiled_once_training_has_begun(
    tiny_data: Path, tmp_path: Path, loss: str, activation_checkpointing: bool
) -> None:
    """Steps, validations (with a short last batch), samples and saves need no new graph, nor do they after a resume.

    There are three graphs with gradients (all blocks, the last norm, the loss), three without, and three for
    HellaSwag's batches of 4 x 32 tokens; the chunked loss has one less, since all its chunks have one size.
    """
    options: dict[str, Any] = {"loss": loss, "activation_checkpointing": activation_checkpointing}
    options["loss_chunk_tokens"] = 64
    config = sampling(tiny_config(tiny_data, tmp_path / "run", steps=20, compile=True, **options))
    config = replace(config, validate=replace(config.validate, every=5))
    config = scoring(config, tmp_path)
    graphs = 9 if loss == "plain" else 8
    assert counts_before_each_step(config) == [graphs] * 21
    assert len([row for row in rows(tmp_path / "run") if "val_loss" in row]) == 5
    assert len(scores(tmp_path / "run")) == 4
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 4
    cut_back(tmp_path / "run", tmp_path / "resumed", step=10)
    resumed = replace(config, run_dir=tmp_path / "resumed")
    assert counts_before_each_step(resumed) == [graphs] * 11


def test_hellaswag_is_scored_at_its_own_interval_and_changes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    """Training is bitwise the same without it; test_hellaswag_score.py compares the score itself."""
    plain = tiny_config(tiny_data, tmp_path / "plain", steps=20)
    run(plain, ALONE)
    config = scoring(tiny_config(tiny_data, tmp_path / "run", steps=20), tmp_path, every=8)
    run(config, ALONE)
    assert curve(tmp_path / "run") == curve(tmp_path / "plain")
    assert_same_tensors(final_tensors(tmp_path / "run"), final_tensors(tmp_path / "plain"))
    logged = scores(tmp_path / "run")
    assert [row["step"] for row in logged] == [8, 16, 20]
    assert logged[0].keys() >= {f"hellaswag_{name}" for name in ("acc_stderr", "acc_norm", "items", "pinned")}
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "items.jsonl: 12 items, not the whole pinned set, so the score is not comparable" in log
    assert f"step      20  hellaswag acc {logged[-1]['hellaswag_acc']:.4f} +- 0.1" in log
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    run(config, ALONE)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before, "a restart reads the rows that it wrote"
    assert "not as it was written" not in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(("module", "name"), [(hellaswag, "ending_losses"), (validation, "validate")])
def test_a_stop_during_an_evaluation_leaves_the_rest_to_the_next_start(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    """The evaluations of step 8, in their order: validation, HellaSwag, samples."""
    config = scoring(sampling(tiny_config(tiny_data, tmp_path / "run", steps=8), every=8), tmp_path, every=8)
    evaluate = getattr(module, name)

    def interrupted(*args: Any) -> Any:
        if any(row["step"] == 8 for row in rows(tmp_path / "run")):
            args[-1].stop_requests.reason = "test"
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        run(config, ALONE)
    assert status(tmp_path / "run") == {"state": "stopped", "step": 8, "reason": "test", "attempt": 1}
    assert scores(tmp_path / "run") == [] and not (tmp_path / "run" / "samples.jsonl").exists()
    run(config, ALONE)
    assert status(tmp_path / "run")["state"] == "done"
    for logged in (scores(tmp_path / "run"), rows(tmp_path / "run", "samples.jsonl")):
        assert [row["step"] for row in logged] == [8]


def score_here(group: ProcessGroup, config: Config, folder: Path) -> None:
    for mode in ("ddp", "fsdp"):
        parallel = replace(config.parallel, mode=mode)
        run(replace(config, parallel=parallel, run_dir=folder / mode), group)


@pytest.mark.long(reason="three processes; test_validate.py has two in `make test`")
def test_hellaswag_has_the_same_score_in_every_mode(tiny_data: Path, tmp_path: Path) -> None:
    """Eleven questions in batches of three ranks: the last rank has one batch less."""
    config = scoring(tiny_config(tiny_data, tmp_path / "one", steps=4), tmp_path, every=2, num_items=11)
    run(config, ALONE)
    wanted = scores(tmp_path / "one")
    assert len(wanted) == 2
    run_on_ranks(3, score_here, config, tmp_path)
    for mode in ("ddp", "fsdp"):
        assert [row | {"seconds": 0} for row in scores(tmp_path / mode)] == [row | {"seconds": 0} for row in wanted]


def test_activation_checkpointing_keeps_little() -> None:
    """The forward pass keeps few elements for the backward pass, apart from the weights."""
    kept = {}
    for activation_checkpointing in (False, True):
        config = tiny_config(Path("none"), Path("none"), activation_checkpointing=activation_checkpointing)
        loss_model = build_loss_model(config, agree_on_parallel_plan(config, ALONE), ALONE)
        weights = {p.data_ptr() for p in loss_model.parameters()}
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes, weights: set[int] = weights) -> torch.Tensor:
            sizes.append(0 if tensor.data_ptr() in weights else tensor.numel())
            return tensor

        tokens = torch.zeros(6, 32, dtype=torch.int64)
        loss_model(tokens, tokens, torch.ones(()))[0].backward()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_model.model.hidden_states(tokens)
        kept[activation_checkpointing] = sum(sizes)
    assert kept[True] < kept[False] / 3


@pytest.mark.usefixtures("nothing_frozen")
def test_garbage_is_collected_between_steps_only(tiny_data: Path, tmp_path: Path) -> None:
    """No collection starts by itself while steps run; the loop collects at each boundary; then all is as before."""
    callers: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and not gc.isenabled():
            callers.append(sys._getframe(1).f_code.co_name)

    assert gc.isenabled()
    gc.callbacks.append(note)
    try:
        run(tiny_config(tiny_data, tmp_path / "run"), ALONE)
    finally:
        gc.callbacks.remove(note)
    # At each of the 50 rows, and at steps 10, 20, 25, 30, 40 and 50: saves and validations.
    assert callers == ["train"] * 56
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_steps_leave_no_cycles_behind(tiny_data: Path, tmp_path: Path) -> None:
    """Otherwise memory would grow until the next row."""
    unreachable: list[int] = []
    with before_each_step(lambda _: unreachable.append(gc.collect())):
        run(tiny_config(tiny_data, tmp_path / "run", steps=9), ALONE)
    assert unreachable[2:] == [0] * 7


def test_samples_are_the_same_after_a_resume_and_do_not_touch_training(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_config(tiny_data, tmp_path / "silent", steps=20), ALONE)
    whole = sampling(tiny_config(tiny_data, tmp_path / "whole", steps=20))
    run(whole, ALONE)
    assert curve(tmp_path / "whole") == curve(tmp_path / "silent")
    drawn = rows(tmp_path / "whole", "samples.jsonl")
    assert [row["step"] for row in drawn] == [5, 10, 15, 20]
    assert [sample["prompt"] for sample in drawn[0]["samples"]] == ["The ", "a", ""]
    assert all(len(sample["text"]) == 12 for row in drawn for sample in row["samples"])

    resumed = replace(whole, run_dir=tmp_path / "resumed")

    def stop(this: loop.Run) -> None:
        if this.state.progress.step == 11:
            this.processes.stop_requests.reason = "test"  # as a signal would

    with before_each_step(stop):
        run(resumed, ALONE)
    assert status(tmp_path / "resumed")["state"] == "stopped"
    run(resumed, ALONE)
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "resumed")]
    assert samples[0] == samples[1]


def test_rates_are_of_training_alone_and_data_wait_is_part_of_them(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that a batch moves by 100 s and a validation by 10,000 s; MFU is FLOPs done over FLOPs possible."""
    clock, take, validate, added = time.perf_counter, Prefetcher.take, validation.validate, [0.0]

    def slowly_take(self: Prefetcher, position: int) -> Any:
        added[0] += 100
        return take(self, position)

    def slowly_validate(*args: Any, **options: Any) -> Any:
        added[0] += 10_000
        return validate(*args, **options)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + added[0])
    monkeypatch.setattr(Prefetcher, "take", slowly_take)
    monkeypatch.setattr(validation, "validate", slowly_validate)
    config = tiny_config(tiny_data, tmp_path / "run", steps=6)
    track, validate_every_3 = replace(config.track, peak_tflops=1e-5), replace(config.validate, every=3)
    run(replace(config, validate=validate_every_3, track=track), ALONE)
    trained = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [round(row["step_seconds"], -2) for row in trained] == [100] * 6
    for row in trained:
        assert row["data_wait_fraction"] == pytest.approx(100 / row["step_seconds"], abs=2e-2)
        assert row["mfu"] == pytest.approx(row["flops"] / row["tokens"] * row["tokens_per_second"] / 1e7, rel=2e-2)
        assert row["flops"] > 6 * 27_552 * row["tokens"]  # at least 6 per parameter and token


@pytest.mark.long(reason="two processes that compile")
def test_two_compiled_processes_train_the_same_run_and_hold_their_gradients_once(
    tiny_data: Path, tmp_path: Path
) -> None:
    alone = tiny_config(tiny_data, tmp_path / "one", steps=10, batch_tokens=768)  # kernels of the shapes compiled above
    run(alone, ALONE)
    both = replace(alone, run_dir=tmp_path / "two", train=replace(alone.train, compile=True))
    storages = run_on_ranks(2, run_and_count_storages, both)
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert f"{one[1]:.4f} {one[2]:.3f}" == f"{two[1]:.4f} {two[2]:.3f}"
    assert storages == [1, 1], "every gradient lies in DDP's one bucket, with micro-batches that are not reduced too"


def run_and_count_storages(group: ProcessGroup, config: Config) -> int:
    """Return in how many storages the gradients lie after a step that accumulates."""
    seen: list[int] = []
    take_step = loop.take_step

    def counting(this: loop.Run) -> loop.StepResult:
        report = take_step(this)
        gradients = [p.grad for p in this.state.model.parameters() if p.grad is not None]
        seen.append(len({gradient.untyped_storage().data_ptr() for gradient in gradients}))
        return report

    loop.take_step = counting  # type: ignore[assignment]
    run(config, group)
    return max(seen)


def test_an_out_of_memory_error_ends_with_what_to_set(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.53 GiB.")

    monkeypatch.setattr(train_losses, "plain_loss", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(tiny_config(tiny_data, tmp_path / "run"), ALONE)
    (note,) = caught.value.__notes__
    assert "set --train.micro-batch 4 or --train.micro-batch auto or --train.loss chunked or --train.act" in note
    assert "OutOfMemoryError: CUDA out of memory" in status(tmp_path / "run")["reason"]
    least = tiny_config(tiny_data, tmp_path / "least", micro_batch=1, loss="chunked", activation_checkpointing=True)
    monkeypatch.setattr(train_losses, "chunk_loss", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(least, ALONE)
    assert "set a smaller --train.seq-len or a smaller model" in caught.value.__notes__[0]
    large = {"batch_tokens": 1536, "micro_batch": 48, "activation_checkpointing": True}
    with pytest.raises(torch.OutOfMemoryError) as caught_too:
        run(tiny_config(tiny_data, tmp_path / "large", loss="chunked", **large), ALONE)
    assert " or --train.loss-chunk-tokens 1024;" in caught_too.value.__notes__[0]
    assert "the same command then goes on from the beginning" in caught.value.__notes__[0]


def test_bad_input_of_evaluations_is_refused_before_the_first_step(tiny_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"ind": 1}\n')
    for flags, message in (
        (("--validate.hellaswag", str(path)), f"{path}:1: no field activity_label"),
        (("--validate.hellaswag", str(path), "--dry-run"), f"{path}:1: no field activity_label"),
        (("--sample.prompts", "caf\u00e9"), "--sample.prompts 'caf\u00e9'"),
        (("--trace", "5:2"), "--trace 5:2: needs FIRST:END"),
    ):
        done = called(main, *tiny_flags(tiny_data, tmp_path / "run"), "--train.steps", "2", *flags)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and message in done.stderr
    assert rows(tmp_path / "run") == []


def test_the_command_reports_its_start_and_writes_trace_and_tracking(tiny_data: Path, tmp_path: Path) -> None:
    flags = ("--train.steps", "12", "--trace", "4:6", "--track.wandb", "offline", "--sample.every", "6")
    done = called(main, *tiny_flags(tiny_data, tmp_path / "run"), *flags, "--sample.tokens", "5")
    assert done.returncode == 0, done.stderr
    assert "first step done after" in done.stdout and "imports" in done.stdout and "aten::" in done.stdout
    assert (tmp_path / "run" / "traces" / "steps_4_6_rank0.json.gz").is_file()
    sync = next(text for text in done.stdout.splitlines() if "wandb sync" in text)
    saved = next((tmp_path / "run" / "checkpoints").glob("step_*/state.json"))
    assert json.loads(saved.read_text())["wandb_id"] in sync
