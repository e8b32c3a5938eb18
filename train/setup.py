"""Put a run together: model, optimizer, data, progress and reports."""

import secrets
import sys
from pathlib import Path

import numpy as np
import torch

from common.errors import InputError
from common.redaction import redacted
from data_prep.manifest import Manifest, open_split
from data_prep.tokenizer import Tokenizer, load_tokenizer
from train.config import Config, parse_steps
from train.config_checks import settings_without_effect
from train.data import BatchPlan, Prefetcher, TrainingSequences
from train.evals.hellaswag import HellaSwag, open_hellaswag
from train.evals.periodic import Evaluator, PeriodicEvaluation
from train.evals.samples import Sampler
from train.evals.validation import ValidationSet
from train.guards.nonfinite import NonFiniteGuard
from train.guards.stragglers import Stragglers
from train.guards.watchdog import Watchdog
from train.metrics.logger import RunLogger
from train.metrics.meters import Meters, Startup, device_peak_flops
from train.metrics.profiler import open_trace
from train.metrics.wandb_process import Tracking, open_tracking
from train.optim import build_optimizer
from train.parallel import apply
from train.parallel.attention import settle_attention_backend
from train.parallel.auto_micro_batch import settle_micro_batch
from train.parallel.averaging import WeightAverage
from train.parallel.graphs import GraphedPasses
from train.parallel.plan import ParallelPlan
from train.parallel.precision import LossScale
from train.processes.group import ProcessGroup
from train.processes.host_memory import keep_freed_memory
from train.processes.stop_requests import StopRequests
from train.run import resume
from train.run.checkpoint_schedule import CheckpointSchedule
from train.run.checkpoints import CheckpointWriter, Progress
from train.run.directory import RunDirectory
from train.state import Processes, Reports, Run, RunData, TrainState


def set_up(
    config: Config,
    batch_plan: BatchPlan,
    manifest: Manifest,
    *,
    group: ProcessGroup,
    parallel_plan: ParallelPlan,
    directory: RunDirectory,
    stop_requests: StopRequests,
    watchdog: Watchdog,
    startup: Startup,
) -> Run:
    """Return a run with new weights from the seed, or as its newest sound checkpoint left it. Collective."""
    if group.device.type == "cpu":
        keep_freed_memory()
    tokenizer = group.on_all(lambda: open_tokenizer(config.data.dir, manifest))
    checkpoint, faults = resume.find_start(
        directory.path, save_every=config.save.every, give_up=directory.give_up_progress, group=group
    )
    config, measured, attention_remark = settle_attention_backend(config, batch_plan, directory.measured, group)
    is_new = checkpoint is None and config.from_checkpoint is None
    loss_model = apply.build_loss_model(config, parallel_plan, group, draws_weights=is_new)
    optimizer = build_optimizer(loss_model.model, config.optim, parallel_plan, group)
    if config.optim.average_fraction is not None:
        optimizer.average = WeightAverage(loss_model, config.optim, config.train.steps)
    if config.train.micro_batch == "auto":
        config, batch_plan, settled = settle_micro_batch(
            config, batch_plan, directory.measured, loss_model=loss_model, parallel_plan=parallel_plan, group=group
        )
        measured |= settled
    if measured:
        directory.record(measured)
    sequences = group.on_all(lambda: open_sequences(config))
    evaluation_data = group.on_all(lambda: open_evaluation_data(config, batch_plan, tokenizer))
    module = apply.wrap(loss_model, parallel_plan)
    if config.train.cuda_graphs:
        module = GraphedPasses(loss_model, (batch_plan.micro_batch, config.train.seq_len), group.device)
    loss_scale = LossScale(group.device) if config.train.dtype == "fp16" else None

    progress, saved_wandb_id, origin, seals = Progress(), None, None, None
    if checkpoint is not None:
        saved = resume.load(checkpoint, model=loss_model.model, optimizer=optimizer, loss_scale=loss_scale, group=group)
        progress, saved_wandb_id, seals = Progress(**saved["progress"]), saved["wandb_id"], saved.get("rows")
    elif config.from_checkpoint is not None:
        origin = resume.load_weights(config.from_checkpoint, loss_model.model, tokenizer, group)

    loaded = None if checkpoint is None else checkpoint.path
    logger = RunLogger(
        directory.path,
        step=progress.step if loaded else None,
        group=group,
        stop_requests=stop_requests if config.save.on_failure == "stop" else None,
        seals=seals,
    )
    remarks = [*directory.remarks, *(f"passed over {fault}" for fault in faults), *logger.remarks]
    for line in remarks + warnings_of(config, parallel_plan, evaluation_data, group):
        logger.log(f"warning: {line}")
    if attention_remark is not None:
        logger.log(attention_remark)
    if origin is not None:
        logger.log(f"weights from {origin}")
    wandb_id = group.on_main(lambda: saved_wandb_id or secrets.token_hex(4))
    if group.is_main:
        logger.tracking = start_tracking(config, wandb_id, directory, logger)
    stragglers = Stragglers(group, watchdog.hosts, logger.log)
    if parallel_plan.is_sharded:
        stragglers.watch(loss_model.model.blocks[0])
    meters = Meters(config, progress, device=group.device, world=group.world)
    writer = CheckpointWriter(
        directory.path,
        attempt=directory.attempt,
        model=loss_model.model,
        optimizer=optimizer,
        loss_scale=loss_scale,
        config=config.save,
        state={
            "config": config.to_json(),
            "data": manifest.fingerprint,
            "versions": versions(),
            "wandb_id": wandb_id,
            "found": directory.measured,
            "rows": logger.seals,
        },
        loaded=loaded,
        group=group,
    )
    evaluator = Evaluator(
        loss_model, config.train.steps, group, stop_requests, watchdog, logger, meters, optimizer.average
    )
    startup.done("set-up")
    return Run(
        config=config,
        state=TrainState(
            model=loss_model.model,
            loss_model=loss_model,
            module=module,
            optimizer=optimizer,
            loss_scale=loss_scale,
            guard=NonFiniteGuard(config.train.on_nonfinite, group.device, diverged_above=config.train.diverged_above),
            progress=progress,
            loaded=loaded,
        ),
        data=RunData(
            batch_plan=batch_plan,
            batches=Prefetcher(sequences, batch_plan, rank=group.rank, device=group.device),
            evaluations=make_evaluations(config, batch_plan, evaluation_data, evaluator),
        ),
        processes=Processes(group, parallel_plan, stop_requests, watchdog, stragglers),
        reports=Reports(
            directory=directory,
            logger=logger,
            meters=meters,
            startup=startup,
            trace=open_trace(
                parse_steps(config.trace) if config.trace is not None else None,
                first=progress.step,
                ranks=config.trace_ranks,
                rank=group.rank,
                run_dir=directory.path,
                device=group.device,
                log=logger.log,
            ),
            checkpoints=CheckpointSchedule(
                config.save,
                last_step=config.train.steps,
                writer=writer,
                directory=directory,
                logger=logger,
                meters=meters,
                group=group,
                heartbeat=watchdog.heartbeat,
            ),
        ),
    )


def open_tokenizer(directory: Path, manifest: Manifest) -> Tokenizer:
    """Return the data's tokenizer. Raise InputError if it has another vocabulary than the data, and so the model."""
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size != manifest.vocab_size:
        raise InputError(
            f"{directory}: its tokenizer has {tokenizer.vocab_size} ids, its manifest says {manifest.vocab_size}; "
            "restore it or prepare the data again"
        )
    return tokenizer


def open_sequences(config: Config) -> TrainingSequences:
    """Return the training sequences. Raise InputError if the split is too short or a skipped one is not in it."""
    stream = open_split(config.data.dir, "train")
    return TrainingSequences(
        stream,
        config.train.seq_len,
        config.seed,
        config.data.skip_sequences,
        has_dropout=config.model.dropout > 0,
    )


EvaluationData = tuple[ValidationSet | None, HellaSwag | None, Sampler | None]


def open_evaluation_data(config: Config, batch_plan: BatchPlan, tokenizer: Tokenizer) -> EvaluationData:
    """Return the data of each evaluation; None for an evaluation that is switched off."""
    validation = hellaswag = sampler = None
    if config.validate.every is not None:
        validation = ValidationSet(
            open_split(config.data.dir, "val"),
            seq_len=config.train.seq_len,
            micro_batch=batch_plan.micro_batch,
            num_tokens=config.validate.tokens,
            byte_lengths=tokenizer.byte_lengths(),
        )
    if config.validate.hellaswag is not None and config.validate.hellaswag_every is not None:
        hellaswag = open_hellaswag(
            config.validate.hellaswag,
            tokenizer,
            context_len=config.train.seq_len,
            batch_tokens=batch_plan.micro_batch * config.train.seq_len,
            fixed_shapes=config.train.compile,
            most=config.validate.hellaswag_items,
        )
    if config.sample.every is not None:
        # A compiled model is called in validation's shape, which it knows already.
        num_rows = batch_plan.micro_batch if config.train.compile else None
        sampler = Sampler(config.sample, tokenizer, seed=config.seed, num_rows=num_rows)
    return validation, hellaswag, sampler


def make_evaluations(
    config: Config, batch_plan: BatchPlan, data: EvaluationData, evaluator: Evaluator
) -> list[PeriodicEvaluation]:
    """Return the loop's evaluations in the order in which they run after a step."""
    validation, hellaswag, sampler = data
    evaluations = []
    if validation is not None and config.validate.every is not None:
        evaluations.append(evaluator.validation(validation, every=config.validate.every))
    if hellaswag is not None and config.validate.hellaswag_every is not None:
        evaluations.append(evaluator.hellaswag(hellaswag, every=config.validate.hellaswag_every))
    if sampler is not None and config.sample.every is not None:
        shape = (batch_plan.micro_batch, config.train.seq_len)
        evaluations.append(evaluator.samples(sampler, every=config.sample.every, shape=shape))
    return evaluations


def warnings_of(config: Config, parallel_plan: ParallelPlan, data: EvaluationData, group: ProcessGroup) -> list[str]:
    """Return one line for each setting that does less than its flag says."""
    validation, hellaswag, _ = data
    warnings = settings_without_effect(config, group.device.type, group.world, parallel_plan.mode)
    if validation is not None and config.validate.tokens is not None and validation.num_tokens < config.validate.tokens:
        warnings.append(f"--validate.tokens {config.validate.tokens}: the split has only {validation.num_tokens}")
    if hellaswag is not None:
        warnings += hellaswag.remarks
    if group.device.type == "cuda" and device_peak_flops(config, group.device) is None:
        warnings.append(
            f"no peak is known for {torch.cuda.get_device_name(group.device)} at {config.train.dtype}, so there is no "
            "MFU; give the GPU's dense peak as --track.peak-tflops"
        )
    return warnings


def start_tracking(config: Config, wandb_id: str, directory: RunDirectory, logger: RunLogger) -> Tracking | None:
    """Return the W&B run; None if tracking is disabled or cannot start."""
    return open_tracking(
        mode=config.track.wandb,
        run_dir=config.directory,
        run_id=wandb_id,
        name=config.directory.name,
        project=redacted(config.track.project),
        group=None if config.track.group is None else redacted(config.track.group),
        tags=tuple(map(redacted, config.track.tags)),
        config=config.to_json(),
        provenance=directory.provenance,
        log=logger.log,
    )


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}
