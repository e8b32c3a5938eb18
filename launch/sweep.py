"""Experiments of many runs, each sweep by one command: a table and a picture at the end.

    python launch/sweep.py descent                            # gradient descent by hand, and how its rate goes wrong
    python launch/sweep.py ladder --run-dir runs/ladder       # from a bigram to a GPT, one idea at a time
    python launch/sweep.py epochs --run-dir runs/epochs       # one model's loss and speech, epoch by epoch
    python launch/sweep.py lr --run-dir runs/lr               # nine learning rates, past the edge of stability
    python launch/sweep.py batch --run-dir runs/batch         # the same tokens in small and large batches
    python launch/sweep.py ablate --run-dir runs/ablate       # a part left out or exchanged at a time
    python launch/sweep.py budget --minutes 1                 # what is best, if every entry has the same time
    python launch/sweep.py lr --cluster slurm --gpus-per-node 8 --account A --preset gpt2-small --train.steps 2000

Without a GPU each run is a process of one core, `--max-parallel` of them at a time, and takes about a minute on 2 MB
of TinyStories; docs/experiments.md has the commands that prepare these, and docs/ladder.md those of the ladder. More
flags are train/main.py's, for every run. Each point is a run directory of its own: the same command again trains what
is not done. A run that diverges is stopped early, and stays so. RUN_DIR/sweep.md has the table, RUN_DIR/sweep.png the
picture; --into FILE.md puts the table where that file has `<!-- sweep NAME -->` before it and `<!-- end -->` after it.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from common.errors import InputError, one_line_errors, writing_to
from common.files import write_atomically
from common.tables import new_figure, put_into
from data_prep.manifest import read_manifest
from launch.experiments import (
    CPU_PRESET,
    NAMES,
    PRESETS_SWEPT,
    Entry,
    length_flags,
    refuse_flags_of,
    sweep_named,
    timing_flags,
)
from launch.findings import DIVERGED, draw, result_of, table
from launch.grid import Point
from launch.lessons import descent
from launch.options import Options
from launch.runs import look
from launch.submit import train_points
from train.config import parse
from train.curves import read_rows
from train.presets import PRESETS


@dataclass(frozen=True)
class SweepOptions:
    """Experiments of many runs. More flags are train/main.py's, for every run."""

    run_dir: Path | None = None
    """Folder of the runs; None: runs/sweep-NAME."""
    preset: str | None = None
    """What is swept; None: stories-cpu, for ladder shakespeare-char-cpu, for epochs phase1."""
    minutes: float | None = None
    """budget: of training, for each entry."""
    into: Path | None = None
    """A Markdown file whose table of this sweep is replaced."""
    how: Annotated[Options, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Options(cluster="local", gpus_per_node=1, wait=True)
    )


def main(args: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if args is None else args)
    with one_line_errors("sweep"):
        name = words.pop(0) if words and not words[0].startswith("-") else ""
        if name not in ("descent", *NAMES) and "--help" not in words:
            raise InputError(f"which sweep? {', '.join(('descent', *NAMES))}; given: {name or 'none'}")
        options, flags = tyro.cli(
            SweepOptions, prog="launch/sweep.py", description=__doc__, args=words, return_unknown_args=True
        )
        if name == "descent":
            if flags or options.how != SweepOptions().how:
                raise InputError(f"descent takes no flag but --into; given: {' '.join(words)}")
            text = descent()
            if options.into is not None:
                put_into(options.into, f"sweep {name}", text)
            print(text)
        else:
            sweep(name, options, flags)


def sweep(name: str, options: SweepOptions, flags: Sequence[str]) -> None:
    preset = options.preset or PRESETS_SWEPT.get(name, CPU_PRESET)
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: there are {', '.join(PRESETS)}")
    if (name == "budget") != (options.minutes is not None):
        raise InputError("--minutes M is for budget, and budget needs it: the time of training that each entry has")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise InputError(f"--minutes {options.minutes:g} must be a finite number above 0")
    base = (options.run_dir or Path("runs") / f"sweep-{name}").absolute()
    config = parse([preset, *flags], PRESETS)
    world = options.how.nodes * options.how.gpus_per_node
    refuse_flags_of(sweep_named(name, config, world=world), name, flags)
    new_figure()  # refuses now, not after all runs
    if options.into is not None:
        put_into(options.into, f"sweep {name}", None)
    manifest = read_manifest(config.data.dir)
    data_tokens = manifest.splits["train"].tokens
    plan = sweep_named(name, config, world=world, data_tokens=data_tokens)
    limit = ("--train.diverged-above", f"{math.log(manifest.vocab_size) + 1:.2f}")  # worse by a nat than no knowledge
    common = (preset, *limit, "--track.group", base.name, *flags)
    entries = plan.entries
    if options.minutes is not None:
        timed = time_entries(entries, common, base / "timing", options)
        if timed is None:
            return
        entries = timed
    points = points_of(entries, common, base)
    runs = look([point.run_dir for point in points])
    gone = [result_of(entry, run) for entry, run in zip(entries, runs, strict=True)]
    train_points(points, base, options.how, settled={each.run.run_dir for each in gone if each.outcome == DIVERGED})
    if options.how.dry_run:
        return
    runs = look([point.run_dir for point in points])
    results = [result_of(entry, run) for entry, run in zip(entries, runs, strict=True)]
    text = table(plan, results, data_tokens=data_tokens)
    with writing_to(base):
        write_atomically(base / "sweep.md", text)
    draw(plan, results, base / "sweep.png")
    print(f"{text}\n{base / 'sweep.png'}")
    unfinished = [str(each.run.run_dir) for each in results if each.outcome not in ("done", DIVERGED)]
    if unfinished:
        raise InputError(f"not finished: {', '.join(unfinished)}; the same command goes on with them")
    if options.into is not None:
        put_into(options.into, f"sweep {name}", text)


def points_of(entries: Sequence[Entry], common: Sequence[str], base: Path) -> list[Point]:
    return [Point((*common, *entry.flags, "--run-dir", str(base / entry.name)), base / entry.name) for entry in entries]


def time_entries(
    entries: Sequence[Entry], common: Sequence[str], base: Path, options: SweepOptions
) -> tuple[Entry, ...] | None:
    """The entries with as many steps as fit into --minutes, by a short run of each under the same circumstances; None
    if that is for another time. These runs stay, so that the same command again comes to the same steps."""
    points = points_of([replace(entry, flags=(*entry.flags, *timing_flags())) for entry in entries], common, base)
    train_points(points, base, options.how)
    runs = look([point.run_dir for point in points])
    if options.how.dry_run:
        return None
    unfinished = [str(run.run_dir) for run in runs if run.doing != "done"]
    if unfinished:
        raise InputError(f"not timed: {', '.join(unfinished)}; the same command goes on with them")
    assert options.minutes is not None
    found = []
    for entry, run in zip(entries, runs, strict=True):
        seconds = statistics.median(row["step_seconds"] for row in read_rows(run.run_dir) if "loss" in row)
        steps = int(60 * options.minutes / seconds)
        if steps < 1:
            raise InputError(f"--minutes {options.minutes:g}: a step of {entry.name} takes {seconds:.1f} s")
        found.append(replace(entry, flags=(*entry.flags, *length_flags(steps))))
    return tuple(found)


if __name__ == "__main__":
    main()
