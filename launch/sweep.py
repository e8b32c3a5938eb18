"""Run an experiment of many runs, a sweep, and end it with a table and a picture.

    python launch/sweep.py descent                            # gradient descent by hand, and how its rate goes wrong
    python launch/sweep.py ladder --run-dir runs/ladder       # from a bigram to a GPT, one idea at a time
    python launch/sweep.py epochs --run-dir runs/epochs       # one model's loss and samples, epoch by epoch
    python launch/sweep.py lr --run-dir runs/lr               # nine learning rates, past the edge of stability
    python launch/sweep.py batch --run-dir runs/batch         # the same tokens in small and large batches
    python launch/sweep.py ablate --run-dir runs/ablate       # one part left out or exchanged at a time
    python launch/sweep.py budget --minutes 1                 # the best of nine entries that have the same time
    python launch/sweep.py recipe --run-dir runs/recipe       # the ladder from AdamW to Muon, both ends tuned
    python launch/sweep.py lr --cluster slurm --gpus-per-node 8 --account A --preset gpt2-small --train.steps 2000

Without a GPU each run is a process of one core, --max-parallel of them at a time, and takes about a minute on 2 MB of
TinyStories. docs/experiments.md has the commands that prepare this text, docs/ladder.md those of the ladder. Other
flags are train/main.py's and hold for every run. Each run has its own run directory, so the same command again trains
what is not done. A run that diverges is stopped early and not tried again. RUN_DIR/sweep.md has the table and
RUN_DIR/sweep.png the picture. --into FILE.md also writes the table between `<!-- sweep NAME -->` and `<!-- end -->` of
that file.
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
from common.reading import require_place
from common.tables import new_figure, put_into
from data_prep.manifest import Manifest, read_manifest
from launch.grid import Point
from launch.options import Options
from launch.recipe import LADDER, Recipe
from launch.runs import inspect_runs
from launch.submit import train_points
from launch.sweeps import (
    CPU_PRESET,
    DEFAULT_PRESETS,
    DIVERGED,
    SWEEPS,
    TIMED_STEPS,
    Entry,
    Result,
    build_sweep,
    descent_table,
    draw_sweep,
    length_flags,
    read_result,
    refuse_flags_of,
    refuse_stages,
    sweep_table,
)
from train.command_line import parse
from train.config import Config
from train.curves import read_rows
from train.presets import PRESETS


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep. Other flags are train/main.py's and hold for every run."""

    run_dir: Path | None = None
    """Folder of the runs; None: runs/sweep-NAME."""
    preset: str | None = None
    """Preset that all runs start from; None: stories-cpu, for ladder shakespeare-char-cpu, for epochs phase1."""
    minutes: float | None = None
    """Minutes of training that each entry of budget has; for budget only."""
    seeds: int = 3
    """Seeds of each rung of recipe; for recipe only."""
    into: Path | None = None
    """Markdown file whose table of this sweep is replaced."""
    how: Annotated[Options, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Options(cluster="local", gpus_per_node=1, wait=True)
    )


def main(args: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if args is None else args)
    with one_line_errors("sweep"):
        name = words.pop(0) if words and not words[0].startswith("-") else ""
        names = ("descent", *SWEEPS, "recipe")
        if name not in names and "--help" not in words:
            raise InputError(f"which sweep? {', '.join(names)}; given: {name or 'none'}")
        options, flags = tyro.cli(
            SweepOptions, prog="launch/sweep.py", description=__doc__, args=words, return_unknown_args=True
        )
        if name == "descent":
            if flags or options.how != SweepOptions().how:
                raise InputError(f"descent takes no flag but --into; given: {' '.join(words)}")
            text = descent_table()
            if options.into is not None:
                put_into(options.into, f"sweep {name}", text)
            print(text)
        else:
            run_sweep(name, options, flags)


def run_sweep(name: str, options: SweepOptions, flags: Sequence[str]) -> None:
    """Train what is not done, then write and print the table and draw the picture."""
    preset = options.preset or DEFAULT_PRESETS.get(name, CPU_PRESET)
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: there are {', '.join(PRESETS)}")
    if (name == "budget") != (options.minutes is not None):
        raise InputError("--minutes M is for budget, and budget needs it: the time of training that each entry has")
    if name != "recipe" and options.seeds != SweepOptions.seeds:
        raise InputError("--seeds is for recipe only")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise InputError(f"--minutes {options.minutes:g} must be a finite number above 0")
    base = (options.run_dir or Path("runs") / f"sweep-{name}").absolute()
    require_place(base, "--run-dir")
    config = parse([preset, *flags], PRESETS)
    if name == "recipe":
        run_recipe(config, (preset, *flags), base, options)
        return
    world = options.how.nodes * options.how.gpus_per_node
    refuse_flags_of(build_sweep(name, config, world=world).entries, name, flags)
    new_figure()  # a missing matplotlib is refused now instead of after all runs
    if options.into is not None:
        put_into(options.into, f"sweep {name}", None)
    manifest = read_manifest(config.data.dir)
    data_tokens = manifest.splits["train"].tokens
    sweep = build_sweep(name, config, world=world, data_tokens=data_tokens)
    common = common_words((preset, *flags), manifest, base)
    entries = sweep.entries
    if options.minutes is not None:
        timed_entries = time_entries(entries, common, base / "timing", options)
        if timed_entries is None:
            return
        entries = timed_entries
    results = train_entries(entries, common, base, options)
    if options.how.dry_run:
        return
    text = sweep_table(sweep, results, data_tokens=data_tokens)
    with writing_to(base):
        write_atomically(base / "sweep.md", text)
    draw_sweep(sweep, results, base / "sweep.png")
    print(f"{text}\n{base / 'sweep.png'}")
    unfinished = [str(each.run.run_dir) for each in results if each.outcome not in ("done", DIVERGED)]
    if unfinished:
        raise InputError(f"not finished: {', '.join(unfinished)}; the same command goes on with them")
    if options.into is not None:
        put_into(options.into, f"sweep {name}", text)


def run_recipe(config: Config, words: Sequence[str], base: Path, options: SweepOptions) -> None:
    """Train the stages of the ladder (launch/recipe.py), then write and print its table."""
    if options.seeds < 1:
        raise InputError(f"--seeds {options.seeds} must be at least 1")
    refuse_stages("recipe", config)
    if options.how.nodes * options.how.gpus_per_node > 1:
        raise InputError(
            "recipe: a batch may be of 4 sequences, so each run has one process; leave out --nodes and --gpus-per-node"
        )
    if options.into is not None:
        put_into(options.into, "sweep recipe", None)
    manifest = read_manifest(config.data.dir)
    half = config.validate.tokens
    if half is None or 2 * half > manifest.splits["val"].tokens - 1:
        raise InputError(
            f"--validate.tokens {half}: settings are chosen on so many and reported on as many again, and the split "
            f"has {manifest.splits['val'].tokens:,}; give at most half of that"
        )
    common = common_words(words, manifest, base)

    def train(entries: Sequence[Entry]) -> list[Result]:
        return train_entries(entries, common, base, options)

    recipe = Recipe(config, num_seeds=options.seeds, train=train)
    grid = [recipe.entry(trial) for trial in recipe.grid(rung=len(LADDER) - 1, tokens=recipe.tokens)]
    refuse_flags_of(grid, "recipe", words[1:])
    if options.how.dry_run:
        train(grid)
        print("and the grid of the plain recipe, the best four of each at all tokens, and the rungs of the ladder")
        return
    text = recipe.table()
    with writing_to(base):
        write_atomically(base / "sweep.md", text)
    print(text)
    if options.into is not None:
        put_into(options.into, "sweep recipe", text)


def common_words(words: Sequence[str], manifest: Manifest, base: Path) -> tuple[str, ...]:
    """Return preset and flags of all runs: those given, a group, and where a run has diverged.

    A loss that is a nat above ln V is worse than knowing nothing.
    """
    limit = ("--train.diverged-above", f"{math.log(manifest.vocab_size) + 1:.2f}")
    return (words[0], *limit, "--track.group", base.name, *words[1:])


def train_entries(entries: Sequence[Entry], common: Sequence[str], base: Path, options: SweepOptions) -> list[Result]:
    """Train the entries that are not done and have not diverged; return the results of all, in order."""
    points = make_points(entries, common, base)
    diverged = {each.run.run_dir for each in read_results(entries, points) if each.outcome == DIVERGED}
    train_points(points, base, options.how, excluded=diverged)
    return read_results(entries, points)


def make_points(entries: Sequence[Entry], common: Sequence[str], base: Path) -> list[Point]:
    """Return the entries as runs in folders of `base`; `common`: the preset and the flags that all runs share."""
    return [Point((*common, *entry.flags, "--run-dir", str(base / entry.name)), base / entry.name) for entry in entries]


def read_results(entries: Sequence[Entry], points: Sequence[Point]) -> list[Result]:
    runs = inspect_runs([point.run_dir for point in points])
    return [read_result(entry, run) for entry, run in zip(entries, runs, strict=True)]


def time_entries(
    entries: Sequence[Entry], common: Sequence[str], base: Path, options: SweepOptions
) -> tuple[Entry, ...] | None:
    """Return the entries with as many steps as fit into --minutes; None for a dry run.

    The time of a step comes from a short run of each entry under the same circumstances. These runs are kept, so the
    same command again gives the same numbers of steps.
    """
    flags = (*length_flags(TIMED_STEPS), "--track.every", "1")
    points = make_points([replace(entry, flags=(*entry.flags, *flags)) for entry in entries], common, base)
    train_points(points, base, options.how)
    runs = inspect_runs([point.run_dir for point in points])
    if options.how.dry_run:
        return None
    unfinished = [str(run.run_dir) for run in runs if run.state != "done"]
    if unfinished:
        raise InputError(f"not timed: {', '.join(unfinished)}; the same command goes on with them")
    assert options.minutes is not None
    timed_entries = []
    for entry, run in zip(entries, runs, strict=True):
        step_seconds = statistics.median(row["step_seconds"] for row in read_rows(run.run_dir) if "loss" in row)
        steps = int(60 * options.minutes / step_seconds)
        if steps < 1:
            raise InputError(f"--minutes {options.minutes:g}: a step of {entry.name} takes {step_seconds:.1f} s")
        timed_entries.append(replace(entry, flags=(*entry.flags, *length_flags(steps))))
    return tuple(timed_entries)


if __name__ == "__main__":
    main()
