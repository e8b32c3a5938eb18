"""What a sweep found: its Markdown table and its picture."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import reading_from, writing_to
from common.tables import markdown, new_figure
from launch.experiments import Entry, Sweep
from launch.runs import Look
from train.curves import Row, count_parameters_of, plot, read_rows, read_runs
from train.metrics.logger import METRICS_FILE, SAMPLES_FILE

ABSENT = "-"
DIVERGED = "diverged"
SHOWN_CHARACTERS = 60  # of a sample


@dataclass(frozen=True)
class Result:
    """A run and what it wrote."""

    entry: Entry
    run: Look
    trained: Sequence[Row]
    validated: Sequence[Row]
    sampled: Sequence[Row]

    @property
    def outcome(self) -> str:
        """A word for the table: how the run ended."""
        reason = str((self.run.status or {}).get("reason") or "")
        return DIVERGED if reason.startswith(("DivergedError", "NonFiniteError")) else self.run.doing

    @property
    def last(self) -> Row | None:
        """The validation of a run that came to its end."""
        return self.validated[-1] if self.run.doing == "done" and self.validated else None


def result_of(entry: Entry, run: Look) -> Result:
    path = run.run_dir / METRICS_FILE  # empty, if it ended before its first step
    sampled = run.run_dir / SAMPLES_FILE
    with reading_from(run.run_dir):
        rows = read_rows(run.run_dir) if path.is_file() and path.stat().st_size > 0 else []
        samples = sampled.read_text(encoding="utf-8").splitlines() if sampled.is_file() else []
    return Result(
        entry,
        run,
        [row for row in rows if "loss" in row],
        [row for row in rows if "val_loss" in row],
        [json.loads(line) for line in samples],
    )


def loss_of(row: Row | None) -> str:
    return ABSENT if row is None else f"{row['val_loss']:.4f}"


def sample_at(result: Result, step: int) -> str:
    """The beginning of what the model said then, on one line."""
    said = next((row["samples"][0]["text"] for row in result.sampled if row["step"] == step), "")
    line = " / ".join(part for part in (re.sub(r"\s+", " ", line).strip() for line in said.splitlines()) if part)
    return line[:SHOWN_CHARACTERS].replace("|", "\\|").replace("`", "'")


def against(result: Result, first: Result) -> str:
    """Its perplexity against the first run's."""
    if result.last is None or first.last is None:
        return ABSENT
    return f"{math.exp(result.last['val_loss'] - first.last['val_loss']) - 1:+.1%}"


def steps_of(result: Result) -> int:
    return max(result.run.step, result.trained[-1]["step"] if result.trained else 0)


def parameters_of(result: Result) -> str:
    found = count_parameters_of(result.run.run_dir)
    return ABSENT if found is None else f"{found:,}"


# A column's cell from a run's result and the first run's.
COLUMNS: dict[str, Callable[[Result, Result], str]] = {
    "run": lambda result, _: result.entry.name,
    "parameters": lambda result, _: parameters_of(result),
    "steps": lambda result, _: f"{steps_of(result):,}",
    "tokens": lambda result, _: f"{result.trained[-1]['tokens']:,}" if result.trained else ABSENT,
    "first loss": lambda result, _: loss_of(result.validated[0] if result.validated else None),
    "val loss": lambda result, _: loss_of(result.last),
    "+-": lambda result, _: f"{result.last['val_loss_stderr']:.4f}" if result.last else ABSENT,
    "perplexity": lambda result, _: f"{math.exp(result.last['val_loss']):,.1f}" if result.last else ABSENT,
    "seconds": lambda result, _: f"{result.trained[-1]['seconds']:,.0f}" if result.trained else ABSENT,
    "": lambda result, _: "" if result.run.doing == "done" else result.outcome,
    "against the first": against,
    "published": lambda result, _: result.entry.published or ABSENT,
    "sample": lambda result, _: sample_at(result, steps_of(result)),
}


def table(plan: Sweep, results: Sequence[Result], *, data_tokens: int) -> str:
    """Markdown."""
    if plan.has_epochs:
        return epochs_table(results[0], data_tokens)
    shown = sorted(results, key=lambda each: each.last["val_loss"] if each.last else math.inf)
    rows = [
        [COLUMNS[name](each, results[0]) for name in plan.columns] for each in (shown if plan.is_ranked else results)
    ]
    return markdown([list(plan.columns), *rows])


def epochs_table(result: Result, data_tokens: int) -> str:
    """A row for each validation: how often the data was seen, the loss, the beginning of a sample."""
    rows = [["epoch", "step", "val loss", "+-", "sample"]]
    for row in result.validated:
        cells = [
            f"{row['tokens'] / data_tokens:.1f}",
            f"{row['step']:,}",
            loss_of(row),
            f"{row['val_loss_stderr']:.4f}",
        ]
        rows.append([*cells, sample_at(result, row["step"])])
    return markdown(rows)


def draw(plan: Sweep, results: Sequence[Result], out: Path) -> None:
    """Validation loss by x, a line for each series, runs that diverged as crosses at the top; or the runs' curves."""
    if plan.x_label is None:
        plot(read_runs([each.run.run_dir for each in results if each.trained or each.validated]), "step", out)
        return
    figure = new_figure(figsize=(7, 4.5))
    axes: Any = figure.subplots()
    for series in dict.fromkeys(entry.series for entry in plan.entries):
        found = [each for each in results if each.entry.series == series]
        drawn = [(each.entry.x, each.last["val_loss"]) for each in found if each.last is not None]
        axes.plot([x for x, _ in drawn], [loss for _, loss in drawn], "o-", label=series)
    gone = [each.entry.x for each in results if each.outcome == DIVERGED]
    if gone:
        place = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(gone, [1.0] * len(gone), "x", color="black", label=DIVERGED, **place)
    axes.set_xscale("log")
    axes.set_xlabel(plan.x_label)
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(plan.lesson)
    axes.grid(alpha=0.3)
    axes.legend()
    with writing_to(out):
        figure.savefig(out, dpi=120)
