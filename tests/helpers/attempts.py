"""A real torchrun of tests/helpers/faulty_train.py, its processes, and the faults inflicted on them."""

import contextlib
import json
import os
import random
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.helpers.faults import CLOCK, FULL, PAUSE, SIGNALS, Episode, Strike
from tests.helpers.runs import torchrun

SECONDS_TO_REACH = 240.0  # to reach a place or the end, on a busy machine
SECONDS_TO_END = 240.0  # for every process, after the last strike; the watchdog and torchrun take a minute


CLOCK_STEPS_C = Path(__file__).with_name("clock_steps.c")
CLOCK_STEPS_SECONDS = (2 * 3600, -2 * 3600, 400 * 86400, -400 * 86400)


class StuckError(AssertionError):
    """Something did not happen within its time."""


def processes_of(control: Path) -> list[int]:
    """Return every running process that was started with this control folder, whoever its parent is now."""
    variable, pids = f"SOAK_CONTROL={control}".encode(), []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable in environ.read_bytes().split(b"\0") and is_running(int(environ.parent.name)):
                pids.append(int(environ.parent.name))
    return pids


def is_running(pid: int) -> bool:
    """Return whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def clock_library(folder: Path) -> Path:
    """Return the compiled clock_steps.c in `folder`, for LD_PRELOAD."""
    library = folder / "clock_steps.so"
    if not library.exists():
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, CLOCK_STEPS_C], check=True)
    return library


def fill(path: Path) -> None:
    """Fill the disk with this file."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))


class Attempt:
    """A torchrun of faulty_train.py and the marks that its processes leave."""

    def __init__(self, control: Path, episode: Episode, run_dir: Path, flags: list[str], world: int) -> None:
        self.control, self.run_dir, self.world = control, run_dir, world
        self.clock = control / "clock"
        self.filler = run_dir.parent / "filler"
        control.mkdir()
        holds = [asdict(fault) for fault in episode.faults]
        (control / "holds.json").write_text(json.dumps(holds))
        env = {"SOAK_CONTROL": str(control)}
        if any(strike.kind == CLOCK for fault in episode.faults for strike in fault.strikes):
            self.set_clock(0)
            env |= {"LD_PRELOAD": str(clock_library(control.parent)), "CLOCK_STEPS": str(self.clock)}
        if episode.in_place:
            env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self.output = control / "output.txt"
        with self.output.open("w") as output:
            self.process = torchrun(
                world,
                *(*flags, *episode.flags),
                script="tests/helpers/faulty_train.py",
                launcher_flags=(*episode.launcher_flags, f"--max-restarts={3 if episode.in_place else 0}"),
                env=env,
                stdout=output,
            )

    def set_clock(self, seconds: int) -> None:
        """Let the wall clock of all processes be off by so much."""
        with self.clock.open("r+b" if self.clock.exists() else "wb") as file:  # they have the file itself in memory
            file.write(struct.pack("=q", seconds))

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float, tick_seconds: float = 0.01) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                self.dump_stacks()
                raise StuckError(f"{what}: not after {seconds:.0f} s")
            time.sleep(tick_seconds)

    def dump_stacks(self) -> None:
        """Make every rank write its stack into the output."""
        for pid in self.ranks():
            if is_running(pid):
                send(pid, signal.SIGUSR2)
        time.sleep(1)

    def ranks(self) -> list[int]:
        return [int(path.read_text()) for path in self.control.glob("pid_*")]

    def living(self) -> list[int]:
        """Return the running processes. Ranks are found by pid, too: a dying process has no environment any more."""
        return [*processes_of(self.control), *filter(is_running, self.ranks())]

    def has(self, mark: str) -> bool:
        return (self.control / mark).exists()

    def reaches(self, mark: str) -> bool:
        """Wait until a process makes the mark; return False if the run ends instead."""
        self.wait_for(lambda: self.has(mark) or self.process.poll() is not None, mark, SECONDS_TO_REACH)
        return self.has(mark)

    def is_under_way(self, start: int) -> bool:
        """Wait until every rank of this start runs; return False if the attempt is over."""
        return all(self.reaches(f"pid_{start}_{rank}") for rank in range(self.world)) and self.process.poll() is None

    def strike(self, start: int, strike: Strike) -> bool:
        """Inflict the strike; return whether every process that it addresses was listening for signals."""
        pids = [int((self.control / f"pid_{start}_{rank}").read_text()) for rank in range(self.world)]
        targets = [strike.rank] if strike.kind.endswith(" rank") else range(self.world)
        listening = all(self.has(f"listening_{start}_{rank}") for rank in targets)
        name, _, target = strike.kind.partition(" ")
        match strike.kind:
            case "kill rank":
                send(pids[strike.rank], signal.SIGKILL)
            case "kill ranks":
                for pid in pids:
                    send(pid, signal.SIGKILL)
            case "kill everything":
                for pid in (self.process.pid, *pids):
                    send(pid, signal.SIGKILL)
            case "kill launcher":
                self.process.kill()
                self.process.wait()
            case _ if strike.kind == CLOCK:
                self.set_clock(random.Random(str(strike)).choice(CLOCK_STEPS_SECONDS))
            case _ if strike.kind == FULL:
                fill(self.filler)
            case "STOP file":
                (self.run_dir / "STOP").touch()
            case "pause rank" | "freeze rank":
                send(pids[strike.rank], signal.SIGSTOP)
                if strike.kind == PAUSE:
                    time.sleep(0.5)
                    send(pids[strike.rank], signal.SIGCONT)
            case _:
                send(self.process.pid if target == "launcher" else pids[strike.rank], SIGNALS[name])
        return listening

    def wait_for_the_end(self) -> None:
        self.wait_for(lambda: self.process.poll() is not None, "the launcher's end", SECONDS_TO_END)
        self.wait_for(lambda: not self.living(), "the end of every process", SECONDS_TO_END, 0.05)

    def kill_everything(self) -> None:
        while left := self.living():
            for pid in left:
                send(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()
