"""A grid of flags as a list of runs, each with its own run directory.

    python3 launch/grid.py gpt2-small --grid optim.lr-peak=6e-4,1e-3 seed=1,2 -- --train.steps 1000      # lists them
    python3 launch/grid.py gpt2-small --grid ... --point 3 -- ...          # the arguments of one, for train/main.py

Every combination is a run, the last flag changing fastest: RUN_DIR/optim.lr-peak=6e-4,seed=1 and so on, RUN_DIR being
runs/PRESET-grid unless --run-dir stands among the flags. slurm/sweep.sh and launch/submit.py --grid read this. Python
3.9 is enough, and nothing needs to be installed.
"""

from __future__ import annotations

import argparse
import itertools
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

    args: tuple[str, ...]
    """Of train/main.py: the preset, then flags, --run-dir last."""
    run_dir: Path


def points_of(preset: str, grid: Sequence[str], flags: Sequence[str]) -> list[Point]:
    """The runs of `grid`, entries like "optim.lr-peak=6e-4,1e-3". Without one: the one run that `flags` describe."""
    base = run_dir_in(flags) or Path("runs") / (f"{preset}-grid" if grid else preset)
    if not grid:
        return [Point((preset, *flags, "--run-dir", str(base)), base)]
    axes = [axis_of(entry) for entry in grid]
    if len({axis[0][0] for axis in axes}) < len(axes):
        raise InputError(f"--grid {' '.join(grid)}: a flag stands there twice; put all its values behind one =")
    found = []
    for pairs in itertools.product(*axes):
        run_dir = base / ",".join(f"{name}={value}" for name, value in pairs).replace("/", "_")
        changed = [word for name, value in pairs for word in (f"--{name}", value)]
        # Of one grid in W&B, unless the flags name another group.
        group = ("--track.group", base.name)
        found.append(Point((preset, *group, *flags, *changed, "--run-dir", str(run_dir)), run_dir))
    if len({point.run_dir for point in found}) < len(found):
        raise InputError(
            f"--grid {' '.join(grid)}: two values give one folder name; make them differ in more than / and _"
        )
    return found


def axis_of(entry: str) -> list[tuple[str, str]]:
    """ "seed=1,2": [("seed", "1"), ("seed", "2")]."""
    name, equals, text = entry.lstrip("-").partition("=")
    values = text.split(",")
    if not (name and equals and all(values)) or len(set(values)) < len(values) or "\n" in entry:
        raise InputError(f"--grid {entry}: write FLAG=VALUE,VALUE with different values, like optim.lr-peak=6e-4,1e-3")
    return [(name, value) for value in values]


def run_dir_in(flags: Sequence[str]) -> Path | None:
    """The last --run-dir among the flags."""
    found = None
    for number, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in ("--run-dir", "--run_dir"):
            found = Path(value if equals else "".join(flags[number + 1 : number + 2]))
    return found


def main(args: list[str] | None = None) -> None:
    given, flags = split(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--grid", nargs="+", required=True, metavar="FLAG=VALUE,VALUE")
    parser.add_argument("--point", type=int, help="which one, from 0 on; its arguments are printed one to a line")
    options = parser.parse_args(given)
    with one_line_errors("grid"):
        points = points_of(options.preset, options.grid, flags)
        if options.point is None:
            for number, point in enumerate(points):
                print(f"{number}  {point.run_dir}")
            return
        if options.point not in range(len(points)):
            raise InputError(
                f"--point {options.point}: the grid has {len(points)}; --array=0-{len(points) - 1} takes all"
            )
        print("\n".join(points[options.point].args))


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and what after."""
    words = list(args)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


if __name__ == "__main__":
    main()
