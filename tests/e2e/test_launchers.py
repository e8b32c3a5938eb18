"""Starting processes: on a host that cannot name itself, with wrong variables, and with Ctrl-C during the start."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, called
from train import preflight

TORCHRUN = ("-m", "torch.distributed.run", "--local-addr=127.0.0.1", "--nproc_per_node=2")
PREFLIGHT = ("train/preflight.py", "--run-dir")
NAMELESS = ("unshare", "--map-root-user", "--uts", "sh", "-c", 'hostname has-no-address && exec "$@"', "-")


def python(*args: str, before: tuple[str, ...] = (), env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "GLOO_"))}
    return subprocess.Popen(
        [*before, sys.executable, *args],
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "1"} | (env or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's `&` leaves it ignored
    )


def submitit_task(rank: int) -> dict[str, str]:
    """Return what submitit's local executor sets for one of two tasks."""
    job = str(100000 + os.getpid())
    return {"SUBMITIT_LOCAL_JOB_ID": job, "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": str(rank)}


def test_a_host_that_cannot_name_itself_trains(tmp_path: Path) -> None:
    """torchrun with the flag of our pages, and tasks without torchrun. Without the flag, torchrun itself hangs."""
    if subprocess.run([*NAMELESS, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no namespace for a host's name: `unshare --map-root-user --uts` is refused here")
    run_dir = str(tmp_path / "run")
    starts = [python(*TORCHRUN, *PREFLIGHT, run_dir, before=NAMELESS)]
    starts += [python(*PREFLIGHT, run_dir, before=NAMELESS, env=submitit_task(rank)) for rank in range(2)]
    ends = [(*start.communicate(timeout=120), start.returncode) for start in starts]
    for out, err, code in ends[:2]:
        assert code == 0 and out.splitlines()[-1] == "preflight: fit to train", err
        assert out.splitlines()[-2].startswith("preflight: warning: has-no-address cannot resolve its own name, ")
        assert "hostname" not in err and "cannot be retrieved" not in err, "nobody asks for the name"
    assert ends[2] == ("", "", 0)


def fault(run_dir: Path, env: dict[str, str]) -> str:
    """Return the one line with which a process ends that has these variables."""
    done = called(preflight.main, "--run-dir", str(run_dir), **env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    return done.stderr


def test_wrong_variables_are_one_line_of_the_process_that_has_them(tmp_path: Path) -> None:
    line = fault(tmp_path, {"RANK": "3", "WORLD_SIZE": "2"})
    assert line.startswith("train: RANK='3': WORLD_SIZE=2 allows 0 to 1; start with torchrun or srun, or unset ")
    line = fault(tmp_path, {"RANK": "one", "WORLD_SIZE": "2"})
    assert line.startswith("train: RANK='one': not a whole number; start with torchrun or srun, or unset ")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = fault(tmp_path, submitit_task(0) | {"MASTER_PORT": str(port)})
    assert line == (
        f"train: rank 0 cannot listen at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} (Address already in use); "
        "give an address or the name of its host, and a free port\n"
    )


def test_ctrl_c_during_the_start_is_one_line(tmp_path: Path) -> None:
    """It comes again while Python clears up."""
    process = python("-X", "importtime", *PREFLIGHT, str(tmp_path))
    assert process.stderr is not None
    for line in process.stderr:  # of Python's list of imports, until they are torch's
        if "torch" in line:
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert process.returncode in (-signal.SIGINT, 130) and lines in (["train: interrupted"], []), err
