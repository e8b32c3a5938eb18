"""launch/submit.py's jobs on Slurm: the training's, through submitit, and FineWeb-Edu's before it."""

import contextlib
import hashlib
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, writing_to
from data_prep.manifest import FILE_NAME as MANIFEST_FILE
from launch.grid import Point
from launch.options import Options, SubmitOptions, wants_preparation
from launch.requeue import ask_slurm
from launch.runs import note_submission

NOTICE_SECONDS = 300  # from the signal to the time limit; Slurm's may come a minute earlier
PREP_SCRIPT = "slurm/prep_fineweb.sh"
OURS = {  # of sbatch's flags, those that are set from ours
    **{name: f"--{name}" for name in ("nodes", "gpus-per-node", "time", "account", "partition")},
    **{"ntasks-per-node": "--gpus-per-node", "cpus-per-task": "--cpus-per-gpu", "job-name": "--name"},
    **{"array": "--grid", "signal": "--time", "dependency": "--prep"},
}


def submit_to_slurm(options: Options, base: Path, code: Path, points: Sequence[Point], data_dir: Path) -> None:
    """FineWeb-Edu's jobs first, if asked for; they are cancelled if Slurm refuses what comes after them."""
    folder = Path.cwd()
    ours: list[str] = []  # of the preparation, what this command submits
    try:
        pack = submit_prep(options, base, code, data_dir, ours) if wants_preparation(options) else None
        executor = slurm_executor(options, base, code, points, f"afterok:{pack}" if pack is not None else None)
        # A job's folder is where it was submitted.
        with refused_by_slurm(), writing_to(base / "submitit"), contextlib.chdir(code):
            jobs = map_points(executor, points, folder)
    except InputError:
        for job in ours:
            subprocess.run(["scancel", job], check=False)
        raise
    for job, point in zip(jobs, points, strict=True):
        note_submission(point, job.job_id)
        print(f"job {job.job_id} trains {point.run_dir}; log {job.paths.stdout}")


def slurm_executor(
    options: Options, base: Path, code: Path, points: Sequence[Point], dependency: str | None = None
) -> Any:
    """submitit's, whose line in the job script is then: per_rank PYTHON -u -m submitit.core._submit FOLDER"""

    executor = import_submitit().SlurmExecutor(base / "submitit", python=f"per_rank {shlex.quote(sys.executable)}")
    body = shlex.quote(str(code / "slurm" / "body.sh"))
    executor.update_parameters(
        job_name=options.name or base.name,
        nodes=options.nodes,
        ntasks_per_node=options.gpus_per_node,
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_gpu,
        account=options.account,
        partition=options.partition,
        dependency=dependency,
        array_parallelism=options.max_parallel or len(points),
        wckey=None,
        use_srun=False,
        stderr_to_stdout=True,
        setup=[
            f"export MAX_REQUEUES={options.max_requeues} PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            f'. {body} || {{ echo "slurm: {body} is not there on $(hostname): share the run directory" >&2; exit 2; }}',
            f"submitted {shlex.join([str(code), *(str(point.run_dir) for point in points)])}",
        ],
        additional_parameters={
            "time": options.time,
            "signal": f"B:USR1@{NOTICE_SECONDS}",
            "requeue": True,
            **({"kill-on-invalid-dep": "yes"} if dependency else {}),
            **sbatch_flags(options.sbatch),
        },
    )
    return executor


def sbatch_flags(given: Sequence[str]) -> dict[str, str | bool]:
    """{name: value}, True for a flag without one. InputError for what has a flag of ours."""
    found: dict[str, str | bool] = {}
    for flag in given:
        name, equals, value = flag.lstrip("-").partition("=")
        name = name.replace("_", "-")
        if name in OURS:
            raise InputError(f"--sbatch {flag}: use {OURS[name]}")
        found[name] = value if equals else True
    return found


def map_points(executor: Any, points: Sequence[Point], folder: Path) -> list[Any]:
    """submitit's jobs, one for each."""
    from launch.task import train_as_task  # which needs submitit

    columns = ([folder] * len(points), [point.run_dir for point in points], [point.args for point in points])
    jobs: list[Any] = executor.map_array(train_as_task, *columns)
    return jobs


def import_submitit() -> Any:
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # which the trainer hears; read when submitit is imported
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise InputError("submitit is not installed; pip install -e '.[cluster]'") from error
    return submitit


def submit_prep(options: SubmitOptions, base: Path, code: Path, data_dir: Path, ours: list[str]) -> str | None:
    """The job that packs FineWeb-Edu, for which the training has to wait; None if the data is there. It, and the array
    before it, are put into `ours` unless an earlier command has submitted them."""
    if (data_dir / MANIFEST_FILE).is_file():
        print(f"{data_dir}: prepared already")
        return None
    flags = [*shlex.split(options.prep_flags), "--out", str(data_dir)]
    name = f"prep-{hashlib.sha256(str(data_dir).encode()).hexdigest()[:12]}"
    pending = ask_slurm("squeue", "--noheader", "--array", "--name", f"{name}-pack", "--format", "%i").split()
    if pending:
        pack = pending[0].partition("_")[0]
        print(f"{data_dir}: job {pack} prepares it already")
        return pack
    whose = {"account": options.account, "partition": options.partition}
    common = [f"--{key}={value}" for key, value in whose.items() if value is not None]
    common += [f"--{flag.lstrip('-')}" for flag in options.prep_sbatch]
    log = base / "submitit"
    with writing_to(log):
        log.mkdir(parents=True, exist_ok=True)
    many = [f"--array=0-{options.prep_tasks - 1}", f"--output={log}/prep-%A_%a.log", f"--job-name={name}"]
    array = ask_sbatch("tokenize", [*many, *common], code, flags)
    ours.append(array)
    after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", "--array=0"]
    names = [f"--output={log}/pack-%A.log", f"--job-name={name}-pack"]
    pack = ask_sbatch("pack", [*after, *names, *common], code, flags)
    ours.append(pack)
    print(f"job {array} tokenizes into {data_dir}, {options.prep_tasks} tasks; job {pack} packs; logs in {log}")
    return pack


def ask_sbatch(stage: str, sbatch_flags: Sequence[str], code: Path, flags: Sequence[str]) -> str:
    own = {"PREP_FINEWEB": stage, "PREP_FOLDER": str(Path.cwd())}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sbatch", "--parsable", *sbatch_flags, PREP_SCRIPT, *flags],
        cwd=code,
        env=os.environ | own | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise InputError(refusal(done.stderr))
    return done.stdout.strip().partition(";")[0]


@contextlib.contextmanager
def refused_by_slurm() -> Iterator[None]:
    """What sbatch says, as an InputError."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    with contextlib.redirect_stderr(io.StringIO()):  # submitit prints it, too
        try:
            yield
        except (FailedJobError, FailedSubmissionError) as error:
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
