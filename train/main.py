"""Train a GPT.

    torchrun --nproc_per_node=8 train/main.py                       # gpt2-small, 8 GPUs, 10B tokens
    torchrun --nproc_per_node=2 train/main.py quickstart            # under 3 minutes on two CPU cores
    python train/main.py shakespeare-char-cpu                       # 2 minutes on two; val loss <= 1.90
    torchrun --nproc_per_node=8 train/main.py gpt2-small --optim.lr-peak 1e-3 --run-dir runs/hot --dry-run

Presets: train/presets.py. Flags: `--help`. The same command line again continues the run.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from data_prep.codec import load_codec
from data_prep.errors import one_line_errors
from data_prep.manifest import FILE_NAME, Manifest, open_split, read_manifest
from model.gpt import build_model
from train import parallel, saves
from train.batches import BatchPlan, Windows, plan_batches
from train.config import Config, parse, settings_without_effect, with_vocabulary
from train.loop import Run, train
from train.mesh import Mesh, open_mesh
from train.meters import Meters
from train.optim import build_optimizer
from train.presets import PRESETS
from train.run_card import run_card
from train.run_dir import RunDirectory, refuse_disagreement
from train.saves import Progress
from train.sinks import Sinks
from train.stops import Stops
from train.validate import ValidationSet


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors("train"):
        config = parse(sys.argv[1:] if args is None else args, PRESETS)
        if config.dry_run:
            dry_run(config)
            return
        with open_mesh() as mesh:
            run(config, mesh)


def dry_run(config: Config) -> None:
    """The run card for as many processes as torchrun started, without touching anything."""
    manifest = read_manifest(config.data.dir) if (config.data.dir / FILE_NAME).is_file() else None
    if manifest is not None:
        config = with_vocabulary(config, manifest.vocab_size)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parallel.check_mode(config, world)
    plan = plan_batches(config, world)
    if os.environ.get("RANK", "0") == "0":
        print(card(config, manifest, plan, world))
        for line in settings_without_effect(config):
            print(f"warning: {line}")


def run(config: Config, mesh: Mesh) -> None:
    """One attempt at a run, from its directory to its end. Collective."""
    manifest = mesh.on_all(lambda: read_manifest(config.data.dir))
    config = with_vocabulary(config, manifest.vocab_size)
    refuse_disagreement(config, manifest.fingerprint, mesh)
    parallel.check_mode(config, mesh.world)
    plan = plan_batches(config, mesh.world)
    with (
        Stops(config.directory, is_main=mesh.is_main) as stops,
        RunDirectory(config, manifest.fingerprint, mesh) as directory,
    ):
        this = set_up(config, mesh, manifest, plan, directory, stops)
        with this.sinks as sinks:
            sinks.say(card(config, manifest, plan, mesh.world))
            if this.loaded is not None:
                sinks.say(f"continuing from {this.loaded}")
            directory.report(this.progress.step)
            state, reason = train(this)
            directory.end(state, this.progress.step, reason)
            sinks.say(f"{state} at step {this.progress.step}" + (f" ({reason})" if reason else ""))
        mesh.barrier()  # launchers kill the rest when the first process exits


def set_up(
    config: Config, mesh: Mesh, manifest: Manifest, plan: BatchPlan, directory: RunDirectory, stops: Stops
) -> Run:
    """Model, optimizer, data and progress: new from the seed, or as the newest sound checkpoint left them."""
    windows, validation = mesh.on_all(lambda: open_data(config, plan))
    model = build_model(
        config.model, seed=config.seed, device=mesh.device, compute_dtype=parallel.compute_dtype(config)
    )
    module = parallel.parallelize(model, config, mesh)
    optimizer = build_optimizer(model, config.optim)
    loaded, faults = saves.find_start(directory.path, resume=config.resume, mesh=mesh)
    progress = Progress()
    if loaded is not None:
        progress = saves.load(loaded, model=model, optimizer=optimizer, mesh=mesh)
    sinks = Sinks(directory.path, step=progress.step if loaded else None, mesh=mesh)
    for fault in faults:
        sinks.say(f"warning: passed over {fault}")
    for line in settings_without_effect(config):
        sinks.say(f"warning: {line}")
    if validation is not None and config.validate.tokens is not None and validation.num_tokens < config.validate.tokens:
        sinks.say(f"warning: --validate.tokens {config.validate.tokens}: the split has only {validation.num_tokens}")
    return Run(
        config=config,
        mesh=mesh,
        directory=directory,
        plan=plan,
        windows=windows,
        validation=validation,
        model=model,
        module=module,
        optimizer=optimizer,
        sinks=sinks,
        stops=stops,
        progress=progress,
        meters=Meters(config, device=mesh.device, world=mesh.world, step=progress.step, seconds=progress.seconds),
        state={"config": config.to_json(), "data": manifest.fingerprint, "versions": versions()},
        loaded=loaded,
        saved_step=progress.step if loaded else None,
    )


def open_data(config: Config, plan: BatchPlan) -> tuple[Windows, ValidationSet | None]:
    """The training windows, and what is validated on; None with --validate.every None."""
    windows = Windows(open_split(config.data.dir, "train"), config.train.seq_len, config.seed)
    if config.validate.every is None:
        return windows, None
    return windows, ValidationSet(
        open_split(config.data.dir, "val"),
        seq_len=config.train.seq_len,
        micro_batch=plan.micro_batch,
        num_tokens=config.validate.tokens,
        byte_lengths=load_codec(config.data.dir).byte_lengths(),
    )


def card(config: Config, manifest: Manifest | None, plan: BatchPlan, world: int) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU process"
    return run_card(config, manifest, plan, world, device)


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}


if __name__ == "__main__":
    main()
