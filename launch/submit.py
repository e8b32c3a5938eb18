"""Train on a Slurm cluster, or a grid of runs, without writing a job script: through submitit, one task per rank.

    python launch/submit.py gpt2-small --nodes 4 --account A --partition P -- --optim.lr-peak 1e-3
    python launch/submit.py gpt2-small --grid optim.lr-peak=6e-4,1e-3 seed=1,2 --max-parallel 2 --account A --wait
    python launch/submit.py gpt2-small --prep --account A          # FineWeb-Edu first, the training after it
    python launch/submit.py shakespeare-char-cpu --cluster local --gpus-per-node 2          # on this machine
    python launch/submit.py status runs/gpt2-small-grid
    python launch/submit.py stop runs/gpt2-small                   # a checkpoint first

What stands after -- are train/main.py's flags; they are checked before anything is submitted. The code as it is now is
copied into the run directory, and that copy runs, after every requeue too. The job comes back after preemption, at its
time limit and after a crash, by the same rules as sbatch slurm/gpt2_small.sh (docs/cluster.md). Takes some seconds.
"""

import dataclasses
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from common.errors import InputError, one_line_errors, reading_from
from data_prep.manifest import FILE_NAME as MANIFEST_FILE
from launch.grid import Point, points_of, run_dir_in, split
from launch.local import train_here
from launch.options import Options, SubmitOptions, refuse_contradictions, wants_preparation
from launch.runs import Look, look, runs_in, stop, table
from launch.slurm_jobs import slurm_executor, submit_to_slurm
from launch.snapshot import ROOT, take
from train.config import Config, parse
from train.main import planned
from train.presets import PRESETS
from train.processes.ranks import RankInfo

COMMANDS = ("status", "stop")


def submit(preset: str, options: SubmitOptions, flags: Sequence[str]) -> None:
    if not options.grid and (options.only_failed or options.max_parallel is not None):
        raise InputError("--only-failed and --max-parallel are for a --grid")
    points = [
        dataclasses.replace(point, run_dir=point.run_dir.absolute()) for point in points_of(preset, options.grid, flags)
    ]
    run_dirs = [point.run_dir for point in points]
    if not options.grid:
        refuse_busy(look(run_dirs)[0])
    base = (run_dir_in(flags) or run_dirs[0].parent).absolute() if options.grid else run_dirs[0]
    train_points(points, base, options)
    looks = look(run_dirs)
    if not options.dry_run and not any(run.doing in ("queued", "running") for run in looks):
        print(table(looks))
        if any(run.doing in ("failed", "killed", "new") for run in looks):
            sys.exit(1)


def train_points(
    points: Sequence[Point], base: Path, options: Options, *, settled: Collection[Path] = frozenset()
) -> None:
    """Those that are not done and not trained yet, with one copy of the code in `base`: here until they have ended, or
    handed to Slurm. All are checked, those that are done too. `settled`: failed runs that would fail again."""
    refuse_contradictions(options)
    run_dirs = [point.run_dir for point in points]
    configs = [parse(point.args, PRESETS) for point in points]
    cards = [checked(config, options) for config in configs]
    chosen = [point for point in choose(points, look(run_dirs), options) if point.run_dir not in settled]
    if options.dry_run:
        print("\n".join([cards[0], *(f"would train {point.run_dir}" for point in chosen)]))
        if options.cluster == "slurm" and chosen:
            executor = slurm_executor(options, base, base / "code" / "...", chosen)
            print(executor._make_submission_file_text(executor._submitit_command_str, ""))  # it has no public name
        return

    if chosen:
        code = ROOT if options.cluster == "debug" else take(ROOT, base)
        if options.cluster == "slurm":
            submit_to_slurm(options, base, code, chosen, configs[0].data.dir.absolute())
        else:
            train_here(options, base, code, chosen)
    if options.wait:
        wait_for_jobs(run_dirs)


def checked(config: Config, options: Options) -> str:
    """The run card; InputError for what train/main.py would refuse, but for what only the job's nodes can tell."""
    with reading_from(config.data.dir):
        is_prepared = (config.data.dir / MANIFEST_FILE).is_file()
    if not wants_preparation(options) and not is_prepared:
        raise InputError(f"{config.data.dir}: no {MANIFEST_FILE}, so no data yet; prepare it first, or give --prep")
    world = options.nodes * options.gpus_per_node
    return "\n".join(planned(config, RankInfo(0, world, 0, options.gpus_per_node)))


def choose(points: Sequence[Point], looks: Sequence[Look], options: Options) -> list[Point]:
    """Those that are to be trained."""
    wanted = ("failed", "killed") if options.only_failed else ("new", "stopped", "failed", "killed")
    return [point for point, run in zip(points, looks, strict=True) if run.doing in wanted]


def refuse_busy(run: Look) -> None:
    """InputError if another job or process has the run."""
    if run.doing in ("queued", "running"):
        verb = "waits in the queue" if run.doing == "queued" else "is training here"
        who = f"job {run.job}" if run.job is not None else run.holder
        raise InputError(f"{run.run_dir}: {who} {verb}; stop it first (launch/submit.py stop), or use --run-dir")


def wait_for_jobs(run_dirs: Sequence[Path]) -> None:
    while any(run.doing in ("queued", "running") for run in look(run_dirs)):
        time.sleep(5)


def main(args: Sequence[str] | None = None) -> None:
    given, flags = split(sys.argv[1:] if args is None else args)
    with one_line_errors("submit"):
        if given and given[0] in COMMANDS:
            if len(given) == 1:
                raise InputError(f"{given[0]}: which? give run directories, or a sweep's folder")
            run_dirs = [run_dir for folder in given[1:] for run_dir in runs_in(Path(folder))]
            if given[0] == "stop":
                stop(run_dirs)
            else:
                print(table(look(run_dirs)))
            return
        preset = given.pop(0) if given and not given[0].startswith("-") else "gpt2-small"
        options = tyro.cli(SubmitOptions, prog=f"launch/submit.py {preset}", args=given)
        submit(preset, options, flags)


if __name__ == "__main__":
    main()
