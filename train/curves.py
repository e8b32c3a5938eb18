"""Loss curves of one or more runs as a PNG. Needs the extra `plots`.

    python train/curves.py runs/A runs/B --x tokens --out curves.png

Takes a few seconds. Lines are training loss, dots validation loss.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from data_prep.errors import InputError, one_line_errors
from train.sinks import METRICS_FILE


@dataclass(frozen=True)
class Options:
    """Loss curves of one or more runs as a PNG."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    x: Literal["step", "tokens"] = "step"
    """The horizontal axis."""
    out: Path | None = None
    """Where to put the picture; None: curves.png in the first run directory."""


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The complete rows of a run's metrics.jsonl; a line that is still being written is left out."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise InputError(f"{run_dir}: no {METRICS_FILE} in it; give a run directory")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: damaged ({error})") from error
    if not rows:
        raise InputError(f"{path}: no rows yet")
    return rows


def plot(runs: tuple[Path, ...], x: str, out: Path) -> None:
    """Draw every run into one picture at `out`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("curves needs matplotlib: pip install -e '.[plots]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, run_dir in enumerate(runs):
        rows, color = read_rows(run_dir), f"C{index % 10}"
        trained = [(row[x], row["loss"]) for row in rows if "loss" in row]
        validated = [(row[x], row["val_loss"]) for row in rows if "val_loss" in row]
        name = run_dir.resolve().name
        if trained:
            axes.plot(*zip(*trained, strict=True), color=color, linewidth=1, alpha=0.6, label=f"{name} train")
        if validated:
            axes.plot(*zip(*validated, strict=True), "o", color=color, label=f"{name} val {validated[-1][1]:.4f}")
    axes.set_xlabel(x)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main(args: list[str] | None = None) -> None:
    with one_line_errors("curves"):
        options = tyro.cli(Options, args=args, description=__doc__)
        if not options.runs:
            raise InputError("give at least one run directory")
        out = options.out or options.runs[0] / "curves.png"
        plot(options.runs, options.x, out)
        print(out)


if __name__ == "__main__":
    main()
