"""What each sweep of launch/sweep.py trains, as grids of flags, and the table and picture of its results."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError, writing_to
from common.tables import markdown, new_figure
from launch.runs import RunInfo
from train.config import Config
from train.curves import Row, count_parameters_of, plot, read_runs
from train.metrics.rows import METRICS_FILE, SAMPLES_FILE, read_lines

SWEEPS = ("lr", "batch", "ablate", "budget", "ladder", "epochs")
ONE_BATCH = ("batch", "budget", "epochs", "recipe")  # sweeps that count in steps of one size
CPU_PRESET = "stories-cpu"
DEFAULT_PRESETS = {"ladder": "shakespeare-char-cpu", "epochs": "phase1"}  # every other sweep: CPU_PRESET
LEARNING_RATES = (3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 3e-2, 1e-1)  # the published seven, and two past the edge
BATCH_SEQUENCES = (1, 8, 32, 64, 128, 256, 512)
CPU_BATCH_SEQUENCES = (1, 4, 16, 64)
# Flags that may be given to a sweep although it sets them for each run: the runs start from the given values.
STARTING_FLAGS = {
    "batch": ("--optim.lr-peak", "--train.steps", "--train.batch-tokens", "--train.micro-batch"),
    "budget": ("--optim.lr-peak", "--train.batch-tokens", "--train.micro-batch", "--model.num-layers"),
    "recipe": ("--train.steps", "--train.batch-tokens", "--seed"),
}
# The model of the published ablations; then each part that they take out, with the published change of perplexity.
MODERN = ("--model.norm", "rmsnorm", "--model.position-embedding", "rope", "--model.mlp", "swiglu", "--model.no-bias")
BASELINE = (*MODERN, "--model.no-tie")
ABLATIONS = {
    "baseline": ("", ""),
    "no-norm": ("--model.norm none", "diverges"),
    "post-norm": ("--model.norm-place post", "+46 %"),
    "no-positions": ("--model.position-embedding none", "+3 %"),
    "silu": ("--model.mlp silu", "+0.7 %"),
}
# The better of the rates 1e-2 and 4e-3 for each kind of model, on Tiny Shakespeare: more layers want a smaller rate.
RUNGS = {"bigram": 1e-2, "head": 1e-2, "heads": 1e-2, "block": 1e-2, "gpt": 4e-3}
SAMPLED_TOKENS = 120  # of which a table shows the first SHOWN_CHARACTERS characters
SHOWN_CHARACTERS = 60
TIMED_STEPS = 12  # of a short run that measures the time of a step
DESCENT_RATES = (10.0, 100.0, 1000.0)
DESCENT_STEPS = 6
ABSENT = "-"
DIVERGED = "diverged"


@dataclass(frozen=True)
class Entry:
    """One run of a sweep."""

    name: str  # of the run's folder
    flags: tuple[str, ...]
    x: float = 0.0  # position on the picture's x axis
    series: str = "loss"  # line of the picture that the run is a point of
    published: str = ""  # result of the published account, in the form of the table's last column


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, and the form of its table and picture."""

    title: str
    entries: tuple[Entry, ...]
    columns: tuple[str, ...] = ("run", "steps", "val loss", "+-", "perplexity", "seconds", "")  # of COLUMNS
    x_label: str | None = None  # None: the picture shows the runs' curves
    is_ranked: bool = False  # the table is sorted by validation loss
    has_epochs: bool = False  # the sweep is one run, and the table has a row per validation


def build_sweep(name: str, config: Config, *, world: int = 1, data_tokens: int = 0) -> Sweep:
    """Return the sweep called `name`.

    `config` has the flags that all runs share, `world` counts each run's processes, `data_tokens` the training split.
    """
    refuse_stages(name, config)
    if name == "lr":
        entries = tuple(Entry(f"lr={lr:g}", ("--optim.lr-peak", f"{lr:g}"), x=lr) for lr in LEARNING_RATES)
        return Sweep("Final loss against the learning rate", entries, x_label="peak learning rate")
    if name == "batch":
        entries = batch_entries(config, world=world)
        return Sweep("The same tokens in batches of different size", entries, x_label="sequences per step")
    if name == "ablate":
        entries = tuple(
            Entry(name, (*BASELINE, *flags.split()), published=result) for name, (flags, result) in ABLATIONS.items()
        )
        columns = (*Sweep.columns, "against the first", "published")
        return Sweep("One part left out or exchanged at a time", entries, columns)
    if name == "budget":
        columns = ("run", "parameters", "steps", "tokens", "seconds", "val loss", "+-", "against the first", "")
        return Sweep("The same time for every entry", budget_entries(config), columns, is_ranked=True)
    if name == "ladder":
        columns = ("run", "parameters", "first loss", "val loss", "+-", "seconds", "", "sample")
        return Sweep("From a bigram to a GPT", ladder_entries(config), columns)
    assert name == "epochs"
    every = str(max(1, data_tokens // config.train.batch_tokens))
    entry = Entry("run", ("--validate.every", every, "--sample.every", every, "--save.every", every))
    return Sweep("Epoch by epoch", (entry,), has_epochs=True)


def refuse_stages(name: str, config: Config) -> None:
    if config.train.batch_stages and name in ONE_BATCH:
        raise InputError(f"{name}: its runs have one batch size each; leave out --train.batch-stages")


def batch_entries(config: Config, *, world: int) -> tuple[Entry, ...]:
    """Return runs with the same number of tokens, up to one step, in batches of different size.

    One series keeps the learning rate. The other scales it with the square root of the batch (Malladi et al. 2022,
    for Adam).
    """
    train, sequences_now = config.train, config.sequences_per_step
    largest = train.micro_batch if isinstance(train.micro_batch, int) else 1
    entries = []
    for series, exponent in (("fixed rate", 0.0), ("rate by square root", 0.5)):
        for sequences in CPU_BATCH_SEQUENCES if config.preset == CPU_PRESET else BATCH_SEQUENCES:
            rate = config.optim.lr_peak * (sequences / sequences_now) ** exponent
            flags = (
                *("--train.batch-tokens", str(sequences * train.seq_len)),
                *("--train.micro-batch", str(max(1, min(sequences // world, largest)))),
                *("--optim.lr-peak", f"{rate:.4g}"),
                *length_flags(train.steps * train.batch_tokens // (sequences * train.seq_len)),
            )
            if exponent == 0.0 or sequences != sequences_now:  # at the preset's batch, both series are the same run
                name = f"batch={sequences},{series.replace(' ', '-')}"
                entries.append(Entry(name, flags, x=sequences, series=series))
    return tuple(entries)


def ladder_entries(config: Config) -> tuple[Entry, ...]:
    """Return a run for each kind of model, with a sample at the end."""
    flags = ("--sample.every", str(config.train.steps), "--sample.tokens", str(SAMPLED_TOKENS))
    return tuple(
        Entry(kind, ("--model.kind", kind, "--optim.lr-peak", f"{rate:g}", *flags)) for kind, rate in RUNGS.items()
    )


def budget_entries(config: Config) -> tuple[Entry, ...]:
    """Return runs that spend the same time on other parts, another size, another batch or another rate."""
    num_layers, micro_batch = config.model.num_layers, config.train.micro_batch
    batch_tokens = max(1, config.sequences_per_step // 4) * config.train.seq_len
    quarter_batch = ["--train.batch-tokens", str(batch_tokens)]
    if isinstance(micro_batch, int):
        quarter_batch += ["--train.micro-batch", str(max(1, micro_batch // 4))]
    entries = {
        "gpt2": (),
        "modern": MODERN,
        "modern,own-head": (*MODERN, "--model.no-tie"),
        "modern,qk-norm": (*MODERN, "--model.qk-norm"),
        "modern,value-residual": (*MODERN, "--model.value-residual"),
        "modern,half-the-layers": (*MODERN, "--model.num-layers", str(max(1, num_layers // 2))),
        "modern,twice-the-layers": (*MODERN, "--model.num-layers", str(2 * num_layers)),
        "modern,quarter-batch": (*MODERN, *quarter_batch),
        "modern,twice-the-rate": (*MODERN, "--optim.lr-peak", f"{2 * config.optim.lr_peak:g}"),
    }
    return tuple(Entry(name, flags) for name, flags in entries.items())


def length_flags(steps: int) -> tuple[str, ...]:
    """Return the flags of a run of `steps` steps.

    A tenth of the steps is warm-up; there is one validation and one checkpoint, at the end, and about 50 rows.
    """
    flags = {"--train.steps": steps, "--optim.warmup-steps": max(1, steps // 10), "--validate.every": steps}
    flags |= {"--save.every": steps, "--track.every": max(1, steps // 50)}
    return tuple(str(word) for pair in flags.items() for word in pair)


def refuse_flags_of(entries: Sequence[Entry], name: str, flags: Sequence[str]) -> None:
    """Raise InputError for a flag that the sweep sets for each run, unless its runs start from that flag's value."""
    set_by_sweep = {flag for entry in entries for flag in entry.flags if flag.startswith("--")}
    set_by_sweep -= set(STARTING_FLAGS.get(name, ()))
    set_by_sweep |= {flag for flag in length_flags(1) if flag.startswith("--")} if name == "budget" else set()
    conflicts = set_by_sweep & {flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    if conflicts:
        raise InputError(f"{' '.join(sorted(conflicts))}: the sweep {name} sets it for each run")


@dataclass(frozen=True)
class Result:
    """A run of a sweep and the rows that it wrote."""

    entry: Entry
    run: RunInfo
    training: Sequence[Row]  # of metrics.jsonl, with a training loss
    validations: Sequence[Row]  # of metrics.jsonl, with a validation loss
    samples: Sequence[Row]  # of samples.jsonl

    @property
    def outcome(self) -> str:
        """Return how the run ended, in one word for the table."""
        reason = str((self.run.status or {}).get("reason") or "")
        return DIVERGED if reason.startswith(("DivergedError", "NonFiniteError")) else self.run.state

    @property
    def last(self) -> Row | None:
        """Last validation of a run that is done; None for any other run."""
        return self.validations[-1] if self.run.state == "done" and self.validations else None

    @property
    def step(self) -> int:
        return max(self.run.step, self.training[-1]["step"] if self.training else 0)


def read_result(entry: Entry, run: RunInfo) -> Result:
    """Return what the run wrote so far."""
    rows, samples = (read_lines(run.run_dir / name).rows for name in (METRICS_FILE, SAMPLES_FILE))
    return Result(
        entry,
        run,
        [row for row in rows if "loss" in row],
        [row for row in rows if "val_loss" in row],
        samples,
    )


def format_loss(row: Row | None) -> str:
    return ABSENT if row is None else f"{row['val_loss']:.4f}"


def format_parameters(result: Result) -> str:
    count = count_parameters_of(result.run.run_dir)
    return ABSENT if count is None else f"{count:,}"


def format_sample(result: Result, step: int) -> str:
    """Return the beginning of the sample taken at `step`, on one line that Markdown shows as it is."""
    text = next((row["samples"][0]["text"] for row in result.samples if row["step"] == step), "")
    line = " / ".join(part for part in (re.sub(r"\s+", " ", line).strip() for line in text.splitlines()) if part)
    return line[:SHOWN_CHARACTERS].replace("|", "\\|").replace("`", "'")


def compare_perplexity(result: Result, first: Result) -> str:
    """Return the change of perplexity against the first run."""
    if result.last is None or first.last is None:
        return ABSENT
    return f"{math.exp(result.last['val_loss'] - first.last['val_loss']) - 1:+.1%}"


# The cell of each column, from a run's result and the first run's.
COLUMNS: dict[str, Callable[[Result, Result], str]] = {
    "run": lambda result, _: result.entry.name,
    "parameters": lambda result, _: format_parameters(result),
    "steps": lambda result, _: f"{result.step:,}",
    "tokens": lambda result, _: f"{result.training[-1]['tokens']:,}" if result.training else ABSENT,
    "first loss": lambda result, _: format_loss(result.validations[0] if result.validations else None),
    "val loss": lambda result, _: format_loss(result.last),
    "+-": lambda result, _: f"{result.last['val_loss_stderr']:.4f}" if result.last else ABSENT,
    "perplexity": lambda result, _: f"{math.exp(result.last['val_loss']):,.1f}" if result.last else ABSENT,
    "seconds": lambda result, _: f"{result.training[-1]['seconds']:,.0f}" if result.training else ABSENT,
    "": lambda result, _: "" if result.run.state == "done" else result.outcome,
    "against the first": compare_perplexity,
    "published": lambda result, _: result.entry.published or ABSENT,
    "sample": lambda result, _: format_sample(result, result.step),
}


def sweep_table(sweep: Sweep, results: Sequence[Result], *, data_tokens: int) -> str:
    """Return the sweep's Markdown table: a row per run, or per validation of the one run of `epochs`."""
    if sweep.has_epochs:
        return epochs_table(results[0], data_tokens)
    ranked = sorted(results, key=lambda result: result.last["val_loss"] if result.last else math.inf)
    shown = ranked if sweep.is_ranked else results
    rows = [[COLUMNS[name](result, results[0]) for name in sweep.columns] for result in shown]
    return markdown([list(sweep.columns), *rows])


def epochs_table(result: Result, data_tokens: int) -> str:
    """Return a row per validation: epoch, step, loss, standard error and the beginning of a sample."""
    rows = [["epoch", "step", "val loss", "+-", "sample"]]
    for row in result.validations:
        epoch, sample = f"{row['tokens'] / data_tokens:.1f}", format_sample(result, row["step"])
        rows.append([epoch, f"{row['step']:,}", format_loss(row), f"{row['val_loss_stderr']:.4f}", sample])
    return markdown(rows)


def draw_sweep(sweep: Sweep, results: Sequence[Result], out: Path) -> None:
    """Draw the validation loss against x, with a line per series, or the runs' curves if the sweep has no x.

    Runs that diverged are crosses at the top.
    """
    if sweep.x_label is None:
        plot(read_runs([each.run.run_dir for each in results if each.training or each.validations]), "step", out)
        return
    figure = new_figure(figsize=(7, 4.5))
    axes: Any = figure.subplots()
    for series in dict.fromkeys(entry.series for entry in sweep.entries):
        in_series = [each for each in results if each.entry.series == series]
        points = [(each.entry.x, each.last["val_loss"]) for each in in_series if each.last is not None]
        axes.plot([x for x, _ in points], [loss for _, loss in points], "o-", label=series)
    diverged = [each.entry.x for each in results if each.outcome == DIVERGED]
    if diverged:
        at_top = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(diverged, [1.0] * len(diverged), "x", color="black", label=DIVERGED, **at_top)
    axes.set_xscale("log")
    axes.set_xlabel(sweep.x_label)
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(sweep.title)
    axes.grid(alpha=0.3)
    axes.legend()
    with writing_to(out):
        figure.savefig(out, dpi=120)


def descend(rate: float, num_steps: int = DESCENT_STEPS) -> list[float]:
    """Return the loss mean(w^2) before each of `num_steps` steps of gradient descent.

    w is a 10 x 10 matrix that begins as 5 times normal numbers. Step t has the rate rate / sqrt(t + 1). The gradient
    is 2 w / 100, so the step multiplies every weight by 1 - 0.02 rate / sqrt(t + 1). Below -1 the weights grow, until
    the decay has made the step small enough.
    """
    torch.manual_seed(42)
    weights = torch.nn.Parameter(5 * torch.randn(10, 10))
    losses = []
    for step in range(num_steps):
        loss = weights.square().mean()
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights.sub_(rate / (step + 1) ** 0.5 * gradient)
    return losses


def descent_table() -> str:
    """Return a Markdown table of `descend`: a row per learning rate, a column per step."""
    header = "| rate | " + " | ".join(f"step {step}" for step in range(DESCENT_STEPS)) + " |"
    rows = [f"| {rate:g} | " + " | ".join(f"{loss:,.2f}" for loss in descend(rate)) + " |" for rate in DESCENT_RATES]
    return "\n".join([header, "|" + "---|" * (DESCENT_STEPS + 1), *rows]) + "\n"
