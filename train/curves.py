"""Draw loss curves of one or more runs as a PNG, and print their results as a Markdown table.

    python train/curves.py runs/A                         # into runs/A/curves.png
    python train/curves.py runs/A runs/B --x tokens       # into curves.png

It takes a few seconds. The PNG needs the extra `plots`; lines are training loss, dots validation loss. The table is
also written beside the PNG as curves.md, one row per run:

    parameters   of the model in config.json, without vocabulary padding
    val loss     the last one, in nats per token, +- its standard error; `best` with its step
    train loss   mean of the last 5 rows; a skipped step counts, with the loss before its update
    seconds      of training, without validation and saving
    tokens/s     median of the training rows; MFU is the last row's
"""

import math
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from common.errors import InputError, one_line_errors, warn, writing_to
from common.files import write_atomically
from common.reading import is_there, read_own_json, require_place
from common.tables import markdown, new_figure
from model.config import ModelConfig, with_current_names
from model.cost import model_cost
from train.metrics.logger import with_error
from train.metrics.rows import METRICS_FILE, read_lines

Row = dict[str, Any]
Axis = Literal["step", "tokens", "seconds", "flops"]
LAST_ROWS = 5  # of training loss in the table's mean
ABSENT = "-"
LONGEST_LABEL = 60  # characters of a run's name in the picture


@dataclass(frozen=True)
class Options:
    """Loss curves of one or more runs as a PNG, and their results as a Markdown table."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    x: Axis = "step"
    """Quantity on the horizontal axis."""
    out: Path | None = None
    """File for the picture, with the table beside it; None: RUN/curves.png, or ./curves.png for several runs."""


@dataclass(frozen=True)
class RunMetrics:
    """A run's rows by kind, and the size of its model."""

    directory: Path
    label: str
    train_rows: list[Row]
    val_rows: list[Row]
    num_parameters: int | None


def read_rows(run_dir: Path) -> list[Row]:
    """Return the complete rows of a run's metrics.jsonl, without a line that is still being written."""
    path = run_dir / METRICS_FILE
    if not is_there(path):
        raise InputError(f"{run_dir}: no {METRICS_FILE} in it; give a run directory")
    rows, _, damaged = read_lines(path)
    if damaged:
        warn("curves", f"{path}: {len(damaged)} lines are damaged and left out (the first is line {damaged[0]})")
    if not rows:
        raise InputError(f"{path}: no rows yet")
    return rows


def count_parameters_of(run_dir: Path) -> int | None:
    """Return the parameters of the model in config.json; None without one, or with a warning if it is unknown."""
    path = run_dir / "config.json"
    try:
        content = read_own_json(path, {"config": {"model": dict}}, remedy="the next start writes it again")
        if content is None:
            return None
        return model_cost(ModelConfig(**with_current_names(content["config"]["model"]))).num_parameters
    except InputError as error:
        warn("curves", str(error))
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        warn("curves", f"{path}: no model of this version in it ({error!r})")
    return None


def labels_of(run_dirs: Sequence[Path]) -> list[str]:
    """Return directory names, with as many parents as distinguish equal names."""
    paths = [run_dir.resolve() for run_dir in run_dirs]
    duplicate = next((path for path in paths if paths.count(path) > 1), None)
    if duplicate is not None:
        raise InputError(f"{duplicate}: given twice")

    def tail(path: Path, num_parts: int) -> tuple[str, ...]:
        return path.parts[-num_parts:]

    labels = []
    for path in paths:
        num_parts = 1
        while sum(tail(other, num_parts) == tail(path, num_parts) for other in paths) > 1:
            num_parts += 1
        label = "/".join(tail(path, num_parts))
        labels.append(
            label.encode(errors="backslashreplace").decode()
        )  # a path need not be UTF-8, a picture's text has to
    return labels


def read_runs(run_dirs: Sequence[Path]) -> list[RunMetrics]:
    runs = []
    for run_dir, label in zip(run_dirs, labels_of(run_dirs), strict=True):
        rows = read_rows(run_dir)
        train_rows = [row for row in rows if "loss" in row]
        val_rows = [row for row in rows if "val_loss" in row]
        runs.append(RunMetrics(run_dir, label, train_rows, val_rows, count_parameters_of(run_dir)))
    return runs


def values(rows: Sequence[Row], key: str) -> list[float]:
    """Return the non-null values under `key`. A NaN stays, so that a diverged run shows."""
    return [row[key] for row in rows if row.get(key) is not None]


def points(run: RunMetrics, rows: Sequence[Row], x: Axis, loss: str) -> list[tuple[float, float]]:
    """Return (x, loss) of each row. Raise InputError if a row has no such x."""
    for row in rows:
        if row.get(x) is None:
            kind = "validation" if loss == "val_loss" else "training"
            raise InputError(
                f"{run.directory / METRICS_FILE}: the {kind} row of step {row['step']} has no {x!r}; "
                "an older version wrote it: use --x step or --x tokens"
            )
    return [(row[x], math.nan if row[loss] is None else row[loss]) for row in rows]


def results(run: RunMetrics) -> dict[str, str]:
    """Return a run's cells by column."""
    rows = [*run.train_rows, *run.val_rows]
    last_val, best = ABSENT, ABSENT
    if run.val_rows:
        last_val = with_error(run.val_rows[-1]["val_loss"], run.val_rows[-1].get("val_loss_stderr"))
        lowest = min(run.val_rows, key=lambda row: math.inf if math.isnan(row["val_loss"]) else row["val_loss"])
        best = f"{lowest['val_loss']:.4f} at {lowest['step']}"
    losses, seconds, rates = values(run.train_rows, "loss"), values(rows, "seconds"), values(rows, "tokens_per_second")
    bits_per_byte = values(run.val_rows[-1:], "val_bits_per_byte")
    mfu = values(run.train_rows[-1:], "mfu")
    tokens = values(rows, "tokens")
    return {
        "run": run.label.replace("|", "\\|"),
        "parameters": ABSENT if run.num_parameters is None else f"{run.num_parameters:,}",
        "steps": f"{max(row['step'] for row in rows):,}" if rows else ABSENT,
        "tokens": f"{max(tokens):,}" if tokens else ABSENT,
        "val loss": last_val,
        "bits/byte": f"{bits_per_byte[0]:.4f}" if bits_per_byte else ABSENT,
        "best val loss": best,
        "train loss": f"{statistics.fmean(losses[-LAST_ROWS:]):.4f}" if losses else ABSENT,
        "seconds": f"{max(seconds):,.1f}" if seconds else ABSENT,
        "tokens/s": f"{statistics.median(rates):,.0f}" if rates else ABSENT,
        "MFU": f"{mfu[0]:.1%}" if mfu else ABSENT,
    }


def table(runs: Sequence[RunMetrics]) -> str:
    """Return the Markdown table, with names on the left and numbers on the right."""
    cells = [results(run) for run in runs]
    return markdown([list(cells[0]), *(list(row.values()) for row in cells)], right_from=1)


def plot(runs: Sequence[RunMetrics], x: Axis, out: Path) -> None:
    """Draw all runs into one picture at `out`."""
    figure = new_figure(figsize=(8, 5))
    axes = figure.subplots()
    for index, run in enumerate(runs):
        color = f"C{index % 10}"
        trained, validated = points(run, run.train_rows, x, "loss"), points(run, run.val_rows, x, "val_loss")
        if not trained and not validated:
            raise InputError(f"{run.directory / METRICS_FILE}: no loss in it yet")
        name = run.label if len(run.label) <= LONGEST_LABEL else f"{run.label[: LONGEST_LABEL - 3]}..."
        if trained:
            axes.plot(*zip(*trained, strict=True), color=color, linewidth=1, alpha=0.6, label=f"train {name}")
        if validated:
            label = f"val {name} {validated[-1][1]:.4f}"
            axes.plot(*zip(*validated, strict=True), "o", color=color, label=label)
    axes.set_xlabel({"step": "step", "tokens": "tokens", "seconds": "seconds of training", "flops": "FLOPs"}[x])
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)  # a run may be called $1 or $2
    with writing_to(out), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name may be in any script
        figure.savefig(out, dpi=120)


def main(args: list[str] | None = None) -> None:
    with one_line_errors("curves"):
        options = tyro.cli(Options, args=args, description=__doc__)
        if not options.runs:
            raise InputError("give at least one run directory")
        out = options.out or (options.runs[0] / "curves.png" if len(options.runs) == 1 else Path("curves.png"))
        if out.suffix != ".png":
            raise InputError(f"--out {out} must end in .png")
        require_place(out.parent)
        runs = read_runs(options.runs)
        text = table(runs)
        with writing_to(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out.with_suffix(".md"), text)
        print(text)
        plot(runs, options.x, out)
        print(out)


if __name__ == "__main__":
    main()
