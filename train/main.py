"""Train a GPT.

    torchrun --local-addr=127.0.0.1 --nproc_per_node=8 train/main.py              # gpt2-small, 8 GPUs, 10B tokens
    torchrun --local-addr=127.0.0.1 --nproc_per_node=2 train/main.py quickstart   # 3 to 5 minutes on two CPU cores
    python train/main.py shakespeare-char-cpu                       # 2 minutes on two cores; validation loss 1.89
    torchrun --local-addr=127.0.0.1 --nproc_per_node=8 train/main.py gpt2-small --run-dir runs/hot --dry-run

--local-addr is for one host: without it torchrun needs an address of the host's own name, which a container may lack.
The presets are in train/presets.py; `--help` lists the flags. The same command line again continues the run.
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

from common.compile_cache import take_compile_cache
from common.errors import one_line_errors, reading_from
from data_prep.manifest import FILE_NAME, Manifest, read_manifest
from data_prep.tokenizer import load_tokenizer
from model.checkpoint import list_checkpoints
from train.command_line import parse
from train.config import Config
from train.config_checks import settings_without_effect
from train.data import BatchPlan, resolve_with_data
from train.guards.data_check import check_data
from train.guards.watchdog import Watchdog
from train.loop import train
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
from train.run.directory import RunDirectory
from train.run.identity import refuse_disagreement
from train.run.resume import settle_origin
from train.setup import open_evaluation_data, open_sequences, set_up
from train.state import Run

FEW_TOKENS = 1024  # in a chunk of the loss: its logits are then small beside everything else


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors("train"):
        arguments = sys.argv[1:] if args is None else args
        rank_info = take_rank(is_plan="--dry-run" in arguments)
        config = parse(arguments, PRESETS)
        if config.dry_run:
            lines = planned(config, rank_info)
            if rank_info.rank == 0:
                print("\n".join(lines))
            return
        startup = Startup(STARTED)
        startup.done("imports")
        limits = config.parallel
        with open_process_group(
            limits.init_timeout_seconds, config.directory, longest_seconds=limits.timeout_seconds
        ) as group:
            startup.done("process group")
            if config.preflight:
                preflight(group, config.directory, functools.partial(print, flush=True))
                startup.done("preflight")
            run(config, group, startup)


def planned(config: Config, rank_info: RankInfo) -> list[str]:
    """Return the run card for `rank_info.world` processes, after every refusal that needs no GPU. Writes nothing."""
    with reading_from(config.data.dir):
        manifest = read_manifest(config.data.dir) if (config.data.dir / FILE_NAME).is_file() else None
    config, batch_plan = resolve_with_data(settle_origin(config), manifest, rank_info.world)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parallel_plan = choose_parallel_plan(
        config,
        world=rank_info.world,
        local_world=rank_info.local_world,
        memory_bytes=memory_of(device, rank_info.local_world),
    )
    if manifest is not None:
        RunDirectory(config, manifest.fingerprint, ProcessGroup(0, 1, torch.device("cpu"))).check_start()
        open_sequences(config)
        open_evaluation_data(config, batch_plan, load_tokenizer(config.data.dir))
    saved = [f"continues from {path}" for path in list_checkpoints(config.directory)[-1:]]
    warnings = settings_without_effect(config, device.type, rank_info.world, parallel_plan.mode)
    return [card(config, manifest, batch_plan, parallel_plan), *saved, *(f"warning: {line}" for line in warnings)]


def run(config: Config, group: ProcessGroup, startup: Startup | None = None) -> None:
    """Make one attempt at a run, from its directory to its end. Collective. `startup` began with the program."""
    startup = startup or Startup(time.perf_counter())
    manifest = group.on_all(lambda: read_manifest(config.data.dir))
    refuse_disagreement(config, manifest.fingerprint, group)
    config = group.on_main(lambda: settle_origin(config))
    config, batch_plan = resolve_with_data(config, manifest, group.world)
    parallel_plan = agree_on_parallel_plan(config, group)
    check_device(config, group.device)
    if config.train.compile:
        group.on_all(take_compile_cache)
    group.on_all(lambda: set_numerics(config.train, group.device))
    with (
        StopRequests(
            config.directory, is_main=group.is_main, after=config.stop_after, started=startup.started
        ) as stop_requests,
        RunDirectory(config, manifest.fingerprint, group) as directory,
        Watchdog(config.parallel, group, directory) as watchdog,
    ):
        startup.done("run directory")
        if config.data.verify and is_stopped_in_the_data(config, manifest, group, stop_requests, directory, watchdog):
            return
        startup.done("data")
        current = set_up(
            config,
            batch_plan,
            manifest,
            group=group,
            parallel_plan=parallel_plan,
            directory=directory,
            stop_requests=stop_requests,
            watchdog=watchdog,
            startup=startup,
        )
        try:
            with current.reports.checkpoints.writer, current.reports.logger as logger:
                logger.log(card(current.config, manifest, current.data.batch_plan, parallel_plan))
                if current.state.loaded is not None:
                    logger.log(f"continuing from {current.state.loaded}")
                directory.report(current.state.progress.step)
                outcome, reason = train(current)
                step = current.state.progress.step
                watchdog.heartbeat("the end")
                insist = current.reports.checkpoints.insist
                insist(logger.make_durable)
                insist(functools.partial(directory.end, outcome, step, reason))
                logger.log(f"{outcome} at step {step}" + (f" ({reason})" if reason else ""))
        except torch.OutOfMemoryError as error:
            error.add_note(memory_advice(current, is_auto=config.train.micro_batch == "auto"))
            directory.forget()  # the recorded micro-batch of `auto` did not fit after all
            raise
        finally:
            current.data.batches.close()
        group.barrier()  # launchers kill the rest when the first process exits


def is_stopped_in_the_data(
    config: Config,
    manifest: Manifest,
    group: ProcessGroup,
    stop_requests: StopRequests,
    directory: RunDirectory,
    watchdog: Watchdog,
) -> bool:
    """Hold the data to its manifest; return True if a stop was asked for meanwhile, once the run has ended. Collective.

    Raise InputError on all ranks if the data is not what the manifest says.
    """
    reason = check_data(
        config.data.dir,
        manifest,
        manifest.splits,
        group=group,
        stop_requests=stop_requests,
        flag="--data.no-verify",
        run_dir=directory.path,
        heartbeat=lambda: watchdog.heartbeat("reading the data"),
    )
    if reason is None:
        return False
    group.on_main(stop_requests.remove_file)
    directory.end("stopped", directory.step, reason)
    if group.is_main:
        print(f"stopped at step {directory.step}, while the data was read ({reason})", flush=True)
    group.barrier()
    return True


def memory_advice(run: Run, *, is_auto: bool) -> str:
    """Return the flags that make a step smaller, the cheapest first. `is_auto`: --train.micro-batch auto chose it."""
    train, batch_plan, parallel_plan = run.config.train, run.data.batch_plan, run.processes.parallel_plan
    smaller = max((n for n in batch_plan.micro_batches_that_fit if n < batch_plan.micro_batch), default=None)
    flags = {
        f"--train.micro-batch {smaller}": smaller is not None,
        "--train.micro-batch auto": smaller is not None and not is_auto,
        "--train.loss chunked": train.loss == "plain",
        f"--train.loss-chunk-tokens {FEW_TOKENS}": train.loss == "chunked"
        and min(train.loss_chunk_tokens, batch_plan.micro_batch * train.seq_len) > FEW_TOKENS,
        "--train.activation-checkpointing": not train.activation_checkpointing,
        "--parallel.mode fsdp": parallel_plan.mode == "ddp",
        "--parallel.reshard-after-forward": parallel_plan.is_sharded and not parallel_plan.reshard_after_forward,
        "--parallel.reduce-gradients micro_batch": parallel_plan.is_sharded and parallel_plan.whole_gradients,
    }
    advice = (
        " or ".join(flag for flag, helps in flags.items() if helps) or "a smaller --train.seq-len or a smaller model"
    )
    tried = f"out of memory with --train.micro-batch {batch_plan.micro_batch} and --train.seq-len {train.seq_len}"
    start = "from its last checkpoint" if run.reports.checkpoints.writer.saved_step else "from the beginning"
    return f"{tried}: set {advice}; the same command then goes on {start}"


def card(config: Config, manifest: Manifest | None, batch_plan: BatchPlan, parallel_plan: ParallelPlan) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else CPU
    return run_card(config, manifest, batch_plan, parallel_plan, device)


if __name__ == "__main__":
    main()
