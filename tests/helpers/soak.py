"""The soak: a run that real signals strike again and again must be bit for bit the uninterrupted run.

    python tests/helpers/soak.py --seed 7 --faults 500    # half an hour on two cores; a seed draws the same faults

Each episode starts a real torchrun of two or three processes of helpers/faulty_train.py, which waits where the fault is
aimed. Before it, a file of the run or of its data may be damaged. The soak strikes, waits until the last process is
gone, and checks what is left: sound checkpoints, none lost, a truthful status.json, a lock that the next start may
take, no traceback. A run that reaches its end is compared bit for bit with the uninterrupted one, and the next run
begins. Expect `... runs finished, each bitwise the uninterrupted one`, and the damage that needed a person: changed
data, which no start may train on.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.helpers.aftermath import KEEP, STEPS, check, check_checkpoints, snapshot_of
from tests.helpers.at_rest import inflict
from tests.helpers.attempts import Attempt
from tests.helpers.faults import CLOCK, FULL, PLACES, SHARDED, Episode, Struck, draw
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import (
    assert_same_tensors,
    curve,
    final_tensors,
    make_tiny_data,
    rows,
    status,
    tiny_flags,
    validations,
)
from train.command_line import parse
from train.config import Config
from train.main import run
from train.metrics.rows import SAMPLES_FILE, read_lines
from train.presets import PRESETS
from train.processes.group import ProcessGroup

SECONDS_FULL = 2.0
SECONDS_BETWEEN_CHECKS = 1.2  # between the engine's checks of the STOP file and of its launcher, and a little more


class SoakError(AssertionError):
    """A check that failed after a fault, with the seed and all episodes, to reproduce it."""


class Soak:
    """Strikes one run after the other; `episodes` and `table` record what was done so far.

    Runs alternate between two processes and three, which share the model in one way for all of a run, since only two
    add up in the same order whatever the layout. `disk`: a small file system for the run directories, which can be
    filled. `kinds`: faults beside kills, stops and pauses.
    """

    def __init__(
        self,
        folder: Path,
        data: Path,
        *,
        seed: int = 0,
        log: Callable[[str], None] = print,
        disk: Path | None = None,
        kinds: Sequence[str] = (),
    ) -> None:
        self.folder, self.data, self.seed, self.log = folder, data, seed, log
        self.disk, self.kinds = disk or folder, kinds
        self.episodes: list[Episode] = []
        self.table: Counter[tuple[str, str]] = Counter()
        self.ends: Counter[str] = Counter()  # how attempts ended: status.json's state
        self.persons: list[str] = []  # the damage that a start refused, so that a person had to mend it
        self.num_faults = self.num_finished = self.num_restarts = 0
        self.has_lost_rows = False  # of the present run, to damage at rest that was named

    @property
    def setting(self) -> tuple[int, tuple[str, ...]]:
        """The present run's number of processes, and its flags."""
        world = 2 + self.num_finished % 2
        return world, SHARDED if world == 3 and self.num_finished % 4 == 3 else ()

    def whole(self) -> Path:
        """Return the uninterrupted run of the present run's setting; it is trained when it is first wanted."""
        world, flags = self.setting
        run_dir = self.folder / f"whole_{world}{'_sharded' if flags else ''}"
        if not run_dir.exists():
            run_on_ranks(world, train_whole, parse([*self.flags(run_dir), "--save.keep", "1000", *flags], PRESETS))
            assert status(run_dir) == {"state": "done", "step": STEPS, "reason": None, "attempt": 1}
        return run_dir

    def flags(self, run_dir: Path) -> list[str]:
        flags = [*tiny_flags(self.data, run_dir), "--train.steps", str(STEPS), "--save.keep", str(KEEP)]
        return [*flags, "--train.micro-batch", "2"]  # which divides what each of two and three processes has

    @property
    def run_dir(self) -> Path:
        return self.disk / f"run_{self.num_finished}"

    def soak(self, num_faults: int) -> None:
        """Do random episodes until `num_faults` faults were inflicted; then let the last run finish."""
        while self.num_faults < num_faults:
            rng = random.Random(f"{self.seed}:{len(self.episodes)}")
            world, _ = self.setting
            has_begun = (self.run_dir / "status.json").exists()
            self.do(draw(rng, world, may_shard=world == 2, has_begun=has_begun, kinds=self.kinds))
        if snapshot_of(self.run_dir).status is not None:
            self.do(Episode(()))

    def do(self, episode: Episode) -> dict[str, Any] | None:
        """Damage, start torchrun once, strike, check; return status.json afterwards. Raise SoakError on a failure."""
        self.episodes.append(episode)
        run_dir, began = self.run_dir, time.monotonic()
        world, flags = self.setting
        whole = self.whole()
        (run_dir / "STOP").unlink(missing_ok=True)  # as launchers do before a start
        at_rest = self.folder / f"at_rest_{len(self.episodes)}"
        at_rest.mkdir()
        damage = inflict(episode, run_dir, self.data, at_rest)
        before = snapshot_of(run_dir)
        control = self.folder / f"control_{len(self.episodes)}"
        attempt = Attempt(control, episode, run_dir, [*self.flags(run_dir), *flags], world)
        try:
            struck = self.strike_all(attempt, episode)
            attempt.wait_for_the_end()
            after = snapshot_of(run_dir)
            refusal = None if damage is None or struck.strikes else refusal_of(attempt)
            if damage is not None and (damage.is_of_data or refusal is not None):
                assert refusal is not None or struck.faults, f"trained on changed data: {damage}"
                check_checkpoints(run_dir, episode, before, after)
                damage.mend()
                state, after = "refused", snapshot_of(run_dir)
                if refusal is not None:
                    self.persons.append(f"{damage}: {refusal}")
                    self.log(f"  refused: {refusal}")
            else:
                self.has_lost_rows |= damage is not None and damage.is_of_rows
                check(attempt, episode, struck, before, after)
                state = after.status["state"] if after.status is not None else "not begun"
            if state == "done":
                compare(run_dir, whole, with_rows=not self.has_lost_rows)
        except (AssertionError, OSError, ValueError) as error:
            attempt.kill_everything()
            raise SoakError(f"damaged at rest: {damage}\n{self.account(attempt, error)}") from error
        finally:
            attempt.filler.unlink(missing_ok=True)
        self.num_faults += len(struck.faults) + (0 if damage is None else len(damage.paths))
        self.num_restarts += len(list(attempt.control.glob("pid_*_0")))
        self.ends[state] += 1
        for fault in struck.faults:
            self.table[" + ".join(strike.kind for strike in fault.strikes), fault.place if fault.stays else "any"] += 1
        for path in damage.paths if damage is not None else ():
            kind = "wrong data" if path.is_relative_to(self.data) else "damaged file"
            self.table["damaged checkpoint" if path.parent.name.startswith("step_") else kind, "at rest"] += 1
        seconds, steps = time.monotonic() - began, f"step {before.newest:3} -> {after.newest:3}"
        prefix = "" if struck.faults or not episode.faults else "not met: "
        text = f"{prefix}{episode}" + (f"  [{damage}]" if damage is not None else "")
        self.log(f"{self.num_faults:4} faults  {seconds:5.1f} s  {world} x  {steps}  {state:9}  {text}".rstrip())
        if state == "done":
            self.num_finished += 1
            self.has_lost_rows = False
        shutil.rmtree(attempt.control)
        shutil.rmtree(at_rest)
        return after.status

    def strike_all(self, attempt: Attempt, episode: Episode) -> Struck:
        """Strike at each place that the processes reach; return what was done."""
        struck = Struck()
        for start, fault in enumerate(episode.faults):
            if not attempt.reaches(f"reached_{start}"):
                break
            time.sleep(fault.delay_seconds)
            if not attempt.is_under_way(start):
                break
            struck.faults.append(fault)
            struck.rows = last_row(attempt.run_dir)
            for index, strike in enumerate(fault.strikes):
                if index > 0:
                    time.sleep(fault.pause_seconds)
                struck.all_heard &= attempt.strike(start, strike)
                struck.strikes.append(strike)
            if {"STOP file", "kill launcher"} & {strike.kind for strike in fault.strikes}:
                time.sleep(SECONDS_BETWEEN_CHECKS)
            (attempt.control / f"released_{start}").touch()
            if FULL in {strike.kind for strike in fault.strikes}:
                time.sleep(SECONDS_FULL)
                attempt.filler.unlink()
        return struck

    def account(self, attempt: Attempt, error: BaseException) -> str:
        """Return the error with all episodes, the files of the run and the end of its output."""
        history = "\n".join(f"  {number:3} {episode}" for number, episode in enumerate(self.episodes, start=1))
        tail = "\n".join(attempt.output.read_text(errors="replace").splitlines()[-80:])
        kept = "\n".join(
            f"  {path.relative_to(attempt.run_dir)}"
            for path in sorted(attempt.run_dir.glob("*")) + sorted(attempt.run_dir.glob("checkpoints/*"))
        )
        last_status = snapshot_of(attempt.run_dir).status
        return (
            f"{error}\nseed {self.seed}, run {self.num_finished}, episodes, the last of which failed:\n{history}\n"
            f"status.json: {last_status}\n{attempt.run_dir}:\n{kept}\noutput:\n{tail}"
        )

    def report(self) -> Iterator[str]:
        """Return the lines of a table, kinds of faults by places, and the totals."""
        places = [place for place in (*PLACES, "any", "at rest") if any(place == other for _, other in self.table)]
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
        yield f"{len(self.persons)} starts needed a person:"
        yield from (f"  {person}" for person in self.persons)


def train_whole(group: ProcessGroup, config: Config) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        run(config, group)


def last_row(run_dir: Path) -> int:
    """Return the step of the last training row; rows before it may be lost to damage."""
    path = run_dir / "metrics.jsonl"
    return max((row["step"] for row in read_lines(path).rows if "loss" in row), default=0) if path.is_file() else 0


def refusal_of(attempt: Attempt) -> str | None:
    """Return the line with which a start that nothing struck refused to begin; None if it began."""
    lines = attempt.output.read_text(errors="replace").splitlines()
    refusals = [line for line in lines if line.startswith("train: ") and "warning" not in line]
    is_begun = any(attempt.control.glob("claimed_*")) and "step " in "\n".join(lines)
    if not refusals or is_begun:
        return None
    assert len(refusals) == 1 and 'faulty_train.py", line' not in "\n".join(lines), "more than one line"
    return refusals[0]


def compare(run_dir: Path, whole: Path, *, with_rows: bool) -> None:
    """Raise AssertionError unless both runs are bitwise equal, except for timings."""
    assert_same_tensors(final_tensors(run_dir), final_tensors(whole))
    if not with_rows:
        return
    assert curve(run_dir) == curve(whole), "the training rows differ from the uninterrupted run's"
    assert validations(run_dir) == validations(whole), "the validation rows differ from the uninterrupted run's"
    assert rows(run_dir, SAMPLES_FILE) == rows(whole, SAMPLES_FILE), "the samples differ from the uninterrupted run's"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a file system in memory that is soon full, below `folder`; None where that takes more rights."""
    disk = folder / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode != 0:
        print("no full disks: mounting a small one needs root")
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def main() -> None:
    os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=100)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, small_disk(Path(folder)) as disk:
        soak = Soak(
            Path(folder),
            make_tiny_data(Path(folder)),
            seed=args.seed,
            log=lambda line: print(line, flush=True),
            disk=disk,
            kinds=[CLOCK, *([FULL] if disk is not None else [])],
        )
        try:
            soak.soak(args.faults)
        finally:
            print(*soak.report(), sep="\n")
            print(f"seed {args.seed}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
