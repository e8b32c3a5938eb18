"""The soak: a run that real signals strike again and again must be bit for bit the uninterrupted run.

    python tests/helpers/soak.py --seed 7 --faults 100    # 20 minutes on two cores; a seed always draws the same faults

Each episode starts the same real torchrun of two processes of helpers/faulty_train.py, which waits where the fault is
aimed. The soak strikes, waits until the last process is gone, and checks what is left: sound checkpoints, none lost, a
truthful status.json, a lock that the next start may take. A run that reaches its end is compared bit for bit with the
uninterrupted one, and the next run begins. Expect `... runs finished, each bitwise the uninterrupted one`.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.helpers.aftermath import KEEP, STEPS, check, snapshot_of
from tests.helpers.attempts import Attempt
from tests.helpers.faults import PLACES, WORLD, Episode, Struck, draw
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
from train.config import Config, parse
from train.main import run
from train.metrics.rows import SAMPLES_FILE
from train.presets import PRESETS
from train.processes.group import ProcessGroup

SECONDS_BETWEEN_CHECKS = 1.2  # between the engine's checks of the STOP file and of its launcher, and a little more


class SoakError(AssertionError):
    """A check that failed after a fault, with the seed and all episodes, to reproduce it."""


class Soak:
    """Strikes one run after the other; `episodes` and `table` record what was done so far."""

    def __init__(self, folder: Path, data: Path, *, seed: int = 0, log: Callable[[str], None] = print) -> None:
        self.folder, self.data, self.seed, self.log = folder, data, seed, log
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
        """Do random episodes until `num_faults` faults were reached; then let the last run finish."""
        while self.num_faults < num_faults:
            rng = random.Random(f"{self.seed}:{len(self.episodes)}")
            self.do(draw(rng))
        if snapshot_of(self.run_dir).status is not None:
            self.do(Episode(()))

    def do(self, episode: Episode) -> dict[str, Any] | None:
        """Start torchrun once, strike and check; return status.json afterwards. Raise SoakError if a check fails."""
        self.episodes.append(episode)
        run_dir, before, began = self.run_dir, snapshot_of(self.run_dir), time.monotonic()
        (run_dir / "STOP").unlink(missing_ok=True)  # as launchers do before a start
        attempt = Attempt(self.folder / f"control_{len(self.episodes)}", episode, run_dir, self.flags(run_dir))
        try:
            struck = self.strike_all(attempt, episode)
            attempt.wait_for_the_end()
            after = snapshot_of(run_dir)
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
        seconds, steps = time.monotonic() - began, f"step {before.newest:3} -> {after.newest:3}"
        prefix = "" if struck.faults else "not met: "
        self.log(f"{self.num_faults:4} faults  {seconds:5.1f} s  {steps}  {state:9}  {prefix}{episode}".rstrip())
        if state == "done":
            self.num_finished += 1
        shutil.rmtree(attempt.control)
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
            struck.rows = num_rows(attempt.run_dir)
            for index, strike in enumerate(fault.strikes):
                if index > 0:
                    time.sleep(fault.pause_seconds)
                struck.all_heard &= attempt.strike(start, strike)
                struck.strikes.append(strike)
            if {"STOP file", "kill launcher"} & {strike.kind for strike in fault.strikes}:
                time.sleep(SECONDS_BETWEEN_CHECKS)
            (attempt.control / f"released_{start}").touch()
        return struck

    def account(self, attempt: Attempt, error: BaseException) -> str:
        """Return the error with all episodes, the files of the run and the end of its output."""
        history = "\n".join(f"  {number:3} {episode}" for number, episode in enumerate(self.episodes, start=1))
        tail = "\n".join(attempt.output.read_text(errors="replace").splitlines()[-80:])
        kept = "\n".join(
            f"  {path.relative_to(attempt.run_dir)}"
            for path in sorted(attempt.run_dir.glob("*")) + sorted(attempt.run_dir.glob("checkpoints/*"))
        )
        last_status = status(attempt.run_dir) if (attempt.run_dir / "status.json").exists() else None
        return (
            f"{error}\nseed {self.seed}, run {self.num_finished}, episodes, the last of which failed:\n{history}\n"
            f"status.json: {last_status}\n{attempt.run_dir}:\n{kept}\noutput:\n{tail}"
        )

    def report(self) -> Iterator[str]:
        """Return the lines of a table, kinds of faults by places, and the totals."""
        places = [place for place in (*PLACES, "any") if any(place == other for _, other in self.table)]
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


def train_whole(group: ProcessGroup, config: Config) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        run(config, group)


def num_rows(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def compare(run_dir: Path, whole: Path) -> None:
    """Raise AssertionError unless both runs are bitwise equal, except for timings."""
    assert curve(run_dir) == curve(whole), "the training rows differ from the uninterrupted run's"
    assert validations(run_dir) == validations(whole), "the validation rows differ from the uninterrupted run's"
    assert rows(run_dir, SAMPLES_FILE) == rows(whole, SAMPLES_FILE), "the samples differ from the uninterrupted run's"
    assert_same_tensors(final_tensors(run_dir), final_tensors(whole))


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
            log=lambda line: print(line, flush=True),
        )
        try:
            soak.soak(args.faults)
        finally:
            print(*soak.report(), sep="\n")
            print(f"seed {args.seed}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
