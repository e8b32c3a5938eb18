"""Worker processes that are killed and commands that are interrupted end with one line, at once."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from common.errors import InputError
from data_prep.pipeline.workers import Workers
from tests.e2e.test_fineweb_kills import start, wait_for, wait_until_gone, workers_of
from tests.helpers.data_dirs import write_stories
from tests.helpers.runs import ROOT


def sleep_or_die(seconds: float) -> None:
    time.sleep(1)  # until both have their task
    if seconds == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)


def test_the_death_of_the_last_worker_is_noticed_while_the_others_work(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine a start takes long. The pool does not watch the worker that was started last."""
    starting = SpawnProcess.start

    def start_slowly(process: SpawnProcess) -> None:
        starting(process)
        time.sleep(0.3)

    monkeypatch.setattr(SpawnProcess, "start", start_slowly)
    began = time.monotonic()
    with pytest.raises(InputError, match="a worker process was killed"), Workers(2) as workers:
        workers.map(sleep_or_die, [20.0, 0.0])
    assert time.monotonic() - began < 15
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("stories") / "input", 30, 3000)


def children_of(process: "subprocess.Popen[str]") -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_pythons_own_helper_may_be_killed_too(stories: Path, tmp_path: Path) -> None:
    """It frees semaphores, is the first child, and prints five tracebacks when it is started again."""
    flags = ("--input", stories, "--out", "out", "--tokenizer", "byte", "--workers", "2")
    process = start("textfiles.py", *flags, cwd=tmp_path)
    wait_for(tmp_path / ".out.partial" / "parts", "*.json", 1, process)
    (helper,) = set(children_of(process)) - set(workers_of(process))
    os.kill(helper, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


SLOW = """
import sys
sys.path[0] = {root!r}
from common.errors import one_line_errors
from data_prep.pipeline.workers import Workers
from tests.e2e.test_worker_ends import sleep_or_die

if __name__ == "__main__":
    with one_line_errors("slow"), Workers(2) as workers:
        workers.map(sleep_or_die, [60.0, 60.0])
"""


def test_a_second_ctrl_c_does_not_wait_for_the_tasks(tmp_path: Path) -> None:
    """The first waits for them, since what they finish counts; sleeping tasks would take a minute."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=str(ROOT)))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 30
    while len(workers_of(process)) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1.5)
    workers = workers_of(process)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    _, errors = process.communicate(timeout=20)
    wait_until_gone(workers)
    assert errors == "slow: interrupted\n" and process.returncode == 130
    assert len(workers) == 2
