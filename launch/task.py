"""Train one rank of a run, as a task of a job of launch/submit.py.

submitit imports this file from the job's own copy of the code, since the job runs in that folder. The batch shell
(slurm/body.sh) requeues the job instead of submitit: it also handles crashes, and all jobs have the same rules.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

# Nothing of train/ is imported here: torch takes seconds to import, and a signal may come in that time.


def train_as_task(folder: Path, run_dir: Path, args: tuple[str, ...]) -> dict[str, Any]:
    """Train the run and return its status.json; submitit gets a result only from a run that is done.

    `folder` is the working directory of the submitting shell; relative paths in `args`, the arguments of
    train/main.py, start from it.
    """

    def request_stop(number: int, frame: FrameType | None) -> None:
        (run_dir / "STOP").touch()  # train/processes/stop_requests.py finds it once the run has begun

    environment = submitit.JobEnvironment()
    if environment.cluster == "debug":  # the submitting process itself, which goes on afterwards
        return _train(run_dir, args)
    # submitit's own handlers requeue from rank 0 alone, or do nothing. The run installs its handlers while it trains.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, request_stop)
    try:
        os.chdir(folder)
    except OSError as error:
        print(f"slurm: {error} on {os.uname().nodename}: submit from a folder that all nodes share", file=sys.stderr)
        sys.exit(2)
    environment.paths.result_pickle.unlink(missing_ok=True)  # a start that failed may have left one
    sys.argv = [str(Path(__file__).parents[1] / "train" / "main.py"), *args]  # for provenance.json
    status = _train(run_dir, args)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # there is nothing left to stop
    if status["state"] == "done":
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    # Leave without submitit's record of success. The exit status tells its local executor to start the task again; on
    # Slurm the batch shell decides that.
    is_restarted = environment.cluster == "local" and str(status["reason"]).startswith("SIG")
    os._exit(LOCAL_REQUEUE_RETURN_CODE if is_restarted else 0)


def _train(run_dir: Path, args: tuple[str, ...]) -> dict[str, Any]:
    from train.main import main
    from train.run.status import read_status

    main(args)
    status = read_status(run_dir)
    assert status is not None  # main returned, so this run has written one
    return status
