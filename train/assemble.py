"""A run put together: model, optimizer, data, progress, reports."""

import secrets
import sys

import numpy as np
import torch

from data_prep.codec import Codec, load_codec
from data_prep.manifest import Manifest, open_split
from train import parallel, resume
from train.batches import BatchPlan, Prefetcher, Windows, plan_batches
from train.config import Config, settings_without_effect
from train.fit import settle_micro_batch
from train.hellaswag_score import HellaSwag, open_hellaswag
from train.layout import Layout
from train.loop import Run
from train.mesh import Mesh
from train.meters import Meters, Startup, device_peak_flops
from train.nonfinite import Halt
from train.numerics import LossScale
from train.optim import build_optimizer
from train.run_dir import RunDirectory
from train.samples import Sampler
from train.saves import Progress, Saver
from train.sinks import Sinks
from train.stops import Stops
from train.stragglers import Stragglers
from train.traces import open_trace, parse_steps
from train.tracking import Tracking, open_tracking
from train.validation import ValidationSet
from train.watchdog import Watchdog


def assemble(
    config: Config,
    mesh: Mesh,
    layout: Layout,
    manifest: Manifest,
    directory: RunDirectory,
    stops: Stops,
    watchdog: Watchdog,
    startup: Startup,
) -> Run:
    """Model, optimizer, data and progress: new from the seed, or as the newest sound checkpoint left them."""
    codec = mesh.on_all(lambda: load_codec(config.data.dir))
    objective = parallel.build_objective(config, layout, mesh)
    model = objective.model
    optimizer = build_optimizer(model, config.optim)
    if config.train.micro_batch == "auto":
        config = settle_micro_batch(config, objective, layout, directory, mesh)
    plan = plan_batches(config, mesh.world)
    windows, validation, hellaswag, sampler = mesh.on_all(lambda: open_data(config, plan, codec))
    module = parallel.wrap(objective, layout)
    loss_scale = LossScale(mesh.device) if config.train.dtype == "fp16" else None

    loaded, faults = resume.find_start(directory.path, mesh=mesh)
    progress, tracked_as, origin = Progress(), None, None
    if loaded is not None:
        state = resume.load(loaded, model=model, optimizer=optimizer, loss_scale=loss_scale, mesh=mesh)
        progress, tracked_as = Progress(**state["progress"]), state["wandb_id"]
    elif config.from_checkpoint is not None:
        origin = resume.load_weights(config.from_checkpoint, model, codec, mesh)

    sinks = Sinks(directory.path, step=progress.step if loaded else None, mesh=mesh, stops=stops)
    warnings = [f"passed over {fault}" for fault in faults]
    warnings += settings_without_effect(config, mesh.device.type, mesh.world, layout.mode)
    if validation is not None and config.validate.tokens is not None and validation.num_tokens < config.validate.tokens:
        warnings.append(f"--validate.tokens {config.validate.tokens}: the split has only {validation.num_tokens}")
    if hellaswag is not None:
        warnings += hellaswag.remarks
    if mesh.device.type == "cuda" and device_peak_flops(config, mesh.device) is None:
        warnings.append(
            f"no peak is known for {torch.cuda.get_device_name(mesh.device)} at {config.train.dtype}, so there is no "
            "MFU; give the card's dense figure as --track.peak-tflops"
        )
    for line in warnings:
        sinks.say(f"warning: {line}")
    if origin is not None:
        sinks.say(f"weights from {origin}")
    wandb_id = mesh.on_main(lambda: tracked_as or secrets.token_hex(4))
    if mesh.is_main:
        sinks.tracking = start_tracking(config, wandb_id, directory, sinks)
    stragglers = Stragglers(mesh, watchdog.hosts, sinks.say)
    if layout.is_sharded:
        stragglers.watch(model.blocks[0])
    startup.done("set-up")
    return Run(
        config=config,
        mesh=mesh,
        layout=layout,
        directory=directory,
        plan=plan,
        batches=Prefetcher(windows, plan, rank=mesh.rank, device=mesh.device),
        validation=validation,
        hellaswag=hellaswag,
        sampler=sampler,
        model=model,
        objective=objective,
        module=module,
        optimizer=optimizer,
        mean=torch.full((), mesh.world / config.train.batch_tokens, device=mesh.device),
        loss_scale=loss_scale,
        sinks=sinks,
        stops=stops,
        watchdog=watchdog,
        stragglers=stragglers,
        progress=progress,
        meters=Meters(config, device=mesh.device, world=mesh.world, step=progress.step, seconds=progress.seconds),
        startup=startup,
        trace=open_trace(
            parse_steps(config.trace) if config.trace is not None else None,
            ranks=config.trace_ranks,
            rank=mesh.rank,
            run_dir=directory.path,
            device=mesh.device,
            say=sinks.say,
        ),
        saver=Saver(
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
            mesh=mesh,
        ),
        halt=Halt(config.train.on_nonfinite, mesh.device),
        loaded=loaded,
    )


def open_data(
    config: Config, plan: BatchPlan, codec: Codec
) -> tuple[Windows, ValidationSet | None, HellaSwag | None, Sampler | None]:
    """The training windows, and what the model is looked at with; None for what the config switches off."""
    stream = open_split(config.data.dir, "train")
    windows = Windows(stream, config.train.seq_len, config.seed, config.data.leave_out)
    validation = hellaswag = sampler = None
    if config.validate.every is not None:
        validation = ValidationSet(
            open_split(config.data.dir, "val"),
            seq_len=config.train.seq_len,
            micro_batch=plan.micro_batch,
            num_tokens=config.validate.tokens,
            byte_lengths=codec.byte_lengths(),
        )
    if config.validate.hellaswag is not None and config.validate.hellaswag_every is not None:
        hellaswag = open_hellaswag(
            config.validate.hellaswag,
            codec,
            context_len=config.train.seq_len,
            batch_tokens=plan.micro_batch * config.train.seq_len,
            fixed_shapes=config.train.compile,
            most=config.validate.hellaswag_items,
        )
    if config.sample.every is not None:
        # A compiled model is called in validation's shape, which it knows already.
        num_rows = plan.micro_batch if config.train.compile else None
        sampler = Sampler(config.sample, codec, seed=config.seed, num_rows=num_rows)
    return windows, validation, hellaswag, sampler


def start_tracking(config: Config, wandb_id: str, directory: RunDirectory, sinks: Sinks) -> Tracking | None:
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
        say=sinks.say,
    )


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}
