"""The soak: a run that is struck again and again, by real signals in chosen places, is the run that never was.

    python tests/soak.py --seed 7 --faults 100     # 20 minutes on two cores; the same seed draws the same faults

Each episode starts the same real torchrun of two processes (of tests/faulty_train.py, which stands still where the
fault is aimed), strikes, waits until the last process is gone, and holds what is left against what must be: sound
checkpoints, none lost, a truthful status.json, a lock that the next start may take. A run that reaches its end is
compared bit for bit with the uninterrupted one, and the next is begun.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model.trained import fault_of, list_checkpoints, step_of
from tests.groups import run_on_ranks
from tests.runs import (
    assert_same_tensors,
    curve,
    final_tensors,
    make_tiny_data,
    status,
    tiny_flags,
    torchrun,
    validations,
)
from train.config import Config, parse
from train.main import run
from train.mesh import Mesh
from train.presets import PRESETS

STEPS = 150
KEEP = 3
WORLD = 2
SECONDS_TO_REACH = 240.0  # a place, or the end, on a machine with much else to do
SECONDS_TO_END = 240.0  # after the last strike, for every process; the watchdog and torchrun take a minute
SECONDS_BETWEEN_LOOKS = 1.2  # of the engine at the STOP file and at its launcher, and a little more

# How the visit that is struck is drawn: at most so many; and which rank may stand still there.
PLACES: dict[str, tuple[int, str]] = {
    "start": (1, "any"),
    "process group": (1, "any"),
    "claim": (1, "main"),
    "find start": (1, "any"),
    "load": (1, "any"),
    "warm-up": (1, "any"),
    "step": (40, "any"),
    "update": (40, "any"),
    "validation": (6, "any"),
    "save": (4, "any"),
    "writing": (4, "any"),
    "commit": (4, "main"),
    "committed": (4, "main"),
    "purge": (4, "main"),
    "deleting": (2, "main"),
    "leaving": (1, "any"),
}
# Where a thread stands still: the loop does not wait for it, or not if saves are asynchronous.
BESIDE_THE_LOOP = ("purge", "deleting")
BESIDE_THE_LOOP_IF_ASYNC = ("save", "writing", "commit")
ASYNC_SAVES = ("--save.mode", "async")
RESTART_PLACES = ("start", "process group", "claim", "find start", "load", "warm-up")

KILLS = ("kill rank", "kill ranks", "kill everything")
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP, "SIGUSR1": signal.SIGUSR1}
STOPS = {  # kind -> the reason that status.json gives
    "SIGTERM launcher": "SIGTERM",
    "SIGINT launcher": "SIGINT",
    "SIGHUP launcher": "SIGHUP",
    "SIGTERM rank": "SIGTERM",
    "SIGUSR1 rank": "SIGUSR1",
    "STOP file": "STOP file",
    "kill launcher": "launcher died",
}
PAUSE = "pause rank"  # SIGSTOP, then SIGCONT: nothing may come of it
FREEZE = "freeze rank"  # SIGSTOP for good: the others must leave, and torchrun must end the stopped one


class SoakError(AssertionError):
    """What is not as it must be after a fault; with the seed and all that happened, to do it again."""


@dataclass(frozen=True)
class Strike:
    kind: str
    rank: int = 0  # for kinds that hit one


@dataclass(frozen=True)
class Fault:
    """One strike, or two shortly after each other, at a visit to a place.

    stays: the process stands still at the place until struck; else it goes on, and is struck at some moment after.
    """

    place: str
    strikes: tuple[Strike, ...]
    visit: int = 1
    holder: int = 0
    stays: bool = True
    delay_seconds: float = 0.0
    pause_seconds: float = 0.0  # between two strikes

    def __str__(self) -> str:
        where = f"{self.place} {self.visit} of rank {self.holder}" + (
            "" if self.stays else f" +{self.delay_seconds:.2f} s"
        )
        one_rank = (*KILLS[:1], "SIGTERM rank", "SIGUSR1 rank", PAUSE, FREEZE)
        kinds = [f"{strike.kind} {strike.rank}" if strike.kind in one_rank else strike.kind for strike in self.strikes]
        return f"{f' +{self.pause_seconds:.2f} s '.join(kinds)} at {where}"


@dataclass(frozen=True)
class Episode:
    """One start of torchrun: one fault, or with in-place restarts one for each of its attempts."""

    faults: tuple[Fault, ...]
    in_place: bool = False
    flags: tuple[str, ...] = ()
    launcher_flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = "; then ".join(map(str, self.faults))
        extra = " ".join((*self.launcher_flags, *self.flags))
        return text + (" (in-place restarts)" if self.in_place else "") + (f" ({extra})" if extra else "")


@dataclass(frozen=True)
class Look:
    """A run directory, looked at while nobody writes to it."""

    status: dict[str, Any] | None
    checkpoints: tuple[int, ...]

    @property
    def newest(self) -> int:
        return self.checkpoints[-1] if self.checkpoints else 0

    @property
    def attempt(self) -> int:
        return self.status["attempt"] if self.status is not None else 0


def look_at(run_dir: Path) -> Look:
    there = (run_dir / "status.json").exists()
    return Look(status(run_dir) if there else None, tuple(step_of(path) for path in list_checkpoints(run_dir)))


# Chance.


def draw(rng: random.Random) -> Episode:
    flags = ASYNC_SAVES if rng.random() < 0.5 else ()
    if rng.random() < 0.12:
        faults = tuple(draw_fault(rng, KILLS[:2]) for _ in range(rng.randint(1, 3)))
        return Episode(faults, in_place=True, flags=flags)
    if rng.random() < 0.08:
        fault = draw_fault(rng, (FREEZE,), places=("step", "update", "validation", "save"))
        return Episode(
            (fault,), flags=(*flags, "--parallel.timeout-seconds", "10"), launcher_flags=("--shutdown-timeout=5",)
        )
    return Episode((draw_fault(rng, (*KILLS, *STOPS, PAUSE)),), flags=flags)


def draw_fault(rng: random.Random, kinds: tuple[str, ...], places: tuple[str, ...] = tuple(PLACES)) -> Fault:
    """In one of four cases at some moment, else in a place; one in four is two strikes in a row."""
    stays = rng.random() < 0.75
    if not stays:
        place, delay_seconds = rng.choice([("start", rng.uniform(0, 8)), ("step", rng.uniform(0, 0.5))])
    elif len(places) == len(PLACES) and rng.random() < 0.2:
        place, delay_seconds = rng.choice(RESTART_PLACES), 0.0
    else:
        place, delay_seconds = rng.choice([name for name in places if name not in RESTART_PLACES]), 0.0
    most_visits, holders = PLACES[place]
    strikes = [Strike(rng.choice(kinds), rng.randrange(WORLD))]
    if strikes[0].kind == PAUSE or (strikes[0].kind in STOPS and rng.random() < 0.25):
        strikes.append(Strike(rng.choice((*KILLS, *STOPS)), rng.randrange(WORLD)))
    return Fault(
        place,
        tuple(strikes),
        visit=rng.randint(1, most_visits),
        holder=rng.randrange(WORLD) if holders == "any" else 0,
        stays=stays,
        delay_seconds=delay_seconds,
        pause_seconds=rng.uniform(0, 0.5),
    )


# Processes.


def processes_of(control: Path) -> list[int]:
    """Every living process that was started with this control folder, whoever its parent is now."""
    wanted, found = f"SOAK_CONTROL={control}".encode(), []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in environ.read_bytes().split(b"\0") and is_running(int(environ.parent.name)):
                found.append(int(environ.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Attempt:
    """A torchrun of faulty_train.py and the marks that its processes leave."""

    def __init__(self, control: Path, episode: Episode, run_dir: Path, flags: list[str]) -> None:
        self.control, self.run_dir = control, run_dir
        control.mkdir()
        holds = [asdict(fault) for fault in episode.faults]
        (control / "holds.json").write_text(json.dumps(holds))
        env = {"SOAK_CONTROL": str(control)}
        if episode.in_place:
            env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self.output = control / "output.txt"
        with self.output.open("w") as output:
            self.process = torchrun(
                WORLD,
                *(*flags, *episode.flags),
                script="tests/faulty_train.py",
                launcher_flags=(*episode.launcher_flags, f"--max-restarts={3 if episode.in_place else 0}"),
                env=env,
                stdout=output,
            )

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float, tick_seconds: float = 0.01) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                self.ask_where_they_are()
                raise SoakError(f"{what}: not after {seconds:.0f} s")
            time.sleep(tick_seconds)

    def ask_where_they_are(self) -> None:
        """Let every rank write its stack into the output."""
        for pid in self.ranks():
            if is_running(pid):
                send(pid, signal.SIGUSR2)
        time.sleep(1)

    def ranks(self) -> list[int]:
        return [int(path.read_text()) for path in self.control.glob("pid_*")]

    def living(self) -> list[int]:
        """Of a process that is dying the kernel shows no environment any more, so ranks are looked at by id, too."""
        return [*processes_of(self.control), *filter(is_running, self.ranks())]

    def has(self, mark: str) -> bool:
        return (self.control / mark).exists()

    def reaches(self, mark: str) -> bool:
        """Wait until a process makes the mark; False if the run ended instead."""
        self.wait_for(lambda: self.has(mark) or self.process.poll() is not None, mark, SECONDS_TO_REACH)
        return self.has(mark)

    def strike(self, start: int, strike: Strike) -> bool:
        """Do it; True if whoever should hear it was listening (a kill needs no ear)."""
        pids = {}
        for rank in range(WORLD):
            if not self.reaches(f"pid_{start}_{rank}"):
                return False
            pids[rank] = int((self.control / f"pid_{start}_{rank}").read_text())
        hearers = [strike.rank] if strike.kind.endswith(" rank") else range(WORLD)
        listening = all(self.has(f"listening_{start}_{rank}") for rank in hearers)
        what, _, whom = strike.kind.partition(" ")
        match strike.kind:
            case "kill rank":
                send(pids[strike.rank], signal.SIGKILL)
            case "kill ranks":
                for pid in pids.values():
                    send(pid, signal.SIGKILL)
            case "kill everything":
                for pid in (self.process.pid, *pids.values()):
                    send(pid, signal.SIGKILL)
            case "kill launcher":
                self.process.kill()
                self.process.wait()
            case "STOP file":
                (self.run_dir / "STOP").touch()
            case "pause rank" | "freeze rank":
                send(pids[strike.rank], signal.SIGSTOP)
                if strike.kind == PAUSE:
                    time.sleep(0.5)
                    send(pids[strike.rank], signal.SIGCONT)
            case _:
                send(self.process.pid if whom == "launcher" else pids[strike.rank], SIGNALS[what])
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


# The soak.


@dataclass
class Struck:
    """What was done in an episode, as far as what must come of it depends on it."""

    strikes: list[Strike] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)  # those that were reached
    all_heard: bool = True
    rows: int = 0  # in metrics.jsonl at the strike


class Soak:
    """Strikes one run after the other. `episodes` and `table` tell what was done so far."""

    def __init__(self, folder: Path, data: Path, *, seed: int = 0, say: Callable[[str], None] = print) -> None:
        self.folder, self.data, self.seed, self.say = folder, data, seed, say
        self.whole = folder / "whole"
        self.episodes: list[Episode] = []
        self.table: Counter[tuple[str, str]] = Counter()
        self.ends: Counter[str] = Counter()  # how attempts ended: status.json's state
        self.num_faults = self.num_finished = self.num_restarts = 0
        run_on_ranks(WORLD, train_whole, parse([*self.flags(self.whole), "--save.keep", "1000"], PRESETS))
        assert status(self.whole) == {"state": "done", "step": STEPS, "reason": None, "attempt": 1}

    def flags(self, run_dir: Path) -> list[str]:
        return [*tiny_flags(self.data, run_dir), "--train.steps", str(STEPS), "--save.keep", str(KEEP)]

    @property
    def run_dir(self) -> Path:
        return self.folder / f"run_{self.num_finished}"

    def soak(self, num_faults: int) -> None:
        """Random episodes until so many faults were met; the last run is led to its end."""
        while self.num_faults < num_faults:
            rng = random.Random(f"{self.seed}:{len(self.episodes)}")
            self.do(draw(rng))
        if look_at(self.run_dir).status is not None:
            self.do(Episode(()))

    def do(self, episode: Episode) -> dict[str, Any] | None:
        """One start of torchrun, struck and checked; status.json afterwards. SoakError says what is wrong."""
        self.episodes.append(episode)
        run_dir, before, began = self.run_dir, look_at(self.run_dir), time.monotonic()
        (run_dir / "STOP").unlink(missing_ok=True)  # as launchers do before a start
        attempt = Attempt(self.folder / f"control_{len(self.episodes)}", episode, run_dir, self.flags(run_dir))
        try:
            struck = self.strike_all(attempt, episode)
            attempt.wait_for_the_end()
            after = look_at(run_dir)
            check(attempt, episode, struck, before, after)
            state = after.status["state"] if after.status is not None else "not begun"
            if state == "done":
                compare(run_dir, self.whole)
        except (AssertionError, OSError, ValueError) as error:
            attempt.kill_everything()
            raise SoakError(self.account(attempt, error)) from error
        self.num_faults += len(struck.faults)
        self.num_restarts += len(list(attempt.control.glob("pid_*_0")))
        self.ends[state] += 1
        for fault in struck.faults:
            self.table[" + ".join(strike.kind for strike in fault.strikes), fault.place if fault.stays else "any"] += 1
        seconds, way = time.monotonic() - began, f"step {before.newest:3} -> {after.newest:3}"
        met = "" if struck.faults else "not met: "
        self.say(f"{self.num_faults:4} faults  {seconds:5.1f} s  {way}  {state:9}  {met}{episode}".rstrip())
        if state == "done":
            self.num_finished += 1
        shutil.rmtree(attempt.control)
        return after.status

    def strike_all(self, attempt: Attempt, episode: Episode) -> Struck:
        struck = Struck()
        for start, fault in enumerate(episode.faults):
            if not attempt.reaches(f"reached_{start}"):
                break
            time.sleep(fault.delay_seconds)
            struck.faults.append(fault)
            struck.rows = num_rows(attempt.run_dir)
            for index, strike in enumerate(fault.strikes):
                if index > 0:
                    time.sleep(fault.pause_seconds)
                struck.all_heard &= attempt.strike(start, strike)
                struck.strikes.append(strike)
            if {"STOP file", "kill launcher"} & {strike.kind for strike in fault.strikes}:
                time.sleep(SECONDS_BETWEEN_LOOKS)
            (attempt.control / f"released_{start}").touch()
        return struck

    def account(self, attempt: Attempt, error: BaseException) -> str:
        history = "\n".join(f"  {number:3} {episode}" for number, episode in enumerate(self.episodes, start=1))
        tail = "\n".join(attempt.output.read_text(errors="replace").splitlines()[-80:])
        kept = "\n".join(
            f"  {path.relative_to(attempt.run_dir)}"
            for path in sorted(attempt.run_dir.glob("*")) + sorted(attempt.run_dir.glob("checkpoints/*"))
        )
        told = status(attempt.run_dir) if (attempt.run_dir / "status.json").exists() else None
        return (
            f"{error}\nseed {self.seed}, run {self.num_finished}, episodes, the last of which failed:\n{history}\n"
            f"status.json: {told}\n{attempt.run_dir}:\n{kept}\noutput:\n{tail}"
        )

    def report(self) -> Iterator[str]:
        """The table: kinds of faults by places, and the sums."""
        places = [place for place in (*PLACES, "any") if any(at == place for _, at in self.table)]
        kinds = sorted({kind for kind, _ in self.table}, key=lambda kind: (" + " in kind, kind))
        yield "| fault | " + " | ".join(places) + " | all |"
        yield "|---" * (len(places) + 2) + "|"
        for kind in kinds:
            counts = [self.table[kind, place] for place in places]
            yield f"| {kind} | " + " | ".join(str(count or "") for count in counts) + f" | {sum(counts)} |"
        totals = [sum(self.table[kind, place] for kind in kinds) for place in places]
        yield "| all | " + " | ".join(map(str, totals)) + f" | {sum(totals)} |"
        ends = ", ".join(f"{count} {state}" for state, count in self.ends.most_common())
        yield (
            f"{self.num_faults} faults in {len(self.episodes)} starts of torchrun ({ends}); workers started "
            f"{self.num_restarts} times; {self.num_finished} runs finished, each bitwise the uninterrupted one"
        )


def train_whole(mesh: Mesh, config: Config) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        run(config, mesh)


def num_rows(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def compare(run_dir: Path, whole: Path) -> None:
    """Bit for bit, but for timings."""
    assert curve(run_dir) == curve(whole), "the training rows differ from the uninterrupted run's"
    assert validations(run_dir) == validations(whole), "the validation rows differ from the uninterrupted run's"
    assert_same_tensors(final_tensors(run_dir), final_tensors(whole))
    log = (run_dir / "log.txt").read_text()
    assert "continuing from" in log or status(run_dir)["attempt"] == 1, "the log does not say that it continued"


# What must be true afterwards.


def check(attempt: Attempt, episode: Episode, struck: Struck, before: Look, after: Look) -> None:
    check_checkpoints(attempt.run_dir, episode, before, after)
    check_attempts(attempt, struck, before, after)
    if after.status is None:
        return
    left_hard = any(killed_rank_0(strike) or strike.kind == FREEZE for strike in struck.strikes) or not struck.all_heard
    lock = attempt.run_dir / "lock.json"
    if lock.exists():
        assert not is_running(json.loads(lock.read_text())["pid"]), "the lock of a living process"
        assert left_hard, "the lock was not given up"
    if after.attempt == before.attempt and before.status is not None:
        assert after.status == before.status, f"status.json was {before.status}"
        assert not struck.all_heard or at(struck, "start", "process group", "claim"), "the attempt was not counted"
        return
    check_state(attempt, episode, struck, before, after)


def check_checkpoints(run_dir: Path, episode: Episode, before: Look, after: Look) -> None:
    for path in list_checkpoints(run_dir):
        assert (fault := fault_of(path)) is None, fault
    ever = sorted({*before.checkpoints, *after.checkpoints})
    for step in {*before.checkpoints} - {*after.checkpoints}:
        assert step not in ever[-KEEP:], f"the checkpoint of step {step} was lost"
        assert episode.in_place or step != before.newest, f"step {step} was deleted, which this attempt had loaded"


def check_attempts(attempt: Attempt, struck: Struck, before: Look, after: Look) -> None:
    """Every start that claimed the directory was counted, and no other."""
    claimed = len(list(attempt.control.glob("claimed_*")))
    counted = after.attempt - before.attempt
    num_struck_before_the_mark = sum(not fault.stays for fault in struck.faults)
    assert claimed <= counted <= claimed + num_struck_before_the_mark, f"{claimed} starts, {counted} counted"


def check_state(attempt: Attempt, episode: Episode, struck: Struck, before: Look, after: Look) -> None:
    """status.json tells the truth: what it says of the checkpoints, and that it ended so because of what was done."""
    assert after.status is not None
    state, step, reason = after.status["state"], after.status["step"], after.status["reason"]
    kinds = {strike.kind for strike in struck.strikes}
    running = (*BESIDE_THE_LOOP, *(BESIDE_THE_LOOP_IF_ASYNC if episode.flags[:2] == ASYNC_SAVES else ()))
    aimed = all(fault.stays and fault.place not in running for fault in struck.faults)
    is_stop = kinds <= {*STOPS, PAUSE} and bool(kinds - {PAUSE})
    code = attempt.process.returncode
    told = f"status.json says {after.status}, and the newest checkpoint is of step {after.newest}"
    if state == "done":
        assert after.newest == step == STEPS and reason is None, told
        if not struck.strikes or kinds == {PAUSE} or episode.in_place:
            assert code == 0, f"torchrun ended with {code} though the run was done"
        if is_stop and struck.all_heard and aimed:
            assert struck.rows >= STEPS - 1, f"asked to stop at row {struck.rows}, it went on to the end"
        return
    assert struck.strikes, f"nothing was done to it: {told}"
    if state == "stopped":
        assert after.newest == step < STEPS, told
        assert reason in {STOPS.get(kind) for kind in kinds} - {None}, told
        assert not (attempt.run_dir / "STOP").exists() or kinds - {"STOP file"}, "the STOP file is still there"
        if aimed:
            assert step <= max(struck.rows, before.newest) + 5, f"asked at row {struck.rows}: {told}"
        if is_stop and struck.all_heard and kinds <= {"STOP file", "SIGTERM rank", "SIGUSR1 rank", PAUSE}:
            assert code == 0, f"torchrun ended with {code} though the run was stopped in order"
        return
    assert step <= after.newest, told
    assert kinds & {*KILLS, FREEZE} or not struck.all_heard, f"a stop was not honoured: {told}"
    if state == "running":
        assert any(killed_rank_0(strike) for strike in struck.strikes) or not struck.all_heard, told
    else:
        assert state == "failed" and reason, told


def killed_rank_0(strike: Strike) -> bool:
    return strike.kind in ("kill ranks", "kill everything") or (
        strike.kind in ("kill rank", FREEZE) and strike.rank == 0
    )


def at(struck: Struck, *places: str) -> bool:
    return any(fault.place in places for fault in struck.faults)


def main() -> None:
    os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=100)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        soak = Soak(
            Path(folder),
            make_tiny_data(Path(folder)),
            seed=args.seed,
            say=lambda line: print(line, flush=True),
        )
        try:
            soak.soak(args.faults)
        finally:
            print(*soak.report(), sep="\n")
            print(f"seed {args.seed}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
