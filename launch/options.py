"""What launch/submit.py is asked for, and what it refuses at once."""

import re
import shlex
import shutil
from dataclasses import dataclass
from typing import Literal, TypeGuard

import tyro

from common.errors import InputError
from data_prep import fineweb_plan


@dataclass(frozen=True)
class Options:
    """How runs are to be trained."""

    nodes: int = 1
    """Nodes of each job."""
    gpus_per_node: int = 8
    """GPUs, and so processes, on each."""
    cpus_per_gpu: int = 4
    """Cores of each process."""
    time: str = "12:00:00"
    """Time limit as sbatch takes it: 90, 12:00:00, 2-00:00:00. Before it the job saves, and goes back to the queue."""
    account: str | None = None
    """Slurm account."""
    partition: str | None = None
    """Slurm partition."""
    sbatch: tuple[str, ...] = ()
    """More of sbatch's flags, like qos=high mem=0 exclude=n17 exclusive."""
    name: str | None = None
    """Of the job; None: the run directory's."""
    max_requeues: int = 50
    """Restarts of a job after which it is left to end."""
    max_parallel: int | None = None
    """Of several runs, those that train at a time; None: as many as the cluster lets, or one with --cluster local."""
    only_failed: bool = False
    """Of several runs, those that failed or were killed, and no others."""
    wait: bool = False
    """Stay until all have ended, then print the table that `status` prints; exit status 1 if one has failed. --cluster
    local always does."""
    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """local: processes of this machine, which start again at --time and not after a crash; debug: this very process,
    for a debugger."""
    dry_run: bool = False
    """Print the runs, the run card and the job script, and stop."""


@dataclass(frozen=True)
class SubmitOptions(Options):
    """Train on a cluster; after --, train/main.py's flags. `status RUN_DIR` and `stop RUN_DIR` are the other forms."""

    grid: tuple[str, ...] = ()
    """Flags with values, like optim.lr-peak=6e-4,1e-3 seed=1,2: every combination is a run, all of them an array of
    jobs. Those that are done, or train already, are left out."""
    prep: bool = False
    """First prepare FineWeb-Edu in --data.dir by slurm/prep_fineweb.sh; the training waits for it."""
    prep_tasks: int = 8
    """Array tasks that tokenize."""
    prep_sbatch: tuple[str, ...] = ()
    """More of sbatch's flags for --prep, like partition=cpu cpus-per-task=32."""
    prep_flags: str = ""
    """data_prep/fineweb.py's, in one word: --prep-flags='--name sample-100BT'."""


def wants_preparation(options: Options) -> TypeGuard[SubmitOptions]:
    return isinstance(options, SubmitOptions) and options.prep


def refuse_contradictions(options: Options) -> None:
    missing = [name for name in ("sbatch", "srun", "squeue", "scancel") if shutil.which(name) is None]
    if options.cluster == "slurm" and missing:
        raise InputError(f"no Slurm here: no {missing[0]} on PATH; --cluster local trains on this machine")
    if options.cluster != "slurm" and options.nodes > 1:
        raise InputError(
            f"--nodes {options.nodes} with --cluster {options.cluster}: this machine is one; use --nodes 1"
        )
    if options.cluster == "debug" and options.gpus_per_node > 1:
        raise InputError(f"--gpus-per-node {options.gpus_per_node} with --cluster debug: it is one process; use 1")
    if wants_preparation(options) and options.cluster != "slurm":
        raise InputError(f"--prep with --cluster {options.cluster}: run python data_prep/fineweb.py here first")
    for name in ("nodes", "gpus_per_node", "cpus_per_gpu", "max_parallel", "prep_tasks"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if wants_preparation(options):  # its own parser's line, before eight tasks fail with it
        tyro.cli(fineweb_plan.Options, prog="--prep-flags", args=shlex.split(options.prep_flags))
    minutes_of(options.time)


def minutes_of(text: str) -> int:
    """Of sbatch's M, M:S, H:M:S, D-H, D-H:M and D-H:M:S, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise InputError(f"--time {text}: write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # minutes come first
        numbers = [0, *numbers]
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return -(-((int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds) // 60)
