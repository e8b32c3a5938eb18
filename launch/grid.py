"""Expand a grid of flags into runs, each with its own run directory.

    python3 launch/grid.py gpt2-small --grid optim.lr-peak=6e-4,1e-3 seed=1,2 -- --train.steps 1000      # list the runs
    python3 launch/grid.py gpt2-small --grid ... --point 3 -- ...      # print one run's arguments, quoted for a shell

Every combination of values is a run, and the last flag changes fastest. The run directories are
RUN_DIR/optim.lr-peak=6e-4,seed=1 and so on, where RUN_DIR is runs/PRESET-grid or the --run-dir among the flags.
slurm/sweep.sh and launch/submit.py --grid use this. It needs Python 3.9 and no packages, and takes no time.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import InputError, one_line_errors


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    args: tuple[str, ...]  # of train/main.py: the preset, then flags, --run-dir last
    run_dir: Path


def expand_grid(preset: str, grid: Sequence[str], flags: Sequence[str]) -> list[Point]:
    """Return the runs of `grid`, whose entries look like "optim.lr-peak=6e-4,1e-3".

    An empty grid gives the one run that `flags` describe. Raises InputError for entries that make no grid.
    """
    base = find_run_dir(flags) or Path("runs") / (f"{preset}-grid" if grid else preset)
    if not grid:
        return [Point((preset, *flags, "--run-dir", str(base)), base)]
    axes = [parse_axis(entry) for entry in grid]
    if len({axis[0][0] for axis in axes}) < len(axes):
        raise InputError(f"--grid {' '.join(grid)}: a flag is given twice; put all its values behind one =")
    points = []
    for pairs in itertools.product(*axes):
        run_dir = base / ",".join(f"{name}={value}" for name, value in pairs).replace("/", "_")
        grid_flags = [word for name, value in pairs for word in (f"--{name}", value)]
        # The runs of one grid share a W&B group, unless the flags name another group.
        group = ("--track.group", base.name)
        points.append(Point((preset, *group, *flags, *grid_flags, "--run-dir", str(run_dir)), run_dir))
    if len({point.run_dir for point in points}) < len(points):
        raise InputError(
            f"--grid {' '.join(grid)}: two values give one folder name; make them differ in more than / and _"
        )
    return points


def parse_axis(entry: str) -> list[tuple[str, str]]:
    """Return [("seed", "1"), ("seed", "2")] for "seed=1,2"."""
    name, equals, text = entry.lstrip("-").partition("=")
    values = text.split(",")
    if not (name and equals and all(values)) or len(set(values)) < len(values) or "\n" in entry:
        raise InputError(f"--grid {entry}: write FLAG=VALUE,VALUE with different values, like optim.lr-peak=6e-4,1e-3")
    return [(name, value) for value in values]


def find_run_dir(flags: Sequence[str]) -> Path | None:
    """Return the value of the last --run-dir among the flags."""
    run_dir = None
    for index, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in ("--run-dir", "--run_dir"):
            run_dir = Path(value if equals else "".join(flags[index + 1 : index + 2]))
    return run_dir


def split_at_dashes(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before the first `--` and the words after it."""
    words = list(args)
    position = words.index("--") if "--" in words else len(words)
    return words[:position], words[position + 1 :]


def main(args: list[str] | None = None) -> None:
    words, flags = split_at_dashes(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--grid", nargs="+", required=True, metavar="FLAG=VALUE,VALUE")
    parser.add_argument("--point", type=int, help="number of a run, from 0; print its arguments, quoted for a shell")
    options = parser.parse_args(words)
    with one_line_errors("grid"):
        points = expand_grid(options.preset, options.grid, flags)
        if options.point is None:
            for number, point in enumerate(points):
                print(f"{number}  {point.run_dir}")
            return
        if options.point not in range(len(points)):
            raise InputError(
                f"--point {options.point}: the grid has {len(points)} runs; --array=0-{len(points) - 1} takes all"
            )
        print(shlex.join(points[options.point].args))


if __name__ == "__main__":
    main()
