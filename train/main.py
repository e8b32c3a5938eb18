"""Train a GPT.

    torchrun --nproc_per_node=8 train/main.py                       # gpt2-small, 8 GPUs, 10B tokens
    torchrun --nproc_per_node=2 train/main.py quickstart            # 3 to 5 minutes on two CPU cores
    python train/main.py shakespeare-char-cpu                       # 2 minutes on two cores; validation loss 1.89
    torchrun --nproc_per_node=8 train/main.py gpt2-small --optim.lr-peak 1e-3 --run-dir runs/hot --dry-run

Presets: train/presets.py. Flags: `--help`. The same command line again continues the run.
"""

import time

STARTED = time.perf_counter()  # before the slow imports, which are most of a short run's start-up

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.processes import parent_watch

parent_watch.remember()

import torch

from common.errors import one_line_errors, reading_from
from data_prep.manifest import FILE_NAME, Manifest, read_manifest
from data_prep.tokenizer import load_tokenizer
from model.checkpoint import list_checkpoints
from train.config import Config, parse, settings_without_effect, with_vocabulary
from train.data import BatchPlan, divisors, plan_batches
from train.guards.watchdog import Watchdog
from train.loop import Run, train
from train.metrics.meters import Startup
from train.parallel.auto_micro_batch import check_device
from train.parallel.plan import ParallelPlan, agree_on_parallel_plan, choose_parallel_plan, memory_of
from train.parallel.precision import set_numerics
from train.preflight import preflight
from train.presets import PRESETS
from train.processes.group import ProcessGroup, open_process_group
from train.processes.ranks import RankInfo, take_rank
from train.processes.stop_requests import StopRequests
from train.run.card import CPU, run_card
from train.run.directory import RunDirectory, refuse_disagreement
from train.run.resume import settle_origin
from train.setup import assemble, open_data


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors("train"):
        given = sys.argv[1:] if args is None else args
        place = take_rank(is_plan="--dry-run" in given)
        config = parse(given, PRESETS)
        if config.dry_run:
            lines = planned(config, place)
            if place.rank == 0:
                print("\n".join(lines))
            return
        startup = Startup(STARTED)
        startup.done("imports")
        with open_process_group(config.parallel.init_timeout_seconds, config.directory) as group:
            startup.done("process group")
            if config.preflight:
                preflight(group, config.directory, functools.partial(print, flush=True))
                startup.done("preflight")
            run(config, group, startup)


def planned(config: Config, place: RankInfo) -> list[str]:
    """The run card for as many processes as `place` says, and every refusal that needs no GPU; touches nothing."""
    with reading_from(config.data.dir):
        manifest = read_manifest(config.data.dir) if (config.data.dir / FILE_NAME).is_file() else None
    if manifest is not None:
        config = with_vocabulary(config, manifest.vocab_size, manifest.eot_id)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory_bytes = memory_of(device, place.local_world)
    parallel_plan = choose_parallel_plan(
        config, world=place.world, local_world=place.local_world, memory_bytes=memory_bytes
    )
    config = settle_origin(config)
    plan = plan_batches(config, place.world)
    if manifest is not None:
        RunDirectory(config, manifest.fingerprint, ProcessGroup(0, 1, torch.device("cpu"))).check_start()
        open_data(config, plan, load_tokenizer(config.data.dir))
    saved = [f"continues from {path}" for path in list_checkpoints(config.directory)[-1:]]
    idle = settings_without_effect(config, device.type, place.world, parallel_plan.mode)
    return [card(config, manifest, plan, parallel_plan), *saved, *(f"warning: {line}" for line in idle)]


def run(config: Config, group: ProcessGroup, startup: Startup | None = None) -> None:
    """One attempt at a run, from its directory to its end. Collective. `startup`: if the program began before this."""
    startup = startup or Startup(time.perf_counter())
    manifest = group.on_all(lambda: read_manifest(config.data.dir))
    config = with_vocabulary(config, manifest.vocab_size, manifest.eot_id)
    refuse_disagreement(config, manifest.fingerprint, group)
    parallel_plan = agree_on_parallel_plan(config, group)
    check_device(config, group.device)
    plan_batches(config, group.world)
    group.on_all(lambda: set_numerics(config.train, group.device))
    config = group.on_main(lambda: settle_origin(config))
    with (
        StopRequests(
            config.directory, is_main=group.is_main, after=config.stop_after, started=startup.started
        ) as stop_requests,
        RunDirectory(config, manifest.fingerprint, group) as directory,
        Watchdog(config.parallel, group, directory) as watchdog,
    ):
        this = assemble(config, group, parallel_plan, manifest, directory, stop_requests, watchdog, startup)
        try:
            with this.checkpoint_writer, this.logger as logger:
                logger.say(card(this.config, manifest, this.plan, parallel_plan))
                if this.loaded is not None:
                    logger.say(f"continuing from {this.loaded}")
                directory.report(this.progress.step)
                state, reason = train(this)
                watchdog.heartbeat("the end")
                logger.make_durable()
                directory.end(state, this.progress.step, reason)
                logger.say(f"{state} at step {this.progress.step}" + (f" ({reason})" if reason else ""))
        except torch.OutOfMemoryError as error:
            error.add_note(what_to_set_for_memory(this, config))
            directory.forget()  # a micro-batch that was found to fit does not
            raise
        finally:
            this.batches.close()
        group.barrier()  # launchers kill the rest when the first process exits


def what_to_set_for_memory(run: Run, asked: Config) -> str:
    """The flags that make a step smaller, those first that cost least. `asked`: before auto was settled."""
    train, plan = run.config.train, run.plan
    smaller = max((n for n in divisors(plan.sequences_per_rank) if n < plan.micro_batch), default=None)
    flags = [] if smaller is None else [f"--train.micro-batch {smaller}"]
    flags += ["--train.micro-batch auto"] if smaller is not None and asked.train.micro_batch != "auto" else []
    flags += ["--train.loss chunked"] if train.loss == "plain" else []
    flags += [] if train.activation_checkpointing else ["--train.activation-checkpointing"]
    parallel_plan = run.parallel_plan
    flags += ["--parallel.mode fsdp"] if parallel_plan.mode == "ddp" else []
    flags += (
        ["--parallel.reshard-after-forward"]
        if parallel_plan.is_sharded and not parallel_plan.reshard_after_forward
        else []
    )
    flags += (
        ["--parallel.reduce-gradients micro_batch"]
        if parallel_plan.is_sharded and parallel_plan.whole_gradients
        else []
    )
    advice = " or ".join(flags) or "a smaller --train.seq-len or a smaller model"
    tried = f"out of memory with --train.micro-batch {plan.micro_batch} and --train.seq-len {train.seq_len}"
    start = "from its last checkpoint" if run.checkpoint_writer.saved_step else "from the beginning"
    return f"{tried}: set {advice}; the same command then goes on {start}"


def card(config: Config, manifest: Manifest | None, plan: BatchPlan, parallel_plan: ParallelPlan) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else CPU
    return run_card(config, manifest, plan, parallel_plan, device)


if __name__ == "__main__":
    main()
