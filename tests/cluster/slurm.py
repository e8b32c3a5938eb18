"""The Slurm that cluster.sh starts, its jobs, and the processes of these jobs."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from launch import snapshot
from tests.helpers.runs import ROOT

SCRIPT = Path(__file__).with_name("cluster.sh")
SECONDS_TO_END = 240.0  # for a job, on a busy machine
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
SITE = "container=(env CUDA_VISIBLE_DEVICES=)\n"  # the nodes' GPUs are fake, and the machine's must not be used


def script(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    """Run cluster.sh for the cluster of that folder."""
    env = os.environ | {"SLURM_CLUSTER_DIR": str(folder)}
    return subprocess.run([str(SCRIPT), *args], env=env, capture_output=True, text=True, check=False)


def make_checkout(folder: Path) -> Path:
    """Make a clone of this checkout, with its changed and new files, and a site file for the tests."""
    for name in snapshot.files_of(ROOT, folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / "slurm" / "site.sh").write_text(SITE)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "-c", "user.name=tests", "-c", "user.email=tests@localhost", "commit", "--quiet", "-m", "as it is")
    return folder


@contextmanager
def broken(checkout: Path, *more: str) -> Iterator[None]:
    """Break files of the checkout, as somebody who edits it may: nothing started from it now would train."""
    paths = [checkout / name for name in ("train/loop.py", "train/main.py", "launch/requeue.py", *more)]
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_text("half a thought (\n")
    try:
        yield
    finally:
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)


def git(folder: Path, *args: str) -> None:
    subprocess.run(["git", "-C", str(folder), *args], check=True)


@dataclass
class Job:
    """A job and its log file."""

    cluster: "Cluster"
    id: int
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def lines(self, text: str) -> list[str]:
        """Return the lines of the log that hold `text`."""
        return [line for line in self.text().splitlines() if text in line]

    def time_of(self, text: str) -> float:
        """Return when the batch shell wrote the line that holds `text`, in seconds since the epoch."""
        (line,) = self.lines(text)
        return datetime.fromisoformat(line.split("]")[0].split()[-1]).timestamp()

    def state(self) -> str:
        return self.cluster.run("squeue", "-h", "-t", "all", "-j", str(self.id), "-o", "%T").stdout.strip()

    def nodes(self) -> list[str]:
        """Return the job's nodes, the batch shell's node first."""
        names = self.cluster.run("squeue", "-h", "-j", str(self.id), "-o", "%N").stdout.strip()
        return self.cluster.run("scontrol", "show", "hostnames", names).stdout.split()

    def wait(self) -> str:
        """Wait for the end and return the last state. Between a requeue and the next start a job is pending."""
        self.wait_for(lambda: self.state() in ENDED, "the end of the job")
        return self.state()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_END
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not after {SECONDS_TO_END:.0f} s; {self.state()}\n{self.text()}")
            time.sleep(0.1)

    def processes(self) -> list[int]:
        """Return every living process of the job, on any node."""
        return self.cluster.processes_with(f"SLURM_JOB_ID={self.id}")

    def ranks(self, restart: int = 0) -> dict[int, int]:
        """Return {rank: pid, as the machine numbers it} of the trainers of one start of the job."""
        pids: dict[int, int] = {}
        for pid in self.processes():
            environ = environment_of(pid)
            if environ.get("SLURM_RESTART_COUNT") == str(restart) and "RANK" in environ:
                pids.setdefault(int(environ["RANK"]), pid)
        return pids


@dataclass
class Cluster:
    """A running cluster of cluster.sh, with the checkout and the environment that its jobs are submitted from."""

    folder: Path
    checkout: Path
    env: dict[str, str] = field(repr=False)
    nodes: list[str]
    proctrack: str

    def run(
        self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=cwd or self.checkout,
            env=self.env | (env or {}),
            capture_output=True,
            text=True,
            check=False,
        )

    def sbatch(self, log: Path, *args: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> Job:
        """Submit `[sbatch flags] script [arguments]`, whose job writes to `log`."""
        done = self.run("sbatch", "--parsable", f"--output={log}", *args, cwd=cwd, env=env)
        assert done.returncode == 0, done.stderr
        return Job(self, int(done.stdout), log)

    def train(self, log: Path, flags: Sequence[str], *sbatch_flags: str, env: dict[str, str] | None = None) -> Job:
        """Submit gpt2_small.sh, with one process on each of two nodes unless `sbatch_flags` say otherwise."""
        shape = ("--nodes=2", "--gres=gpu:1", "--cpus-per-task=2")
        return self.sbatch(log, *shape, *sbatch_flags, "slurm/gpt2_small.sh", *flags, env=env)

    def processes_with(self, variable: str) -> list[int]:
        """Return the living processes of this cluster with NAME=VALUE in their environment."""
        variables = {variable, f"SLURM_CONF={self.env['SLURM_CONF']}"}
        own = os.getpid()
        return [pid for pid in all_processes() if pid != own and variables <= environment_lines(pid)]

    def everything_of_jobs(self) -> list[int]:
        """Return the living processes of all jobs of this cluster."""
        conf = f"SLURM_CONF={self.env['SLURM_CONF']}"
        pids = []
        for pid in all_processes():
            lines = environment_lines(pid)
            if conf in lines and any(line.startswith("SLURM_JOB_ID=") for line in lines):
                pids.append(pid)
        return pids


def all_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def environment_lines(pid: int) -> set[str]:
    """Return the NAME=VALUE lines of a living process; none for a zombie or a process that has ended."""
    with suppress(OSError):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            return set(Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"))
    return set()


def environment_of(pid: int) -> dict[str, str]:
    return dict(line.split("=", 1) for line in environment_lines(pid) if "=" in line)
