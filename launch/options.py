"""The options of launch/submit.py and launch/sweep.py, and the combinations that are refused at once."""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard

import tyro

from common.errors import InputError
from common.names import require_printable
from data_prep import fineweb_plan


@dataclass(frozen=True)
class Options:
    """Options of a submission: cluster, nodes, time and what to train."""

    nodes: int = 1
    """Nodes of each job."""
    gpus_per_node: int = 8
    """GPUs of each node; each GPU has one process."""
    cpus_per_gpu: int = 4
    """Cores of each process."""
    time: str = "12:00:00"
    """Time limit as sbatch takes it: 90, 12:00:00, 2-00:00:00. The job saves before the limit and is requeued."""
    account: str | None = None
    """Slurm account."""
    partition: str | None = None
    """Slurm partition."""
    sbatch: tuple[str, ...] = ()
    """More flags of sbatch, like qos=high mem=0 exclude=n17 exclusive. gres=gpu:h100:8, gpus-per-node=8, gpus=16 or
    gpus-per-task=1 takes the place of --gres=gpu:N, by which GPUs are asked for."""
    name: str | None = None
    """Name of the job; None: the name of the run directory."""
    max_requeues: int = 50
    """Restarts of a job after which it is left to end; 0: it never goes back to the queue by itself."""
    max_parallel: int | None = None
    """Runs that train at a time; None: as many as the cluster allows, or one with --cluster local."""
    only_failed: bool = False
    """Train only the runs that failed or were killed."""
    wait: bool = False
    """Wait until all runs have ended, then print the table of `status`; exit status 1 if a run has failed. --cluster
    local always waits."""
    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm: submit jobs; local: processes of this machine, which restart at --time but not after a crash; debug: this
    process itself, for a debugger."""
    dry_run: bool = False
    """Print the runs, the run card and the job script, and stop."""


@dataclass(frozen=True)
class SubmitOptions(Options):
    """Train on a cluster. Flags of train/main.py follow after --. Other forms: `status RUN_DIR` and `stop RUN_DIR`."""

    grid: tuple[str, ...] = ()
    """Flags with values, like optim.lr-peak=6e-4,1e-3 seed=1,2: every combination is a run, and all runs are one array
    of jobs. Runs that are done or already train are left out."""
    prep: bool = False
    """Prepare FineWeb-Edu in --data.dir first, by slurm/prep_fineweb.sh; the training waits for it."""
    prep_tasks: int = 8
    """Array tasks that tokenize."""
    prep_sbatch: tuple[str, ...] = ()
    """More flags of sbatch for --prep, like partition=cpu cpus-per-task=32."""
    prep_flags: str = ""
    """Flags of data_prep/fineweb.py in one word: --prep-flags='--name sample-100BT'."""


def wants_preparation(options: Options) -> TypeGuard[SubmitOptions]:
    return isinstance(options, SubmitOptions) and options.prep


def refuse_contradictions(options: Options) -> None:
    """Raise InputError for options that cannot hold together, or that need a Slurm that is not there."""
    missing = [name for name in ("sbatch", "srun", "squeue", "scancel") if shutil.which(name) is None]
    if options.cluster == "slurm" and missing:
        raise InputError(f"no Slurm here: no {missing[0]} on PATH; --cluster local trains on this machine")
    if options.cluster != "slurm" and options.nodes > 1:
        raise InputError(
            f"--nodes {options.nodes} with --cluster {options.cluster}: this machine is one node; use --nodes 1"
        )
    if options.cluster == "debug" and options.gpus_per_node > 1:
        raise InputError(f"--gpus-per-node {options.gpus_per_node} with --cluster debug: it is one process; use 1")
    if wants_preparation(options) and options.cluster != "slurm":
        raise InputError(f"--prep with --cluster {options.cluster}: run python data_prep/fineweb.py here first")
    texts = {"--name": options.name, "--account": options.account, "--partition": options.partition}
    for flag, text in [*texts.items(), *(("--sbatch", word) for word in options.sbatch)]:
        require_script_text(flag, text or "")
    for name in ("nodes", "gpus_per_node", "cpus_per_gpu", "max_parallel", "prep_tasks"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if options.max_requeues < 0:
        raise InputError(f"--max-requeues {options.max_requeues} must be at least 0")
    if wants_preparation(options):  # refuse wrong flags here, before eight tasks fail with them
        tyro.cli(fineweb_plan.Options, prog="--prep-flags", args=shlex.split(options.prep_flags))
    parse_minutes(options.time)


def require_script_text(flag: str, text: str) -> None:
    """Raise InputError for what a line `#SBATCH --flag='text'` cannot hold: Slurm removes a backslash there."""
    require_printable(flag, text)
    if "\\" in text:
        raise InputError(f"{flag} {text}: Slurm removes the backslash; give a name without one")


def require_log_folder(run_dir: Path) -> None:
    """Raise InputError for a run directory that cannot be in the name of a log: Slurm and submitit replace %j there."""
    require_script_text("--run-dir", str(run_dir))
    if "%" in str(run_dir):
        raise InputError(f"--run-dir {run_dir}: Slurm replaces what follows a % in the names of logs; choose another")


def parse_minutes(text: str) -> int:
    """Return the minutes, rounded up, of M, M:S, H:M:S, D-H, D-H:M or D-H:M:S, which are sbatch's forms."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise InputError(f"--time {text}: write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
    days, *numbers = match.groups()
    if days is None and numbers[2] is None:  # without days, one or two numbers begin with minutes
        numbers = ["0", *numbers]
    hours, minutes, seconds = (int(number or 0) for number in numbers[:3])
    return -(-((int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds) // 60)
