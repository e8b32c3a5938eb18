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

import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from data_prep.atomic import write_json_atomically
from data_prep.errors import InputError, one_line_errors, writing_to
from data_prep.manifest import FILE_NAME as MANIFEST_FILE
from launch.grid import Point, points_of, run_dir_in, split
from launch.runs import SUBMITTED_FILE, Look, look, runs_in, stop, table
from launch.snapshot import ROOT, take
from train.config import Config, parse
from train.main import planned
from train.place import Place
from train.presets import PRESETS

COMMANDS = ("status", "stop")
NOTICE_SECONDS = 300  # from the signal to the time limit; Slurm's may come a minute earlier
PREP_SCRIPT = "slurm/prep_fineweb.sh"


@dataclass(frozen=True)
class Options:
    """Train on a cluster; after --, train/main.py's flags. `status RUN_DIR` and `stop RUN_DIR` are the other forms."""

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
    grid: tuple[str, ...] = ()
    """Flags with values, like optim.lr-peak=6e-4,1e-3 seed=1,2: every combination is a run, all of them an array of
    jobs. Those that are done, or train already, are left out."""
    max_parallel: int | None = None
    """Runs of a grid that train at a time; None: as many as the cluster lets, or one with --cluster local."""
    only_failed: bool = False
    """Of a grid, the runs that failed or were killed, and no others."""
    wait: bool = False
    """Stay until all have ended, then print the table that `status` prints. --cluster local always does."""
    prep: bool = False
    """First prepare FineWeb-Edu in --data.dir by slurm/prep_fineweb.sh; the training waits for it."""
    prep_tasks: int = 8
    """Array tasks that tokenize."""
    prep_sbatch: tuple[str, ...] = ()
    """More of sbatch's flags for --prep, like partition=cpu cpus-per-task=32."""
    prep_flags: str = ""
    """data_prep/fineweb.py's, in one word: --prep-flags='--name sample-100BT'."""
    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """local: processes of this machine; debug: in this very process, for a debugger."""
    dry_run: bool = False
    """Print the runs, the run card and the job script, and stop."""


def submit(preset: str, options: Options, flags: Sequence[str]) -> None:
    refuse_contradictions(options)
    folder = Path.cwd()
    points = [
        dataclasses.replace(point, run_dir=point.run_dir.absolute()) for point in points_of(preset, options.grid, flags)
    ]
    configs = [parse(point.args, PRESETS) for point in points]
    cards = [checked(config, options) for config in configs]
    base = (run_dir_in(flags) or points[0].run_dir.parent).absolute() if options.grid else points[0].run_dir
    chosen = choose(points, look([point.run_dir for point in points]), options)
    if not chosen:
        print(table(look([point.run_dir for point in points])))
        return
    if options.dry_run:
        executor = executor_for(options, base, base / "code" / "...", [point.run_dir for point in chosen])
        print("\n".join([cards[0], *(f"would train {point.run_dir}" for point in chosen)]))
        if options.cluster == "slurm":
            print(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))
        return

    code = ROOT if options.cluster == "debug" else take(ROOT, base)
    dependency = submit_prep(options, configs[0], base) if options.prep else None
    executor = executor_for(options, base, code, [point.run_dir for point in chosen], dependency)
    if options.cluster == "slurm":
        submit_to_slurm(executor, code, folder, chosen)
        if options.wait:
            wait_for_jobs([point.run_dir for point in points])
    else:
        train_here(executor, code, folder, chosen, options.max_parallel or 1)
    if options.wait or options.cluster != "slurm":
        print(table(look([point.run_dir for point in points])))


def refuse_contradictions(options: Options) -> None:
    if options.cluster == "slurm" and shutil.which("sbatch") is None:
        raise InputError("no Slurm here: no sbatch on PATH; --cluster local trains on this machine")
    if options.cluster != "slurm" and options.nodes > 1:
        raise InputError(
            f"--nodes {options.nodes} with --cluster {options.cluster}: this machine is one; use --nodes 1"
        )
    if options.cluster == "debug" and options.gpus_per_node > 1:
        raise InputError(f"--gpus-per-node {options.gpus_per_node} with --cluster debug: it is one process; use 1")
    if options.prep and options.cluster != "slurm":
        raise InputError(f"--prep with --cluster {options.cluster}: run python data_prep/fineweb.py here first")
    for name, value in (("--nodes", options.nodes), ("--gpus-per-node", options.gpus_per_node)):
        if value < 1:
            raise InputError(f"{name} {value}: at least 1 is needed")
    if not options.grid and (options.only_failed or options.max_parallel is not None):
        raise InputError("--only-failed and --max-parallel are for a --grid")
    minutes_of(options.time)


def checked(config: Config, options: Options) -> str:
    """The run card; InputError for what train/main.py would refuse, but for what only the job's nodes can tell."""
    if not options.prep and not (config.data.dir / MANIFEST_FILE).is_file():
        raise InputError(f"{config.data.dir}: no {MANIFEST_FILE}, so no data yet; prepare it first, or give --prep")
    world = options.nodes * options.gpus_per_node
    return "\n".join(planned(config, Place(0, world, 0, options.gpus_per_node)))


def choose(points: Sequence[Point], looks: Sequence[Look], options: Options) -> list[Point]:
    """Those that are to be trained. InputError where the only one is trained by another."""
    busy = [run for run in looks if run.doing in ("queued", "running")]
    if busy and not options.grid:
        verb = "waits in the queue" if busy[0].doing == "queued" else "is training here"
        who = f"job {busy[0].job}" if busy[0].job is not None else busy[0].holder
        raise InputError(f"{busy[0].run_dir}: {who} {verb}; stop it first (launch/submit.py stop), or use --run-dir")
    wanted = ("failed", "killed") if options.only_failed else ("new", "stopped", "failed", "killed")
    return [point for point, run in zip(points, looks, strict=True) if run.doing in wanted]


def executor_for(
    options: Options, base: Path, code: Path, run_dirs: Sequence[Path], dependency: str | None = None
) -> Any:
    """submitit's executor of that cluster; its files and the jobs' logs lie in BASE/submitit."""
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # which the trainer hears; read when submitit is imported
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise InputError("submitit is not installed; pip install -e '.[cluster]'") from error
    folder = base / "submitit"
    if options.cluster == "debug":
        return submitit.DebugExecutor(folder)
    if options.cluster == "local":
        executor: Any = submitit.LocalExecutor(folder)
        executor.update_parameters(
            tasks_per_node=options.gpus_per_node,
            gpus_per_node=options.gpus_per_node,
            timeout_min=minutes_of(options.time),
            stderr_to_stdout=True,
        )
        return executor
    # submitit's line in the job script is then: per_rank PYTHON -u -m submitit.core._submit FOLDER
    executor = submitit.SlurmExecutor(folder, python=f"per_rank {shlex.quote(sys.executable)}")
    words = shlex.join([str(code), *(str(run_dir) for run_dir in run_dirs)])
    more = dict(flag.partition("=")[::2] for flag in options.sbatch)
    executor.update_parameters(
        job_name=options.name or base.name,
        nodes=options.nodes,
        ntasks_per_node=options.gpus_per_node,
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_gpu,
        account=options.account,
        partition=options.partition,
        dependency=dependency,
        array_parallelism=options.max_parallel or len(run_dirs),
        use_srun=False,
        stderr_to_stdout=True,
        setup=[
            f"export MAX_REQUEUES={options.max_requeues}",
            f". {shlex.quote(str(code / 'slurm' / 'body.sh'))} && submitted {words}",
        ],
        additional_parameters={
            "time": options.time,
            "signal": f"B:USR1@{NOTICE_SECONDS}",
            "requeue": True,
            **({"kill-on-invalid-dep": "yes"} if dependency else {}),
            **{name.lstrip("-"): value or True for name, value in more.items()},
        },
    )
    return executor


def submit_to_slurm(executor: Any, code: Path, folder: Path, points: Sequence[Point]) -> None:
    with refused_by_slurm(), contextlib.chdir(code):  # a job's folder is where it was submitted
        jobs = executor.map_array(*columns(folder, points))
    for job, point in zip(jobs, points, strict=True):
        note_submission(point, job.job_id)
        print(f"job {job.job_id} trains {point.run_dir}; log {job.paths.stdout}")


def columns(folder: Path, points: Sequence[Point]) -> list[Any]:
    """For map_array: the function, then each argument's values."""
    from launch.rank import train_as_task  # needs submitit, whose absence executor_for explains

    columns = ([folder] * len(points), [point.run_dir for point in points], [point.args for point in points])
    return [train_as_task, *columns]


def train_here(executor: Any, code: Path, folder: Path, points: Sequence[Point], max_parallel: int) -> None:
    """At most so many at a time, until all have ended. Ctrl-C asks those under way to save and stop."""
    waiting = list(points)
    going: list[tuple[Any, Point]] = []
    try:
        while waiting or going:
            while waiting and len(going) < max_parallel:
                point = waiting.pop(0)
                with contextlib.chdir(code):
                    (job,) = executor.map_array(*columns(folder, [point]))
                note_submission(point, None)
                going.append((job, point))
                print(f"training {point.run_dir}; log {job.paths.stdout}", flush=True)
            going = [(job, point) for job, point in going if not job.done()]
            time.sleep(0.2)
    except KeyboardInterrupt:
        stop([point.run_dir for _, point in going])
        raise


def note_submission(point: Point, job: str | None) -> None:
    with writing_to(point.run_dir):
        point.run_dir.mkdir(parents=True, exist_ok=True)
        write_json_atomically(point.run_dir / SUBMITTED_FILE, {"job": job, "args": point.args})


def wait_for_jobs(run_dirs: Sequence[Path]) -> None:
    while any(run.doing in ("queued", "running") for run in look(run_dirs)):
        time.sleep(2)


def submit_prep(options: Options, config: Config, base: Path) -> str | None:
    """FineWeb-Edu's array, then the job that packs; what the training has to wait for, None if the data is there."""
    data_dir = config.data.dir.absolute()
    if (data_dir / MANIFEST_FILE).is_file():
        print(f"{data_dir}: prepared already")
        return None
    flags = [*shlex.split(options.prep_flags), "--out", str(data_dir)]
    whose = {"account": options.account, "partition": options.partition}
    common = [f"--{name}={value}" for name, value in whose.items() if value is not None]
    common += [f"--{flag.lstrip('-')}" for flag in options.prep_sbatch]
    log = base / "submitit"
    with writing_to(log):
        log.mkdir(parents=True, exist_ok=True)
    array = ask_sbatch(
        "tokenize", [f"--array=0-{options.prep_tasks - 1}", f"--output={log}/prep-%A_%a.log", *common], flags
    )
    after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", "--array=0"]
    pack = ask_sbatch("pack", [*after, f"--output={log}/pack-%A.log", *common], flags)
    print(f"job {array} tokenizes into {data_dir}, {options.prep_tasks} tasks; job {pack} packs; logs in {log}")
    return f"afterok:{pack}"


def ask_sbatch(stage: str, sbatch_flags: Sequence[str], flags: Sequence[str]) -> str:
    environment = os.environ | {"PREP_FINEWEB": stage, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sbatch", "--parsable", *sbatch_flags, PREP_SCRIPT, *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise InputError(refusal(done.stderr))
    return done.stdout.strip().partition(";")[0]


@contextlib.contextmanager
def refused_by_slurm() -> Any:
    """What sbatch says, as an InputError."""
    from submitit.core.utils import FailedJobError

    with contextlib.redirect_stderr(io.StringIO()):  # submitit prints it, too
        try:
            yield
        except FailedJobError as error:
            raise InputError(refusal(str(error))) from error


ADVICE = {
    "invalid partition": "--partition; `sinfo -s` lists them",
    "node configuration is not available": "--gpus-per-node, --cpus-per-gpu or --nodes: more than the cluster has",
    "nvalid account": "--account and --partition; `sacctmgr show associations user=$USER` lists them",
}


def refusal(said: str) -> str:
    line = next((line for line in said.splitlines() if "error:" in line), said.strip() or "no reason given")
    advice = next((text for sign, text in ADVICE.items() if sign in said), None)
    return f"Slurm refuses: {line.removeprefix('sbatch: error: ')}" + (f" (see {advice})" if advice else "")


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
        options = tyro.cli(Options, prog=f"launch/submit.py {preset}", args=given)
        submit(preset, options, flags)


if __name__ == "__main__":
    main()
