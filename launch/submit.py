"""Train a run or a grid of runs on a Slurm cluster without a job script: through submitit, one task per rank.

    python launch/submit.py gpt2-small --nodes 4 --account A --partition P -- --optim.lr-peak 1e-3
    python launch/submit.py gpt2-small --grid optim.lr-peak=6e-4,1e-3 seed=1,2 --max-parallel 2 --account A --wait
    python launch/submit.py gpt2-small --prep --account A          # FineWeb-Edu first, the training after it
    python launch/submit.py shakespeare-char-cpu --cluster local --gpus-per-node 2          # on this machine
    python launch/submit.py status runs/gpt2-small-grid
    python launch/submit.py stop runs/gpt2-small                   # a checkpoint first

The words after -- are flags of train/main.py; they are checked before anything is submitted. The code as it is now is
copied into the run directory, and the job runs that copy, after every requeue too. The job comes back after preemption,
at its time limit and after a crash, by the same rules as sbatch slurm/gpt2_small.sh (docs/cluster.md). Submitting takes
some seconds.
"""

import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from common.errors import InputError, one_line_errors, reading_from
from data_prep.manifest import FILE_NAME as MANIFEST_FILE
from launch.grid import Point, expand_grid, find_run_dir, split_at_dashes
from launch.local import train_here
from launch.options import Options, SubmitOptions, refuse_contradictions, require_log_folder, wants_preparation
from launch.runs import RunInfo, find_runs, inspect_runs, stop, table
from launch.slurm_jobs import slurm_executor, submit_to_slurm
from launch.snapshot import ROOT, take
from train.command_line import parse
from train.config import Config
from train.main import planned
from train.presets import PRESETS
from train.processes.ranks import RankInfo

COMMANDS = ("status", "stop")


def submit(preset: str, options: SubmitOptions, flags: Sequence[str]) -> None:
    """Train the run, or the runs of the grid; print their table if none is left in the queue or in training."""
    if not options.grid and (options.only_failed or options.max_parallel is not None):
        raise InputError("--only-failed and --max-parallel are for a --grid")
    points = [Point(point.args, point.run_dir.absolute()) for point in expand_grid(preset, options.grid, flags)]
    run_dirs = [point.run_dir for point in points]
    if not options.grid:
        refuse_busy(inspect_runs(run_dirs)[0])
    base = (find_run_dir(flags) or run_dirs[0].parent).absolute() if options.grid else run_dirs[0]
    train_points(points, base, options)
    runs = inspect_runs(run_dirs)
    if not options.dry_run and not any(run.is_busy for run in runs):
        print(table(runs))
        if any(run.state in ("failed", "killed", "new") for run in runs):
            sys.exit(1)


def train_points(
    points: Sequence[Point], base: Path, options: Options, *, excluded: Collection[Path] = frozenset()
) -> None:
    """Train the runs that are not done and not in training, all with one copy of the code in `base`.

    On this machine the function returns when they have ended; on Slurm when they are submitted. The configuration of
    every run is checked first, also of those that are done. `excluded`: run directories that are not trained.
    """
    refuse_contradictions(options)
    require_log_folder(base)
    run_dirs = [point.run_dir for point in points]
    configs = [parse(point.args, PRESETS) for point in points]
    cards = [checked_card(config, options) for config in configs]
    selected = [point for point in select(points, inspect_runs(run_dirs), options) if point.run_dir not in excluded]
    if options.dry_run:
        print("\n".join([cards[0], *(f"would train {point.run_dir}" for point in selected)]))
        if options.cluster == "slurm" and selected:
            executor = slurm_executor(options, base, base / "code" / "...", selected)
            # submitit has no public name for the text of its job script.
            print(executor._make_submission_file_text(executor._submitit_command_str, ""))
        return

    if selected:
        code = ROOT if options.cluster == "debug" else take(ROOT, base)
        if options.cluster == "slurm":
            submit_to_slurm(options, base, code, selected, configs[0].data.dir.absolute())
        else:
            train_here(options, base, code, selected)
    while options.wait and any(run.is_busy for run in inspect_runs(run_dirs)):
        time.sleep(5)


def checked_card(config: Config, options: Options) -> str:
    """Return the run card; InputError for what train/main.py would refuse, as far as it can be known here."""
    with reading_from(config.data.dir):
        is_prepared = (config.data.dir / MANIFEST_FILE).is_file()
    if not wants_preparation(options) and not is_prepared:
        raise InputError(f"{config.data.dir}: no {MANIFEST_FILE}, so no data yet; prepare it first, or give --prep")
    world = options.nodes * options.gpus_per_node
    return "\n".join(planned(config, RankInfo(0, world, 0, options.gpus_per_node)))


def select(points: Sequence[Point], runs: Sequence[RunInfo], options: Options) -> list[Point]:
    """Return the runs that are to be trained."""
    states = ("failed", "killed") if options.only_failed else ("new", "stopped", "failed", "killed")
    return [point for point, run in zip(points, runs, strict=True) if run.state in states]


def refuse_busy(run: RunInfo) -> None:
    """Raise InputError if another job or process has the run."""
    if run.is_busy:
        verb = "waits in the queue" if run.state == "queued" else "is training here"
        holder = f"job {run.job}" if run.job is not None else run.holder
        raise InputError(f"{run.run_dir}: {holder} {verb}; stop it first (launch/submit.py stop), or use --run-dir")


def main(args: Sequence[str] | None = None) -> None:
    words, flags = split_at_dashes(sys.argv[1:] if args is None else args)
    with one_line_errors("submit"):
        if words and words[0] in COMMANDS:
            command, *folders = words
            if not folders:
                raise InputError(f"{command}: which run? give run directories, or a sweep's folder")
            run_dirs = [run_dir for folder in folders for run_dir in find_runs(Path(folder))]
            if command == "stop":
                stop(run_dirs)
            else:
                print(table(inspect_runs(run_dirs)))
            return
        preset = words.pop(0) if words and not words[0].startswith("-") else "gpt2-small"
        options = tyro.cli(SubmitOptions, prog=f"launch/submit.py {preset}", args=words)
        submit(preset, options, flags)


if __name__ == "__main__":
    main()
