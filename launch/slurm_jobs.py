"""Submit the jobs of launch/submit.py to Slurm: training through submitit, and FineWeb-Edu's preparation before it."""

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
from launch.runs import record_submission

NOTICE_SECONDS = 300  # from the signal to the time limit; Slurm's signal may come a minute earlier
PREP_SCRIPT = "slurm/prep_fineweb.sh"
# Flags of sbatch that a flag of launch/submit.py already sets.
FLAGS_OF_SUBMIT = {
    **{name: f"--{name}" for name in ("nodes", "time", "account", "partition")},
    **{"ntasks-per-node": "--gpus-per-node", "cpus-per-task": "--cpus-per-gpu", "job-name": "--name"},
    **{"array": "--grid", "signal": "--time", "dependency": "--prep"},
}
GPU_FLAGS = ("gres", "gpus-per-node", "gpus", "gpus-per-task")  # sbatch's ways of asking for GPUs
# What to look at, by a part of Slurm's message.
ADVICE = {
    "invalid partition": "--partition; `sinfo -s` lists them",
    "node configuration is not available": "--gpus-per-node, --cpus-per-gpu or --nodes: more than the cluster has",
    "nvalid account": "--account and --partition; `sacctmgr show associations user=$USER` lists them",
}


def submit_to_slurm(options: Options, base: Path, code: Path, points: Sequence[Point], data_dir: Path) -> None:
    """Submit the training, with --prep after FineWeb-Edu's jobs.

    The preparation that this call submitted is cancelled if Slurm refuses what comes after it.
    """
    folder = Path.cwd()
    prep_jobs: list[str] = []
    try:
        pack_job = submit_prep(options, base, code, data_dir, prep_jobs) if wants_preparation(options) else None
        dependency = f"afterok:{pack_job}" if pack_job is not None else None
        executor = slurm_executor(options, base, code, points, dependency)
        # A job runs in the folder where it was submitted.
        with slurm_refusals(), writing_to(base / "submitit"), contextlib.chdir(code):
            jobs = submit_points(executor, points, folder)
    except InputError:
        for job in prep_jobs:
            subprocess.run(["scancel", job], check=False)
        raise
    for job, point in zip(jobs, points, strict=True):
        record_submission(point, job.job_id)
        print(f"job {job.job_id} trains {point.run_dir}; log {job.paths.stdout}")


def slurm_executor(
    options: Options, base: Path, code: Path, points: Sequence[Point], dependency: str | None = None
) -> Any:
    """Return submitit's executor for these runs.

    Its line in the job script is `per_rank PYTHON -u -m submitit.core._submit FOLDER`; slurm/body.sh has per_rank. GPUs
    are asked for by --gres, unless --sbatch has the flag that the site wants.
    """
    more = parse_sbatch_flags(options.sbatch)
    gres = {} if any(name in more for name in GPU_FLAGS) else {"gres": f"gpu:{options.gpus_per_node}"}
    executor = import_submitit().SlurmExecutor(base / "submitit", python=f"per_rank {shlex.quote(sys.executable)}")
    body = shlex.quote(str(code / "slurm" / "body.sh"))
    executor.update_parameters(
        job_name=options.name or base.name,
        nodes=options.nodes,
        ntasks_per_node=options.gpus_per_node,
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
            f"[ -r {body} ] || {{ printf 'slurm: %s is not there on %s: share the run directory\\n' {body} "
            '"$(hostname)" >&2; exit 2; }',
            f". {body}",
            f"submitted {shlex.join([str(code), *(str(point.run_dir) for point in points)])}",
        ],
        additional_parameters={
            "time": options.time,
            "signal": f"B:USR1@{NOTICE_SECONDS}",
            "requeue": True,
            **({"kill-on-invalid-dep": "yes"} if dependency else {}),
            **gres,
            **more,
        },
    )
    return executor


def parse_sbatch_flags(flags: Sequence[str]) -> dict[str, str | bool]:
    """Return {name: value} of --sbatch, True for a flag without a value.

    Raises InputError for a flag that launch/submit.py sets by a flag of its own.
    """
    parameters: dict[str, str | bool] = {}
    for flag in flags:
        name, equals, value = flag.lstrip("-").partition("=")
        name = name.replace("_", "-")
        if name in FLAGS_OF_SUBMIT:
            raise InputError(f"--sbatch {flag}: use {FLAGS_OF_SUBMIT[name]}")
        parameters[name] = value if equals else True
    return parameters


def submit_points(executor: Any, points: Sequence[Point], folder: Path) -> list[Any]:
    """Submit the runs as one array and return submitit's job of each."""
    from launch.task import train_as_task  # imported here because it needs submitit

    columns = ([folder] * len(points), [point.run_dir for point in points], [point.args for point in points])
    jobs: list[Any] = executor.map_array(train_as_task, *columns)
    return jobs


def import_submitit() -> Any:
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # the trainer's signal; submitit reads it when it is imported
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise InputError("submitit is not installed; pip install -e '.[cluster]'") from error
    return submitit


def submit_prep(options: SubmitOptions, base: Path, code: Path, data_dir: Path, prep_jobs: list[str]) -> str | None:
    """Submit FineWeb-Edu's preparation and return the job that packs; None if the data is there.

    The training has to wait for that job. The jobs that this call submits are added to `prep_jobs`; a preparation that
    an earlier command submitted is not submitted again.
    """
    if (data_dir / MANIFEST_FILE).is_file():
        print(f"{data_dir}: prepared already")
        return None
    flags = [*shlex.split(options.prep_flags), "--out", str(data_dir)]
    name = f"prep-{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]}"
    pending = ask_slurm("squeue", "--noheader", "--array", "--name", f"{name}-pack", "--format", "%i").split()
    if pending:
        pack_job = pending[0].partition("_")[0]
        print(f"{data_dir}: job {pack_job} prepares it already")
        return pack_job
    slurm_flags = {"account": options.account, "partition": options.partition}
    common = [f"--{key}={value}" for key, value in slurm_flags.items() if value is not None]
    common += [f"--{flag.lstrip('-')}" for flag in options.prep_sbatch]
    log_dir = base / "submitit"
    with writing_to(log_dir):
        log_dir.mkdir(parents=True, exist_ok=True)
    array_flags = [f"--array=0-{options.prep_tasks - 1}", f"--output={log_dir}/prep-%A_%a.log", f"--job-name={name}"]
    array_job = run_sbatch("tokenize", [*array_flags, *common], code, flags)
    prep_jobs.append(array_job)
    pack_flags = [f"--dependency=afterok:{array_job}", "--kill-on-invalid-dep=yes", "--array=0"]
    pack_flags += [f"--output={log_dir}/pack-%A.log", f"--job-name={name}-pack"]
    pack_job = run_sbatch("pack", [*pack_flags, *common], code, flags)
    prep_jobs.append(pack_job)
    jobs = f"job {array_job} tokenizes into {data_dir}, {options.prep_tasks} tasks; job {pack_job} packs"
    print(f"{jobs}; logs in {log_dir}")
    return pack_job


def run_sbatch(stage: str, sbatch_flags: Sequence[str], code: Path, flags: Sequence[str]) -> str:
    """Submit one stage of the preparation and return its job; InputError if Slurm refuses."""
    variables = {"PREP_FINEWEB": stage, "PREP_FOLDER": str(Path.cwd())}
    env = os.environ | variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["sbatch", "--parsable", *sbatch_flags, PREP_SCRIPT, *flags]
    done = subprocess.run(command, cwd=code, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InputError(refusal_message(done.stderr))
    return done.stdout.strip().partition(";")[0]


@contextlib.contextmanager
def slurm_refusals() -> Iterator[None]:
    """Turn what sbatch refuses inside submitit into an InputError."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints the message
        try:
            yield
        except (FailedJobError, FailedSubmissionError) as error:
            raise InputError(refusal_message(str(error))) from error


def refusal_message(output: str) -> str:
    """Return one line with Slurm's error out of `output`, and the flag to look at."""
    line = next((line for line in output.splitlines() if "error:" in line), output.strip() or "no reason given")
    advice = next((text for sign, text in ADVICE.items() if sign in output), None)
    return f"Slurm refuses: {line.removeprefix('sbatch: error: ')}" + (f" (see {advice})" if advice else "")
