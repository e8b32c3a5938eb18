"""What submitit runs as each task of a job of launch/submit.py: one rank of the run.

submitit loads this from the job's own copy of the code, since the job's folder is that copy. Requeueing is not
submitit's here but the batch shell's (slurm/body.sh), as for every job: it knows of crashes, too; the rules are one.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

# Nothing of train/ here: torch takes seconds to import, in which a signal may come.


def train_as_task(folder: Path, run_dir: Path, args: tuple[str, ...]) -> dict[str, Any]:
    """status.json of a run that is done; of any other, submitit gets no result.

    `folder`: where the submitting shell stood, which relative paths among `args`, train/main.py's, start from.
    """

    def heard_early(number: int, frame: FrameType | None) -> None:
        (run_dir / "STOP").touch()  # which train/processes/stop_requests.py will find

    environment = submitit.JobEnvironment()
    if environment.cluster == "debug":  # in the submitting process, which goes on afterwards
        return _train(run_dir, args)
    # submitit's own handlers requeue from rank 0 alone, or do nothing. Those of the run take over while it lasts.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, heard_early)
    try:
        os.chdir(folder)
    except OSError as error:
        print(f"slurm: {error} on {os.uname().nodename}: submit from a folder that all nodes share", file=sys.stderr)
        sys.exit(2)
    environment.paths.result_pickle.unlink(missing_ok=True)  # of a start that failed
    sys.argv = [str(Path(__file__).parents[1] / "train" / "main.py"), *args]  # for provenance.json
    status = _train(run_dir, args)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # there is nothing left to stop
    if status["state"] == "done":
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    # Without submitit's word of success. Its local executor is told to start again; Slurm is by the batch shell.
    is_due_again = environment.cluster == "local" and str(status["reason"]).startswith("SIG")
    os._exit(LOCAL_REQUEUE_RETURN_CODE if is_due_again else 0)


def _train(run_dir: Path, args: tuple[str, ...]) -> dict[str, Any]:
    from train.main import main
    from train.run.directory import read_status

    main(args)
    status = read_status(run_dir)
    assert status is not None  # of this run: main returned
    return status
