"""A run put together: model, optimizer, data, progress, reports."""

import secrets
import sys

import numpy as np
import torch

from data_prep.manifest import Manifest, open_split
from data_prep.tokenizer import Tokenizer, load_tokenizer
from train.config import Config, settings_without_effect
from train.data import BatchPlan, Prefetcher, TrainingSequences, plan_batches
from train.evals.hellaswag import HellaSwag, open_hellaswag
from train.evals.samples import Sampler
from train.evals.validation import ValidationSet
from train.guards.nonfinite import NonFiniteGuard
from train.guards.stragglers import Stragglers
from train.guards.watchdog import Watchdog
from train.loop import Run
from train.metrics.logger import RunLogger
from train.metrics.meters import Meters, Startup, device_peak_flops
from train.metrics.profiler import open_trace, parse_steps
from train.metrics.wandb_process import Tracking, open_tracking
from train.optim import build_optimizer
from train.parallel import apply
from train.parallel.auto_micro_batch import settle_micro_batch
from train.parallel.plan import ParallelPlan
from train.parallel.precision import LossScale
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests
from train.run import resume
from train.run.checkpoints import CheckpointWriter, Progress
from train.run.directory import RunDirectory


def assemble(
    config: Config,
    group: ProcessGroup,
    parallel_plan: ParallelPlan,
    manifest: Manifest,
    directory: RunDirectory,
    stop_requests: StopRequests,
    watchdog: Watchdog,
    startup: Startup,
) -> Run:
    """Model, optimizer, data and progress: new from the seed, or as the newest sound checkpoint left them."""
    tokenizer = group.on_all(lambda: load_tokenizer(config.data.dir))
    loss_model = apply.build_loss_model(config, parallel_plan, group)
    model = loss_model.model
    optimizer = build_optimizer(model, config.optim)
    if config.train.micro_batch == "auto":
        config = settle_micro_batch(config, loss_model, parallel_plan, directory, group)
    plan = plan_batches(config, group.world)
    sequences, validation, hellaswag, sampler = group.on_all(lambda: open_data(config, plan, tokenizer))
    module = apply.wrap(loss_model, parallel_plan)
    loss_scale = LossScale(group.device) if config.train.dtype == "fp16" else None

    loaded, faults = resume.find_start(directory.path, group=group)
    progress, tracked_as, origin = Progress(), None, None
    if loaded is not None:
        state = resume.load(loaded, model=model, optimizer=optimizer, loss_scale=loss_scale, group=group)
        progress, tracked_as = Progress(**state["progress"]), state["wandb_id"]
    elif config.from_checkpoint is not None:
        origin = resume.load_weights(config.from_checkpoint, model, tokenizer, group)

    logger = RunLogger(directory.path, step=progress.step if loaded else None, group=group, stop_requests=stop_requests)
    warnings = [f"passed over {fault}" for fault in faults]
    warnings += settings_without_effect(config, group.device.type, group.world, parallel_plan.mode)
    if validation is not None and config.validate.tokens is not None and validation.num_tokens < config.validate.tokens:
        warnings.append(f"--validate.tokens {config.validate.tokens}: the split has only {validation.num_tokens}")
    if hellaswag is not None:
        warnings += hellaswag.remarks
    if group.device.type == "cuda" and device_peak_flops(config, group.device) is None:
        warnings.append(
            f"no peak is known for {torch.cuda.get_device_name(group.device)} at {config.train.dtype}, so there is no "
            "MFU; give the card's dense figure as --track.peak-tflops"
        )
    for line in warnings:
        logger.say(f"warning: {line}")
    if origin is not None:
        logger.say(f"weights from {origin}")
    wandb_id = group.on_main(lambda: tracked_as or secrets.token_hex(4))
    if group.is_main:
        logger.tracking = start_tracking(config, wandb_id, directory, logger)
    stragglers = Stragglers(group, watchdog.hosts, logger.say)
    if parallel_plan.is_sharded:
        stragglers.watch(model.blocks[0])
    startup.done("set-up")
    return Run(
        config=config,
        group=group,
        parallel_plan=parallel_plan,
        directory=directory,
        plan=plan,
        batches=Prefetcher(sequences, plan, rank=group.rank, device=group.device),
        validation=validation,
        hellaswag=hellaswag,
        sampler=sampler,
        model=model,
        loss_model=loss_model,
        module=module,
        optimizer=optimizer,
        mean=torch.full((), group.world / config.train.batch_tokens, device=group.device),
        loss_scale=loss_scale,
        logger=logger,
        stop_requests=stop_requests,
        watchdog=watchdog,
        stragglers=stragglers,
        progress=progress,
        meters=Meters(config, device=group.device, world=group.world, step=progress.step, seconds=progress.seconds),
        startup=startup,
        trace=open_trace(
            parse_steps(config.trace) if config.trace is not None else None,
            first=progress.step,
            ranks=config.trace_ranks,
            rank=group.rank,
            run_dir=directory.path,
            device=group.device,
            say=logger.say,
        ),
        checkpoint_writer=CheckpointWriter(
            directory.path,
            attempt=directory.attempt,
            model=model,
            optimizer=optimizer,
            loss_scale=loss_scale,
            config=config.save,
            state={
                "config": config.to_json(),
                "data": manifest.fingerprint,
                "versions": versions(),
                "wandb_id": wandb_id,
            },
            loaded=loaded,
            group=group,
        ),
        guard=NonFiniteGuard(config.train.on_nonfinite, group.device),
        loaded=loaded,
    )


def open_data(
    config: Config, plan: BatchPlan, tokenizer: Tokenizer
) -> tuple[TrainingSequences, ValidationSet | None, HellaSwag | None, Sampler | None]:
    """The training sequences, and what the model is looked at with; None for what the config switches off."""
    stream = open_split(config.data.dir, "train")
    sequences = TrainingSequences(stream, config.train.seq_len, config.seed, config.data.skip_sequences)
    validation = hellaswag = sampler = None
    if config.validate.every is not None:
        validation = ValidationSet(
            open_split(config.data.dir, "val"),
            seq_len=config.train.seq_len,
            micro_batch=plan.micro_batch,
            num_tokens=config.validate.tokens,
            byte_lengths=tokenizer.byte_lengths(),
        )
    if config.validate.hellaswag is not None and config.validate.hellaswag_every is not None:
        hellaswag = open_hellaswag(
            config.validate.hellaswag,
            tokenizer,
            context_len=config.train.seq_len,
            batch_tokens=plan.micro_batch * config.train.seq_len,
            fixed_shapes=config.train.compile,
            most=config.validate.hellaswag_items,
        )
    if config.sample.every is not None:
        # A compiled model is called in validation's shape, which it knows already.
        num_rows = plan.micro_batch if config.train.compile else None
        sampler = Sampler(config.sample, tokenizer, seed=config.seed, num_rows=num_rows)
    return sequences, validation, hellaswag, sampler


def start_tracking(config: Config, wandb_id: str, directory: RunDirectory, logger: RunLogger) -> Tracking | None:
    track = config.track
    return open_tracking(
        mode=track.wandb,
        run_dir=config.directory,
        run_id=wandb_id,
        name=config.directory.name,
        project=track.project,
        group=track.group,
        tags=track.tags,
        config=config.to_json(),
        provenance=directory.provenance,
        say=logger.say,
    )


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}
